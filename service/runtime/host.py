"""States in host memory, and a loaded step that runs on them.

Serves every format on a CPU. On a GPU the step's own loader copies each batch there and back.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.loaders.protocol import LoadedStep
from export.manifest import Array
from model.spec import PolicySpec
from service.runtime.arrays import Arrays, allocate, allocate_in_a_row, first
from service.runtime.protocol import STATE_INPUTS, STATE_OUTPUTS, Outputs, Rows, State


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


class _BatchSize(NamedTuple):
    step: Callable[[], None]
    outputs: Arrays
    floats: NDArray[np.float32]


class HostRuntime:
    """A `Runtime` whose launch does it all. Its arrays are its own; the states may be shared."""

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
        self._states = states
        batch = allocate(inputs, max(batch_sizes))
        self._h, self._c = (batch[name] for name in STATE_INPUTS)
        self.inputs: Mapping[str, NDArray[Any]] = {
            name: array for name, array in batch.items() if name not in STATE_INPUTS
        }
        self._batch_sizes = []
        self._by_num_rows = [0]  # which of the batch sizes a batch of so many rows takes
        for at, size in enumerate(sorted(batch_sizes)):
            decided, floats = allocate_in_a_row(outputs, size)
            step = loaded.bind(first(batch, size), decided)
            self._batch_sizes.append(_BatchSize(step, decided, floats))
            self._by_num_rows += [at] * (size + 1 - len(self._by_num_rows))
        self._launched: tuple[_BatchSize, int] | None = None

    def launch(self, read_rows: Rows, write_rows: Rows) -> None:
        num = len(read_rows)
        batch_size = self._batch_sizes[self._by_num_rows[num]]
        self._states.gather(read_rows, self._h, self._c)
        batch_size.step()
        h, c = (batch_size.outputs[name] for name in STATE_OUTPUTS)
        self._states.scatter(write_rows, h, c)
        self._launched = batch_size, num

    def is_done(self) -> bool:
        return True

    def collect(self) -> Outputs:
        assert self._launched is not None
        (_, outputs, floats), num = self._launched
        arrays = {name: a[:num] for name, a in outputs.items() if name not in STATE_OUTPUTS}
        if np.isfinite(floats).all():  # as a rule; padding is what former batches were
            return Outputs(arrays)
        parts = [a[:num].reshape(num, -1) for a in outputs.values() if a.dtype == np.float32]
        finite = np.logical_and.reduce([np.isfinite(part).all(axis=1) for part in parts])
        return Outputs(arrays, None if finite.all() else finite)

    def read(self, rows: Rows) -> State:
        return self._states.h[rows], self._states.c[rows]

    def write(self, rows: Rows, state: State) -> None:
        self._states.scatter(rows, *state)

    def warm_up(self, times: int = 3, *, is_wanted: Callable[[], bool] = lambda: True) -> None:
        for batch_size in self._batch_sizes:
            for _ in range(times):
                if is_wanted():
                    batch_size.step()
