"""Each session's noise a few steps ahead, because eight steps' noise costs little more than one's.

What a step's noise is, `service.noise` alone says: it depends on (seed, step), not on when it is
made. This only decides when.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.noise import gumbel_noise
from service.sessions import START, Turn

STEPS_AHEAD = 8


class NoiseAhead:
    """Gumbel noise of `num_columns` for turns, kept by session row for the steps to come."""

    def __init__(self, num_rows: int, num_columns: int) -> None:
        self._num_columns = num_columns
        self._noise = np.zeros((num_rows, STEPS_AHEAD, num_columns), dtype=np.float32)
        self._seed = np.zeros(num_rows, dtype=np.uint64)
        self._first_step = np.zeros(num_rows, dtype=np.uint64)
        self._is_made = np.zeros(num_rows, dtype=np.bool_)

    def take(self, turns: Sequence[Turn]) -> NDArray[np.float32]:
        """Each turn's noise, `[turns, num_columns]`."""
        rows = np.array([turn.row for turn in turns])
        seeds = np.array([turn.seed for turn in turns], dtype=np.uint64)
        steps = np.array([turn.step for turn in turns], dtype=np.uint64)
        starts = rows == START
        if starts.any():  # no row yet to keep it in
            noise = np.empty((len(turns), self._num_columns), dtype=np.float32)
            noise[starts] = gumbel_noise(seeds[starts], steps[starts], self._num_columns)
            going = ~starts
            if going.any():
                noise[going] = self._take(rows[going], seeds[going], steps[going])
            return noise
        return self._take(rows, seeds, steps)

    def _take(
        self, rows: NDArray[np.int64], seeds: NDArray[np.uint64], steps: NDArray[np.uint64]
    ) -> NDArray[np.float32]:
        # Unsigned: a step before the first wraps around to far beyond the last.
        ahead = steps - self._first_step[rows]
        missing = (ahead >= STEPS_AHEAD) | (self._seed[rows] != seeds) | ~self._is_made[rows]
        if missing.any():
            self._make(rows[missing], seeds[missing], steps[missing])
            ahead[missing] = 0
        return self._noise[rows, ahead.astype(np.intp)]

    def _make(
        self, rows: NDArray[np.int64], seeds: NDArray[np.uint64], steps: NDArray[np.uint64]
    ) -> None:
        following = np.add.outer(steps, np.arange(STEPS_AHEAD, dtype=np.uint64)).reshape(-1)
        noise = gumbel_noise(np.repeat(seeds, STEPS_AHEAD), following, self._num_columns)
        self._noise[rows] = noise.reshape(-1, STEPS_AHEAD, self._num_columns)
        self._seed[rows], self._first_step[rows], self._is_made[rows] = seeds, steps, True
