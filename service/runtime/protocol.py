"""What runs batches where the recurrent states live: all that the engine knows of a device."""

from collections.abc import Callable, Mapping
from math import inf
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from export.loaders.protocol import LoadedStep

Rows = NDArray[np.intp]
"""Numbers of state rows, one for each row of a batch."""

State = tuple[NDArray[np.float32], ...]
"""`[rows, ...]` of each of the spec's states, in its order: none, for a policy without memory."""

MOST_UNDER_WAY = 2
"""Batches that may be launched and not collected yet: one that runs, and one that follows it."""


class DeviceLost(Exception):
    """A device has met a fault that stays: nothing runs on it in this process any more."""


class Outputs(NamedTuple):
    """What a step gave for a batch: `[rows, ...]` of each of its outputs but the states, by name.

    `is_finite` says of which rows, states included; None is all of them. Host arrays, which are the
    caller's.
    """

    arrays: Mapping[str, NDArray[Any]]
    is_finite: NDArray[np.bool_] | None = None


class Runtime(Protocol):
    """One policy's exported step, and rows of states that outlive any step.

    `zero_row` is a state row that is always zeros; no step writes to it.
    """

    name: str
    device: str
    zero_row: int

    when_done: Callable[[], None]
    """Called, from any thread, when a step has ended that its launch did not wait for."""

    @property
    def inputs(self) -> Mapping[str, NDArray[Any]]:
        """Where the next batch is written before its launch, from its first row on.

        All of the step's inputs but the states, `[largest batch, ...]`, by name. They may be other
        arrays after a launch.
        """

    def launch(self, read_rows: Rows, write_rows: Rows, *, beside_s: float = inf) -> None:
        """Begins to step the first rows of `inputs`, from the states in `read_rows`.

        The new states go to `write_rows`, which no batch under way reads or writes. It is not to
        wait for a step that takes `beside_s`. Raises what went wrong with one that it waited for;
        then nothing was launched.
        """

    def is_done(self) -> bool:
        """Whether the first batch that is not collected yet has ended, well or not."""

    def is_idle(self) -> bool:
        """Whether no step runs, nor waits to."""

    def collect(self) -> Outputs:
        """What that batch's step gave. Raises what went wrong with it, DeviceLost for good."""

    def read(self, rows: Rows) -> State:
        """Copies of the states in these rows. Raises DeviceLost, as `write` and `prepare` do."""

    def write(self, rows: Rows, state: State) -> None:
        """Sets the states in these rows."""

    def prepare(self, loaded: LoadedStep) -> Callable[[], None]:
        """Readies another step of the same inputs and outputs beside the one that serves.

        From any thread, one at a time. Every batch size of it has run when this returns; what it
        gives, called while no batch is under way, has the launches from then on run that step.
        """

    def warm_up(self, *, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Runs every batch size, so that no batch pays for a first run; until it is not wanted.

        While no batch is under way, and nothing is prepared. It moves no state.
        """
