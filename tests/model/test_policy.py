"""The policy against the naive one, and the promises of its two methods."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from model.actor_critic import Act
from model.policy import Evaluation, FactoredRecurrentActorCritic
from model.recurrence import State
from model.spec import PolicySpec
from tests.naive import FLOAT_ATOL, LOG_PROB_ATOL, NaivePolicy
from tests.random_inputs import (
    gumbel_noise,
    random_actions,
    random_masks,
    random_observations,
    random_policy,
    random_state,
    stacked,
    tensors,
    weights_of,
)

SAME_SUMS_ATOL = 5e-6
"""Between our own float32 step and our own float32 sequence."""
GRADIENT_RTOL = 1e-3
"""Between a float32 gradient and a float64 central difference."""
ONE_IN_A_MILLION = math.log(1e6)
FREE_RANGE = 750.0
"""Beyond any standard Gumbel sample a float64 can express."""

SHAPES = {
    "2 slots, 1 layer": PolicySpec.tamiyo_v1(
        num_slots=2, observation_dim=11, feature_dim=12, hidden_dim=10, num_layers=1
    ),
    "3 slots, 2 layers": PolicySpec.tamiyo_v1(
        num_slots=3, observation_dim=7, feature_dim=13, hidden_dim=9, num_layers=2
    ),
    "5 slots, 1 layer": PolicySpec.tamiyo_v1(
        num_slots=5, observation_dim=16, feature_dim=5, hidden_dim=17, num_layers=1
    ),
    "5 slots, 2 layers": PolicySpec.tamiyo_v1(
        num_slots=5, observation_dim=1, feature_dim=3, hidden_dim=4, num_layers=2
    ),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())

V1_SHAPES = {
    "feature_net.0.weight": (128, 140),
    "feature_net.0.bias": (128,),
    "feature_net.1.weight": (128,),
    "feature_net.1.bias": (128,),
    "lstm.weight_ih_l0": (512, 128),
    "lstm.weight_hh_l0": (512, 128),
    "lstm.bias_ih_l0": (512,),
    "lstm.bias_hh_l0": (512,),
    "lstm_ln.weight": (128,),
    "lstm_ln.bias": (128,),
}
V1_OUTPUTS = {
    "slot_head": 3,
    "blueprint_head": 13,
    "style_head": 4,
    "tempo_head": 3,
    "alpha_target_head": 3,
    "alpha_speed_head": 4,
    "alpha_curve_head": 3,
    "op_head": 6,
    "value_head": 1,
}

Bools = NDArray[np.bool_]


def naive_of(policy: FactoredRecurrentActorCritic) -> NaivePolicy:
    return NaivePolicy(policy.spec, weights_of(policy))


def some_of(masks: dict[str, Bools]) -> dict[str, Bools]:
    """Every other head's mask: the others are absent, with nothing disallowed."""
    return {head: mask for index, (head, mask) in enumerate(masks.items()) if index % 2}


def as_state(state: tuple[NDArray[np.float32], NDArray[np.float32]]) -> State:
    return torch.from_numpy(state[0]), torch.from_numpy(state[1])


@every_shape
@pytest.mark.parametrize("masked", ["no head", "some heads", "every head"])
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "most likely"])
def test_chained_steps_are_the_naive_policys(
    shape: PolicySpec, masked: str, sampled: bool, rng: np.random.Generator
) -> None:
    policy = random_policy(shape)
    naive = naive_of(policy)
    h, c = random_state(shape, rng, 5)
    state = as_state((h, c))
    expected_h, expected_c = h.astype(np.float64), c.astype(np.float64)
    for _ in range(6):
        observation = random_observations(shape, rng, 5)
        masks = random_masks(shape, rng, 5)
        masks = {"no head": {}, "some heads": some_of(masks), "every head": masks}[masked]
        noise = gumbel_noise(shape, rng, 5) if sampled else None

        act = policy.get_action(
            torch.from_numpy(observation),
            state,
            tensors(masks) or None,
            None if noise is None else torch.from_numpy(noise),
        )
        expected = naive.step(observation, masks, noise, expected_h, expected_c)

        np.testing.assert_array_equal(stacked(shape, act.action), expected.action)
        np.testing.assert_allclose(
            stacked(shape, act.log_prob), expected.log_prob, atol=LOG_PROB_ATOL, rtol=0
        )
        np.testing.assert_allclose(act.value, expected.value, atol=FLOAT_ATOL, rtol=0)
        np.testing.assert_allclose(act.state[0], expected.h, atol=FLOAT_ATOL, rtol=0)
        np.testing.assert_allclose(act.state[1], expected.c, atol=FLOAT_ATOL, rtol=0)
        state, expected_h, expected_c = act.state, expected.h, expected.c


