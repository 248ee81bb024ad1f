"""The policy against plain NumPy, whatever its wiring: scores, states, resets, masks, sampling."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.sb3.spec import SB3Spec
from tests.naive_sb3 import log_probs
from tests.sb3.policies import SPECS, WIRINGS, naive_of, random_masks, random_sb3, spec_of

ATOL = 2e-5
ROWS = 3
STEPS = 5


def by_head(spec: SB3Spec, packed: NDArray[Any]) -> dict[str, torch.Tensor]:
    parts = np.split(packed, np.cumsum(spec.head_sizes)[:-1], axis=1)
    return {name: torch.from_numpy(part) for name, part in zip(spec.head_names, parts, strict=True)}


@settings(deadline=None, max_examples=60)
@given(spec=SPECS, seed=st.integers(0, 2**16))
def test_steps_are_those_of_plain_numpy_across_resets(spec: SB3Spec, seed: int) -> None:
    policy, rng = random_sb3(spec, seed), np.random.default_rng(seed)
    naive = naive_of(policy)
    state = policy.initial_state(ROWS)
    states = [{of.name: np.zeros(of.shape) for of in spec.states} for _ in range(ROWS)]
    for _ in range(STEPS):
        starts = rng.random(ROWS) < 0.3
        for row in np.flatnonzero(starts).tolist():
            states[row] = {of.name: np.zeros(of.shape) for of in spec.states}
        state = tuple(
            torch.where(torch.from_numpy(starts)[:, None, None], 0.0, part) for part in state
        )
        observation = rng.normal(size=(ROWS, spec.observation_dim)).astype(np.float32)
        mask = random_masks(spec, rng, ROWS)
        noise = rng.gumbel(size=mask.shape).astype(np.float32)
        act = policy.get_action(
            torch.from_numpy(observation), state, by_head(spec, mask), torch.from_numpy(noise)
        )
        for row in range(ROWS):
            expected = naive.row(observation[row], states[row])
            states[row] = expected.states
            np.testing.assert_allclose(act.value[row], expected.value, atol=ATOL, rtol=ATOL)
            likely = log_probs(expected.logits, mask[row], spec.head_sizes)
            first = 0
            for head in spec.heads:
                own = slice(first, first + head.size)
                first += head.size
                action = int(act.action[head.name][row])
                score = likely[own] + noise[row, own]
                assert score[action] >= score.max() - ATOL
                taken = float(act.log_prob[head.name][row])
                assert taken == pytest.approx(likely[own][action], abs=ATOL, rel=ATOL)
            for of, part in zip(spec.states, act.state, strict=True):
                np.testing.assert_allclose(
                    part[row], expected.states[of.name], atol=ATOL, rtol=ATOL
                )
        state = act.state


@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_masked_choice_is_never_taken_however_small_the_logits_are(wiring: str) -> None:
    """There is no LayerNorm to bound them: esper-lite's -1e4 would lose to the allowed one."""
    policy = random_sb3(spec_of((3,), WIRINGS[wiring]))
    policy.action_net.bias.copy_(torch.tensor([-1e30, 5.0, -3e4]))
    policy.action_net.weight.zero_()
    for allowed in range(3):
        mask = torch.arange(3).eq(allowed).expand(2, 3)
        act = policy.get_action(torch.zeros(2, 6), masks={"action_0": mask})
        assert act.action["action_0"].tolist() == [allowed, allowed]
        assert act.log_prob["action_0"].tolist() == [0.0, 0.0]


def test_the_first_of_equal_choices_is_taken() -> None:
    policy = random_sb3(spec_of((4, 2)))
    policy.action_net.weight.zero_()
    policy.action_net.bias.zero_()
    act = policy.get_action(torch.zeros(1, 6))
    assert [int(act.action[name]) for name in policy.spec.head_names] == [0, 0]


@pytest.mark.parametrize("wiring", WIRINGS)
def test_states_of_another_shape_are_refused_by_name(wiring: str) -> None:
    policy = random_sb3(spec_of(recurrence=WIRINGS[wiring]))
    state = policy.initial_state(2)
    assert len(state) == len(policy.spec.states)
    for at, of in enumerate(policy.spec.states):
        wrong = [*state]
        wrong[at] = torch.zeros(2, 9, 9)
        with pytest.raises(ValueError, match=rf"^state {of.name} has shape \(2, 9, 9\)"):
            policy.get_action(torch.zeros(2, 6), tuple(wrong))


def test_a_policy_without_memory_carries_nothing() -> None:
    policy = random_sb3(spec_of())
    assert policy.initial_state(4) == ()
    assert policy.get_action(torch.zeros(4, 6)).state == ()
    with pytest.raises(ValueError, match=r"^state has 1 arrays, expected 0$"):
        policy.get_action(torch.zeros(4, 6), (torch.zeros(4, 1, 1),))


def test_blueprints_are_another_family_s() -> None:
    with pytest.raises(ValueError, match=r"^blueprint_index is given, and this policy reads none$"):
        random_sb3(spec_of()).step_scores(
            torch.zeros(2, 6), blueprint_index=torch.zeros(2, 3, dtype=torch.int64)
        )


def test_a_mask_that_allows_nothing_is_refused() -> None:
    policy = random_sb3(spec_of())
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match=r"^mask 'action_2' allows nothing in row 1$"):
        policy.get_action(torch.zeros(2, 6), masks={"action_2": mask})


@pytest.mark.parametrize("wiring", WIRINGS)
def test_compiled_it_acts_as_it_does_eagerly(wiring: str) -> None:
    policy = random_sb3(spec_of(recurrence=WIRINGS[wiring]))
    compiled = torch.compile(policy.get_action, backend="aot_eager", fullgraph=True)
    observation = torch.linspace(-1, 1, 12).view(2, 6)
    eager, act = policy.get_action(observation), compiled(observation)
    torch.testing.assert_close(act.value, eager.value)
    torch.testing.assert_close(act.state, eager.state)
    assert all(torch.equal(act.action[name], eager.action[name]) for name in eager.action)
