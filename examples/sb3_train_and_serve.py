"""Trains a RecurrentPPO, exports its zip, serves it, and plays what Stable-Baselines3 plays.

pip install sb3-contrib
python examples/sb3_train_and_serve.py --output artifacts/recall

The environment here takes memory: what it shows once, it asks for until it ends. A hundred episodes
are played by `evaluate_policy` and, of the same seeds, through the service: return by return alike.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from tamiyo_client import wrap

NUM_ENVS = 8
NUM_CUES = 3
SEED = 7


class Recall(gymnasium.Env[npt.NDArray[np.float32], npt.NDArray[np.int64]]):
    """Shows a cue at the first step, and a bit at each; asks for both, for four to twelve steps."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(-1.0, 1.0, (NUM_CUES + 1,))
        self.action_space = gymnasium.spaces.MultiDiscrete([NUM_CUES, 2])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._cue = int(self.np_random.integers(NUM_CUES))
        self._steps_left = int(self.np_random.integers(4, 13))
        shown = self._next()
        shown[self._cue] = 1.0
        return shown, {}

    def step(
        self, action: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        reward = (int(action[0]) == self._cue) / 2 + (int(action[1]) == self._bit) / 2
        self._steps_left -= 1
        return self._next(), reward, self._steps_left == 0, False, {}

    def _next(self) -> npt.NDArray[np.float32]:
        self._bit = int(self.np_random.integers(2))
        shown = np.zeros(NUM_CUES + 1, np.float32)
        shown[NUM_CUES] = 2 * self._bit - 1
        return shown


def trainer() -> Any:
    return RecurrentPPO(
        "MlpLstmPolicy",
        DummyVecEnv([Recall] * NUM_ENVS),
        n_steps=64,
        batch_size=128,
        n_epochs=8,
        learning_rate=5e-3,
        policy_kwargs={"lstm_hidden_size": 16, "net_arch": [16]},
        seed=SEED,
        device="cpu",
    )


def trainers_returns(model: Any, num_episodes: int) -> list[float]:
    """Of each episode in the order they end, by Stable-Baselines3 itself."""
    envs = DummyVecEnv([Recall] * NUM_ENVS)
    envs.seed(SEED)
    evaluated: Any = evaluate_policy(
        model, envs, num_episodes, deterministic=True, return_episode_rewards=True, warn=False
    )
    returns, _ = evaluated
    return [float(of_episode) for of_episode in returns]


def served_returns(url: str, num_episodes: int) -> list[float]:
    """The same, of the policy on the server; each environment plays its share."""
    envs = SyncVectorEnv([Recall] * NUM_ENVS, autoreset_mode=AutoresetMode.SAME_STEP)
    left = np.array([(num_episodes + at) // NUM_ENVS for at in range(NUM_ENVS)])
    totals, returns = np.zeros(NUM_ENVS), []
    with wrap(envs, url) as policy:
        observations, infos = policy.reset(seed=SEED)
        while left.any():
            act = policy.act(observations, infos, deterministic=True)
            observations, rewards, terminated, truncated, infos = policy.step(act)
            totals += rewards
            for env in np.flatnonzero(terminated | truncated):
                if left[env]:
                    returns.append(float(totals[env]))
                    left[env] -= 1
                totals[env] = 0.0
    envs.close()
    return returns


@contextmanager
def service(artifact: Path) -> Iterator[str]:
    """The URL of one that runs, on a free port, as long as the context does."""
    command = [sys.executable, "-m", "service", "--artifact", str(artifact), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = (re.search(r"ready: .*(http://[^/\s]+)", line) for line in process.stdout)
            yield next(found[1] for found in lines if found)
        finally:
            process.terminate()
            process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("artifacts/recall"), metavar="DIR")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--train-steps", type=int, default=6000)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    checkpoint, artifact = options.output / "model.zip", options.output / "artifact"

    torch.set_num_threads(1)  # for layers as small as these, more wait for each other
    model = trainer()
    untrained = trainers_returns(model, options.episodes)
    model.learn(options.train_steps)
    model.save(checkpoint)

    export = [sys.executable, "-m", "export", "--checkpoint", str(checkpoint)]
    subprocess.run([*export, "--output", str(artifact), "--overwrite"], check=True)

    expected = trainers_returns(model, options.episodes)
    with service(artifact) as url:
        returns = served_returns(url, options.episodes)
    print(f"untrained: {np.mean(untrained):.2f}")
    print(f"trained, by Stable-Baselines3: {np.mean(expected):.2f}")
    print(f"trained, by the service: {np.mean(returns):.2f}")
    if returns != expected:
        raise SystemExit("the returns are not the same")
    print(f"{len(returns)} episodes, each with the same return")


if __name__ == "__main__":
    main()
