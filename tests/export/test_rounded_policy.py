"""The judge of bf16 against an oracle: the naive policies with each product rounded as it says.

The oracle sums in float64 and rounds by integer arithmetic, so the two differ where a sum lies
between two bf16 numbers to within float32's rounding: rarely, and by one unit of the last place.
"""

import copy
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray

from export.rounded_policy import round_products
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.export.gate_cases import small_v1, small_v2
from tests.naive import Floats, NaivePolicy
from tests.naive_v2 import NaivePolicyV2
from tests.random_inputs import random_blueprints, random_observations, random_policy, weights_of

ROWS = 12
STEPS = 4
LAST_PLACE = 2.0**-8
"""Of a bf16 number, in units of its power of two: what a flip is worth."""
FLIPS = 0.03
"""The share of numbers that may be others than the oracle's."""


def bf16(x: ArrayLike) -> Floats:
    """The nearest numbers of 8 bits, the even one of two as near."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


class Products:
    """How a product rounds: what goes in, and once what comes out."""

    def of(self, weight: Floats, x: Floats, bias: Floats) -> Floats:
        return bf16(bf16(weight) @ bf16(x) + bf16(bias))

    def of_weights(self, weight: Floats, embedding: Floats) -> Floats:
        return bf16(weight @ embedding)


class BiasAfterwards(Products):
    """Rounds the product, and once more with the bias."""

    def of(self, weight: Floats, x: Floats, bias: Floats) -> Floats:
        return bf16(bf16(bf16(weight) @ bf16(x)) + bf16(bias))


class InputUnrounded(Products):
    def of(self, weight: Floats, x: Floats, bias: Floats) -> Floats:
        return bf16(bf16(weight) @ x + bf16(bias))


class WeightsUnrounded(Products):
    def of(self, weight: Floats, x: Floats, bias: Floats) -> Floats:
        return bf16(weight @ bf16(x) + bf16(bias))


class ResultUnrounded(Products):
    def of(self, weight: Floats, x: Floats, bias: Floats) -> Floats:
        return bf16(weight) @ bf16(x) + bf16(bias)


class BlueprintsUnrounded(Products):
    def of_weights(self, weight: Floats, embedding: Floats) -> Floats:
        return weight @ embedding


class _Rounded(NaivePolicy):
    """Its linear layers and its cells' gates, as `products` has them."""

    products = Products()

    def _linear(self, name: str, x: Floats) -> Floats:
        weight, bias = (self.weights[f"{name}.{part}"] for part in ("weight", "bias"))
        observed = self.spec.observation_dim
        if name != "feature_net.0" or self.spec.blueprint_embedding_dim is None:
            return self.products.of(weight, x, bias)
        features = self.products.of(weight[:, :observed], x[:observed], bias)
        embeddings = np.split(x[observed:], self.spec.num_slots)
        columns = np.split(weight[:, observed:], self.spec.num_slots, axis=1)
        for embedding, by_slot in zip(embeddings, columns, strict=True):
            features = features + self.products.of_weights(by_slot, embedding)
        return features

    def _cell(self, names: str, x: Floats, h: Floats, c: Floats) -> tuple[Floats, Floats]:
        of = {
            name: self.weights[names.format(name)]
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        weight = np.concatenate([of["weight_ih"], of["weight_hh"]], axis=1)
        bias = (of["bias_ih"] + of["bias_hh"]).astype(np.float32).astype(np.float64)
        gates = self.products.of(weight, np.concatenate([x, h]), bias)
        i, f, g, o = np.split(gates, 4)
        new_c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(new_c), new_c


class RoundedV1(_Rounded): ...


class RoundedV2(_Rounded, NaivePolicyV2): ...


def sigmoid(x: Floats) -> Floats:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def oracle_of(policy: FactoredRecurrentActorCritic) -> _Rounded:
    spec, weights = policy.spec, weights_of(policy)
    return RoundedV2(spec, weights, floors={}) if is_v2(spec) else RoundedV1(spec, weights)


def is_v2(spec: PolicySpec) -> bool:
    return spec.blueprint_embedding_dim is not None


class Answer(NamedTuple):
    """What products make, side by side: logits, value and, where there are such, Q and the
    contributions; and the state, which products only go into. `[rows, ...]`."""

    products: Floats
    state: Floats


class Step(NamedTuple):
    """What goes into a step."""

    observation: NDArray[np.float32]
    blueprints: NDArray[np.int64]
    h: NDArray[np.float32]
    c: NDArray[np.float32]


def answers(
    rounded: FactoredRecurrentActorCritic, rng: np.random.Generator
) -> list[tuple[Step, Answer]]:
    """Some carried steps of a policy, each with what went in."""
    spec = rounded.spec
    state = rounded.initial_state(ROWS)
    carried = []
    for _ in range(STEPS):
        observation = 2 * random_observations(spec, rng, ROWS)
        blueprints = random_blueprints(spec, rng, ROWS)
        step = Step(observation, blueprints, *(array.numpy() for array in state))
        scores = rounded.step_scores(
            torch.from_numpy(observation),
            state,
            blueprint_index=torch.from_numpy(blueprints) if is_v2(spec) else None,
        )
        logits = scores.choices.logits[..., rounded.heads.valid]
        parts = [logits, scores.value[:, None]]
        if is_v2(spec):
            op = torch.zeros(ROWS, dtype=torch.int64)
            parts += [rounded.q_value(scores.output, op)[:, None]]
            parts += [rounded.contribution(scores.output)]
        state = scores.state
        carried.append(
            (
                step,
                Answer(
                    torch.cat(parts, dim=-1).double().numpy(),
                    torch.cat(state, dim=1).double().numpy(),
                ),
            )
        )
    return carried


def expected(oracle: _Rounded, step: Step) -> Answer:
    rows = [_expected_row(oracle, *row) for row in zip(*step, strict=True)]
    products, states = zip(*rows, strict=True)
    return Answer(np.stack(products), np.stack(states))


def _expected_row(
    oracle: _Rounded, observation: Floats, blueprints: NDArray[np.int64], h: Floats, c: Floats
) -> tuple[Floats, Floats]:
    observation, h, c = (array.astype(np.float64) for array in (observation, h, c))
    if isinstance(oracle, RoundedV2):
        y, new_h, new_c = oracle.output_row(observation, blueprints, h, c)
        logits = oracle.logits_row(y)
        value, q_value, contribution = oracle.critic_row(y, 0)
        critic = [value, q_value, *contribution]
    else:
        logits, value, new_h, new_c = oracle.forward_row(observation, h, c)
        critic = [value]
    return np.concatenate([*logits.values(), critic]), np.concatenate([new_h, new_c])


def share_of_others(got: Floats, wanted: Floats, relative: float) -> float:
    return float(np.mean(np.abs(got - wanted) > relative * np.abs(wanted)))


@pytest.fixture(scope="module", params=["v1", "v1 of two layers", "v2", "v2 of two layers"])
def policy(request: pytest.FixtureRequest) -> FactoredRecurrentActorCritic:
    name: str = request.param
    small = small_v1 if name.startswith("v1") else small_v2
    policy = random_policy(small(num_layers=2 if "two" in name else 1))
    if policy.blueprint_embedding is not None:
        with torch.no_grad():  # or what blueprints add is too little to see it rounded
            policy.blueprint_embedding.embedding.weight.mul_(30.0)
    return policy


@pytest.fixture
@torch.inference_mode()
def carried(
    policy: FactoredRecurrentActorCritic, rng: np.random.Generator
) -> list[tuple[Step, Answer]]:
    """A few steps of the policy in bf16; what goes into each is the policy's own state."""
    return answers(round_products(copy.deepcopy(policy)), rng)


@pytest.mark.parametrize(
    ("number", "nearest"),
    [
        (1 + 2**-8, 1.0),  # as near to both: to the even one
        (1 + 3 * 2**-8, 1 + 2**-6),
        (1 + 2**-8 + 2**-20, 1 + 2**-7),
        (-(1 + 2**-8 + 2**-20), -(1 + 2**-7)),
        (0.0, 0.0),
    ],
)
def test_oracle_rounds_to_the_nearest_and_the_even(number: float, nearest: float) -> None:
    assert float(bf16(number)) == nearest


def test_each_step_is_the_oracles_but_for_rare_flips_of_the_last_place(
    policy: FactoredRecurrentActorCritic, carried: list[tuple[Step, Answer]]
) -> None:
    oracle = oracle_of(policy)
    got = [answer for _, answer in carried]
    wanted = [expected(oracle, step) for step, _ in carried]
    products, state = (
        (np.stack([answer[at] for answer in got]), np.stack([answer[at] for answer in wanted]))
        for at in (0, 1)
    )
    assert share_of_others(*products, relative=0.0) <= FLIPS
    assert share_of_others(*state, relative=1e-4) <= FLIPS
    scale = np.abs(products[1]).max()
    np.testing.assert_allclose(*products, rtol=0, atol=2 * LAST_PLACE * scale)
    np.testing.assert_allclose(*state, rtol=0, atol=2 * LAST_PLACE * np.abs(state[1]).max())


def test_what_products_make_is_bf16_and_the_state_is_not(
    carried: list[tuple[Step, Answer]],
) -> None:
    products = np.stack([answer.products for _, answer in carried])
    state = np.stack([answer.state for _, answer in carried])
    assert share_of_others(products, bf16(products), relative=0.0) == 0.0
    assert share_of_others(state, bf16(state), relative=0.0) > 0.9


def others_than(
    wrong: Products, policy: FactoredRecurrentActorCritic, carried: list[tuple[Step, Answer]]
) -> float:
    """The share of a policy's products that such an oracle has otherwise."""
    oracle = oracle_of(policy)
    oracle.products = wrong
    got = np.stack([answer.products for _, answer in carried])
    wanted = np.stack([expected(oracle, step).products for step, _ in carried])
    return share_of_others(got, wanted, relative=0.0)


@pytest.mark.parametrize(
    "wrong",
    [BiasAfterwards(), InputUnrounded(), WeightsUnrounded(), ResultUnrounded()],
    ids=lambda wrong: type(wrong).__name__,
)
def test_rounding_otherwise_is_far_beyond_flips(
    wrong: Products, policy: FactoredRecurrentActorCritic, carried: list[tuple[Step, Answer]]
) -> None:
    assert others_than(wrong, policy, carried) > 10 * FLIPS


@pytest.mark.parametrize("policy", ["v2", "v2 of two layers"], indirect=True)
def test_what_blueprints_add_is_rounded_by_itself(
    policy: FactoredRecurrentActorCritic, carried: list[tuple[Step, Answer]]
) -> None:
    assert others_than(BlueprintsUnrounded(), policy, carried) > 10 * FLIPS
