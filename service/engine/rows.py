"""The rows that states lie in: which are free, and what stands beside each state.

A row is where one environment is after a step: its state (in the runtime), the seed of its noise,
its episode's next step, and what was decided. A step reads rows and writes others, so that nothing
it read is lost before all of it is known to be right.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.manifest import Array
from service.engine.block import Batch
from service.errors import Overloaded
from service.runtime.arrays import Arrays, allocate
from service.runtime.protocol import Rows

ONE = np.array(1, dtype=np.uint64)
MOST_LONE = 1024
"""Free rows that are kept for single environments: more of them than are in a batch or two."""


class RowTable:
    """`num_rows` rows, and after them the one that every episode starts from.

    `seed` and `step` are what a row's next step draws its noise with; `outputs` what its last gave.
    Only rows once used take memory. No block has more than `largest` rows.
    """

    def __init__(self, num_rows: int, outputs: Sequence[Array], *, largest: int) -> None:
        self.zero_row = num_rows
        self._zeros: Rows = np.full(largest, num_rows, dtype=np.intp)
        self.seed = np.zeros(num_rows + 1, dtype=np.uint64)
        self.step = np.zeros(num_rows + 1, dtype=np.uint64)
        self.outputs: Arrays = allocate(outputs, num_rows)
        self._free: Rows = np.arange(num_rows - 1, -1, -1, dtype=np.intp)
        self._num_free = num_rows
        self._lone: list[Rows] = []  # free too, as arrays of one: to make one takes NumPy longer

    def reserve(self, number: int) -> Rows:
        """Free rows, the last used first. Raises Overloaded where there are not so many."""
        if number == 1 and self._lone:
            return self._lone.pop()
        if number > self._num_free:
            if number > self._num_free + len(self._lone):
                raise Overloaded(f"there is no room for {number} rows more just now")
            lone, self._lone = self._lone, []
            self._put_back(np.concatenate(lone))
        self._num_free -= number
        return self._free[self._num_free : self._num_free + number].copy()

    def zeros(self, number: int) -> Rows:
        """The row that episodes start from, so many times."""
        return self._zeros[:number]

    def give_back(self, rows: Rows) -> None:
        """Reserved rows are free again."""
        if len(rows) == 1 and len(self._lone) < MOST_LONE:
            self._lone.append(rows)
        else:
            self._put_back(rows)

    def _put_back(self, rows: Rows) -> None:
        self._free[self._num_free : self._num_free + len(rows)] = rows
        self._num_free += len(rows)

    def keep(
        self,
        rows: Rows,
        seeds: NDArray[np.uint64],
        steps: NDArray[np.uint64],
        decided: Mapping[str, NDArray[Any]],
    ) -> None:
        """Writes down what a step at `steps` decided for these rows."""
        # A lone row by its number: NumPy takes several times as long for an array of one.
        at, of = (rows[0], 0) if len(rows) == 1 else (rows, slice(None))
        self.seed[at] = seeds[of]
        self.step[at] = (steps + ONE)[of]  # of arrays, which wrap without a warning
        for name, array in self.outputs.items():
            array[at] = decided[name][of]

    def last(self, rows: Rows) -> Batch:
        """What the last step decided for these rows."""
        return Batch({name: array[rows] for name, array in self.outputs.items()})
