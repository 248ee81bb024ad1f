"""The policies that the gate is tried on: small ones of every kind, and the recorded ones."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Self

import torch

from export.manifest import Precision
from export.tamiyo_step import TamiyoStep
from model.checkpoint import load_checkpoint
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.spec import PROBABILITY_FLOORS_V2, PolicySpec
from tests.golden import GOLDEN
from tests.random_inputs import random_policy

GATE_GAIN = 6.0


@dataclass(frozen=True)
class Case:
    """A policy, how it is exported, and the largest batch it is exported for."""

    policy: FactoredRecurrentActorCritic
    normalizer: ObservationNormalizer | None
    precision: Precision = "fp32"
    max_batch_size: int = 128

    def step(self) -> TamiyoStep:
        """The right step, packed from copies: whoever changes it changes nothing else."""
        policy, normalizer = copy.deepcopy((self.policy, self.normalizer))
        return TamiyoStep(policy, normalizer, self.precision).eval()

    def with_policy(self, policy: FactoredRecurrentActorCritic) -> Self:
        return replace(self, policy=policy)

    def with_spec(self, spec: PolicySpec) -> Self:
        """The same weights under other rules."""
        policy = FactoredRecurrentActorCritic(spec).eval()
        policy.load_state_dict(self.policy.state_dict())
        return self.with_policy(policy)

    def with_statistics(self, mean: float | None, var: float) -> Self:
        """The normaliser with its mean times `mean`, and `var` on its variance; None without."""
        assert self.normalizer is not None
        if mean is None:
            return replace(self, normalizer=None)
        other = ObservationNormalizer(self.normalizer.mean * mean, self.normalizer.var + var)
        return replace(self, normalizer=other)


def small_v1(*, num_layers: int = 1, observation_dim: int = 21) -> PolicySpec:
    return PolicySpec.tamiyo_v1(
        observation_dim=observation_dim, feature_dim=32, hidden_dim=32, num_layers=num_layers
    )


def small_v2(
    *, num_layers: int = 1, extras: bool = False, floors: bool = False, value_scale: float = 1.0
) -> PolicySpec:
    spec = PolicySpec.tamiyo_v2(
        observation_dim=21,
        feature_dim=40,
        hidden_dim=32,
        num_layers=num_layers,
        value_scale=value_scale,
    )
    if extras:
        spec = spec.model_copy(update={"extra_outputs": ("q_value", "contribution")})
    return spec.with_probability_floors(PROBABILITY_FLOORS_V2) if floors else spec


def statistics(observation_dim: int) -> ObservationNormalizer:
    """Of features of many scales, one of them constant in training."""
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(observation_dim, generator=generator)
    var = 10.0 ** (4 * torch.rand(observation_dim, generator=generator) - 2)
    var[0] = 0.0
    return ObservationNormalizer(mean, var)


def fresh(spec: PolicySpec) -> FactoredRecurrentActorCritic:
    """As it is before training: no biases, and heads that are nearly uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return FactoredRecurrentActorCritic(spec).eval()


def trained(spec: PolicySpec) -> FactoredRecurrentActorCritic:
    """With opinions, and with one unit whose gates other units can open and close all the way."""
    policy = random_policy(spec)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "weight_hh" in name:
                weight[:: spec.hidden_dim] *= GATE_GAIN
    return policy


def recorded(name: str) -> tuple[FactoredRecurrentActorCritic, ObservationNormalizer | None]:
    spec, weights, normalizer = load_checkpoint(GOLDEN / f"{name}.pt")
    policy = FactoredRecurrentActorCritic(spec).eval()
    policy.load_state_dict(weights)
    return policy, normalizer


CASES: dict[str, Callable[[], Case]] = {
    "v1 fresh, largest batch 16": lambda: Case(fresh(small_v1()), None, max_batch_size=16),
    "v1 fresh, normaliser": lambda: Case(fresh(small_v1()), statistics(21)),
    "v1, normaliser": lambda: Case(trained(small_v1()), statistics(21)),
    "v1, as many features as choices, largest batch 2": lambda: Case(
        trained(small_v1(observation_dim=39, num_layers=2)), None, max_batch_size=2
    ),
    "v1 in bf16": lambda: Case(trained(small_v1()), statistics(21), "bf16"),
    "v2 fresh": lambda: Case(fresh(small_v2()), None),
    "v2, normaliser, extras": lambda: Case(
        trained(small_v2(extras=True, num_layers=2, value_scale=3.0)), statistics(21)
    ),
    "v2 with floors, normaliser, extras": lambda: Case(
        trained(small_v2(extras=True, floors=True, value_scale=3.0)), statistics(21)
    ),
    "v2 fresh in bf16": lambda: Case(fresh(small_v2()), statistics(21), "bf16"),
    "v2 with floors, normaliser, extras in bf16": lambda: Case(
        trained(small_v2(extras=True, floors=True, value_scale=3.0)), statistics(21), "bf16"
    ),
    "v1 recorded": lambda: Case(*recorded("ckpt_v1")),
    "v2 recorded": lambda: Case(*recorded("ckpt_v2")),
    "v2 recorded in bf16": lambda: Case(*recorded("ckpt_v2"), "bf16"),
}


@cache
def case_of(name: str) -> Case:
    return CASES[name]()
