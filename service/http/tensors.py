"""What a request brings as named tensors with a row each: a block of them, whatever carried them.

The names are the same on every wire that has tensors; so is what is refused, and why.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.step_spec import StepSpec
from service.engine.block import Block
from service.errors import Invalid, Malformed
from service.http.codec import check_rows, check_session, vector_starts
from service.http.inputs import InputReader, finite_state
from service.http.safetensors_file import DTYPES
from service.runtime.protocol import State

Tensors = Mapping[str, NDArray[Any]]
LONGEST_IDENTIFIER = 256


class Tensor(NamedTuple):
    """What a tensor of a request may be: its dtypes, the widest last, and a row's shape."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


class Scalars(NamedTuple):
    """What a request says besides: once, for all of its rows. Fields as `Block` has them."""

    session_id: str | None = None
    run: str | None = None
    step: int | None = None
    seed: int | None = None
    deterministic: bool = False
    starts: bool = False
    ends: bool = False


def request_tensors(spec: StepSpec) -> dict[str, Tensor]:
    """The tensors that a request may have, by name; only `observation` is required."""
    tensors = {
        "observation": Tensor(("F32", "F64"), (spec.observation_dim,)),
        "action_mask": Tensor(("BOOL",), (spec.num_choices,)),
        **{f"action_mask.{head.name}": Tensor(("BOOL",), (head.size,)) for head in spec.heads},
        "episode_start": Tensor(("BOOL",), ()),
        "seed": Tensor(("U64",), ()),
        **{state.tensor: Tensor(("F32",), state.shape) for state in spec.states},
    }
    if spec.blueprint_embedding_dim is not None:
        tensors["blueprint_index"] = Tensor(("I64",), (spec.num_slots,))
    if spec.has_slot_by_op:
        tensors["slot_by_op_mask"] = Tensor(("BOOL",), (spec.num_ops, spec.num_slots))
    return tensors


class TensorReader:
    """Makes blocks of tensors for one policy. What is given is not copied.

    `session` is what the wire calls the name of a session, for sentences.
    """

    def __init__(self, spec: StepSpec, *, max_rows: int, session: str = "session_id") -> None:
        self.tensors = request_tensors(spec)
        self.states = tuple(state.tensor for state in spec.states)
        self.dtypes = {name: tensor.dtypes for name, tensor in self.tensors.items()}
        row = sum(DTYPES[dtypes[-1]].itemsize * prod(of) for dtypes, of in self.tensors.values())
        self.largest_bytes = max_rows * row
        """Of all the tensors that a request may have."""
        self._max_rows = max_rows
        self._session = session
        self._reader = InputReader(spec)
        self._masks = {f"action_mask.{head}": head for head in spec.head_names}

    def block(self, tensors: Tensors, scalars: Scalars) -> Block:
        """All of the tensors' names and dtypes are known to be right.

        Raises Malformed where one is missing, Invalid for a shape or a value that is not the
        policy's, TooLarge for too many rows.
        """
        num_rows = self._check_shapes(tensors)
        starts = self._starts(tensors, scalars)
        seeds = tensors.get("seed")
        if scalars.seed is not None and seeds is not None:
            raise Invalid("`seed` is given twice, as one number and as a tensor")
        named = {"run": scalars.run}
        has_state = any(name in tensors for name in self.states[:1])
        check_session(
            scalars.session_id, has_state, starts is not False, named, session=self._session
        )
        given = self._reader.read(
            tensors["observation"],
            self._mask(tensors, num_rows),
            tensors.get("blueprint_index"),
            tensors.get("slot_by_op_mask"),
            is_vector=True,
        )
        return Block(
            given,
            is_vector=True,
            deterministic=scalars.deterministic,
            session_id=scalars.session_id,
            run=scalars.run,
            step=scalars.step,
            starts=starts,
            ends=scalars.ends,
            seed=scalars.seed,
            seeds=seeds,
            state=self._state(tensors),
        )

    def _check_shapes(self, tensors: Tensors) -> int:
        """How many rows there are."""
        observation = tensors.get("observation")
        if observation is None:
            raise Malformed("`observation` is required")
        for name, tensor in tensors.items():
            shape = self.tensors[name].shape
            if tensor.ndim != 1 + len(shape) or tensor.shape[1:] != shape:
                expected = ", ".join(["n", *map(str, shape)])
                raise Invalid(f"`{name}` is {list(tensor.shape)}, the policy reads [{expected}]")
        num_rows = len(observation)
        if num_rows == 0:
            raise Invalid("`observation` has no rows")
        check_rows(num_rows, self._max_rows, {name: len(t) for name, t in tensors.items()})
        return num_rows

    def _starts(self, tensors: Tensors, scalars: Scalars) -> bool | NDArray[np.bool_]:
        by_row = tensors.get("episode_start")
        if by_row is None:
            return scalars.starts
        if scalars.starts and not by_row.all():
            row = int(by_row.argmin())
            raise Invalid(f"the request starts every row, and `episode_start[{row}]` is false")
        return vector_starts(by_row, scalars.step)

    def _mask(self, tensors: Tensors, num_rows: int) -> NDArray[np.bool_] | None:
        by_head = [name for name in tensors if name in self._masks]
        whole = tensors.get("action_mask")
        if not by_head:
            return whole
        if whole is not None:
            raise Invalid(f"`action_mask` and `{by_head[0]}` are given, two masks for one head")
        mask = np.ones((num_rows, *self.tensors["action_mask"].shape), dtype=np.bool_)
        for name in by_head:
            mask[:, self._reader.columns[self._masks[name]]] = tensors[name]
        return mask

    def _state(self, tensors: Tensors) -> State | None:
        present = [name for name in self.states if name in tensors]
        if not present:
            return None
        for name in self.states:
            if name not in present:
                raise Malformed(f"`{name}` is required where `{present[0]}` is given")
        return finite_state(self.states, [tensors[name] for name in self.states], is_vector=True)


def check_identifier(name: str, value: str) -> str:
    """Raises Malformed where a name is empty or too long to be kept."""
    if not 1 <= len(value) <= LONGEST_IDENTIFIER:
        raise Malformed(f"`{name}` has {len(value)} characters, not 1 to {LONGEST_IDENTIFIER}")
    return value
