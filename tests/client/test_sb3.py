"""Stable-Baselines3's own evaluation against a server, unchanged."""

from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest

from model.spec import PolicySpec
from tamiyo_client import VectorPolicyClient
from tests.client.by_hand import ByHand
from tests.client.environments import Counting
from tests.running_server import RunningServer

LENGTHS = (3, 5, 8)
NUM_EPISODES = 7

evaluation = pytest.importorskip(
    "stable_baselines3.common.evaluation", reason="stable_baselines3 is in the extra `heavy`"
)


def makers(spec: PolicySpec) -> list[Callable[[], Any]]:
    return [partial(Counting, spec, index, length) for index, length in enumerate(LENGTHS)]


def by_hand(address: str, spec: PolicySpec) -> list[float]:
    """The reward of each episode in the order they end, as `evaluate_policy` counts them."""
    targets = [(NUM_EPISODES + at) // len(LENGTHS) for at in range(len(LENGTHS))]
    rewards: list[float] = []
    with httpx.Client(base_url=address) as http:
        envs = [make() for make in makers(spec)]
        sessions = [ByHand(http, f"evaluated-{at}") for at in range(len(envs))]
        shown = [env.reset()[0] for env in envs]
        totals, counts, is_first = [0.0] * 3, [0] * 3, [True] * 3
        while any(count < target for count, target in zip(counts, targets, strict=True)):
            for at, env in enumerate(envs):
                seed = 0 if is_first[at] else None
                told = sessions[at].act(shown[at], seed=seed, deterministic=True)
                shown[at], reward, terminated, truncated, _ = env.step(np.array(told.action))
                totals[at] += reward
                is_first[at] = terminated or truncated
                if is_first[at]:
                    if counts[at] < targets[at]:
                        rewards.append(totals[at])
                    counts[at] += 1
                    totals[at] = 0.0
                    shown[at] = env.reset()[0]
    return rewards


def test_evaluate_policy_finds_what_a_loop_by_hand_does(
    server: RunningServer, spec: PolicySpec
) -> None:
    from stable_baselines3.common.vec_env import DummyVecEnv

    envs = DummyVecEnv(makers(spec))
    with VectorPolicyClient(server.address, len(LENGTHS)) as client:
        for _ in range(2):  # each evaluation begins anew
            rewards, lengths = evaluation.evaluate_policy(
                client,
                envs,
                n_eval_episodes=NUM_EPISODES,
                deterministic=True,
                return_episode_rewards=True,
                warn=False,
            )
            expected = by_hand(server.address, spec)
            assert len(set(expected)) > 1
            # Later evaluations show later episodes of the environments, and other observations.
            envs = DummyVecEnv(makers(spec))
            assert rewards == expected
            assert set(lengths) == set(LENGTHS)
    envs.close()
