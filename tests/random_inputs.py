"""Seeded random policies and inputs whose every number matters.

Inputs are NumPy arrays, as artifacts and the service take them; `tensors` makes them a policy's.
A fresh policy would hide mistakes: its biases are zero and its heads nearly uniform.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec

HEAD_GAIN = 150.0
"""Spreads the heads' logits, which start with a gain of 0.01, over a few units."""
ALLOWED_SHARE = 0.6


def random_policy(spec: PolicySpec, seed: int = 0) -> FactoredRecurrentActorCritic:
    """A policy with random biases and LayerNorms and with opinions about its actions.

    A deep critic's few units are kept from being all off: its value would be a constant.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = FactoredRecurrentActorCritic(spec)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
            for mlp in policy.head_mlps():
                mlp[-1].get_parameter("weight").mul_(HEAD_GAIN)
            if spec.critic != "value":
                for name in policy.critic_names:
                    before_last = list(policy.get_submodule(name).children())[-3]
                    before_last.get_parameter("bias").add_(3.0)
    return policy.eval()


def weights_of(policy: torch.nn.Module) -> dict[str, NDArray[np.float64]]:
    """A module's `state_dict` as the naive policy takes it."""
    return {name: tensor.double().numpy() for name, tensor in policy.state_dict().items()}


def random_observations(
    spec: PolicySpec, rng: np.random.Generator, *lead: int
) -> NDArray[np.float32]:
    return rng.normal(size=(*lead, spec.observation_dim)).astype(np.float32)


def random_state(
    spec: PolicySpec, rng: np.random.Generator, batch_size: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`(h, c)` within the range an LSTM's own are in."""
    shape = (batch_size, spec.num_layers, spec.hidden_dim)
    h = rng.uniform(-1, 1, size=shape).astype(np.float32)
    return h, rng.normal(size=shape).astype(np.float32)


def random_masks(
    spec: PolicySpec, rng: np.random.Generator, *lead: int
) -> dict[str, NDArray[np.bool_]]:
    """`{head: bool [*lead, n]}`, at least one choice allowed in every row of every head."""
    masks = {}
    for head in spec.heads:
        mask = rng.random((*lead, head.size)) < ALLOWED_SHARE
        one = rng.integers(head.size, size=(*lead, 1))
        np.put_along_axis(mask, one, True, axis=-1)
        masks[head.name] = mask
    return masks


def random_slots_by_op(
    spec: PolicySpec, rng: np.random.Generator, op_mask: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """`[*lead, ops, slots]`: at least one slot for each op of `op_mask` `[*lead, ops]` but WAIT.

    None for the ops that are not allowed, as environments send it, and at times none for WAIT.
    """
    mask = rng.random((*op_mask.shape, spec.num_slots)) < ALLOWED_SHARE
    one = rng.integers(spec.num_slots, size=(*op_mask.shape, 1))
    np.put_along_axis(mask, one, True, axis=-1)
    mask &= op_mask[..., None]
    mask[..., 0, :] &= rng.random(op_mask.shape[:-1])[..., None] < ALLOWED_SHARE
    return mask


def random_blueprints(spec: PolicySpec, rng: np.random.Generator, *lead: int) -> NDArray[np.int64]:
    """`[*lead, slots]`, -1 among them."""
    return rng.integers(-1, spec.num_blueprints, size=(*lead, spec.num_slots))


def gumbel_noise(spec: PolicySpec, rng: np.random.Generator, *lead: int) -> NDArray[np.float32]:
    """Standard Gumbel samples, `[*lead, num_choices]`."""
    return rng.gumbel(size=(*lead, spec.num_choices)).astype(np.float32)


def random_actions(
    spec: PolicySpec,
    rng: np.random.Generator,
    masks: Mapping[str, NDArray[np.bool_]],
) -> dict[str, NDArray[np.int64]]:
    """One allowed choice for every head and row of `masks`, each as likely as any other."""
    return {
        head.name: np.argmax(rng.random(masks[head.name].shape) * masks[head.name], axis=-1)
        for head in spec.heads
    }


def packed(spec: PolicySpec, by_head: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The heads' columns side by side in spec order: a mask as the exported step takes it."""
    return np.concatenate([by_head[name] for name in spec.head_names], axis=-1)


def stacked(spec: PolicySpec, by_head: Mapping[str, Any]) -> NDArray[Any]:
    """`{head: [...]}` as one array `[..., heads]`, from arrays or tensors."""
    return np.stack([np.asarray(by_head[name]) for name in spec.head_names], axis=-1)


def tensors(by_head: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in by_head.items()}
