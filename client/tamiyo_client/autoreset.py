"""Which rows start an episode, from what a vector environment said of the last ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MODES = ("next_step", "same_step", "disabled")


def autoreset_mode(given: Any) -> str:
    """One of `MODES`, from its name, gymnasium's `AutoresetMode`, or a vector environment.

    Raises ValueError for anything else, and for a vector environment that does not say.
    """
    metadata = getattr(given, "metadata", None)
    if isinstance(metadata, dict):
        if "autoreset_mode" not in metadata:
            raise ValueError("the environment's metadata has no `autoreset_mode`; name it")
        given = metadata["autoreset_mode"]
    name = str(getattr(given, "value", given))
    for mode in MODES:
        if name.replace("_", "").lower() == mode.replace("_", ""):
            return mode
    raise ValueError(f"{given!r} is no autoreset mode; they are {', '.join(MODES)}")


class Autoreset:
    """Turns `terminated` and `truncated` into the rows that start at the next step.

    An episode is over at `done`. What the policy is shown next is, with `same_step` and `disabled`
    (where the caller resets), the first observation of a new one. With `next_step` it is the last
    of the old one, and the action is ignored; the first of the new one comes a step later
    (gymnasium's `AutoresetMode`).
    """

    def __init__(self, mode: str, num_envs: int) -> None:
        self._is_late = mode == "next_step"
        self._num_envs = num_envs
        self._done = np.zeros(num_envs, dtype=np.bool_)  # last step, and not started since
        self._starts = np.ones(num_envs, dtype=np.bool_)

    @property
    def starts(self) -> npt.NDArray[np.bool_]:
        """`[num_envs]`, of the next step."""
        return self._starts.copy()

    @property
    def ended(self) -> npt.NDArray[np.bool_]:
        """`[num_envs]`: whose next action is ignored, as their episodes are over."""
        return self._done & ~self._starts

    def reset(self, rows: npt.ArrayLike | None = None) -> None:
        """These were reset by the caller, or all of them: they start."""
        which = np.ones(self._num_envs, dtype=np.bool_) if rows is None else self.flags(rows)
        self._starts |= which
        self._done &= ~which

    def restart(self) -> None:
        """All start, wherever their environments are; ends that were told stay told."""
        self._starts[:] = True

    def acted(self) -> None:
        """A step was taken; nobody starts at the next, as far as is known."""
        self._starts[:] = False

    def observe(self, terminated: npt.ArrayLike, truncated: npt.ArrayLike) -> None:
        """What the environments said of the step that was just taken. Raises ValueError."""
        done = self.flags(terminated) | self.flags(truncated)
        if self._is_late:
            self._starts |= self._done
            self._done = done
        else:
            self._starts |= done

    def flags(self, given: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """One for each environment. Raises ValueError."""
        flags = np.asarray(given, dtype=np.bool_)
        if flags.shape != (self._num_envs,):
            raise ValueError(
                f"the flags have the shape {list(flags.shape)}, and there are {self._num_envs} "
                "environments"
            )
        return flags
