"""The forms in which a load sends its requests and reads its answers."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json, to_json
from safetensors.numpy import load, save

from model.step_spec import StepSpec
from service.bench.pool import POOL_SIZE, Pool, json_fields

LENGTH_BYTES = 8
"""Of a safetensors file, before its header."""
Arrays = dict[str, NDArray[Any]]


class Wire(Protocol):
    """One form. `starts` is None for a single environment's, else which rows start."""

    content_type: str

    def body(
        self, session_id: str, seed: int, step: int, first: int, starts: NDArray[np.bool_] | None
    ) -> bytes:
        """The request of a step, whose rows observe the pool's from `first` on."""

    def answer(self, content: bytes) -> Arrays:
        """An answer's outputs by name, `[rows, ...]`."""

    def version(self, content: bytes) -> str:
        """The version that an answer names."""


class JsonWire:
    """JSON, as most clients would."""

    content_type = "application/json"

    def __init__(self, spec: StepSpec, pool: Pool, num_rows: int | None) -> None:
        self._spec = spec
        self._is_vector = num_rows is not None
        rows = np.arange(num_rows or 1)
        self._bodies = [
            json_fields(spec, pool, (first + rows) % POOL_SIZE if self._is_vector else first)
            for first in range(POOL_SIZE)
        ]

    def body(
        self, session_id: str, seed: int, step: int, first: int, starts: NDArray[np.bool_] | None
    ) -> bytes:
        begins = b""
        if step == 0:
            name = b"run" if self._is_vector else b"episode"
            begins = b'"episode_start":true,"%b":"0","seed":%d,' % (name, seed)
        elif starts is not None and starts.any():
            begins = b'"episode_start":%b,' % to_json(starts.tolist())
        return b'{"session_id":"%b","step":%d,%b%b}' % (
            session_id.encode(),
            step,
            begins,
            self._bodies[first],
        )

    def answer(self, content: bytes) -> Arrays:
        fields = from_json(content)
        arrays = {
            name: np.array(list(fields[name].values())).T for name in ("action", "log_prob")
        } | {name: np.array(fields[name]) for name in ("value", *self._spec.extra_outputs)}
        if self._is_vector:
            return arrays
        return {name: array[None] for name, array in arrays.items()}

    def version(self, content: bytes) -> str:
        return str(from_json(content)["policy_version"])


class SafetensorsWire:
    """safetensors, for speed."""

    content_type = "application/vnd.safetensors"

    def __init__(self, spec: StepSpec, pool: Pool, num_rows: int) -> None:
        self._spec = spec
        rows = np.arange(num_rows)
        self._tensors = [
            {name: array[(first + rows) % POOL_SIZE] for name, array in pool.by_name().items()}
            for first in range(POOL_SIZE)
        ]

    def body(
        self, session_id: str, seed: int, step: int, first: int, starts: NDArray[np.bool_] | None
    ) -> bytes:
        metadata = {"session_id": session_id, "step": str(step)}
        if step == 0:
            metadata |= {"run": "0", "seed": str(seed)}
        assert starts is not None
        return save(self._tensors[first] | {"episode_start": starts}, metadata)

    def answer(self, content: bytes) -> Arrays:
        tensors = load(content)
        names = ("action", "log_prob", "value", *self._spec.extra_outputs)
        return {name: tensors[name] for name in names}

    def version(self, content: bytes) -> str:
        header = content[
            LENGTH_BYTES : LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
        ]
        return str(from_json(header)["__metadata__"]["policy_version"])


def wire_of(kind: str, spec: StepSpec, pool: Pool, num_rows: int | None) -> Wire:
    """The form called `json` or `safetensors`; without `num_rows`, of single environments."""
    if kind == "json":
        return JsonWire(spec, pool, num_rows)
    return SafetensorsWire(spec, pool, num_rows or 1)
