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
        without_row, missing = [], []
        for at, turn in enumerate(turns):
            if turn.row == START:  # stateless, or a session that has no row to keep more in yet
                without_row.append(at)
                continue
            ahead = self._of_row.get(turn.row)
            if ahead is not None and ahead.seed == turn.seed:
                index = turn.step - ahead.first_step
                if 0 <= index < STEPS_AHEAD:
                    out[at] = ahead.noise[index]
                    continue
            missing.append(at)
        if without_row:
            out[without_row] = self._make(turns, without_row, 1)[:, 0]
        if missing:
            for at, noise in zip(missing, self._make(turns, missing, STEPS_AHEAD), strict=True):
                turn = turns[at]
                out[at] = noise[0]
                self._of_row[turn.row] = _Ahead(turn.seed, turn.step, noise.copy())

    def _make(
        self, turns: Sequence[Turn], which: Sequence[int], num_steps: int
    ) -> NDArray[np.float32]:
        """The noise of these turns and the steps after them: `[which, num_steps, columns]`."""
        seeds = np.array([turns[at].seed for at in which], dtype=np.uint64)
        steps = np.array([turns[at].step for at in which], dtype=np.uint64)
        following = np.add.outer(steps, np.arange(num_steps, dtype=np.uint64)).reshape(-1)
        noise = gumbel_noise(np.repeat(seeds, num_steps), following, self._num_columns)
        return noise.reshape(len(which), num_steps, self._num_columns)
