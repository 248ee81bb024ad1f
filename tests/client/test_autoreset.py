"""Which rows start when: real gymnasium environments, and the rule itself."""

import httpx
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.spec import PolicySpec
from tamiyo_client import PolicyClient, VectorAct, VectorPolicyClient, row_seed, wrap
from tamiyo_client.autoreset import MODES, Autoreset, autoreset_mode
from tests.client.by_hand import ByHand
from tests.client.environments import EPISODE, LENGTHS, STEP, counting
from tests.running_server import RunningServer

NUM_STEPS = 200
SEED = 11


def drive(server: RunningServer, spec: PolicySpec, mode: AutoresetMode) -> list[VectorAct]:
    """The loop of a trainer, `NUM_STEPS` long, each step checked against single sessions by hand.

    What starts an episode there is the observation's own word for it: its step is 0.
    """
    envs = counting(spec, mode)
    acts = []
    with (
        wrap(envs, server.address, seed=SEED) as policy,
        httpx.Client(base_url=server.address) as http,
    ):
        alone = [ByHand(http, f"{mode.value}-{row}") for row in range(len(LENGTHS))]
        observations, infos = policy.reset(seed=0)
        for _ in range(NUM_STEPS):
            act = policy.act(observations, infos)
            check(act, observations, alone)
            acts.append(act)
            observations, _, terminated, truncated, infos = policy.step(act)
            done = terminated | truncated
            if mode == AutoresetMode.DISABLED and done.any():
                observations, infos = policy.reset(options={"reset_mask": done})
    envs.close()
    return acts


def check(act: VectorAct, observations: NDArray[np.float32], alone: list[ByHand]) -> None:
    for row, (shown, by_hand) in enumerate(zip(observations, alone, strict=True)):
        is_first = shown[STEP] == 0
        seed = int(row_seed(SEED, row, int(shown[EPISODE]))) if is_first else None
        told = by_hand.act(shown, seed=seed)
        assert act.multi_discrete[row].tolist() == told.action
        assert act.log_probs[row].tolist() == told.log_prob
        assert act.value[row] == told.value
        assert act.episode_start[row] == is_first


@pytest.mark.parametrize("mode", AutoresetMode)
def test_states_restart_where_the_environments_do(
    server: RunningServer, spec: PolicySpec, mode: AutoresetMode
) -> None:
    acts = drive(server, spec, mode)
    num_episodes = np.sum([act.episode_start for act in acts], axis=0)
    pause = 1 if mode == AutoresetMode.NEXT_STEP else 0
    expected = [-(-NUM_STEPS // (length + pause)) for length in LENGTHS]
    assert num_episodes.tolist() == expected


@pytest.mark.parametrize("mode", AutoresetMode)
def test_a_mode_is_gymnasiums_or_its_name_or_read_off_the_environment(
    spec: PolicySpec, mode: AutoresetMode
) -> None:
    envs = counting(spec, mode)
    named = autoreset_mode(mode)
    assert named in MODES
    assert autoreset_mode(mode.value) == autoreset_mode(named) == autoreset_mode(envs) == named


def test_another_mode_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="'sometimes' is no autoreset mode; they are next_step"):
        VectorPolicyClient("http://127.0.0.1:1", 2, autoreset_mode="sometimes")


def test_flags_of_another_length_are_refused() -> None:
    client = VectorPolicyClient("http://127.0.0.1:1", 3)
    with pytest.raises(ValueError, match=r"have the shape \[2\], and there are 3 environments"):
        client.observe([True, False], [False, False])


@given(st.sampled_from(MODES), st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12))
def test_a_row_starts_once_for_each_end(mode: str, ends: list[tuple[bool, bool]]) -> None:
    rows = Autoreset(mode, 1)
    num_starts, num_ends, is_resetting = 0, 0, False
    for terminated, truncated in ends:
        num_starts += int(rows.starts[0])
        rows.acted()
        is_over = (terminated or truncated) and not is_resetting
        rows.observe([terminated and is_over], [truncated and is_over])
        num_ends += is_over
        is_resetting = mode == "next_step" and is_over
    if ends:
        assert num_starts + int(rows.starts[0]) + is_resetting == 1 + num_ends


def test_an_end_that_was_told_outlives_a_restart(server: RunningServer, spec: PolicySpec) -> None:
    """The environment shows the next episode's first observation whatever became of the server."""
    shown = np.ones((2, spec.observation_dim), np.float32)
    with VectorPolicyClient(server.address, 2, autoreset_mode="next_step") as client:
        client.act(shown)
        client.observe([True, False], [False, False])
        client.restart()
        assert client.starts.all()
        assert client.act(shown).episode_start.all()
        client.observe([False, False], [False, False])
        assert client.act(shown).episode_start.tolist() == [True, False]


@pytest.mark.parametrize("end", [(True, False), (False, True)])
def test_a_lone_environment_starts_where_it_ended(
    server: RunningServer, spec: PolicySpec, end: tuple[bool, bool]
) -> None:
    shown = np.ones(spec.observation_dim, np.float32)
    with PolicyClient(server.address) as client:
        assert client.act(shown).episode_start
        client.observe(False, False)
        assert not client.act(shown).episode_start
        client.observe(*end)
        assert client.act(shown).episode_start
        client.reset()
        assert client.act(shown).episode_start
        assert client.act(shown, episode_start=True).episode_start
        assert not client.act(shown).episode_start


def test_rows_that_the_caller_resets_start(spec: PolicySpec) -> None:
    rows = Autoreset("next_step", 3)
    rows.acted()
    rows.observe([True, False, False], [False, False, False])
    rows.reset([True, True, False])
    assert rows.starts.tolist() == [True, True, False]
    rows.acted()
    rows.observe([False] * 3, [False] * 3)
    assert not rows.starts.any()  # the first one's end was before its reset
