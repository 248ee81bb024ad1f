"""A model of Stable-Baselines3 -> spec, weights and observation statistics, running none of it."""

from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model.checkpoint_file import CheckpointError
from model.sb3.description import (
    MASKABLE,
    Description,
    check_network,
    read_description,
)
from model.sb3.mirror import read_attributes
from model.sb3.network import Network, read_network
from model.sb3.normalizer import VecNormalizer
from model.sb3.space_text import MultiBinary
from model.sb3.spaces import flat_observation, heads
from model.sb3.spec import SB3Spec
from model.sb3.vec_normalize import load_statistics
from model.sb3.weights import load_weights
from model.sb3.zip_file import is_sb3_zip, read_members

__all__ = ["SB3Checkpoint", "is_sb3_zip", "load_sb3"]

SHAPES = "policy.pth (shapes)"
NEVER_NORMALIZED = "data (JSON)"


class SB3Checkpoint(NamedTuple):
    """A policy as its trainer saved it.

    `state_dict` has the trainer's own names, float32; `provenance` says of each fact where it was
    read, and of `stable_baselines3` its version.
    """

    spec: SB3Spec
    state_dict: dict[str, Tensor]
    normalizer: VecNormalizer | None
    provenance: dict[str, str]


def load_sb3(
    path: Path,
    content: bytes,
    *,
    action_space: str | None = None,
    observation_space: str | None = None,
    normaliser: Path | Literal["identity"] | None = None,
    any_policy_class: bool = False,
) -> SB3Checkpoint:
    """The policy of a `model.save()` of RecurrentPPO, MaskablePPO, PPO or A2C.

    The spaces, as text, are for a file that does not say them; `normaliser` is what VecNormalize
    saved beside the model, or says that the policy reads observations as they come. A MultiBinary's
    one logit a choice becomes two, the first 0, which is the same distribution.
    Raises CheckpointError for a file of any other kind, a damaged one, one whose parts contradict
    each other, and a policy whose step is another.
    """
    try:
        checkpoint = _read(content, action_space, observation_space, normaliser, any_policy_class)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return _normalized(checkpoint, normaliser) if isinstance(normaliser, Path) else checkpoint


def _read(
    content: bytes,
    action_space: str | None,
    observation_space: str | None,
    normaliser: Path | Literal["identity"] | None,
    any_policy_class: bool,
) -> SB3Checkpoint:
    members = read_members(content)
    description = read_description(
        read_attributes(members.data),
        action_space=action_space,
        observation_space=observation_space,
        any_policy_class=any_policy_class,
    )
    weights = load_weights(members.weights)
    network = read_network({name: tuple(tensor.shape) for name, tensor in weights.items()})
    check_network(description, network)
    is_bernoulli = _is_bernoulli(description, network.rows)
    # Before there are heads, which are as many as is said.
    num_rows = description.num_choices // (2 if is_bernoulli else 1)
    if num_rows != network.rows:
        raise CheckpointError(
            f"its action space takes {num_rows} rows of action_net, which has {network.rows}"
        )
    if is_bernoulli:
        for name in ("action_net.weight", "action_net.bias"):
            weights[name] = _two_rows(weights[name])
    provenance = description.provenance | dict.fromkeys(
        ("hidden_dim", "num_layers", "critic") if network.recurrence else (), SHAPES
    )
    provenance |= dict.fromkeys(("actor_layers", "critic_layers"), SHAPES)
    provenance["normalization"] = _normalization(description, normaliser)
    if members.version is not None:
        provenance["stable_baselines3"] = members.version
    return SB3Checkpoint(_spec(description, network), weights, None, provenance)


def _spec(description: Description, network: Network) -> SB3Spec:
    size, parts = flat_observation(description.observation_space)
    if size != network.observation_dim:
        raise CheckpointError(
            f"its observation space has {size} numbers, and its policy.pth reads "
            f"{network.observation_dim}"
        )
    return SB3Spec(
        family="mlps",
        name=description.name,
        observation_dim=size,
        heads=heads(description.action_space),
        actor_layers=network.actor_layers,
        critic_layers=network.critic_layers,
        activation=description.activation,
        recurrence=network.recurrence,
        observation=parts,
    )


def _is_bernoulli(description: Description, rows: int) -> bool:
    """Whether a choice of two has one logit, that of 1: as every trainer but MaskablePPO has it."""
    space, module = description.action_space, description.policy_module
    if not isinstance(space, MultiBinary) or module == MASKABLE:
        return False
    return module is not None or space.shape == (rows,)


def _two_rows(tensor: Tensor) -> Tensor:
    """`[n, ...]` -> `[2 n, ...]`, a row of zeros before each."""
    return torch.stack((torch.zeros_like(tensor), tensor), dim=1).flatten(0, 1)


def _normalization(description: Description, normaliser: Path | Literal["identity"] | None) -> str:
    """Where it was said; CheckpointError where it has to be, and was not."""
    if normaliser is not None:
        name = normaliser.name if isinstance(normaliser, Path) else normaliser
        return f"--normaliser {name}"
    if description.was_normalized is False:
        return NEVER_NORMALIZED
    what = "was trained" if description.was_normalized else "may have been trained"
    raise CheckpointError(
        f"{what} with VecNormalize, whose statistics are not in it: --normaliser FILE brings the "
        "vec_normalize.pkl saved beside it, --normaliser identity says that there are none"
    )


def _normalized(checkpoint: SB3Checkpoint, statistics: Path) -> SB3Checkpoint:
    spec = checkpoint.spec
    normalizer = load_statistics(statistics, spec.observation, spec.observation_dim)
    normalization = normalizer.normalization.model_dump()
    spec = SB3Spec.model_validate(spec.model_dump() | {"normalization": normalization})
    return checkpoint._replace(spec=spec, normalizer=normalizer)
