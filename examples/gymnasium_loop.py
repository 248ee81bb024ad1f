"""Steps gymnasium's vector environments by the policy on a server, in all three autoreset modes.

    python examples/gymnasium_loop.py --url http://127.0.0.1:8000

The environments here walk at random and end after a step or a hundred; put your own in their place.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from tamiyo_client import PolicyClient, wrap


class Walk(gymnasium.Env[npt.NDArray[np.float32], npt.NDArray[np.int64]]):
    """An environment of the served policy's dimensions, with an action mask as gymnasium has it."""

    def __init__(self, observation_dim: int, head_sizes: dict[str, int]) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (observation_dim,))
        self.action_space = gymnasium.spaces.MultiDiscrete(list(head_sizes.values()))
        self._masks = {head: np.ones(size, np.int8) for head, size in head_sizes.items()}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._at = np.zeros(self.observation_space.shape or (), np.float32)
        return self._at, {"action_mask": self._masks}

    def step(
        self, action: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self._at = self._at + self.np_random.normal(size=self._at.shape).astype(np.float32)
        reward = float(-np.abs(self._at).mean())
        is_over = bool(self.np_random.random() < 0.03)
        return self._at, reward, is_over, False, {"action_mask": self._masks}


def run(url: str, mode: AutoresetMode, num_envs: int, num_steps: int) -> tuple[float, int]:
    """The mean reward, and how many episodes were begun."""
    with PolicyClient(url) as client:
        spec = client.policy()["spec"]
    heads = {head["name"]: head["size"] for head in spec["heads"]}
    make = partial(Walk, spec["observation_dim"], heads)
    envs = SyncVectorEnv([make] * num_envs, autoreset_mode=mode)
    total, num_episodes = 0.0, 0
    with wrap(envs, url, seed=7) as policy:
        observations, infos = policy.reset(seed=7)
        for _ in range(num_steps):
            act = policy.act(observations, infos)
            observations, rewards, terminated, truncated, infos = policy.step(act)
            total += float(rewards.sum())
            num_episodes += int(act.episode_start.sum())
            done = terminated | truncated
            if mode == AutoresetMode.DISABLED and done.any():
                observations, infos = policy.reset(options={"reset_mask": done})
    envs.close()
    return total / num_steps / num_envs, num_episodes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--envs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    for mode in AutoresetMode:
        mean_reward, num_episodes = run(options.url, mode, options.envs, options.steps)
        print(f"{mode.value}: mean reward {mean_reward:.3f}, {num_episodes} episodes")


if __name__ == "__main__":
    main()
