"""Probability floors against their definition, one head and row at a time; and slots by op."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.heads import HeadTable
from model.spec import PROBABILITY_FLOORS_V2, PolicySpec
from tests.naive import FLOAT_ATOL, masked_log_softmax
from tests.naive_v2 import floored
from tests.random_inputs import random_policy

SPEC = PolicySpec.tamiyo_v2(num_slots=4)
FLOORED = SPEC.with_probability_floors(PROBABILITY_FLOORS_V2)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 8.0))
def test_every_head_has_its_own_floor(seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    table = HeadTable(FLOORED)
    logits = rng.normal(scale=spread, size=(1, SPEC.num_choices)).astype(np.float32)
    allowed = rng.random((1, SPEC.num_choices)) < 0.7
    allowed[:, np.cumsum([0, *SPEC.head_sizes[:-1]])] = True
    log_probs = table.log_probs(
        table.spread(torch.from_numpy(logits)), table.spread(torch.from_numpy(allowed))
    )
    start = 0
    for row, head in enumerate(FLOORED.heads):
        columns = slice(start, start + head.size)
        start += head.size
        own = logits[0, columns].astype(np.float64)
        mask = allowed[0, columns]
        plain = np.exp(masked_log_softmax(own, mask)[mask])
        f = min(head.probability_floor, 0.99 / len(plain))
        if np.abs(plain - f).min() < 1e-6:
            continue  # on which side of its floor it is, depends on rounding
        expected = floored(own, mask, head.probability_floor)
        got = log_probs[0, row, : head.size].exp()
        np.testing.assert_allclose(got, expected, rtol=0, atol=FLOAT_ATOL, err_msg=head.name)


@pytest.mark.parametrize("floor", [0.2, 0.5, 0.999])
@pytest.mark.parametrize("num_allowed", [1, 2, 5, 6])
def test_floors_that_would_take_all_probability_share_99_hundredths(
    floor: float, num_allowed: int
) -> None:
    """Above that share the likely choices would have nothing, or less, to give."""
    table = HeadTable(SPEC.with_probability_floors({"op": floor}))
    rng = np.random.default_rng(num_allowed)
    logits = rng.normal(scale=3.0, size=(50, SPEC.num_choices)).astype(np.float32)
    at, start = SPEC.op_index, sum(SPEC.head_sizes[: SPEC.op_index])
    mask = np.arange(SPEC.num_ops) < num_allowed
    allowed = table.valid.clone()
    allowed[at, : SPEC.num_ops] = torch.from_numpy(mask)
    log_probs = table.log_probs(table.spread(torch.from_numpy(logits)), allowed)
    got = log_probs[:, at, : SPEC.num_ops].exp()
    for row in range(50):
        own = logits[row, start : start + SPEC.num_ops].astype(np.float64)
        expected = floored(own, mask, floor)
        np.testing.assert_allclose(got[row], expected, rtol=0, atol=FLOAT_ATOL)


def test_a_head_without_a_floor_is_left_alone() -> None:
    only_op = HeadTable(SPEC.with_probability_floors({"op": 0.1}))
    logits = 3 * torch.randn(6, SPEC.num_choices, generator=torch.Generator().manual_seed(0))
    plain = HeadTable(SPEC)
    both = [table.log_probs(table.spread(logits), table.valid) for table in (only_op, plain)]
    op = SPEC.op_index
    assert torch.equal(both[0][:, :op], both[1][:, :op])
    assert not torch.equal(both[0][:, op], both[1][:, op])


@pytest.mark.parametrize("name", ["op", "slot"])
def test_floors_do_not_change_the_most_likely_action(name: str) -> None:
    rng = np.random.default_rng(5)
    at = SPEC.head_names.index(name)
    logits = torch.from_numpy(rng.normal(scale=2.0, size=(500, SPEC.num_choices)))
    argmax = [
        table.log_probs(table.spread(logits), table.valid)[:, at].argmax(-1)
        for table in (HeadTable(FLOORED), HeadTable(SPEC))
    ]
    assert torch.equal(*argmax)


def test_gradients_through_floors_are_finite_and_reach_the_logits() -> None:
    policy = random_policy(
        PolicySpec.tamiyo_v2(
            num_slots=2, observation_dim=5, feature_dim=8, hidden_dim=8
        ).with_probability_floors(PROBABILITY_FLOORS_V2)
    )
    generator = torch.Generator().manual_seed(1)
    observations = torch.randn(3, 4, 5, generator=generator)
    actions = {
        head.name: torch.randint(head.size, (3, 4), generator=generator)
        for head in policy.spec.heads
    }
    masks = {"op": torch.ones(3, 4, 6, dtype=torch.bool)}
    masks["op"][..., 3] = False
    actions["op"] = actions["op"].masked_fill(actions["op"] == 3, 1)
    evaluation = policy.evaluate_actions(observations, actions, masks)
    loss = sum(evaluation.log_prob.values()) + sum(evaluation.entropy.values())
    torch.autograd.backward(torch.as_tensor(loss).sum())
    gradients = {
        name: parameter.grad
        for name, parameter in policy.named_parameters()
        if parameter.grad is not None
    }
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["op_head.2.weight"].any()


def test_an_op_that_is_allowed_and_has_no_slot_is_an_error_that_names_both() -> None:
    policy = random_policy(PolicySpec.tamiyo_v2(num_slots=2, observation_dim=5, hidden_dim=8))
    slot_by_op = torch.ones(2, 6, 2, dtype=torch.bool)
    slot_by_op[1, 4] = False
    with pytest.raises(ValueError, match=r"'slot_by_op' allows no slot for op 4.* in row 1"):
        policy.get_action(torch.zeros(2, 5), masks={"slot_by_op": slot_by_op})
    op = torch.ones(2, 6, dtype=torch.bool)
    op[1, 4] = False
    policy.get_action(torch.zeros(2, 5), masks={"slot_by_op": slot_by_op, "op": op})


@pytest.mark.parametrize("index", [-2, 13])
def test_a_blueprint_there_is_not_is_an_error_that_names_slot_and_row(index: int) -> None:
    policy = random_policy(PolicySpec.tamiyo_v2(num_slots=2, observation_dim=5, hidden_dim=8))
    blueprints = torch.tensor([[0, -1], [12, index]])
    with pytest.raises(ValueError, match=rf"of slot 1 is {index} in row 1; there are 13"):
        policy.get_action(torch.zeros(2, 5), blueprint_index=blueprints)


def test_a_policy_that_reads_no_blueprints_refuses_them() -> None:
    policy = random_policy(PolicySpec.tamiyo_v1(num_slots=2, observation_dim=5))
    with pytest.raises(ValueError, match="this policy reads none"):
        policy.get_action(torch.zeros(1, 5), blueprint_index=torch.zeros(1, 2, dtype=torch.int64))
