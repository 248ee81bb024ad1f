"""Noise of the steps to come, made before they are asked for.

Eight steps of a few single environments cost little more than one does; a vector's next step is
drawn for while its environments step, or the model steps others. What a step's noise is,
`tamiyo_client.noise` alone says: it depends on (seed, step), not on when it is made. This only
decides when.
"""

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.runtime.protocol import Rows
from tamiyo_client.noise import gumbel_noise

STEPS_AHEAD = 8
FEW = 64
"""Environments. Of more, eight steps at once would hold up who waits."""
MOST_SEEDS = 1024
MOST_ROWS = 16_384
"""Whose next step's noise is kept: 2.5 MB of it with Tamiyo's first policy."""


class _Kept(NamedTuple):
    first_step: int
    noise: NDArray[np.float32]


class NoiseAhead:
    """Gumbel noise of `num_columns` for `num_rows` rows of states.

    Kept are windows of steps for the last `MOST_SEEDS` seeds that `take_each` drew with, and one
    step for the last `MOST_ROWS` rows that `look_ahead` was told of.
    """

    def __init__(self, num_columns: int, num_rows: int) -> None:
        self._num_columns = num_columns
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._slots = np.zeros(num_rows, dtype=np.int32)  # where each row's is, if it still is
        self._seeds, self._steps = np.zeros((2, MOST_ROWS), dtype=np.uint64)
        self._noise: NDArray[np.float32] | None = None
        self._num_told = 0

    def look_ahead(self, rows: Rows, seeds: NDArray[np.uint64], steps: NDArray[np.uint64]) -> None:
        """Makes the noise of a step that these rows, `MOST_ROWS` at most, will take next."""
        if self._noise is None:  # and each slot has, from the start, what it says it has
            self._noise = gumbel_noise(self._seeds[:1], self._steps[:1], self._num_columns)
            self._noise = self._noise.repeat(MOST_ROWS, axis=0)
        first = self._num_told if self._num_told + len(rows) <= MOST_ROWS else 0
        self._num_told = first + len(rows)
        slots = slice(first, self._num_told)
        self._noise[slots] = gumbel_noise(seeds, steps, self._num_columns)
        self._seeds[slots], self._steps[slots] = seeds, steps
        self._slots[rows] = np.arange(first, self._num_told, dtype=np.int32)

    def take(
        self,
        rows: Rows,
        seeds: NDArray[np.uint64],
        steps: NDArray[np.uint64],
        out: NDArray[np.float32],
    ) -> None:
        """Writes into `out`, `[rows, num_columns]`, what the rows draw with at these steps."""
        slots = self._slots[rows]
        is_kept = (self._seeds[slots] == seeds) & (self._steps[slots] == steps)
        num_kept = np.count_nonzero(is_kept) if self._noise is not None else 0
        if self._noise is None or num_kept == 0:
            out[:] = gumbel_noise(seeds, steps, self._num_columns)
        elif num_kept == len(rows):
            self._noise.take(slots, axis=0, out=out, mode="clip")
        else:
            out[is_kept] = self._noise[slots[is_kept]]
            out[~is_kept] = gumbel_noise(seeds[~is_kept], steps[~is_kept], self._num_columns)

    def take_each(
        self, seeds: NDArray[np.uint64], steps: NDArray[np.uint64], out: NDArray[np.float32]
    ) -> None:
        """The same for single environments, `FEW` at most."""
        rows: list[NDArray[np.float32]] = []
        missing: list[int] = []
        for at, (seed, step) in enumerate(zip(seeds.tolist(), steps.tolist(), strict=True)):
            kept = self._kept.get(seed)
            if kept is not None and 0 <= step - kept.first_step < STEPS_AHEAD:
                rows.append(kept.noise[step - kept.first_step])
            else:
                rows.append(out[at])
                missing.append(at)
        if missing:
            for at, steps_ahead in zip(
                missing, self._make(seeds[missing], steps[missing]), strict=True
            ):
                rows[at] = steps_ahead[0]
        np.concatenate(rows, out=out.reshape(-1))

    def _make(self, seeds: NDArray[np.uint64], steps: NDArray[np.uint64]) -> NDArray[np.float32]:
        """The noise of these steps and of those that follow, which are kept."""
        following = np.add.outer(steps, np.arange(STEPS_AHEAD, dtype=np.uint64))
        noise = gumbel_noise(seeds.repeat(STEPS_AHEAD), following.reshape(-1), self._num_columns)
        by_seed = noise.reshape(len(seeds), STEPS_AHEAD, self._num_columns)
        for seed, step, ahead in zip(seeds.tolist(), steps.tolist(), by_seed, strict=True):
            self._kept[seed] = _Kept(step, ahead.copy())
            self._kept.move_to_end(seed)
            if len(self._kept) > MOST_SEEDS:
                self._kept.popitem(last=False)
        return by_seed
