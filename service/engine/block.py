"""What a request is to the engine: a block of rows that step together, and the answer to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

from service.runtime.protocol import State

Given = tuple[NDArray[Any], ...]
"""The step's inputs that a request brings, `[rows, ...]` each, in the manifest's order."""


@dataclass(slots=True)
class Block:
    """`num_rows` environments that take one step together, fully validated.

    They are one session's, or nobody's: then the block is stateless and brings its `state`, or
    starts from zeros. A single environment is a block of one row, and its episode is its `run`.

    `starts` says for all rows, or one by one where they differ, whether an episode starts. `seed`
    is the run's; `seeds`, one a row, are of the episodes that start. With `ends` it is the last
    step that its session takes.
    `fingerprint` stands for what decides the answer: a retry has it, another content has not.
    """

    given: Given
    is_vector: bool = False
    deterministic: bool = False
    session_id: str | None = None
    run: str | None = None
    step: int | None = None
    starts: bool | NDArray[np.bool_] = False
    ends: bool = False
    seed: int | None = None
    seeds: NDArray[np.uint64] | None = None
    state: State | None = None
    num_rows: int = field(init=False)
    fingerprint: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.num_rows = len(self.given[0])
        # Of a client's own requests, so no hash that withstands an enemy: one 60 times as fast.
        digest = xxh3_128(b"\1" if self.deterministic else b"\0")
        for array in self.given:
            digest.update(np.ascontiguousarray(array).data)
        if self.is_vector:
            digest.update(np.asarray(self.starts).data)
            if self.seeds is not None:
                digest.update(np.ascontiguousarray(self.seeds).data)
        if self.ends:
            digest.update(b"end")
        self.fingerprint = digest.digest()


class Batch:
    """What the policy decided for the rows of a batch: what a step gives but the states."""

    __slots__ = ("_lists", "arrays")

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.arrays = arrays
        self._lists: dict[str, list[Any]] | None = None

    @property
    def lists(self) -> dict[str, list[Any]]:
        """The same as lists, made once for all answers of the batch."""
        if self._lists is None:
            self._lists = {name: array.tolist() for name, array in self.arrays.items()}
        return self._lists


class Answer(NamedTuple):
    """To a block: what was decided for rows `first` to `first + num_rows` of `batch`.

    `state` comes to a stateless block, which carries it itself.
    """

    batch: Batch
    first: int
    num_rows: int
    step: int
    policy_version: str
    state: State | None = None
    is_replay: bool = False

    def array(self, name: str) -> NDArray[Any]:
        """The block's rows of one output."""
        return self.batch.arrays[name][self.first : self.first + self.num_rows]

    def tensors(self, states: Sequence[str]) -> dict[str, NDArray[Any]]:
        """All of it that is arrays, by the names that they have on a wire: `states`, the state."""
        tensors = {name: self.array(name) for name in self.batch.arrays}
        if self.state is not None:
            tensors |= zip(states, self.state, strict=True)
        return tensors
