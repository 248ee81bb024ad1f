"""Gymnasium environments whose episodes end at known, different steps."""

from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from model.spec import PolicySpec

LENGTHS = (1, 2, 3, 5, 7, 11, 40)
"""Steps of each environment's episodes."""
EPISODE, STEP = 0, 1
"""Where an observation says which of its environment's it is."""


def observation(spec: PolicySpec, index: int, episode: int, step: int) -> NDArray[np.float32]:
    """What environment `index` shows: drawn from all three, with the latter two written in."""
    rng = np.random.default_rng([index, episode, step])
    drawn = rng.normal(size=spec.observation_dim).astype(np.float32)
    drawn[[EPISODE, STEP]] = episode, step
    return drawn


class Counting(gymnasium.Env[NDArray[np.float32], NDArray[np.int64]]):
    """Ends after its `length` steps: every other episode terminated, the rest truncated."""

    def __init__(self, spec: PolicySpec, index: int, length: int) -> None:
        self.observation_space = gymnasium.spaces.Box(
            -np.inf, np.inf, (spec.observation_dim,), np.float32
        )
        self.action_space = gymnasium.spaces.MultiDiscrete(list(spec.head_sizes))
        self._spec = spec
        self._index = index
        self._length = length
        self._episode = -1

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        self._episode += 1
        self._step = 0
        return self._shown(), self._info()

    def step(
        self, action: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        assert self._step < self._length, "stepped after its end"
        self._step += 1
        is_over, is_odd = self._step == self._length, self._episode % 2 == 1
        reward = float(np.sum(action * np.arange(1, len(action) + 1)))
        return self._shown(), reward, is_over and not is_odd, is_over and is_odd, self._info()

    def _shown(self) -> NDArray[np.float32]:
        return observation(self._spec, self._index, self._episode, self._step)

    def _info(self) -> dict[str, Any]:
        return {}


def counting(spec: PolicySpec, mode: AutoresetMode) -> SyncVectorEnv:
    """One environment of each of `LENGTHS`."""
    makers = [partial(Counting, spec, index, length) for index, length in enumerate(LENGTHS)]
    return SyncVectorEnv(makers, autoreset_mode=mode)
