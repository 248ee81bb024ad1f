"""Each session's noise a few steps ahead, because eight steps' noise costs little more than one's.

What a step's noise is, `service.noise` alone says: it depends on (seed, step), not on when it is
made. This only decides when.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.noise import gumbel_noise
from service.sessions import START, Turn

STEPS_AHEAD = 8


class _Ahead(NamedTuple):
    """What was made for a session's row: its seed's noise from `first_step` on."""

    seed: int
    first_step: int
    noise: NDArray[np.float32]


class NoiseAhead:
    """Gumbel noise of `num_columns` for turns, kept by session row for the steps to come."""

    def __init__(self, num_columns: int) -> None:
        self._num_columns = num_columns
        self._of_row: dict[int, _Ahead] = {}

    def take(self, turns: Sequence[Turn], out: NDArray[np.float32]) -> None:
        """Writes each turn's noise into `out`, `[turns, num_columns]`."""
        missing = []
        for at, turn in enumerate(turns):
            ahead = self._of_row.get(turn.row)
            if ahead is not None and ahead.seed == turn.seed:
                index = turn.step - ahead.first_step
                if 0 <= index < STEPS_AHEAD:
                    out[at] = ahead.noise[index]
                    continue
            missing.append(at)
        if missing:
            self._make(turns, missing, out)

    def _make(
        self, turns: Sequence[Turn], missing: Sequence[int], out: NDArray[np.float32]
    ) -> None:
        seeds = np.array([turns[at].seed for at in missing], dtype=np.uint64)
        steps = np.array([turns[at].step for at in missing], dtype=np.uint64)
        following = np.add.outer(steps, np.arange(STEPS_AHEAD, dtype=np.uint64)).reshape(-1)
        noise = gumbel_noise(np.repeat(seeds, STEPS_AHEAD), following, self._num_columns)
        for at, ahead in zip(missing, np.split(noise, len(missing)), strict=True):
            turn = turns[at]
            out[at] = ahead[0]
            if turn.row != START:  # a start has no row yet
                self._of_row[turn.row] = _Ahead(turn.seed, turn.step, ahead.copy())
