"""Clients of policies that carry nothing from step to step, two arrays or four."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from model.spec import PolicySpec
from model.step_spec import StepSpec
from tamiyo_client import Act, PolicyClient, VectorAct, VectorPolicyClient
from tests.running_server import RunningServer
from tests.service.gated_server import serving
from tests.specs import TINY_LSTMS, TINY_MLPS, TINY_V1

NUM_ROWS, NUM_STEPS = 3, 5
SEEDS = [5, 6, 7]
DEAD = "http://127.0.0.1:9"
"""The discard port, where nothing listens."""


@pytest.fixture(scope="module", params=[TINY_MLPS, TINY_V1, TINY_LSTMS], ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> StepSpec:
    of_family: StepSpec = request.param
    return of_family


@pytest.fixture(scope="module")
def server(spec: PolicySpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(spec, tmp_path_factory.mktemp("family")) as server:
        yield server
        assert "Traceback" not in server.log()


def shown(spec: StepSpec, *lead: int) -> NDArray[np.float32]:
    """Small whole numbers, whose sums are exact."""
    rng = np.random.default_rng(1)
    return rng.integers(1, 9, (*lead, spec.observation_dim)).astype(np.float32)


def alike(one: VectorAct, other: VectorAct) -> bool:
    return (
        np.array_equal(one.multi_discrete, other.multi_discrete)
        and np.array_equal(one.log_probs, other.log_probs)
        and np.array_equal(one.value, other.value)
    )


def test_a_state_is_carried_by_its_caller_in_the_policy_s_order(
    server: RunningServer, spec: StepSpec
) -> None:
    observations = shown(spec, NUM_STEPS, NUM_ROWS)
    with VectorPolicyClient(server.address, NUM_ROWS) as client:
        state = None
        for step, observation in enumerate(observations):
            act = client.act_from(state, observation, step=step, seeds=SEEDS)
            state = act.state
        assert dict(act.extras) == {}
        assert client.act(observations[0]).state is None
    sums = observations[:, :, 0].sum(axis=0)
    if not spec.states:
        assert state is None
        return
    assert state is not None
    expected = {"h": sums, "c": NUM_STEPS, "critic_h": 2 * sums, "critic_c": 2 * NUM_STEPS}
    for of, array in zip(spec.states, state, strict=True):
        assert array.shape == (NUM_ROWS, *of.shape)
        assert (array[:, 0, 0] == expected[of.name]).all()


def test_who_brings_a_state_need_not_have_been_given_it(
    server: RunningServer, spec: StepSpec
) -> None:
    observations = shown(spec, 2, NUM_ROWS)
    with VectorPolicyClient(server.address, NUM_ROWS) as client:
        state = client.act_from(None, observations[0], seeds=SEEDS).state
        expected = client.act_from(state, observations[1], step=1, seeds=SEEDS)
    with VectorPolicyClient(server.address, NUM_ROWS) as client:
        act = client.act_from(state, observations[1], step=1, seeds=SEEDS)
    assert alike(act, expected)


def test_one_environment_carries_its_state(server: RunningServer, spec: StepSpec) -> None:
    observations, state = shown(spec, 3), None
    with PolicyClient(server.address) as client:
        for step, observation in enumerate(observations):
            free: Act = client.act_from(state, observation, step=step, seed=9)
            state = free.state
            held = client.act(observation, seed=9)
            assert (free.action, free.value) == (held.action, held.value)
            assert (state is None) == (not spec.states)


def test_a_state_of_another_number_of_arrays_is_refused(
    server: RunningServer, spec: StepSpec
) -> None:
    one = np.zeros((NUM_ROWS, 1, 1), np.float32)
    names = ", ".join(state.name for state in spec.states) or "none"
    with (
        VectorPolicyClient(server.address, NUM_ROWS) as client,
        pytest.raises(ValueError, match=f"has 3 arrays; those of the policy: {names}$"),
    ):
        client.act_from((one,) * 3, shown(spec, NUM_ROWS))


def test_predict_goes_on_with_what_it_gave(server: RunningServer, spec: StepSpec) -> None:
    observations = shown(spec, NUM_STEPS, NUM_ROWS)
    starts = [np.full(NUM_ROWS, step in (0, 3)) for step in range(NUM_STEPS)]
    with VectorPolicyClient(server.address, NUM_ROWS, seed=2) as client:
        acts = [
            client.act(observation, episode_start=of_step)
            for observation, of_step in zip(observations, starts, strict=True)
        ]
    with VectorPolicyClient(server.address, NUM_ROWS, seed=2) as client:
        state = None
        for observation, of_step, act in zip(observations, starts, acts, strict=True):
            actions, state = client.predict(observation, state, of_step)
            assert (state is None) == (not spec.states)
            chosen = act.multi_discrete
            assert np.array_equal(actions, chosen if len(act.heads) > 1 else chosen[:, 0])


def test_predict_takes_no_state_but_its_own(server: RunningServer, spec: StepSpec) -> None:
    observation = shown(spec, NUM_ROWS)
    with VectorPolicyClient(server.address, NUM_ROWS) as client:
        client.predict(observation)
        with pytest.raises(ValueError, match="`state` is not that of the last answer"):
            client.predict(observation, (np.zeros(NUM_ROWS), np.zeros(NUM_ROWS)))


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_predict_finds_a_server_that_is_there(
    server: RunningServer, spec: StepSpec, name: str
) -> None:
    """Whichever of the two the session's name prefers."""
    urls = [DEAD, server.address]
    with VectorPolicyClient(urls, NUM_ROWS, session_id=name, failover=True, retries=0) as client:
        actions, _ = client.predict(shown(spec, NUM_ROWS))
        assert len(actions) == NUM_ROWS
