"""V2, acting and evaluating, against the naive policy in every shape the spec can take.

The recordings (`test_golden_v2.py`) have one layer, three slots and no input projection.
"""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.policy import FactoredRecurrentActorCritic
from model.recurrence import State
from model.spec import PROBABILITY_FLOORS_V2, PolicySpec
from model.step_spec import SLOT_BY_OP
from tests.naive import FLOAT_ATOL, LOG_PROB_ATOL
from tests.naive_v2 import NaivePolicyV2
from tests.random_inputs import (
    gumbel_noise,
    random_actions,
    random_blueprints,
    random_masks,
    random_observations,
    random_policy,
    random_slots_by_op,
    random_state,
    stacked,
    tensors,
    weights_of,
)

SHAPES = {
    "one layer, as wide as its input": PolicySpec.tamiyo_v2(
        num_slots=3, observation_dim=11, feature_dim=24, hidden_dim=24
    ),
    "two layers, projected": PolicySpec.tamiyo_v2(
        num_slots=2, observation_dim=7, feature_dim=10, hidden_dim=20, num_layers=2
    ),
    "three layers, more slots than ops": PolicySpec.tamiyo_v2(
        num_slots=7, observation_dim=5, feature_dim=12, hidden_dim=12, num_layers=3
    ),
    "one slot": PolicySpec.tamiyo_v2(
        num_slots=1, observation_dim=5, feature_dim=9, hidden_dim=13, num_layers=2
    ),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
every_floor = pytest.mark.parametrize(
    "floors", [{}, PROBABILITY_FLOORS_V2], ids=["without floors", "with floors"]
)
every_mask = pytest.mark.parametrize("masked", ["nothing", "slots alike", "slots by op"])


def both(
    shape: PolicySpec, floors: Mapping[str, float]
) -> tuple[FactoredRecurrentActorCritic, NaivePolicyV2]:
    policy = random_policy(shape.with_probability_floors(floors))
    return policy, NaivePolicyV2(shape, weights_of(policy), floors=floors)


def masks_of(
    masked: str, spec: PolicySpec, rng: np.random.Generator, *lead: int
) -> dict[str, NDArray[np.bool_]]:
    if masked == "nothing":
        return {}
    masks = random_masks(spec, rng, *lead)
    if masked == "slots by op":
        masks[SLOT_BY_OP] = random_slots_by_op(spec, rng, masks["op"])
    return masks


@every_shape
@every_floor
@every_mask
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "most likely"])
@torch.no_grad()
def test_chained_steps_are_the_naive_policys(
    shape: PolicySpec,
    floors: Mapping[str, float],
    masked: str,
    sampled: bool,
    rng: np.random.Generator,
) -> None:
    policy, naive = both(shape, floors)
    h, c = random_state(shape, rng, 6)
    state: State = (torch.from_numpy(h), torch.from_numpy(c))
    expected_h, expected_c = h.astype(np.float64), c.astype(np.float64)
    for _ in range(5):
        observation = random_observations(shape, rng, 6)
        blueprints = random_blueprints(shape, rng, 6)
        masks = masks_of(masked, shape, rng, 6)
        noise = gumbel_noise(shape, rng, 6) if sampled else None
        given = torch.from_numpy(observation), state, tensors(masks)
        more = torch.from_numpy(blueprints)

        act = policy.get_action(
            *given, None if noise is None else torch.from_numpy(noise), blueprint_index=more
        )
        scores = policy.step_scores(*given, blueprint_index=more)
        expected = naive.step_v2(observation, blueprints, masks, noise, expected_h, expected_c)

        op = act.action["op"].clone()
        np.testing.assert_array_equal(stacked(shape, act.action), expected.action)
        for got, want, atol in (
            (stacked(shape, act.log_prob), expected.log_prob, LOG_PROB_ATOL),
            (act.value, expected.value, FLOAT_ATOL),
            (act.state[0], expected.h, FLOAT_ATOL),
            (act.state[1], expected.c, FLOAT_ATOL),
            (policy.q_value(scores.output, op), expected.q_value, FLOAT_ATOL),
            (policy.contribution(scores.output), expected.contribution, FLOAT_ATOL),
        ):
            np.testing.assert_allclose(got, want, atol=atol, rtol=0)
        state, expected_h, expected_c = act.state, expected.h, expected.c


