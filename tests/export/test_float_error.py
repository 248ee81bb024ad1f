"""What float32 may move: enough for every right step, and too little for a wrong one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from export.comparison import ParityError
from export.episodes import EpisodeMaker
from export.float_error import GATE_ERROR, LARGEST_SLACK, MlpsError, Slack, of_gates
from export.judge import CarriedJudge
from export.log_prob_bounds import logit_bounds
from export.sb3_step import SB3Step
from model.sb3.normalizer import VecNormalizer
from model.sb3.policy import SB3Policy
from model.sb3.spec import Normalization, Recurrence, SB3Spec
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
        assert not slack.is_large(torch.zeros(64)).any()


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
    expected = 6 * 2.0**0.5 * 2.0**-24
    torch.testing.assert_close(slack.value, torch.tensor([expected, 1024 * expected]))


def test_a_normaliser_s_few_roundings_are_part_of_it() -> None:
    policy = random_sb3(spec_of((2,), actor_layers=(), critic_layers=(), observation_dim=1))
    policy.value_net.weight.fill_(1.0)
    policy.value_net.bias.zero_()
    normalization = Normalization(epsilon=1e-8, clip=10.0)
    one = torch.ones(1, dtype=torch.float64)
    normalizer = VecNormalizer(0 * one, one, normalization)
    slack = MlpsError(policy, normalizer, "fp32")(torch.tensor([[8.0]]), (), ())
    assert slack.value is not None
    expected = 6 * 8 * (4.0**2 + 2) ** 0.5 * 2.0**-24
    torch.testing.assert_close(slack.value, torch.tensor([expected]))


def test_rows_that_begin_begin_without_an_error() -> None:
    policy = random_sb3(spec_of(recurrence=WIRINGS["lstm"]))
    gate = gate_of(policy)
    maker = EpisodeMaker(gate.exact.rebuilt, 7)
    carried = CarriedJudge(gate.exact, ROWS)
    zero = tuple(torch.zeros_like(part) for part in zeros(policy))
    with torch.inference_mode():
        for _ in range(5):
            carried.answer(replace(maker.moment(ROWS), begins=torch.zeros(ROWS).bool()))
        moment = maker.moment(ROWS)
        begins = torch.tensor([True, False, True, False])
        slack = carried.answer(replace(moment, begins=begins, begin_state=zero)).slack
        exact = gate.exact.float_error(moment.observation, zero, zero)
    for got, of_start in zip(slack.states, exact.states, strict=True):
        torch.testing.assert_close(got[begins], of_start[begins])
        assert not torch.allclose(got[~begins], of_start[~begins])


def test_bf16_rounds_what_goes_into_a_product_and_what_comes_out() -> None:
    policy = random_sb3(spec_of((2,), actor_layers=(), critic_layers=(), observation_dim=1))
    policy.value_net.weight.fill_(1.0)
    policy.value_net.bias.zero_()
    slack = MlpsError(policy, None, "bf16")(torch.tensor([[1.0]]), (), ())
    assert slack.value is not None
    assert float(slack.value[0]) == pytest.approx(6 * 2.0**-9, rel=1e-3)


def test_a_gate_s_error_is_multiplied_by_what_the_cell_held() -> None:
    h, c = torch.ones(2, 1, 3), torch.tensor([[[0.0, 2.0, -8.0]]]).expand(2, 1, 3)
    slack = of_gates(torch.zeros(2, 1), (h, c), (h, c))
    for part in slack.states:
        torch.testing.assert_close(part, GATE_ERROR * c.abs())
    assert not slack.is_large(torch.zeros(2)).any()


def test_one_number_far_off_makes_its_row_uncertain() -> None:
    small, large = torch.full((2, 3), 1e-5), torch.full((2, 3), 1e-5)
    large[1, 2] = 2 * LARGEST_SLACK
    none, value = torch.zeros(2), torch.zeros(2)
    assert Slack((), small, none).is_large(value).tolist() == [False, False]
    assert Slack((), large, none).is_large(value).tolist() == [False, True]
    assert Slack((large[:, None],), small, none).is_large(value).tolist() == [False, True]
    assert Slack((), small, large[:, 2]).is_large(value).tolist() == [False, True]
    thousands = torch.tensor([0.0, -3000.0])  # of which a thousandth is more than that
    assert Slack((), small, large[:, 2]).is_large(thousands).tolist() == [False, False]
    assert Slack((), large, none).is_large(thousands).tolist() == [False, True]


def test_values_in_thousands_are_no_chaos() -> None:
    policy = random_sb3(spec_of(actor_layers=(64,), critic_layers=(64,)))
    policy.value_net.bias.add_(5000.0)
    with torch.inference_mode():
        judged(gate_of(policy), SB3Step(policy, None).eval())


def test_a_wrong_step_of_a_policy_with_far_rows_is_told_where() -> None:
    """Of a ReLU network without statistics some rows may be anything: most may not."""
    policy = random_sb3(spec_of(actor_layers=(64, 64), critic_layers=(64, 64), activation="ReLU"))
    step = SB3Step(policy, None).eval()
    step.value.layers[-1].bias.data.add_(0.01)  # type: ignore[operator]
    with torch.inference_mode(), pytest.raises(ParityError, match=r"value\[\d+\] is .* expected"):
        judged(gate_of(policy), step)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_bf16_is_no_cloak_for_a_wrong_actor(wiring: str) -> None:
    """Nor for a wrong critic: what is off a little in all rows is off in their mean."""
    policy = random_sb3(spec_of(recurrence=WIRINGS[wiring], actor_layers=(64, 64)), gain=1.0)
    gate = gate_of(policy, precision="bf16")
    for part in ("action", "value"):
        step = SB3Step(policy, None, "bf16").eval()
        getattr(step, part).layers[-1].weight.data.mul_(0.96)
        with torch.inference_mode(), pytest.raises(ParityError):
            judged(gate, step)


def test_a_chaotic_policy_is_refused() -> None:
    """Its float32 and its float64 part ways within an episode: nothing could be compared."""
    recurrence = Recurrence(hidden_dim=128, num_layers=1, critic="shared")
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
