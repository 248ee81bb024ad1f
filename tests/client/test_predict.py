"""`predict` as Stable-Baselines3 has it, without Stable-Baselines3."""

import numpy as np
import pytest

from model.spec import PolicySpec
from tamiyo_client import PolicyClient, VectorPolicyClient
from tests.random_inputs import random_observations
from tests.running_server import RunningServer

NUM_ROWS = 3


def test_a_state_is_gone_on_from_and_none_begins_anew(
    server: RunningServer, spec: PolicySpec
) -> None:
    shown = random_observations(spec, np.random.default_rng(1), 6, NUM_ROWS)
    starts = np.zeros(NUM_ROWS, dtype=bool)
    with VectorPolicyClient(server.address, NUM_ROWS, seed=2) as client:
        acts = []
        for step in range(6):
            starts[:] = step == 3  # all start at the fourth, as their episodes ended
            acts.append(client.act(shown[step], episode_start=starts))
    with VectorPolicyClient(server.address, NUM_ROWS, seed=2) as client:
        for _ in range(2):
            state = None
            for step in range(6):
                actions, state = client.predict(shown[step], state, np.full(NUM_ROWS, step == 3))
                assert np.array_equal(actions, acts[step].multi_discrete)


def test_no_start_is_no_start(server: RunningServer, spec: PolicySpec) -> None:
    shown = random_observations(spec, np.random.default_rng(1), 2, NUM_ROWS)
    with VectorPolicyClient(server.address, NUM_ROWS, seed=2) as client:
        client.act(shown[0])
        expected = client.act(shown[1]).multi_discrete
    with VectorPolicyClient(server.address, NUM_ROWS, seed=2, autoreset_mode="disabled") as client:
        _, state = client.predict(shown[0])
        client.observe([True] * NUM_ROWS, [False] * NUM_ROWS)  # which is for `act`
        actions, _ = client.predict(shown[1], state)
        assert np.array_equal(actions, expected)


def test_a_state_that_is_not_the_last_is_refused(server: RunningServer, spec: PolicySpec) -> None:
    shown = np.zeros((NUM_ROWS, spec.observation_dim))
    with VectorPolicyClient(server.address, NUM_ROWS) as client:
        _, first = client.predict(shown)
        client.predict(shown, first)
        with pytest.raises(ValueError, match="not that of the last answer"):
            client.predict(shown, first)


def test_a_lone_observation_has_a_lone_action(server: RunningServer, spec: PolicySpec) -> None:
    with VectorPolicyClient(server.address, 1) as client:
        actions, state = client.predict(np.zeros(spec.observation_dim), deterministic=True)
        assert actions.shape == (len(spec.heads),)
        masks = {spec.op_head: np.eye(spec.num_ops, dtype=bool)[2]}
        actions, state = client.predict(np.zeros(spec.observation_dim), state, action_masks=masks)
        assert actions[spec.op_index] == 2
        actions, _ = client.predict(
            np.zeros((1, spec.observation_dim)),
            state,
            [False],
            action_masks={head: mask[None] for head, mask in masks.items()},
        )
        assert actions.shape == (1, len(spec.heads))
        assert actions[0, spec.op_index] == 2


def test_starts_of_another_number_are_refused(server: RunningServer, spec: PolicySpec) -> None:
    with (
        VectorPolicyClient(server.address, NUM_ROWS) as client,
        pytest.raises(ValueError, match="there are 3 environments"),
    ):
        client.predict(np.zeros((NUM_ROWS, spec.observation_dim)), None, [True])


@pytest.mark.parametrize("seed", [-1, 2**64, np.int64(-1)])
def test_a_seed_beyond_64_bits_is_refused(
    server: RunningServer, spec: PolicySpec, seed: int
) -> None:
    with (
        PolicyClient(server.address) as client,
        pytest.raises(ValueError, match=r"from 0 to 2\*\*64 - 1"),
    ):
        client.act(np.zeros(spec.observation_dim), seed=seed)
