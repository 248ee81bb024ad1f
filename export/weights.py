"""A policy's weights as an artifact holds them, and the policy they make: nothing else travels.

What is exported, what judges it, and what `verify` rebuilds years later all come from these bytes,
each by itself; no module of the caller's is among them, and none is in two of them.
"""

from typing import Any, NamedTuple, cast

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from export.families import Normalizer, family_of
from export.manifest import ArtifactError, Precision
from model.actor_critic import ActorCritic
from model.policy_weights import uncompiled
from model.step_spec import StepSpec

WEIGHTS_FILE = "weights.safetensors"
NORMALIZER_PREFIX = "observation_normalizer."


class RebuiltPolicy(NamedTuple):
    """A policy for acting, and the statistics it was trained with, if any."""

    policy: ActorCritic
    normalizer: Normalizer | None


def pack_weights(policy: nn.Module, normalizer: Normalizer | None) -> bytes:
    """The content of `weights.safetensors`: float32 copies, the spec beside them.

    `policy` may be compiled, whole or in parts, be on any device and have any floating dtype.
    Raises ValueError where two weights have one name, one is not finite, or the normaliser is not
    one for the policy's features.
    """
    tensors: dict[str, Tensor] = {}
    for compiled_name, tensor in policy.state_dict().items():
        name = uncompiled(compiled_name)
        if name in tensors:
            raise ValueError(
                f"the policy has two weights called {name!r}, one as {compiled_name!r}"
            )
        tensors[name] = _plain(tensor)
        if not tensors[name].isfinite().all():
            raise ValueError(f"the policy's {name!r} holds NaN or infinity")
    spec = cast(StepSpec, policy.spec)
    named = {} if normalizer is None else normalizer.state_dict()
    statistics = {uncompiled(name): tensor for name, tensor in named.items()}
    own = family_of(spec).normalizer(spec, statistics)  # whose checks are its own
    if own is not None and len(own.mean) != spec.observation_dim:
        raise ValueError(
            f"the normaliser is for {len(own.mean)} features, and the policy reads "
            f"{spec.observation_dim}"
        )
    for name, tensor in statistics.items():
        tensors[f"{NORMALIZER_PREFIX}{name}"] = _plain(tensor)
    # Without defaults: what a later release adds to the spec leaves old policies' versions alone.
    return save_tensors(tensors, metadata={"spec": spec.model_dump_json(exclude_defaults=True)})


def rebuild(content: bytes, spec: StepSpec, device: torch.device) -> RebuiltPolicy:
    """What `weights.safetensors` makes: modules of their own, in eval mode, on `device`.

    Raises ArtifactError where the weights are not those of the spec.
    """
    try:
        tensors = load_tensors(content)
        statistics = {
            name.removeprefix(NORMALIZER_PREFIX): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(NORMALIZER_PREFIX)
        }
        with torch.random.fork_rng(devices=[]):
            policy = family_of(spec).policy(spec)
        policy.load_state_dict(tensors, strict=True)
        normalizer = family_of(spec).normalizer(spec, statistics)
    except (KeyError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise ArtifactError("the weights are not those of the spec") from error
    policy = policy.to(device).eval().requires_grad_(False)
    return RebuiltPolicy(policy, None if normalizer is None else normalizer.to(device).eval())


def pack(weights: bytes, spec: StepSpec, precision: Precision) -> dict[str, NDArray[Any]]:
    """The packed parameters of an artifact's weights: the same on every machine, to the bit."""
    policy, normalizer = rebuild(weights, spec, torch.device("cpu"))
    return family_of(spec).step(policy, normalizer, precision).packed()


def _plain(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()