@every_shape
@pytest.mark.parametrize("masked", ["no head", "some heads", "every head"])
def test_evaluation_is_the_naive_policys(
    shape: PolicySpec, masked: str, rng: np.random.Generator
) -> None:
    policy = random_policy(shape)
    observations = random_observations(shape, rng, 4, 7)
    every = random_masks(shape, rng, 4, 7)
    actions = random_actions(shape, rng, every)
    masks = {"no head": {}, "some heads": some_of(every), "every head": every}[masked]
    h, c = random_state(shape, rng, 4)

    with torch.no_grad():
        evaluation = policy.evaluate_actions(
            torch.from_numpy(observations), tensors(actions), tensors(masks), as_state((h, c))
        )
    expected = naive_of(policy).evaluate(observations, stacked(shape, actions), masks, h, c)

    np.testing.assert_allclose(
        stacked(shape, evaluation.log_prob), expected.log_prob, atol=LOG_PROB_ATOL, rtol=0
    )
    np.testing.assert_allclose(
        stacked(shape, evaluation.entropy), expected.entropy, atol=FLOAT_ATOL, rtol=0
    )
    np.testing.assert_allclose(evaluation.value, expected.value, atol=FLOAT_ATOL, rtol=0)
    np.testing.assert_allclose(evaluation.state[0], expected.h, atol=FLOAT_ATOL, rtol=0)
    np.testing.assert_allclose(evaluation.state[1], expected.c, atol=FLOAT_ATOL, rtol=0)


@every_shape
def test_evaluation_scores_steps_as_the_steps_scored_themselves(
    shape: PolicySpec, rng: np.random.Generator
) -> None:
    policy = random_policy(shape)
    observations = torch.from_numpy(random_observations(shape, rng, 6, 9))
    masks = tensors(random_masks(shape, rng, 6, 9))
    noise = torch.from_numpy(gumbel_noise(shape, rng, 6, 9))
    start = state = as_state(random_state(shape, rng, 6))
    acts = []
    for t in range(9):
        step_masks = {head: mask[:, t] for head, mask in masks.items()}
        acts.append(policy.get_action(observations[:, t], state, step_masks, noise[:, t]))
        state = acts[-1].state

    actions = {
        head: torch.stack([act.action[head] for act in acts], dim=1) for head in shape.head_names
    }
    evaluation = policy.evaluate_actions(observations, actions, masks, start)

    for head in shape.head_names:
        log_prob = torch.stack([act.log_prob[head] for act in acts], dim=1)
        torch.testing.assert_close(
            evaluation.log_prob[head].detach(), log_prob, atol=SAME_SUMS_ATOL, rtol=0
        )
    value = torch.stack([act.value for act in acts], dim=1)
    torch.testing.assert_close(evaluation.value.detach(), value, atol=SAME_SUMS_ATOL, rtol=0)
    for ours, theirs in zip(evaluation.state, state, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, atol=SAME_SUMS_ATOL, rtol=0)


