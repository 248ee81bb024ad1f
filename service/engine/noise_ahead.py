"""Noise of the steps to come, for batches of few rows: eight steps' costs little more than one's.

What a step's noise is, `service.engine.noise` alone says: it depends on (seed, step), not on when
it is made. This only decides when.
"""

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.engine.noise import gumbel_noise

STEPS_AHEAD = 8
FEW = 8
"""Rows. Of more, each costs so little that keeping noise costs more."""
MOST_SEEDS = 1024


class _Kept(NamedTuple):
    first_step: int
    noise: NDArray[np.float32]


class NoiseAhead:
    """Gumbel noise of `num_columns`, that of the last `MOST_SEEDS` seeds of small batches kept."""

    def __init__(self, num_columns: int) -> None:
        self._num_columns = num_columns
        self._kept: OrderedDict[int, _Kept] = OrderedDict()

    def take(
        self, seeds: NDArray[np.uint64], steps: NDArray[np.uint64], out: NDArray[np.float32]
    ) -> None:
        """Writes each row's noise into `out`, `[rows, num_columns]`."""
        if len(seeds) > FEW:
            out[:] = gumbel_noise(seeds, steps, self._num_columns)
            return
        rows = list(zip(seeds.tolist(), steps.tolist(), strict=True))
        if missing := [at for at, (seed, step) in enumerate(rows) if not self._has(seed, step)]:
            self._make(seeds[missing], steps[missing])
        for at, (seed, step) in enumerate(rows):
            if self._has(seed, step):
                kept = self._kept[seed]
                out[at] = kept.noise[step - kept.first_step]
            else:  # two rows with one seed, at steps that lie apart
                out[at] = gumbel_noise(seeds[at : at + 1], steps[at : at + 1], self._num_columns)[0]

    def _has(self, seed: int, step: int) -> bool:
        kept = self._kept.get(seed)
        return kept is not None and 0 <= step - kept.first_step < STEPS_AHEAD

    def _make(self, seeds: NDArray[np.uint64], steps: NDArray[np.uint64]) -> None:
        following = np.add.outer(steps, np.arange(STEPS_AHEAD, dtype=np.uint64))
        noise = gumbel_noise(seeds.repeat(STEPS_AHEAD), following.reshape(-1), self._num_columns)
        by_seed = noise.reshape(len(seeds), STEPS_AHEAD, self._num_columns)
        for seed, step, ahead in zip(seeds.tolist(), steps.tolist(), by_seed, strict=True):
            self._kept[seed] = _Kept(step, ahead.copy())
            self._kept.move_to_end(seed)
            if len(self._kept) > MOST_SEEDS:
                self._kept.popitem(last=False)
