"""States in host memory, and a loaded step that runs on them.

Serves every format on a CPU. On a GPU the step's own loader copies each batch there and back.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import inf
from operator import attrgetter
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.loaders.protocol import LoadedStep
from export.manifest import Array
from model.spec import PolicySpec
from service.runtime.arrays import Arrays, allocate, allocate_in_a_row, are_all, first
from service.runtime.protocol import (
    MOST_UNDER_WAY,
    STATE_INPUTS,
    STATE_OUTPUTS,
    Outputs,
    Rows,
    State,
)


class HostStates:
    """`num_rows` rows of `(h, c)`, and after them the one that is always zero.

    The arrays are as large as the address space allows to promise: only rows once used take memory.
    """

    def __init__(self, spec: PolicySpec, num_rows: int) -> None:
        shape = (num_rows + 1, spec.num_layers, spec.hidden_dim)
        self.zero_row = num_rows
        self.h = np.zeros(shape, dtype=np.float32)
        self.c = np.zeros(shape, dtype=np.float32)

    def gather(self, rows: Rows, h: NDArray[np.float32], c: NDArray[np.float32]) -> None:
        """Copies the rows' states into the first rows of `h` and `c`."""
        num = len(rows)
        if num == 1:  # NumPy copies a lone row several times faster by its number
            h[0], c[0] = self.h[rows[0]], self.c[rows[0]]
        else:  # "clip": a row out of range, which there is none of, would cost a buffer
            self.h.take(rows, axis=0, out=h[:num], mode="clip")
            self.c.take(rows, axis=0, out=c[:num], mode="clip")

    def scatter(self, rows: Rows, h: NDArray[np.float32], c: NDArray[np.float32]) -> None:
        """Sets the rows' states to the first rows of `h` and `c`."""
        num = len(rows)
        if num == 1:
            self.h[rows[0]], self.c[rows[0]] = h[0], c[0]
        else:
            self.h[rows], self.c[rows] = h[:num], c[:num]


Steps = tuple[Callable[[], None], ...]
"""A step bound to a lane's arrays, at every batch size."""


class _BatchSize(NamedTuple):
    inputs: Arrays
    outputs: Arrays
    floats: NDArray[np.float32]


class _Lane:
    """The arrays of one batch at a time, at every batch size."""

    def __init__(
        self,
        number: int,
        inputs: Sequence[Array],
        outputs: Sequence[Array],
        batch_sizes: Sequence[int],
    ) -> None:
        self.number = number
        batch = allocate(inputs, max(batch_sizes))
        self.h, self.c = (batch[name] for name in STATE_INPUTS)
        self.inputs = {name: array for name, array in batch.items() if name not in STATE_INPUTS}
        self.batch_sizes = [
            _BatchSize(first(batch, size), *allocate_in_a_row(outputs, size))
            for size in batch_sizes
        ]

    def bind(self, loaded: LoadedStep) -> Steps:
        return tuple(loaded.bind(size.inputs, size.outputs) for size in self.batch_sizes)


