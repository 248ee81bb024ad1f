"""Noise of the steps to come, made before they are asked for.

Eight steps of a few single environments cost little more than one does; a vector's next step is
drawn for while its environments step, or the model steps others. What a step's noise is,
`tamiyo_client.noise` alone says: it depends on (seed, step), not on when it is made. This only
decides when.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.runtime.protocol import Rows
from tamiyo_client.noise import gumbel_noise

STEPS_AHEAD = 8
FEW = 64
"""Environments. Of more, eight steps at once would hold up who waits."""
MOST_WINDOWS = 1024
"""Of eight steps of an environment: 1.3 MB with Tamiyo's first policy."""
STALE_ROWS = 4 * STEPS_AHEAD * MOST_WINDOWS
"""Drawn since a window was made: by then its environment is through it, if it has not ended."""
MOST_ROWS = 16_384
"""Whose next step's noise is kept: 2.5 MB of it with Tamiyo's first policy."""


_Window = tuple[int, int]
"""A seed, and a step by `STEPS_AHEAD`."""


class _Kept(NamedTuple):
    noise: NDArray[np.float32]
    drawn_before: int


class NoiseAhead:
    """Gumbel noise of `num_columns` for `num_rows` rows of states.

    Kept are `MOST_WINDOWS` of what `take_each` is to draw next, and one step for the last
    `MOST_ROWS` rows that `look_ahead` was told of.
    """

    def __init__(self, num_columns: int, num_rows: int) -> None:
        self._num_columns = num_columns
        self._kept: dict[_Window, _Kept] = {}  # the oldest first
        self._num_drawn = 0
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
        windows: list[_Window] = []
        rows: list[NDArray[np.float32]] = []
        missing: list[int] = []
        for at, (seed, step) in enumerate(zip(seeds.tolist(), steps.tolist(), strict=True)):
            window = (seed, step // STEPS_AHEAD)
            windows.append(window)
            kept = self._kept.get(window)
            if kept is not None:
                rows.append(kept.noise[step % STEPS_AHEAD])
            else:
                rows.append(out[at])
                missing.append(at)
        self._num_drawn += len(rows)
        if out.flags.c_contiguous:
            np.concatenate(rows, out=out.reshape(-1))
        else:  # in a batch's rows, beside what else they bring
            out[:] = np.concatenate(rows).reshape(out.shape)
        if missing:
            self._make(missing, windows, seeds, steps, out)

    def _make(
        self,
        missing: list[int],
        windows: list[_Window],
        seeds: NDArray[np.uint64],
        steps: NDArray[np.uint64],
        out: NDArray[np.float32],
    ) -> None:
        """Writes the rows of which nothing is kept, and keeps what is worth it.

        A first step may be the only one, as a stateless request's is. And where more environments
        step than there is room for, some have theirs kept, instead of each the next one's.
        """
        lasting = [at for at in missing if steps[at] > 0]
        for at in lasting:
            seed, number = windows[at]
            self._kept.pop((seed, number - 1), None)
        self._forget_stale(len(lasting))
        lasting = lasting[: MOST_WINDOWS - len(self._kept)]
        if lasting:
            first = steps[lasting] // STEPS_AHEAD * STEPS_AHEAD
            following = np.add.outer(first, np.arange(STEPS_AHEAD, dtype=np.uint64)).reshape(-1)
            noise = gumbel_noise(seeds[lasting].repeat(STEPS_AHEAD), following, self._num_columns)
            for at, steps_ahead in zip(
                lasting, noise.reshape(len(lasting), STEPS_AHEAD, -1), strict=True
            ):
                out[at] = steps_ahead[int(steps[at] % STEPS_AHEAD)]
                self._kept[windows[at]] = _Kept(steps_ahead.copy(), self._num_drawn)
        if passing := sorted({*missing} - {*lasting}):
            out[passing] = gumbel_noise(seeds[passing], steps[passing], self._num_columns)

    def _forget_stale(self, number: int) -> None:
        """Makes room for so many windows, as far as there are some that nobody draws from."""
        while number > MOST_WINDOWS - len(self._kept):
            window, kept = next(iter(self._kept.items()))
            if kept.drawn_before > self._num_drawn - STALE_ROWS:
                return
            del self._kept[window]
