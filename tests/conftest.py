"""Fixtures that more than one package's tests use, and how hypothesis searches.

A run tries the same examples each time, so that a failure is the change's own doing;
`--hypothesis-profile=explore` looks for new ones.
"""

import numpy as np
import pytest
import torch
from hypothesis import settings

from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.random_inputs import random_policy

torch.set_num_threads(1)  # the products here are too small for two

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=5000)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rehearse", action="store_true", help="tests/gpu: without a GPU, run on the CPU"
    )


@pytest.fixture(scope="session")
def spec() -> PolicySpec:
    """Tiny, and with no two dimensions equal, so that a mix-up cannot pass."""
    return PolicySpec.tamiyo_v1(
        num_slots=2, observation_dim=11, feature_dim=12, hidden_dim=10, num_layers=1
    )


@pytest.fixture(scope="session")
def policy(spec: PolicySpec) -> FactoredRecurrentActorCritic:
    """Seeded and shared: tests only read it."""
    return random_policy(spec)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20251227)