def test_forced_head_counts_for_nothing_whatever_its_mask_says(
    policy: FactoredRecurrentActorCritic, spec: PolicySpec, rng: np.random.Generator
) -> None:
    """The original takes style 0 with log-prob -1.39 where the caller forbids the forced style."""
    observations = torch.from_numpy(random_observations(spec, rng, 6, 1))
    op_mask = torch.eye(6, dtype=torch.bool)  # row r: op r and no other
    without_forced = torch.tensor([True, True, False, True]).expand(6, 4)
    masks = {"op": op_mask, "style": without_forced}

    act = policy.get_action(observations[:, 0], masks=masks)
    stored = {head: action.clone().unsqueeze(1) for head, action in act.action.items()}
    evaluation = policy.evaluate_actions(
        observations, stored, {head: mask.unsqueeze(1) for head, mask in masks.items()}
    )

    assert act.action["op"].tolist() == [0, 1, 2, 3, 4, 5]
    irrelevant = torch.tensor([True, False, False, True, True, True])
    assert (act.action["style"][irrelevant] == 2).all()
    assert (act.log_prob["style"][irrelevant] == 0).all()
    assert (evaluation.log_prob["style"][irrelevant] == 0).all()
    assert (evaluation.entropy["style"][irrelevant] == 0).all()
    assert (act.action["style"][~irrelevant] != 2).all()
    assert (act.log_prob["style"][~irrelevant] < 0).all()
    assert (evaluation.entropy["style"][~irrelevant] > 0).all()


