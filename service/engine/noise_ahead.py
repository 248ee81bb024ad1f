"""Each session's noise a few steps ahead, because eight steps' noise costs little more than one's.

What a step's noise is, `service.engine.noise` alone says: it depends on (seed, step), not on when
it is made. This only decides when.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.engine.noise import gumbel_noise
from service.engine.sessions import START, Turn

STEPS_AHEAD = 8


class NoiseAhead:
    """Gumbel noise of `num_columns` for turns, kept by session row for the steps to come.

    It lies in one array of `capacity` rows, of which only those in use take memory.
    """

    def __init__(self, num_columns: int, capacity: int) -> None:
        self._num_columns = num_columns
        self._noise = np.zeros((capacity, STEPS_AHEAD, num_columns), dtype=np.float32)
        self._of_row: dict[int, tuple[int, int]] = {}  # whose: its seed and first step

    def take(self, turns: Sequence[Turn], out: NDArray[np.float32]) -> None:
        """Writes each turn's noise into `out`, `[turns, num_columns]`; no row is there twice."""
        without_row, missing, known = [], [], []
        for at, turn in enumerate(turns):
            if turn.row == START:  # stateless, or a session that has no row to keep more in yet
                without_row.append(at)
                continue
            seed, first_step = self._of_row.get(turn.row, (None, 0))
            if seed != turn.seed or not 0 <= turn.step - first_step < STEPS_AHEAD:
                missing.append(at)
                first_step = turn.step
            known.append((at, turn.row, turn.step - first_step))
        if without_row:
            out[without_row] = self._make(turns, without_row, 1)[:, 0]
        if missing:
            rows = [turns[at].row for at in missing]
            self._noise[rows] = self._make(turns, missing, STEPS_AHEAD)
            self._of_row |= {turns[at].row: (turns[at].seed, turns[at].step) for at in missing}
        if len(known) == 1:
            at, row, ahead = known[0]
            out[at] = self._noise[row, ahead]
        elif known:
            at_all, of_rows, aheads = zip(*known, strict=True)
            out[list(at_all)] = self._noise[of_rows, aheads]

    def _make(
        self, turns: Sequence[Turn], which: Sequence[int], num_steps: int
    ) -> NDArray[np.float32]:
        """The noise of these turns and the steps after them: `[which, num_steps, columns]`."""
        seeds = np.array([turns[at].seed for at in which], dtype=np.uint64)
        steps = np.array([turns[at].step for at in which], dtype=np.uint64)
        following = np.add.outer(steps, np.arange(num_steps, dtype=np.uint64)).reshape(-1)
        noise = gumbel_noise(np.repeat(seeds, num_steps), following, self._num_columns)
        return noise.reshape(len(which), num_steps, self._num_columns)