@every_shape
@every_floor
@every_mask
def test_evaluation_is_the_naive_policys(
    shape: PolicySpec, floors: Mapping[str, float], masked: str, rng: np.random.Generator
) -> None:
    policy, naive = both(shape, floors)
    observations = random_observations(shape, rng, 3, 6)
    blueprints = random_blueprints(shape, rng, 3, 6)
    masks = masks_of(masked, shape, rng, 3, 6)
    actions = random_actions(shape, rng, masks_of("slots alike", shape, rng, 3, 6) | masks)
    if masked == "slots by op":  # the slots that the stored op may take
        index = actions["op"][..., None, None]
        of_op = np.take_along_axis(masks[SLOT_BY_OP], index, axis=-2).squeeze(-2)
        actions["slot"] = random_actions(shape, rng, masks | {"slot": of_op})["slot"]
    h, c = random_state(shape, rng, 3)
    with torch.no_grad():
        got = policy.evaluate_actions(
            torch.from_numpy(observations),
            tensors(actions),
            tensors(masks),
            (torch.from_numpy(h), torch.from_numpy(c)),
            blueprint_index=torch.from_numpy(blueprints),
        )
    assert got.q_value is not None
    assert got.contribution is not None
    expected = naive.evaluate_v2(observations, blueprints, stacked(shape, actions), masks, h, c)
    for have, want, atol in (
        (stacked(shape, got.log_prob), expected.log_prob, LOG_PROB_ATOL),
        (stacked(shape, got.entropy), expected.entropy, FLOAT_ATOL),
        (got.value, expected.value, FLOAT_ATOL),
        (got.state[0], expected.h, FLOAT_ATOL),
        (got.state[1], expected.c, FLOAT_ATOL),
        (got.q_value, expected.q_value, FLOAT_ATOL),
        (got.contribution, expected.contribution, FLOAT_ATOL),
    ):
        np.testing.assert_allclose(have, want, atol=atol, rtol=0)


def test_the_critic_s_other_outputs_send_no_gradient_into_the_recurrence(
    rng: np.random.Generator,
) -> None:
    """And V(s) does: each is checked with the others left out."""
    shape = SHAPES["two layers, projected"]
    policy = random_policy(shape)
    observations = torch.from_numpy(random_observations(shape, rng, 2, 3))
    actions = tensors(random_actions(shape, rng, random_masks(shape, rng, 2, 3)))
    reaches = {}
    for name in ("q_value", "contribution", "value"):
        policy.zero_grad()
        getattr(policy.evaluate_actions(observations, actions), name).sum().backward()
        gradients = [parameter.grad for parameter in policy.lstm.parameters()]
        reaches[name] = any(gradient is not None and gradient.any() for gradient in gradients)
    assert reaches == {"q_value": False, "contribution": False, "value": True}


def test_fresh_weights_have_the_original_s_gains_and_open_forget_gates() -> None:
    """Every product orthogonal with sqrt(2), but for the LSTMs' own and what decides."""
    spec = PolicySpec.tamiyo_v2(feature_dim=20, hidden_dim=32, num_layers=3)
    state_dict = FactoredRecurrentActorCritic(spec).double().state_dict()
    last = {"state_value_head.8": 0.1, "q_head.8": 0.1, "contribution_predictor.6": 0.1}
    last |= {f"{name}_head.2": 0.01 for name in spec.head_names if name != "blueprint"}
    last |= {"blueprint_head.4": 0.01}
    matrices = [
        name
        for name, tensor in state_dict.items()
        if tensor.ndim == 2 and not name.startswith("blueprint_embedding")
    ]
    for name in matrices:
        gain = 1.0 if "lstm.layers" in name else last.get(name.removesuffix(".weight"), 2**0.5)
        matrix = state_dict[name]
        short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        expected = gain**2 * torch.eye(len(short), dtype=torch.float64)
        torch.testing.assert_close(short @ short.T, expected, atol=1e-5 * gain**2, rtol=0)
    for layer in range(3):
        for bias in ("bias_ih_l0", "bias_hh_l0"):
            quarters = state_dict[f"lstm.layers.{layer}.{bias}"].view(4, 32)
            torch.testing.assert_close(quarters[1], torch.full((32,), 1 + np.log(3.0)).double())
            assert not quarters[[0, 2, 3]].any()
    assert 0.015 < state_dict["blueprint_embedding.embedding.weight"].std() < 0.025


@torch.no_grad()
def test_training_drops_a_tenth_of_what_predicts_contributions_and_acting_none() -> None:
    policy = random_policy(
        PolicySpec.tamiyo_v2(num_slots=2, observation_dim=5, feature_dim=8, hidden_dim=64)
    )
    *before_dropout, _, _, _ = policy.get_submodule("contribution_predictor").children()
    hidden = torch.nn.Sequential(*before_dropout)
    output = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    whole = hidden(output)
    assert torch.equal(hidden(output), whole)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = hidden.train()(output)
    is_on = whole > 0
    is_dropped = is_on & torch.eq(dropped, 0)
    assert is_dropped.sum() / is_on.sum() == pytest.approx(0.1, abs=0.01)
    torch.testing.assert_close(dropped[~is_dropped], whole[~is_dropped] / 0.9)
