"""A trainer's file -> spec, weights and observation statistics.

The only place that knows esper-lite's checkpoint keys. Nothing in the file is ever executed:
pickles load with `weights_only=True`, which refuses code.
"""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec

COMPILED_PREFIX = "_orig_mod."


class CheckpointError(ValueError):
    """The file is not a policy this version can read; the message says why, in one sentence."""


def load_checkpoint(
    path: Path | str,
) -> tuple[PolicySpec, dict[str, Tensor], ObservationNormalizer | None]:
    """Reads a trainer's checkpoint, or a bare state_dict (`.pt`, or `.safetensors`).

    Dimensions are read off the weights, since the trainer stores neither feature width nor layer
    count (esper-lite's own loader assumes one layer). The normaliser is None where the file holds
    no observation statistics: the V1 trainer loses them (esper-lite B5-PT-02).
    Raises CheckpointError for a missing, damaged, foreign or non-finite file, and for a pickle
    that holds anything but tensors and plain containers.
    """
    path = Path(path)
    content = _read(path)
    state_dict = {
        name.removeprefix(COMPILED_PREFIX): tensor for name, tensor in _weights(path, content)
    }
    spec = _infer_spec(path, state_dict)
    _check_weights(path, spec, state_dict)
    return spec, state_dict, _normalizer(path, content, spec)


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on how to load what is refused here
            if path.suffix == ".safetensors":
                content = load_file(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds Python objects beyond tensors and plain containers, or is damaged; "
            "nothing in it was run"
        ) from error
    except Exception as error:  # whatever the parsers trip over in a damaged file
        raise CheckpointError(
            f"{path}: cannot be read, it is truncated or no checkpoint"
        ) from error  # fmt: skip
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def _weights(path: Path, content: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    weights = content.get("network_state_dict", content)
    if not isinstance(weights, Mapping) or not weights:
        raise CheckpointError(f"{path}: has no weights under 'network_state_dict'")
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: is neither a checkpoint with 'network_state_dict' nor a state_dict; "
                f"its entry {name!r} is a {type(tensor).__name__}"
            )
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
            raise CheckpointError(
                f"{path}: {name!r} is no plain tensor: {tensor.layout} on {tensor.device}"
            )
    return list(weights.items())


def _infer_spec(path: Path, weights: Mapping[str, Tensor]) -> PolicySpec:
    if "state_value_head.0.weight" in weights or "lstm.layers.0.weight_ih_l0" in weights:
        raise CheckpointError(
            f"{path}: is a V2 checkpoint (residual LSTM, state_value_head); this version reads V1"
        )
    needed = ("feature_net.0.weight", "lstm.weight_hh_l0", "slot_head.2.weight")
    for name in needed:
        if name not in weights:
            raise CheckpointError(f"{path}: has no {name!r}, so it is not a Tamiyo V1 policy")
        if weights[name].ndim != 2:
            raise CheckpointError(
                f"{path}: {name!r} has shape {tuple(weights[name].shape)}, expected a matrix"
            )
    feature_dim, observation_dim = weights["feature_net.0.weight"].shape
    try:
        return PolicySpec.tamiyo_v1(
            num_slots=weights["slot_head.2.weight"].shape[0],
            observation_dim=observation_dim,
            feature_dim=feature_dim,
            hidden_dim=weights["lstm.weight_hh_l0"].shape[1],
            num_layers=sum(name.startswith("lstm.weight_ih_l") for name in weights),
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: its weights have an impossible shape") from error


def _check_weights(path: Path, spec: PolicySpec, weights: Mapping[str, Tensor]) -> None:
    try:
        with torch.device("meta"):
            expected = FactoredRecurrentActorCritic(spec).state_dict()
    except RuntimeError as error:  # dimensions whose product overflows
        raise CheckpointError(f"{path}: its weights have an impossible shape") from error
    missing, foreign = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or foreign:
        parts = [
            f"{what} {', '.join(sorted(names)[:3])}" + (" and others" if len(names) > 3 else "")
            for what, names in (("lacks", missing), ("has the unknown", foreign))
            if names
        ]
        raise CheckpointError(f"{path}: is not a Tamiyo V1 policy: it {' and '.join(parts)}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: {name!r} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(expected[name].shape)}"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name!r} is {tensor.dtype}, expected floating point")
        if not tensor.float().isfinite().all():
            raise CheckpointError(f"{path}: {name!r} holds NaN or infinity")


def _normalizer(
    path: Path, content: Mapping[str, Any], spec: PolicySpec
) -> ObservationNormalizer | None:
    metadata = content.get("metadata")
    needed = {"obs_normalizer_mean", "obs_normalizer_var"}
    if not isinstance(metadata, Mapping) or not needed & metadata.keys():
        return None
    try:
        mean = torch.as_tensor(metadata["obs_normalizer_mean"], dtype=torch.float32)
        var = torch.as_tensor(metadata["obs_normalizer_var"], dtype=torch.float32)
        normalizer = ObservationNormalizer(mean, var)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{path}: has unusable observation statistics: {reason}") from error
    if len(normalizer.mean) != spec.observation_dim:
        raise CheckpointError(
            f"{path}: has observation statistics for {len(normalizer.mean)} features, "
            f"the network reads {spec.observation_dim}"
        )
    return normalizer
