"""Where floors jump, the gate's bounds hold what rounding may do, and hardly more."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.log_prob_bounds import LogProbBounds, floor_bounds
from tests.naive import masked_log_softmax
from tests.naive_v2 import floored

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

floors = st.floats(0.02, 0.3)
seeds = st.integers(0, 2**32 - 1)
ROUNDING = 1e-5


def row(seed: int, spread: float) -> tuple[Floats, Bools]:
    """One head's logits and mask, with up to thirteen choices."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 14))
    allowed = rng.random(size) < 0.7
    allowed[rng.integers(size)] = True
    return rng.normal(scale=spread, size=size), allowed


def bounds_of(logits: Floats, allowed: Bools, floor: float, margin: float) -> LogProbBounds:
    log_probs = torch.from_numpy(masked_log_softmax(logits, allowed)).float()[None]
    return floor_bounds(
        log_probs,
        torch.from_numpy(allowed)[None],
        torch.tensor([[floor]]),
        torch.full(log_probs.shape, margin),
    )


def log_of(prob: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        logs: Floats = np.log(prob)
    return logs


@given(seeds, floors, st.floats(0.0, 4.0), st.sampled_from([1e-4, 0.02, 0.1]))
def test_no_rounding_within_the_margin_leaves_the_bounds(
    seed: int, floor: float, spread: float, margin: float
) -> None:
    """Any log-probs that near: floored, they are within the bounds but for the margin itself.

    Twice, as what a choice keeps depends on the others that are not raised, which are off too.
    """
    logits, allowed = row(seed, spread)
    lower, upper = (bound[0].numpy() for bound in bounds_of(logits, allowed, floor, margin))
    rng = np.random.default_rng(seed)
    for _ in range(20):
        off = rng.uniform(-margin, margin, len(logits)) / 2  # and the same again by normalising
        rounded = log_of(floored(logits + off, allowed, floor))
        assert (rounded[allowed] >= lower[allowed] - 2 * margin - ROUNDING).all()
        assert (rounded[allowed] <= upper[allowed] + 2 * margin + ROUNDING).all()


@given(seeds, floors, st.floats(0.0, 4.0))
def test_far_from_every_floor_there_is_one_number(seed: int, floor: float, spread: float) -> None:
    margin = 1e-4
    logits, allowed = row(seed, spread)
    lower, upper = bounds_of(logits, allowed, floor, margin)
    limit = min(floor, 0.99 / allowed.sum())
    plain = masked_log_softmax(logits, allowed)[allowed]
    if (np.abs(plain - np.log(limit)) < 2 * margin).any():
        return
    assert torch.equal(lower, upper)
    expected = log_of(floored(logits, allowed, floor))[allowed]
    np.testing.assert_allclose(lower[0].numpy()[allowed], expected, rtol=1e-5, atol=ROUNDING)


@given(seeds, floors, st.floats(0.0, 4.0), st.sampled_from([1e-4, 0.02, 0.1]))
def test_the_policy_s_own_number_is_never_beyond_the_margin(
    seed: int, floor: float, spread: float, margin: float
) -> None:
    logits, allowed = row(seed, spread)
    lower, upper = (bound[0].numpy() for bound in bounds_of(logits, allowed, floor, margin))
    own = log_of(floored(logits, allowed, floor))[allowed]
    assert (own >= lower[allowed] - margin - ROUNDING).all()
    assert (own <= upper[allowed] + margin + ROUNDING).all()


def test_a_choice_on_its_floor_is_raised_or_gives_way() -> None:
    """0.15 is either raised to 0.15, or keeps what two raised ones leave it."""
    prob = np.array([0.15, 0.6, 0.05, 0.2])
    lower, upper = bounds_of(np.log(prob), np.ones(4, np.bool_), floor=0.15, margin=1e-3)
    raised = np.array([0.15, 0.7 * 0.6 / 0.8, 0.15, 0.7 * 0.2 / 0.8])  # 0.15 among the raised
    keeps = np.array([0.15, 0.6, 0, 0.2]) * 0.85 / 0.95
    np.testing.assert_allclose(lower[0, 1::2].exp(), raised[1::2], rtol=1e-5)
    np.testing.assert_allclose(upper[0, 1::2].exp(), keeps[1::2], rtol=1e-5)
    np.testing.assert_allclose([lower[0, 2].exp(), upper[0, 2].exp()], 0.15, rtol=1e-5)
    assert lower[0, 0].exp() < keeps[0] < upper[0, 0].exp()
    np.testing.assert_allclose(upper[0, 0].exp(), 0.15, rtol=1e-5)


def test_a_head_without_a_floor_is_left_alone() -> None:
    logits, allowed = row(3, 1.0)
    plain = masked_log_softmax(logits, allowed)
    for bound in bounds_of(logits, allowed, floor=0.0, margin=0.1):
        np.testing.assert_allclose(bound[0], plain, rtol=1e-6)
