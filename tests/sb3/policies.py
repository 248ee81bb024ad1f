"""Policies of every wiring, small, with weights that spread their answers."""

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.sb3.policy import SB3Policy
from model.sb3.spec import Recurrence, SB3Spec
from model.step_spec import HeadSpec
from tests.naive_sb3 import ACTIVATIONS, NaiveSB3

SIZES = st.lists(st.integers(1, 9), max_size=3).map(tuple)


def spec_of(
    heads: tuple[int, ...] = (3, 4, 2),
    recurrence: Recurrence | None = None,
    *,
    actor_layers: tuple[int, ...] = (10,),
    critic_layers: tuple[int, ...] = (7,),
    activation: str = "Tanh",
    observation_dim: int = 6,
) -> SB3Spec:
    return SB3Spec.model_validate(
        {
            "family": "mlps",
            "name": "test",
            "observation_dim": observation_dim,
            "heads": [
                HeadSpec(name=f"action_{index}", size=size) for index, size in enumerate(heads)
            ],
            "actor_layers": actor_layers,
            "critic_layers": critic_layers,
            "activation": activation,
            "recurrence": recurrence,
        }
    )


WIRINGS: dict[str, Recurrence | None] = {
    "none": None,
    "lstm": Recurrence(hidden_dim=8, num_layers=1, critic="lstm"),
    "shared": Recurrence(hidden_dim=8, num_layers=2, critic="shared"),
    "linear": Recurrence(hidden_dim=8, num_layers=1, critic="linear"),
}

RECURRENCES = st.none() | st.builds(
    Recurrence,
    hidden_dim=st.integers(1, 8),
    num_layers=st.integers(1, 3),
    critic=st.sampled_from(["lstm", "shared", "linear"]),
)
SPECS = st.builds(
    spec_of,
    heads=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    recurrence=RECURRENCES,
    actor_layers=SIZES,
    critic_layers=SIZES,
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    observation_dim=st.integers(1, 9),
)


def random_sb3(spec: SB3Spec, seed: int = 0, gain: float = 2.0) -> SB3Policy:
    """Weights of a trained policy's size: torch's own, times `gain`."""
    policy = SB3Policy(spec).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        reach = gain / max(1, parameter.shape[-1]) ** 0.5
        parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * reach)
    return policy


def naive_of(policy: SB3Policy) -> NaiveSB3:
    weights = {name: tensor.numpy() for name, tensor in policy.state_dict().items()}
    return NaiveSB3(weights, policy.spec.activation)


def random_masks(spec: SB3Spec, rng: np.random.Generator, rows: int) -> NDArray[np.bool_]:
    """Packed, with something allowed in every head."""
    parts = []
    for size in spec.head_sizes:
        part = rng.random((rows, size)) < 0.6
        part[np.arange(rows), rng.integers(size, size=rows)] = True
        parts.append(part)
    return np.concatenate(parts, axis=1)
