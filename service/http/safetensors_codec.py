"""`POST /act` in safetensors: a vector of environments, as arrays, and scalars as metadata."""

import re
from collections.abc import Mapping
from math import isfinite, prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.spec import PolicySpec
from service.engine.block import Answer, Block
from service.errors import Invalid, Malformed, short
from service.http.codec import SAFETENSORS, Request, check_rows, check_session, vector_starts
from service.http.inputs import InputReader, finite_state
from service.http.safetensors_file import (
    DTYPES,
    LARGEST_HEADER_BYTES,
    LENGTH_BYTES,
    read_file,
    write_file,
)
from service.runtime.protocol import State

LONGEST_IDENTIFIER = 256
SCALARS = ("session_id", "run", "step", "seed", "deterministic", "timeout_ms")
NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")
BOOLEANS = {"true": True, "false": False}


class Tensor(NamedTuple):
    """What a tensor of a request may be: its dtypes, the widest last, and a row's shape."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


def request_tensors(spec: PolicySpec) -> dict[str, Tensor]:
    """The tensors that a request may have, by name; only `observation` is required."""
    state = Tensor(("F32",), (spec.num_layers, spec.hidden_dim))
    tensors = {
        "observation": Tensor(("F32", "F64"), (spec.observation_dim,)),
        "action_mask": Tensor(("BOOL",), (spec.num_choices,)),
        **{f"action_mask.{head.name}": Tensor(("BOOL",), (head.size,)) for head in spec.heads},
        "episode_start": Tensor(("BOOL",), ()),
        "seed": Tensor(("U64",), ()),
        "state_h": state,
        "state_c": state,
    }
    if spec.blueprint_embedding_dim is not None:
        tensors["blueprint_index"] = Tensor(("I64",), (spec.num_slots,))
    if spec.has_slot_by_op:
        tensors["slot_by_op_mask"] = Tensor(("BOOL",), (spec.num_ops, spec.num_slots))
    return tensors


class SafetensorsCodec:
    """Reads and writes safetensors bodies for one policy. What is read are views of the body."""

    content_type = SAFETENSORS

    def __init__(self, spec: PolicySpec, *, max_rows: int) -> None:
        self._max_rows = max_rows
        self._reader = InputReader(spec)
        self._heads = ",".join(spec.head_names)
        self._tensors = request_tensors(spec)
        self._dtypes = {name: tensor.dtypes for name, tensor in self._tensors.items()}
        self._masks = {f"action_mask.{head}": head for head in spec.head_names}
        row = sum(
            DTYPES[dtypes[-1]].itemsize * prod(shape) for dtypes, shape in self._tensors.values()
        )
        self.max_body_bytes = LENGTH_BYTES + LARGEST_HEADER_BYTES + max_rows * row

    def parse(self, body: bytes | bytearray) -> Request:
        tensors, metadata = read_file(body, self._dtypes)
        scalars = _Scalars(metadata)
        num_rows = self._check_shapes(tensors)
        session_id = scalars.identifier("session_id")
        run = scalars.identifier("run")
        step = scalars.integer("step")
        starts: bool | NDArray[np.bool_] = False
        if "episode_start" in tensors:
            starts = vector_starts(tensors["episode_start"], step)
        seed, seeds = scalars.integer("seed"), tensors.get("seed")
        if seed is not None and seeds is not None:
            raise Invalid("`seed` is given twice, in the metadata and as a tensor")
        check_session(session_id, "state_h" in tensors, starts is not False, {"run": run})
        given = self._reader.read(
            tensors["observation"],
            self._mask(tensors, num_rows),
            tensors.get("blueprint_index"),
            tensors.get("slot_by_op_mask"),
            is_vector=True,
        )
        block = Block(
            given,
            is_vector=True,
            deterministic=scalars.boolean("deterministic"),
            session_id=session_id,
            run=run,
            step=step,
            starts=starts,
            seed=seed,
            seeds=seeds,
            state=self._state(tensors),
        )
        return Request(block, scalars.timeout_ms())

    def write(self, block: Block, answer: Answer) -> bytes:
        tensors = {name: answer.array(name) for name in answer.batch.arrays}
        metadata = {
            "step": str(answer.step),
            "policy_version": answer.policy_version,
            "heads": self._heads,
        }
        if block.session_id is not None:
            metadata["session_id"] = block.session_id
        if answer.state is not None:
            tensors["state_h"], tensors["state_c"] = answer.state
        return write_file(tensors, metadata)

    def _check_shapes(self, tensors: Mapping[str, NDArray[Any]]) -> int:
        """How many rows there are."""
        observation = tensors.get("observation")
        if observation is None:
            raise Malformed("`observation` is required")
        for name, tensor in tensors.items():
            shape = self._tensors[name].shape
            if tensor.ndim != 1 + len(shape) or tensor.shape[1:] != shape:
                expected = ", ".join(["n", *map(str, shape)])
                raise Invalid(f"`{name}` is {list(tensor.shape)}, the policy reads [{expected}]")
        num_rows = len(observation)
        if num_rows == 0:
            raise Invalid("`observation` has no rows")
        check_rows(num_rows, self._max_rows, {name: len(t) for name, t in tensors.items()})
        return num_rows

    def _mask(self, tensors: Mapping[str, NDArray[Any]], num_rows: int) -> NDArray[np.bool_] | None:
        by_head = [name for name in tensors if name in self._masks]
        whole = tensors.get("action_mask")
        if not by_head:
            return whole
        if whole is not None:
            raise Invalid(f"`action_mask` and `{by_head[0]}` are given, two masks for one head")
        mask = np.ones((num_rows, *self._tensors["action_mask"].shape), dtype=np.bool_)
        for name in by_head:
            mask[:, self._reader.columns[self._masks[name]]] = tensors[name]
        return mask

    @staticmethod
    def _state(tensors: Mapping[str, NDArray[Any]]) -> State | None:
        names = ("state_h", "state_c")
        present = [name for name in names if name in tensors]
        if not present:
            return None
        for name in names:
            if name not in present:
                raise Malformed(f"`{name}` is required where `{present[0]}` is given")
        return finite_state(names, (tensors["state_h"], tensors["state_c"]), is_vector=True)


class _Scalars:
    """The file's metadata: strings, of which each is to be one kind of value."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        for name in metadata:
            if name not in SCALARS:
                raise Malformed(f"`{short(name)}` is not a field of the request's metadata")
        self._metadata = metadata

    def identifier(self, name: str) -> str | None:
        value = self._metadata.get(name)
        if value is not None and not 1 <= len(value) <= LONGEST_IDENTIFIER:
            raise Malformed(f"`{name}` has {len(value)} characters, not 1 to {LONGEST_IDENTIFIER}")
        return value

    def integer(self, name: str) -> int | None:
        value = self._metadata.get(name)
        if value is None:
            return None
        if not (value.isascii() and value.isdigit() and len(value) <= 20 and int(value) < 2**64):
            raise Malformed(f"`{name}` is not an integer from 0 to 2**64 - 1")
        return int(value)

    def boolean(self, name: str) -> bool:
        value = BOOLEANS.get(self._metadata.get(name, "false"))
        if value is None:
            raise Malformed(f"`{name}` is neither 'true' nor 'false'")
        return value

    def timeout_ms(self) -> float | None:
        value = self._metadata.get("timeout_ms")
        if value is None:
            return None
        timeout_ms = float(value) if NUMBER.fullmatch(value) else 0.0
        if not (isfinite(timeout_ms) and timeout_ms > 0):
            raise Malformed("`timeout_ms` is not a number above 0")
        return timeout_ms
