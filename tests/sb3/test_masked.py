"""What docs/stable-baselines3.md says to type, with a MaskablePPO and environments with masks."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from numpy.typing import NDArray

from tamiyo_client import VectorPolicyClient
from tests.running_server import ROOT, RunningServer, running_server

TIMEOUT_S = 240
NUM_ENVS, NUM_EPISODES = 4, 30
SIZES = (3, 4)

evaluation = pytest.importorskip(
    "sb3_contrib.common.maskable.evaluation", reason="sb3-contrib is in the extra `heavy`"
)
pytestmark = pytest.mark.timeout(2 * TIMEOUT_S)

BLOCKS = re.findall(
    r"```(\w+)\n(.*?)```", (ROOT / "docs" / "stable-baselines3.md").read_text(), re.DOTALL
)


class Lights(gymnasium.Env[NDArray[np.float32], NDArray[np.int64]]):
    """Each step some choices are dark, and may not be taken; the others are worth their light."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (sum(SIZES),))
    action_space = gymnasium.spaces.MultiDiscrete(list(SIZES))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._steps_left = int(self.np_random.integers(3, 9))
        return self._next(), {}

    def step(
        self, action: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        chosen = np.array([0, SIZES[0]]) + action
        assert self._mask[chosen].all(), "the policy took what it may not"
        reward = float(self._shown[chosen].sum())
        self._steps_left -= 1
        return self._next(), reward, self._steps_left == 0, False, {}

    def action_masks(self) -> NDArray[np.bool_]:
        return self._mask

    def _next(self) -> NDArray[np.float32]:
        self._shown = (self.np_random.integers(-4, 5, sum(SIZES)) / 4).astype(np.float32)
        self._mask = self.np_random.random(sum(SIZES)) < 0.5
        self._mask[[0, SIZES[0]]] |= [not part.any() for part in np.split(self._mask, SIZES[:1])]
        return self._shown


def block(language: str, containing: str) -> str:
    (found,) = (text for of, text in BLOCKS if of == language and containing in text)
    return str(found)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The model, and the directory that model.zip and its artifact lie in."""
    directory = tmp_path_factory.mktemp("masked")
    names: dict[str, Any] = {"make_env": Lights}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        exec(block("python", "model.learn").replace("100_000", "4096"), names)
        export, _ = block("sh", "-m service").splitlines()
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'client'}")
        subprocess.run([sys.executable, *shlex.split(export)[1:]], check=True, timeout=TIMEOUT_S)
    return names["model"], directory / "artifacts" / "model"


@pytest.fixture(scope="module")
def server(trained: tuple[Any, Path]) -> Iterator[RunningServer]:
    with running_server(trained[1]) as server:
        yield server


def test_the_loop_acts_within_the_masks(server: RunningServer) -> None:
    loop = block("python", "wrap(envs").replace("http://127.0.0.1:8000", server.address)
    names: dict[str, Any] = {"make_env": Lights}
    exec(loop.replace("range(1000)", "range(100)"), names)
    assert names["act"].log_prob.shape == (64,)


def returns(model: Any) -> list[float]:
    from stable_baselines3.common.vec_env import DummyVecEnv

    envs = DummyVecEnv([Lights] * NUM_ENVS)
    envs.seed(3)
    evaluated: Any = evaluation.evaluate_policy(
        model, envs, NUM_EPISODES, deterministic=True, return_episode_rewards=True, warn=False
    )
    return [float(of_episode) for of_episode in evaluated[0]]


def test_a_masked_policy_plays_as_the_trainer_s(
    trained: tuple[Any, Path], server: RunningServer
) -> None:
    expected = returns(trained[0])
    assert len(set(expected)) > 3
    with VectorPolicyClient(server.address, NUM_ENVS) as client:
        assert returns(client) == expected