class HostRuntime:
    """A `Runtime` of a step that runs on the caller's thread, or beside it where that is worth it.

    Its arrays are its own; the states may be shared.
    """

    def __init__(
        self,
        loaded: LoadedStep,
        states: HostStates,
        *,
        inputs: Sequence[Array],
        outputs: Sequence[Array],
        batch_sizes: Sequence[int],
    ) -> None:
        self.name = loaded.name
        self.device = loaded.device
        self.zero_row = states.zero_row
        self.when_done: Callable[[], None] = lambda: None
        self._states = states
        self._arrays = (inputs, outputs)
        self._sizes = sizes = sorted(batch_sizes)
        self._step_s = [0.0] * len(sizes)  # as they were warmed up
        self._by_num_rows = [0]  # which of the batch sizes a batch of so many rows takes
        for at, size in enumerate(sizes):
            self._by_num_rows += [at] * (size + 1 - len(self._by_num_rows))
        lanes = [_Lane(number, inputs, outputs, sizes) for number in range(MOST_UNDER_WAY)]
        self._lanes = deque(lanes)
        self._steps = [lane.bind(loaded) for lane in lanes]  # by the lane's number
        self._outputs: Outputs | None = None  # of a step that was waited for
        self._under_way: deque[Future[Outputs]] = deque()
        self._beside = ThreadPoolExecutor(1, "step")

    @property
    def inputs(self) -> Mapping[str, NDArray[Any]]:
        return self._lanes[0].inputs

    def launch(self, read_rows: Rows, write_rows: Rows, *, beside_s: float = inf) -> None:
        lane = self._lanes[0]
        at = self._by_num_rows[len(read_rows)]
        self._states.gather(read_rows, lane.h, lane.c)
        step, batch_size = self._steps[lane.number][at], lane.batch_sizes[at]
        if self._step_s[at] < beside_s and not self._under_way:
            self._outputs = self._run(step, batch_size, write_rows)
            return  # and the lane is free again
        begun = Lock()
        begun.acquire()
        future = self._beside.submit(self._run, step, batch_size, write_rows, begun.release)
        future.add_done_callback(lambda _: self.when_done())
        if not self._under_way:
            # The other thread needs the interpreter to begin, and would get it by chance.
            begun.acquire()
        self._under_way.append(future)
        self._lanes.rotate()

    def is_done(self) -> bool:
        return not self._under_way or self._under_way[0].done()

    def is_idle(self) -> bool:
        return not self._under_way or self._under_way[-1].done()

    def collect(self) -> Outputs:
        outputs, self._outputs = self._outputs, None
        return self._under_way.popleft().result() if outputs is None else outputs

    def _run(
        self,
        step: Callable[[], None],
        batch_size: _BatchSize,
        write_rows: Rows,
        begin: Callable[[], None] = lambda: None,
    ) -> Outputs:
        _, outputs, floats = batch_size
        begin()
        step()
        h, c = (outputs[name] for name in STATE_OUTPUTS)
        self._states.scatter(write_rows, h, c)
        num = len(write_rows)
        # Copies: answers are written from them when others have been launched.
        arrays = {name: a[:num].copy() for name, a in outputs.items() if name not in STATE_OUTPUTS}
        if are_all(np.isfinite(floats)):  # as a rule; padding is what former batches were
            return Outputs(arrays)
        parts = [a[:num].reshape(num, -1) for a in outputs.values() if a.dtype == np.float32]
        finite = np.logical_and.reduce([np.isfinite(part).all(axis=1) for part in parts])
        return Outputs(arrays, None if finite.all() else finite)

    def read(self, rows: Rows) -> State:
        return self._states.h[rows], self._states.c[rows]

    def write(self, rows: Rows, state: State) -> None:
        self._states.scatter(rows, *state)

    def prepare(self, loaded: LoadedStep) -> Callable[[], None]:
        # On arrays of its own: those that it will have are in use.
        inputs, outputs = (allocate(arrays, self._sizes[-1]) for arrays in self._arrays)
        for size in self._sizes:
            loaded.bind(first(inputs, size), first(outputs, size))()
        steps = [lane.bind(loaded) for lane in sorted(self._lanes, key=attrgetter("number"))]

        def adopt() -> None:
            self._steps = steps

        return adopt

    def warm_up(self, *, is_wanted: Callable[[], bool] = lambda: True) -> None:
        self._beside.submit(int).result()  # it is now that a thread too many is to be told
        for at in range(len(self._step_s)):
            seconds = []
            for steps in (self._steps[0], *self._steps):
                if is_wanted():
                    began_s = time.perf_counter()
                    steps[at]()
                    seconds.append(time.perf_counter() - began_s)
            self._step_s[at] = min(seconds, default=0.0)
