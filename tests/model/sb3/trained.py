"""VecNormalizes of Stable-Baselines3 itself, with statistics of a test's choice."""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from numpy.typing import NDArray

from model.sb3.spec import ObservationPart

vec_env: Any = pytest.importorskip(
    "stable_baselines3.common.vec_env", reason="stable_baselines3 is in the extra `heavy`"
)

NUM_ENVS = 2


def box(*shape: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, shape, np.float32)


class Still(gymnasium.Env[Any, Any]):
    """Nothing ever happens in it."""

    action_space = spaces.Discrete(2)

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.observation_space = space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return self.observation_space.sample(), {}


def vec_normalize(space: spaces.Space[Any], **options: Any) -> Any:
    """Freshly made, after one reset, so that it holds an observation as a trained one does."""
    wrapped = vec_env.DummyVecEnv([lambda: Still(space)] * NUM_ENVS)
    vec = vec_env.VecNormalize(wrapped, **options)
    vec.reset()
    return vec


def with_moments(vec: Any, moments: Mapping[str | None, tuple[Any, Any]]) -> Any:
    """The same, with this mean and variance by key, or by None for a Box."""
    for key, (mean, var) in moments.items():
        running = vec.obs_rms if key is None else vec.obs_rms[key]
        running.mean, running.var = mean, var
    return vec


def parts_of(space: spaces.Space[Any]) -> tuple[ObservationPart, ...]:
    """As the policy reads it: a Dict by its keys, in their sorted order."""
    if isinstance(space, spaces.Dict):
        return tuple(_part(key, space.spaces[key]) for key in sorted(space.spaces))
    return (_part(None, space),)


def _part(key: str | None, space: spaces.Space[Any]) -> ObservationPart:
    kind: Any = "box" if isinstance(space, spaces.Box) else "one_hot"
    return ObservationPart(key=key, kind=kind, size=spaces.flatdim(space))


def flat(
    observation: Mapping[str, NDArray[Any]] | NDArray[Any], space: spaces.Space[Any]
) -> NDArray[np.float32]:
    """`[B, observation_dim]` of a batch, one-hot where it is no Box."""
    if not isinstance(space, spaces.Dict):
        rows: list[Any] = [spaces.flatten(space, row) for row in observation]
        return np.stack(rows).astype(np.float32)
    assert isinstance(observation, Mapping)
    columns = [flat(observation[key], space.spaces[key]) for key in sorted(space.spaces)]
    return np.concatenate(columns, axis=1)