@given(
    noise=hnp.arrays(np.float32, (3, 38), elements=st.floats(-FREE_RANGE, FREE_RANGE, width=32)),
    seed=st.integers(0, 2**32 - 1),
)
def test_masked_choice_is_never_taken(
    policy: FactoredRecurrentActorCritic, spec: PolicySpec, noise: NDArray[np.float32], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    masks = random_masks(spec, rng, 3)
    act = policy.get_action(
        torch.from_numpy(random_observations(spec, rng, 3)),
        masks=tensors(masks),
        noise=torch.from_numpy(noise),
    )
    for row in range(3):
        style_matters = int(act.action["op"][row]) in (1, 2)
        for head, mask in masks.items():
            taken = int(act.action[head][row])
            if head == "style" and not style_matters:
                assert taken == 2
            else:
                assert mask[row, taken]
            assert act.log_prob[head][row].isfinite()


def test_samples_are_as_frequent_as_they_are_likely(
    policy: FactoredRecurrentActorCritic, spec: PolicySpec, rng: np.random.Generator
) -> None:
    draws = 40_000
    observation = random_observations(spec, rng, 1)
    masks = random_masks(spec, rng, 1)
    masks["op"][:, 1:4] = True  # both kinds of op: style matters for 1 and 2, not for 3
    masks["style"][:] = True
    with torch.no_grad():
        scores = policy.step_scores(torch.from_numpy(observation), masks=tensors(masks))
    probabilities = scores.choices.log_probs[0].double().exp().numpy()

    act = policy.get_action(
        torch.from_numpy(observation).expand(draws, -1),
        masks={head: torch.from_numpy(mask).expand(draws, -1) for head, mask in masks.items()},
        noise=torch.from_numpy(gumbel_noise(spec, rng, draws)),
    )

    style_matters = (act.action["op"] == 1) | (act.action["op"] == 2)
    for index, head in enumerate(spec.heads):
        taken = act.action[head.name]
        if head.name == "style":
            assert 1000 < style_matters.sum() < draws - 1000
            taken = taken[style_matters]
        counts = np.bincount(taken.numpy(), minlength=head.size)
        assert_drawn_from(probabilities[index, : head.size], counts, head.name)


def assert_drawn_from(probabilities: NDArray[np.float64], counts: NDArray[Any], head: str) -> None:
    """Pearson's chi-square, over the choices expected at least 5 times.

    Laurent and Massart: a chi-square of k degrees exceeds k + 2 sqrt(k x) + 2 x at most exp(-x) of
    the time.
    """
    expected = probabilities * counts.sum()
    common = expected >= 5
    assert counts[~common].sum() <= 30, head
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    k, x = max(int(common.sum()) - 1, 1), ONE_IN_A_MILLION
    assert statistic < k + 2 * math.sqrt(k * x) + 2 * x, head


def test_same_noise_gives_the_same_act(
    policy: FactoredRecurrentActorCritic, spec: PolicySpec, rng: np.random.Generator
) -> None:
    observation = torch.from_numpy(random_observations(spec, rng, 4))
    noise = torch.from_numpy(gumbel_noise(spec, rng, 4))
    generator_state = torch.get_rng_state()
    first = policy.get_action(observation, noise=noise)
    second = policy.get_action(observation, noise=noise)
    for head in spec.head_names:
        assert torch.equal(first.action[head], second.action[head])
        assert torch.equal(first.log_prob[head], second.log_prob[head])
    assert torch.equal(torch.get_rng_state(), generator_state)


def test_masks_are_never_written_to(
    policy: FactoredRecurrentActorCritic, spec: PolicySpec, rng: np.random.Generator
) -> None:
    masks = tensors(random_masks(spec, rng, 4, 3))
    step_masks = {head: mask[:, 0] for head, mask in masks.items()}
    observations = torch.from_numpy(random_observations(spec, rng, 4, 3))
    before = {head: mask.clone() for head, mask in masks.items()}
    versions = {head: mask._version for head, mask in masks.items()}

    act = policy.get_action(observations[:, 0], masks=step_masks)
    stored = {head: action.clone().unsqueeze(1) for head, action in act.action.items()}
    policy.evaluate_actions(
        observations[:, :1], stored, {head: mask[:, :1] for head, mask in masks.items()}
    )

    for head, mask in masks.items():
        assert torch.equal(mask, before[head])
        assert mask._version == versions[head]


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_read_only_and_expanded_masks_are_fine(
    policy: FactoredRecurrentActorCritic, spec: PolicySpec, rng: np.random.Generator
) -> None:
    observation = torch.from_numpy(random_observations(spec, rng, 3))
    row = random_masks(spec, rng, 1)
    for mask in row.values():
        mask.setflags(write=False)
    expanded = {head: torch.from_numpy(mask).expand(3, -1) for head, mask in row.items()}
    copied = {head: mask.clone() for head, mask in expanded.items()}
    actual = policy.get_action(observation, masks=expanded)
    expected = policy.get_action(observation, masks=copied)
    assert {head: a.tolist() for head, a in actual.action.items()} == {
        head: a.tolist() for head, a in expected.action.items()
    }


def test_state_and_noise_are_never_written_to(
    policy: FactoredRecurrentActorCritic, spec: PolicySpec, rng: np.random.Generator
) -> None:
    h, c = as_state(random_state(spec, rng, 4))
    noise = torch.from_numpy(gumbel_noise(spec, rng, 4))
    observation = torch.from_numpy(random_observations(spec, rng, 4))
    policy.get_action(observation, (h, c), noise=noise)
    assert [tensor._version for tensor in (h, c, noise, observation)] == [0, 0, 0, 0]


def test_no_state_is_a_state_of_zeros(
    policy: FactoredRecurrentActorCritic, spec: PolicySpec, rng: np.random.Generator
) -> None:
    observation = torch.from_numpy(random_observations(spec, rng, 4))
    h, c = policy.initial_state(4)
    assert h.shape == c.shape == (4, 1, 10)
    assert not h.any()
    assert not c.any()
    fresh, explicit = policy.get_action(observation), policy.get_action(observation, (h, c))
    assert torch.equal(fresh.value, explicit.value)


def test_batch_may_be_empty(policy: FactoredRecurrentActorCritic, spec: PolicySpec) -> None:
    act = policy.get_action(torch.zeros(0, spec.observation_dim))
    assert act.value.shape == (0,)
    assert act.action["op"].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_state_is_the_modules_dtype_and_scores_are_float32(
    spec: PolicySpec, rng: np.random.Generator, dtype: torch.dtype
) -> None:
    policy = random_policy(spec).to(dtype)
    observations = torch.from_numpy(random_observations(spec, rng, 4, 2)).to(dtype)
    act = policy.get_action(observations[:, 0])
    act = policy.get_action(observations[:, 1], act.state)
    assert [part.dtype for part in act.state] == [dtype, dtype]
    assert_scores_float32(act)
    evaluation = policy.evaluate_actions(
        observations, {head: torch.zeros(4, 2, dtype=torch.int64) for head in spec.head_names}
    )
    assert [part.dtype for part in evaluation.state] == [dtype, dtype]
    assert_scores_float32(evaluation)


def test_scores_are_float32_under_bfloat16_autocast(
    policy: FactoredRecurrentActorCritic, spec: PolicySpec, rng: np.random.Generator
) -> None:
    observations = torch.from_numpy(random_observations(spec, rng, 4, 2))
    masks = random_masks(spec, rng, 4, 2)
    actions = tensors(random_actions(spec, rng, masks))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        act = policy.get_action(observations[:, 0])
        act = policy.get_action(observations[:, 1], act.state)
        evaluation = policy.evaluate_actions(observations, actions, tensors(masks))
    assert_scores_float32(act)
    assert_scores_float32(evaluation)
    with torch.no_grad():
        exact = policy.evaluate_actions(observations, actions, tensors(masks))
    torch.testing.assert_close(evaluation.value, exact.value, atol=0.1, rtol=0.1)


def assert_scores_float32(result: Act | Evaluation) -> None:
    assert result.value.dtype == torch.float32
    assert {tensor.dtype for tensor in result.log_prob.values()} == {torch.float32}
    if isinstance(result, Evaluation):
        assert {tensor.dtype for tensor in result.entropy.values()} == {torch.float32}


@pytest.mark.parametrize("num_layers", [1, 2])
def test_gradient_reaches_every_parameter_and_is_right(
    num_layers: int, rng: np.random.Generator
) -> None:
    """Against a central difference of the naive policy, along a random direction per parameter."""
    spec = PolicySpec.tamiyo_v1(
        num_slots=2, observation_dim=5, feature_dim=6, hidden_dim=8, num_layers=num_layers
    )
    policy = random_policy(spec)
    observations = random_observations(spec, rng, 4, 3)
    masks = random_masks(spec, rng, 4, 3)
    actions = random_actions(spec, rng, masks)
    actions["op"][:, 0] = 1  # some rows in which style matters, whatever was drawn
    masks["op"][:, 0, 1] = True
    weight = rng.normal(size=(3, 4, 3, len(spec.heads)))

    evaluation = policy.evaluate_actions(
        torch.from_numpy(observations), tensors(actions), tensors(masks)
    )
    terms = [
        torch.stack([evaluation.log_prob[head] for head in spec.head_names], dim=-1),
        torch.stack([evaluation.entropy[head] for head in spec.head_names], dim=-1),
        evaluation.value.unsqueeze(-1).expand(4, 3, len(spec.heads)),
    ]
    loss = (torch.stack(terms) * torch.from_numpy(weight)).sum()
    named = dict(policy.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    def loss_at(weights: dict[str, NDArray[np.float64]]) -> float:
        naive = NaivePolicy(spec, weights)
        log_prob, value, entropy, _, _ = naive.evaluate(observations, stacked(spec, actions), masks)
        values = np.broadcast_to(value[..., None], log_prob.shape)
        return float((np.stack([log_prob, entropy, values]) * weight).sum())

    weights, step = weights_of(policy), 1e-6
    for name, gradient in gradients.items():
        assert gradient.any(), name
        direction = rng.normal(size=weights[name].shape)
        ahead = loss_at(weights | {name: weights[name] + step * direction})
        behind = loss_at(weights | {name: weights[name] - step * direction})
        expected = (ahead - behind) / (2 * step)
        actual = float((gradient.double().numpy() * direction).sum())
        scale = float(np.linalg.norm(gradient.numpy()) * np.linalg.norm(direction))
        assert abs(actual - expected) < GRADIENT_RTOL * scale, name


def test_acting_results_cannot_be_trained_on_by_mistake(
    policy: FactoredRecurrentActorCritic, spec: PolicySpec, rng: np.random.Generator
) -> None:
    """Ticket B9-PT-02."""
    observations = torch.from_numpy(random_observations(spec, rng, 3, 1))
    act = policy.get_action(observations[:, 0])
    assert act.value.is_inference()
    stored = {head: action.unsqueeze(1) for head, action in act.action.items()}
    own = {head: action.clone() for head, action in stored.items()}

    with pytest.raises(ValueError, match=r"actions came out of inference mode.*\.clone\(\)"):
        policy.evaluate_actions(observations, stored)
    with pytest.raises(ValueError, match="state came out of inference mode"):
        policy.evaluate_actions(observations, own, state=act.state)
    with torch.inference_mode():
        frozen, frozen_mask = observations.clone(), torch.ones(3, 1, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="observations came out of inference mode"):
        policy.evaluate_actions(frozen, own)
    with pytest.raises(ValueError, match="masks came out of inference mode"):
        policy.evaluate_actions(observations, own, {"op": frozen_mask})

    state = (act.state[0].clone(), act.state[1].clone())
    evaluation = policy.evaluate_actions(observations, own, {"op": frozen_mask.clone()}, state)
    gradient = torch.autograd.grad(
        evaluation.log_prob["op"].sum(), policy.get_parameter("lstm_ln.weight")
    )
    assert gradient[0].any()


def test_acting_results_may_be_evaluated_where_no_gradient_is_recorded(
    policy: FactoredRecurrentActorCritic, spec: PolicySpec
) -> None:
    observations = torch.zeros(3, 1, spec.observation_dim)
    act = policy.get_action(observations[:, 0])
    stored = {head: action.unsqueeze(1) for head, action in act.action.items()}
    with torch.no_grad():
        evaluation = policy.evaluate_actions(observations, stored, state=act.state)
    assert not evaluation.value.requires_grad


@pytest.mark.parametrize("name", ["observation", "state h", "state c", "noise"])
def test_acting_on_what_requires_a_gradient_is_refused(
    policy: FactoredRecurrentActorCritic, spec: PolicySpec, name: str
) -> None:
    inputs = {
        "observation": torch.zeros(2, spec.observation_dim),
        "state h": torch.zeros(2, 1, 10),
        "state c": torch.zeros(2, 1, 10),
        "noise": torch.zeros(2, spec.num_choices),
    }
    inputs[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires a gradient.*detach"):
        policy.get_action(
            inputs["observation"], (inputs["state h"], inputs["state c"]), noise=inputs["noise"]
        )


def zero_actions(spec: PolicySpec, *lead: int) -> dict[str, Tensor]:
    return {head: torch.zeros(lead, dtype=torch.int64) for head in spec.head_names}


@pytest.mark.parametrize("head", ["slot", "style", "op"])
def test_mask_that_allows_nothing_is_named_with_its_row(
    policy: FactoredRecurrentActorCritic, spec: PolicySpec, rng: np.random.Generator, head: str
) -> None:
    masks = tensors(random_masks(spec, rng, 4, 5))
    masks[head][2, 3] = False
    observations = torch.zeros(4, 5, spec.observation_dim)
    with pytest.raises(ValueError, match=f"mask '{head}' allows nothing in row 2$"):
        policy.get_action(observations[:, 3], masks={name: m[:, 3] for name, m in masks.items()})
    with pytest.raises(ValueError, match=rf"mask '{head}' allows nothing in row \(2, 3\)$"):
        policy.evaluate_actions(observations, zero_actions(spec, 4, 5), masks)


@pytest.mark.parametrize("taken", [-1, 6, 13, 2**40])
def test_action_out_of_range_is_named_with_its_row(
    policy: FactoredRecurrentActorCritic, spec: PolicySpec, taken: int
) -> None:
    actions = zero_actions(spec, 4, 5)
    actions["op"][1, 2] = taken
    expected = rf"action 'op' is {taken} in row \(1, 2\); the head has 6 choices"
    with pytest.raises(ValueError, match=expected):
        policy.evaluate_actions(torch.zeros(4, 5, spec.observation_dim), actions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int32])
def test_action_that_is_not_int64_is_refused(
    policy: FactoredRecurrentActorCritic, spec: PolicySpec, dtype: torch.dtype
) -> None:
    actions = zero_actions(spec, 4, 5)
    actions["tempo"] = actions["tempo"].to(dtype)
    with pytest.raises(ValueError, match=f"action 'tempo' is {dtype}, not torch.int64"):
        policy.evaluate_actions(torch.zeros(4, 5, spec.observation_dim), actions)


def test_actions_name_every_head_and_no_other(
    policy: FactoredRecurrentActorCritic, spec: PolicySpec
) -> None:
    observations = torch.zeros(4, 5, spec.observation_dim)
    actions = zero_actions(spec, 4, 5)
    with pytest.raises(
        ValueError, match="actions name an unknown head 'speed'; the heads are slot"
    ):
        policy.evaluate_actions(observations, actions | {"speed": actions["op"]})
    del actions["tempo"]
    with pytest.raises(ValueError, match="actions have no head 'tempo'"):
        policy.evaluate_actions(observations, actions)


Call = Callable[[FactoredRecurrentActorCritic], object]
OBS = torch.zeros(2, 11)
SEQUENCE = torch.zeros(2, 3, 11)
ACTIONS = zero_actions(SHAPES["2 slots, 1 layer"], 2, 3)
STATE = torch.zeros(2, 1, 10)
WRONG_SHAPES: dict[str, tuple[str, Call]] = {
    "observation": (
        r"observation has shape \(2, 12\), expected \(any, 11\)",
        lambda policy: policy.get_action(torch.zeros(2, 12)),
    ),
    "observation without rows": (
        r"observation has shape \(11,\), expected \(any, 11\)",
        lambda policy: policy.get_action(torch.zeros(11)),
    ),
    "sequence handed to a step": (
        r"observation has shape \(2, 3, 11\)",
        lambda policy: policy.get_action(SEQUENCE),
    ),
    "step handed to the evaluation": (
        r"observations has shape \(2, 11\), expected \(any, any, 11\)",
        lambda policy: policy.evaluate_actions(OBS, zero_actions(policy.spec, 2)),
    ),
    "forward": (
        r"observations has shape \(2, 11\)",
        lambda policy: policy.forward(OBS),
    ),
    "layer-first h": (
        r"state h has shape \(1, 2, 10\), expected \(2, 1, 10\)",
        lambda policy: policy.get_action(OBS, (torch.zeros(1, 2, 10), STATE)),
    ),
    "c of another batch": (
        r"state c has shape \(3, 1, 10\), expected \(2, 1, 10\)",
        lambda policy: policy.get_action(OBS, (STATE, torch.zeros(3, 1, 10))),
    ),
    "state of a sequence": (
        r"state h has shape \(2, 2, 10\), expected \(2, 1, 10\)",
        lambda policy: policy.evaluate_actions(
            SEQUENCE, ACTIONS, state=(torch.zeros(2, 2, 10), STATE)
        ),
    ),
    "noise": (
        r"noise has shape \(2, 37\), expected \(2, 38\)",
        lambda policy: policy.get_action(OBS, noise=torch.zeros(2, 37)),
    ),
    "noise of another batch": (
        r"noise has shape \(1, 38\), expected \(2, 38\)",
        lambda policy: policy.get_action(OBS, noise=torch.zeros(1, 38)),
    ),
    "mask": (
        r"mask 'op' has shape \(2, 5\), expected \(2, 6\)",
        lambda policy: policy.get_action(OBS, masks={"op": torch.ones(2, 5).bool()}),
    ),
    "mask of one row": (
        r"mask 'op' has shape \(6,\), expected \(2, 6\)",
        lambda policy: policy.get_action(OBS, masks={"op": torch.ones(6).bool()}),
    ),
    "mask of a sequence": (
        r"mask 'op' has shape \(2, 6\), expected \(2, 3, 6\)",
        lambda policy: policy.evaluate_actions(SEQUENCE, ACTIONS, {"op": torch.ones(2, 6).bool()}),
    ),
    "action": (
        r"action 'style' has shape \(2, 3, 1\), expected \(2, 3\)",
        lambda policy: policy.evaluate_actions(
            SEQUENCE, ACTIONS | {"style": torch.zeros(2, 3, 1, dtype=torch.int64)}
        ),
    ),
}


@pytest.mark.parametrize(("message", "call"), WRONG_SHAPES.values(), ids=WRONG_SHAPES.keys())
def test_wrong_shape_is_refused_with_both_shapes(
    policy: FactoredRecurrentActorCritic, message: str, call: Call
) -> None:
    with pytest.raises(ValueError, match=message):
        call(policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_mask_that_is_not_boolean_is_refused(
    policy: FactoredRecurrentActorCritic, dtype: torch.dtype
) -> None:
    masks = {"style": torch.ones(2, 4, dtype=dtype)}
    with pytest.raises(ValueError, match=r"mask 'style' is torch\..*, not torch.bool"):
        policy.get_action(OBS, masks=masks)


def test_mask_for_an_unknown_head_is_refused(policy: FactoredRecurrentActorCritic) -> None:
    with pytest.raises(ValueError, match="masks name an unknown head 'styel'; the heads are slot"):
        policy.get_action(OBS, masks={"styel": torch.ones(2, 4, dtype=torch.bool)})


def test_default_v1_has_the_originals_parameters() -> None:
    expected: dict[str, tuple[int, ...]] = dict(V1_SHAPES)
    for mlp, outputs in V1_OUTPUTS.items():
        expected |= {
            f"{mlp}.0.weight": (64, 128),
            f"{mlp}.0.bias": (64,),
            f"{mlp}.2.weight": (outputs, 64),
            f"{mlp}.2.bias": (outputs,),
        }
    policy = FactoredRecurrentActorCritic(PolicySpec.tamiyo_v1())
    state_dict = policy.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state_dict.items()} == expected
    assert len(state_dict) == 46
    assert sum(tensor.numel() for tensor in policy.parameters()) == 227_560


def test_second_layer_reads_the_first() -> None:
    spec = PolicySpec.tamiyo_v1(feature_dim=24, hidden_dim=16, num_layers=2)
    state_dict = FactoredRecurrentActorCritic(spec).state_dict()
    assert state_dict["lstm.weight_ih_l0"].shape == (64, 24)
    assert state_dict["lstm.weight_ih_l1"].shape == (64, 16)
    assert len(state_dict) == 50


def test_odd_hidden_size_halves_downwards() -> None:
    policy = FactoredRecurrentActorCritic(PolicySpec.tamiyo_v1(hidden_dim=9))
    assert policy.state_dict()["op_head.0.weight"].shape == (4, 9)


def test_fresh_weights_are_orthogonal_with_the_originals_gains() -> None:
    policy = FactoredRecurrentActorCritic(PolicySpec.tamiyo_v1())
    state_dict = policy.state_dict()
    gains = {name: math.sqrt(2) for name in state_dict if name.endswith(".0.weight")}
    gains |= {f"{mlp}.2.weight": 0.01 for mlp in V1_OUTPUTS} | {"value_head.2.weight": 1.0}
    gains |= {"lstm.weight_ih_l0": 1.0, "lstm.weight_hh_l0": 1.0}
    for name, gain in gains.items():
        weight = state_dict[name].double()
        short = weight if weight.shape[0] <= weight.shape[1] else weight.T
        expected = gain**2 * torch.eye(len(short), dtype=torch.float64)
        torch.testing.assert_close(short @ short.T, expected, atol=1e-5 * gain**2, rtol=0)


def test_fresh_biases_are_zero_and_norms_neutral_but_forget_gates_are_open() -> None:
    policy = FactoredRecurrentActorCritic(PolicySpec.tamiyo_v1())
    for name, parameter in policy.named_parameters():
        if name.startswith("lstm.bias"):
            quarters = parameter.view(4, 128)
            assert (quarters[1] == 1).all(), name
            assert not quarters[[0, 2, 3]].any(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif name in ("feature_net.1.weight", "lstm_ln.weight"):
            assert (parameter == 1).all(), name


def test_fresh_policy_is_nearly_uniform() -> None:
    policy = FactoredRecurrentActorCritic(PolicySpec.tamiyo_v1())
    with torch.no_grad():
        evaluation = policy.evaluate_actions(
            torch.randn(8, 4, 140, generator=torch.Generator().manual_seed(0)),
            zero_actions(policy.spec, 8, 4) | {"op": torch.ones(8, 4, dtype=torch.int64)},
        )
    for head, entropy in evaluation.entropy.items():
        assert (entropy > 0.999).all(), head
