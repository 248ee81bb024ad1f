"""The padded table against the same sums done head by head."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from model.heads import HeadTable
from model.spec import PolicySpec
from model.step_spec import HeadSpec
from tests.naive import FLOAT_ATOL, masked_log_softmax, normalized_entropy
from tests.random_inputs import gumbel_noise, packed, random_masks

SPEC = PolicySpec(
    name="ruled",
    observation_dim=1,
    feature_dim=1,
    hidden_dim=2,
    num_layers=1,
    heads=(
        HeadSpec(name="slot", size=5, relevant_ops=(1, 2), forced_index=4),
        HeadSpec(name="op", size=3),
        HeadSpec(name="style", size=4, relevant_ops=(1,), forced_index=2),
        HeadSpec(name="free", size=1),
        HeadSpec(name="never", size=2, relevant_ops=(), forced_index=1),
    ),
)
"""Rules for three heads, the op head not last, a head with one choice, one that never matters."""
TABLE = HeadTable(SPEC)
ROWS = 5
FREE_RANGE = 750.0
"""Beyond any standard Gumbel sample a float64 can express."""


def random_logits(rng: np.random.Generator) -> NDArray[np.float32]:
    return (3.0 * rng.normal(size=(ROWS, SPEC.num_choices))).astype(np.float32)


def spread(array: NDArray[np.float32] | NDArray[np.bool_]) -> Tensor:
    return TABLE.spread(torch.from_numpy(array))


def by_head(array: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    ends = np.cumsum(SPEC.head_sizes)[:-1]
    return dict(zip(SPEC.head_names, np.split(array, ends, axis=-1), strict=True))


def forced(head: HeadSpec, op: int) -> bool:
    return head.relevant_ops is not None and op not in head.relevant_ops


def test_table_holds_nothing_to_save() -> None:
    assert TABLE.state_dict() == {}
    assert list(TABLE.parameters()) == []


def test_spreading_puts_each_head_in_its_own_row() -> None:
    columns = torch.arange(2 * SPEC.num_choices).view(2, SPEC.num_choices)
    table = TABLE.spread(columns)
    assert table.shape == (2, len(SPEC.heads), 5)
    found = torch.cat([table[1, row, :size] for row, size in enumerate(SPEC.head_sizes)])
    assert torch.equal(found, columns[1])


def test_spreading_keeps_any_leading_dimensions() -> None:
    assert TABLE.spread(torch.zeros(SPEC.num_choices)).shape == (5, 5)
    assert TABLE.spread(torch.zeros(2, 3, 4, SPEC.num_choices)).shape == (2, 3, 4, 5, 5)


def test_log_probs_are_each_heads_own_softmax(rng: np.random.Generator) -> None:
    logits, masks = random_logits(rng), random_masks(SPEC, rng, ROWS)
    table = TABLE.log_probs(spread(logits), spread(packed(SPEC, masks)))
    for index, (name, head_logits) in enumerate(by_head(logits).items()):
        for row in range(ROWS):
            expected = masked_log_softmax(head_logits[row].astype(np.float64), masks[name][row])
            actual = table[row, index, : len(expected)]
            allowed = masks[name][row]
            np.testing.assert_allclose(actual[allowed], expected[allowed], atol=FLOAT_ATOL, rtol=0)
            assert (actual[~allowed] < -9e3).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_log_probs_are_float32_whatever_the_logits_are(dtype: torch.dtype) -> None:
    logits = torch.linspace(-2, 2, SPEC.num_choices).to(dtype)
    log_probs = TABLE.log_probs(TABLE.spread(logits), TABLE.valid)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(len(SPEC.heads)))


def test_choice_is_the_largest_sum_of_log_prob_and_noise(rng: np.random.Generator) -> None:
    logits, masks = random_logits(rng), random_masks(SPEC, rng, ROWS)
    noise = gumbel_noise(SPEC, rng, ROWS)
    log_probs = TABLE.log_probs(spread(logits), spread(packed(SPEC, masks)))
    decision = TABLE.choose(log_probs, spread(noise))
    assert decision.action.dtype == torch.int64
    for row in range(ROWS):
        op = int(decision.action[row, SPEC.op_index])
        for index, head in enumerate(SPEC.heads):
            action, log_prob = decision.action[row, index], decision.log_prob[row, index]
            if forced(head, op):
                assert action == head.forced_index
                assert log_prob == 0.0
                continue
            expected = masked_log_softmax(
                by_head(logits)[head.name][row].astype(np.float64), masks[head.name][row]
            )
            assert action == np.argmax(expected + by_head(noise)[head.name][row])
            np.testing.assert_allclose(log_prob, expected[action], atol=FLOAT_ATOL, rtol=0)


@given(
    logits=hnp.arrays(np.float32, (2, SPEC.num_choices), elements=st.floats(-50, 50, width=32)),
    noise=hnp.arrays(
        np.float32, (2, SPEC.num_choices), elements=st.floats(-FREE_RANGE, FREE_RANGE, width=32)
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_masked_choice_is_never_taken(
    logits: NDArray[np.float32], noise: NDArray[np.float32], seed: int
) -> None:
    masks = random_masks(SPEC, np.random.default_rng(seed), 2)
    log_probs = TABLE.log_probs(spread(logits), spread(packed(SPEC, masks)))
    action, log_prob = TABLE.choose(log_probs, spread(noise))
    assert log_prob.isfinite().all()
    for row in range(2):
        op = int(action[row, SPEC.op_index])
        for index, head in enumerate(SPEC.heads):
            if forced(head, op):
                assert action[row, index] == head.forced_index
            else:
                assert masks[head.name][row, int(action[row, index])]


def test_entropy_is_that_of_each_head_over_its_maximum(rng: np.random.Generator) -> None:
    logits, masks = random_logits(rng), random_masks(SPEC, rng, ROWS)
    allowed = spread(packed(SPEC, masks))
    log_probs = TABLE.log_probs(spread(logits), allowed)
    op = torch.tensor([0, 1, 2, 1, 2])
    entropy = TABLE.entropy(log_probs, allowed, op)
    for row in range(ROWS):
        for index, head in enumerate(SPEC.heads):
            head_logits = by_head(logits)[head.name][row].astype(np.float64)
            mask = masks[head.name][row]
            expected = (
                0.0
                if forced(head, int(op[row]))
                else normalized_entropy(masked_log_softmax(head_logits, mask), mask)
            )
            np.testing.assert_allclose(entropy[row, index], expected, atol=FLOAT_ATOL, rtol=0)


def test_entropy_is_one_where_all_allowed_choices_are_equally_likely() -> None:
    logits = torch.zeros(SPEC.num_choices)
    allowed = TABLE.valid.clone()
    allowed[0, 3:] = False  # slot: three of five
    log_probs = TABLE.log_probs(TABLE.spread(logits), allowed)
    entropy = TABLE.entropy(log_probs, allowed, torch.tensor(1))
    torch.testing.assert_close(entropy, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))
    assert log_probs[0, 0] == pytest.approx(-math.log(3))


@pytest.mark.parametrize("op", range(3))
def test_table_says_which_heads_matter_for_an_op(op: int) -> None:
    expected = [not forced(head, op) for head in SPEC.heads]
    assert TABLE.relevant(torch.tensor(op)).tolist() == expected
