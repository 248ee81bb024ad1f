"""What float32 may move: enough for every right step, and too little for a wrong one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from export.comparison import ParityError
from export.float_error import GATE_ERROR, LARGEST_SLACK, MARGIN, MlpsError, Slack, of_gates
from export.log_prob_bounds import logit_bounds
from export.sb3_step import SB3Step
from model.sb3.policy import SB3Policy
from model.sb3.spec import Recurrence, SB3Spec
from tests.gate import gate_of, judged
from tests.sb3.policies import SPECS, WIRINGS, naive_of, random_sb3, spec_of

ROWS = 4
STEPS = 6
TIGHT = 1e-4
"""Of usual observations, and of networks as trainers leave them."""


def zeros(policy: SB3Policy, rows: int = ROWS) -> tuple[Tensor, ...]:
    return policy.initial_state(rows)


@settings(deadline=None, max_examples=40)
@given(
    spec=SPECS,
    seed=st.integers(0, 2**16),
    magnitude=st.sampled_from([1.0, 30.0, 1e4, 1e8]),
)
def test_what_float32_computes_is_within_it_of_float64(
    spec: SB3Spec, seed: int, magnitude: float
) -> None:
    """Of carried steps, each side on states of its own; the numbers in float64 are NumPy's."""
    policy, rng = random_sb3(spec, seed), np.random.default_rng(seed)
    naive, follow = naive_of(policy), MlpsError(policy, None, "fp32")
    state = error = zeros(policy)
    states = [{of.name: np.zeros(of.shape) for of in spec.states} for _ in range(ROWS)]
    for _ in range(STEPS):
        observation = rng.normal(size=(ROWS, spec.observation_dim)).astype(np.float32) * magnitude
        given_ = torch.from_numpy(observation.astype(np.float32))
        slack = follow(given_, state, error)
        scores = policy.step_scores(given_, state)
        assert slack.value is not None
        assert slack.logits is not None
        logits = scores.choices.logits[:, policy.heads.valid]
        for row in range(ROWS):
            expected = naive.row(observation[row], states[row])
            states[row] = expected.states
            pairs = [
                (scores.value[row], np.asarray(expected.value), slack.value[row]),
                (logits[row], expected.logits, slack.logits[row]),
            ]
            for at, of in enumerate(spec.states):
                moved = slack.states[at][row]
                pairs.append((scores.state[at][row], expected.states[of.name], moved))
            for got, want, most in pairs:
                off = np.abs(got.numpy().astype(np.float64) - want)
                assert (off <= most.numpy() + 1e-6 + 1e-6 * np.abs(want)).all()
        state, error = scores.state, slack.states


@pytest.mark.parametrize("wiring", WIRINGS)
def test_usual_numbers_are_hardly_moved(wiring: str) -> None:
    policy = random_sb3(spec_of(recurrence=WIRINGS[wiring]))
    follow, generator = MlpsError(policy, None, "fp32"), torch.Generator().manual_seed(0)
    state = error = zeros(policy, 64)
    for _ in range(50):
        observation = torch.randn(64, 6, generator=generator)
        slack = follow(observation, state, error)
        state, error = policy.step_scores(observation, state).state, slack.states
        for part in (slack.value, slack.logits, *slack.states):
            assert part is not None
            assert part.max() < TIGHT
        assert not slack.is_large().any()


def test_a_state_s_error_is_carried_on() -> None:
    policy = random_sb3(spec_of(recurrence=WIRINGS["lstm"]))
    follow, observation = MlpsError(policy, None, "fp32"), torch.randn(ROWS, 6)
    state = zeros(policy)
    exact = follow(observation, state, zeros(policy))
    error = tuple(torch.full_like(part, 1e-2) for part in state)
    moved = follow(observation, state, error)
    for before, after in zip(exact.states, moved.states, strict=True):
        assert (after > 10 * before).all()
        assert (after < 10 * 1e-2).all()


def test_one_product_s_error_is_that_of_its_roundings() -> None:
    """Of a Linear alone: as many roundings as terms, each of a unit of the largest sum's size."""
    policy = random_sb3(spec_of((2,), actor_layers=(), critic_layers=(), observation_dim=1))
    policy.value_net.weight.fill_(1.0)
    policy.value_net.bias.zero_()
    slack = MlpsError(policy, None, "fp32")(torch.tensor([[1.0], [1024.0]]), (), ())
    assert slack.value is not None
    expected = MARGIN * 2.0**0.5 * 2.0**-24
    torch.testing.assert_close(slack.value, torch.tensor([expected, 1024 * expected]))


def test_bf16_rounds_what_goes_into_a_product_and_what_comes_out() -> None:
    policy = random_sb3(spec_of((2,), actor_layers=(), critic_layers=(), observation_dim=1))
    policy.value_net.weight.fill_(1.0)
    policy.value_net.bias.zero_()
    slack = MlpsError(policy, None, "bf16")(torch.tensor([[1.0]]), (), ())
    assert slack.value is not None
    assert float(slack.value[0]) == pytest.approx(MARGIN * 2.0**-9, rel=1e-3)


def test_a_gate_s_error_is_multiplied_by_what_the_cell_held() -> None:
    h, c = torch.ones(2, 1, 3), torch.tensor([[[0.0, 2.0, -8.0]]]).expand(2, 1, 3)
    slack = of_gates(torch.zeros(2, 1), (h, c), (h, c))
    for part in slack.states:
        torch.testing.assert_close(part, GATE_ERROR * c.abs())
    assert not slack.is_large().any()


def test_one_number_far_off_makes_its_row_uncertain() -> None:
    small, large = torch.full((2, 3), 1e-5), torch.full((2, 3), 1e-5)
    large[1, 2] = 2 * LARGEST_SLACK
    value = torch.zeros(2)
    assert Slack((), small, value).is_large().tolist() == [False, False]
    assert Slack((), large, value).is_large().tolist() == [False, True]
    assert Slack((large[:, None],), small, value).is_large().tolist() == [False, True]
    assert Slack((), small, large[:, 2]).is_large().tolist() == [False, True]


def test_a_chaotic_policy_is_refused() -> None:
    """Its float32 and its float64 part ways within an episode: nothing could be compared."""
    recurrence = Recurrence(hidden_dim=64, num_layers=1, critic="shared")
    policy = random_sb3(spec_of(recurrence=recurrence), gain=60.0)
    with (
        torch.inference_mode(),
        pytest.raises(ParityError, match=r"moves most of the policy's answers by more than 0\.001"),
    ):
        judged(gate_of(policy), SB3Step(policy, None).eval())


@settings(deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([1e-6, 1e-3]))
def test_log_probs_of_logits_that_far_off_are_within_the_bounds(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (16, 2, 5)
    logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    margin = scale * torch.rand(shape, generator=generator, dtype=torch.float64)
    allowed = torch.rand(shape, generator=generator) < 0.7
    allowed[..., 0] = True
    off = margin * (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1)
    log_probs, moved = (
        torch.where(allowed, each, -1e4).log_softmax(-1) for each in (logits, logits + off)
    )
    lower, upper = logit_bounds(log_probs, allowed, margin)
    of_second_order = scale**2
    assert (lower - of_second_order <= moved)[allowed].all()
    assert (moved <= upper + of_second_order)[allowed].all()
    assert ((upper - lower)[allowed] <= 4 * scale + 1e-12).all()
