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
from model.step_spec import StepSpec
from service.runtime.arrays import Arrays, allocate, allocate_in_a_row, are_all, first
from service.runtime.protocol import MOST_UNDER_WAY, Outputs, Rows, State

Pairs = tuple[tuple[NDArray[np.float32], NDArray[np.float32]], ...]
"""Of each state the array of all rows, and a batch's."""


class HostStates:
    """`num_rows` rows of each of the policy's states, and after them the one that is always zero.

    The arrays are as large as the address space allows to promise: only rows once used take memory.
    """

    def __init__(self, spec: StepSpec, num_rows: int) -> None:
        self.zero_row = num_rows
        self.specs = spec.states
        self.arrays: State = tuple(
            [np.zeros((num_rows + 1, *state.shape), dtype=np.float32) for state in spec.states]
        )

    def beside(self, state: State) -> Pairs:
        """Its arrays with a batch's, paired once: to pair them takes as long as a lone row."""
        return tuple(zip(self.arrays, state, strict=True))


def gather(rows: Rows, pairs: Pairs) -> None:
    """Copies the rows' states into the first rows of the batch's."""
    num = len(rows)
    if num == 1:  # NumPy copies a lone row several times faster by its number
        row = rows[0]
        for array, of_batch in pairs:
            of_batch[0] = array[row]
    else:  # "clip": a row out of range, which there is none of, would cost a buffer
        for array, of_batch in pairs:
            array.take(rows, axis=0, out=of_batch[:num], mode="clip")


def scatter(rows: Rows, pairs: Pairs) -> None:
    """Sets the rows' states to the first rows of the batch's."""
    num = len(rows)
    if num == 1:
        row = rows[0]
        for array, of_batch in pairs:
            array[row] = of_batch[0]
    else:
        for array, of_batch in pairs:
            array[rows] = of_batch[:num]


Steps = tuple[Callable[[], None], ...]
"""A step bound to a lane's arrays, at every batch size."""


class _BatchSize(NamedTuple):
    inputs: Arrays
    outputs: Arrays
    floats: NDArray[np.float32]
    decided: Arrays
    pairs: Pairs


class _Lane:
    """The arrays of one batch at a time, at every batch size."""

    def __init__(
        self,
        number: int,
        states: HostStates,
        inputs: Sequence[Array],
        outputs: Sequence[Array],
        batch_sizes: Sequence[int],
    ) -> None:
        self.number = number
        batch = allocate(inputs, max(batch_sizes))
        self.inputs, self.pairs = _apart(batch, states, [of.input for of in states.specs])
        self.batch_sizes = []
        for size in batch_sizes:
            given, floats = allocate_in_a_row(outputs, size)
            apart = _apart(given, states, [of.output for of in states.specs])
            self.batch_sizes.append(_BatchSize(first(batch, size), given, floats, *apart))

    def bind(self, loaded: LoadedStep) -> Steps:
        return tuple(loaded.bind(size.inputs, size.outputs) for size in self.batch_sizes)


def _apart(arrays: Arrays, states: HostStates, names: Sequence[str]) -> tuple[Arrays, Pairs]:
    """A batch's arrays that are no states, and the others, which have these names."""
    others = {name: array for name, array in arrays.items() if name not in names}
    return others, states.beside(tuple([arrays[name] for name in names]))


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
        lanes = [_Lane(number, states, inputs, outputs, sizes) for number in range(MOST_UNDER_WAY)]
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
        gather(read_rows, lane.pairs)
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
        _, outputs, floats, decided, pairs = batch_size
        begin()
        step()
        scatter(write_rows, pairs)
        num = len(write_rows)
        # Copies: answers are written from them when others have been launched.
        arrays = {name: array[:num].copy() for name, array in decided.items()}
        if are_all(np.isfinite(floats)):  # as a rule; padding is what former batches were
            return Outputs(arrays)
        parts = [a[:num].reshape(num, -1) for a in outputs.values() if a.dtype == np.float32]
        finite = np.logical_and.reduce([np.isfinite(part).all(axis=1) for part in parts])
        return Outputs(arrays, None if finite.all() else finite)

    def read(self, rows: Rows) -> State:
        return tuple([array[rows] for array in self._states.arrays])

    def write(self, rows: Rows, state: State) -> None:
        scatter(rows, self._states.beside(state))

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
