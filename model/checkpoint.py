"""A trainer's file -> spec, weights and observation statistics.

The only place that knows esper-lite's checkpoint keys. Knows nothing of file formats.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint_file import CheckpointError, read_file, short
from model.normalizer import VARIANCE_EPSILON, ObservationNormalizer
from model.observations import BASE_FEATURES, SLOT_FEATURES_V3, UNTRACKED
from model.policy import FactoredRecurrentActorCritic
from model.policy_weights import PolicyWeights, find_weights
from model.spec import PolicySpec

__all__ = ["CheckpointError", "load_checkpoint", "load_normalizer"]

TRAINERS_ENTRY = "network_state_dict"

LEAST_RETURNS = 32
"""V2's trainer leaves values as they are until it has normalised this many returns."""

LARGEST_VARIANCE = 1e30
"""Of returns; float32 holds values up to about 3e38."""


def load_checkpoint(
    path: Path | str, content: bytes | None = None
) -> tuple[PolicySpec, dict[str, Tensor], ObservationNormalizer | None]:
    """Reads a V1 or V2 trainer's checkpoint, or a state_dict, alone or beside other entries.

    `content` is the file's, for who has read it to know what is loaded.
    Dimensions are read off the weights, since the trainer stores neither feature width nor layer
    count (esper-lite's own loader assumes one layer). The spec's `value_scale` is V2's value
    normaliser's. The normaliser is None where the file holds no observation statistics: the V1
    trainer loses them (esper-lite B5-PT-02).
    Raises CheckpointError for a missing, damaged, foreign or non-finite file, for one that holds
    two policies, for one from between V1 and V2 or of another version, and for a pickle that holds
    anything but tensors, NumPy's numbers and arrays, and plain containers.
    """
    path = Path(path)
    held = read_file(path, content)
    if not isinstance(held, Mapping):
        raise CheckpointError(f"{path}: holds a {type(held).__name__}, not a checkpoint")
    found = find_weights(path, held)
    if _generation(path, found) == 2:
        spec = _infer_v2(path, found)
        _check_contract(path, found.beside, spec)
    else:
        spec = _infer_v1(path, found.weights)
    _check_weights(path, spec, found.weights)
    return spec, found.weights, _normalizer(path, found.beside, spec.observation_dim)


def _generation(path: Path, found: PolicyWeights) -> int:
    """1 or 2; CheckpointError for what was trained between the two, or says another version."""
    weights, beside = found.weights, found.beside
    has_residual = any(name.startswith("lstm.layers.") for name in weights)
    has_state_value = any(name.startswith("state_value_head.") for name in weights)
    curve = weights.get("alpha_curve_head.2.weight")
    between = f"{path}: is from between V1 and V2, and neither reads it: "
    if has_residual and not has_state_value:
        raise CheckpointError(f"{between}V(s) has no head yet (2026-01-12 to 2026-06-18)")
    if not has_residual and "blueprint_embedding.embedding.weight" in weights:
        raise CheckpointError(
            f"{between}it embeds blueprints, with V1's LSTM (2025-12-30 to 2026-01-12)"
        )
    if not has_residual and curve is not None and curve.ndim == 2 and curve.shape[0] == 5:
        raise CheckpointError(
            f"{between}it chooses among 5 alpha curves, V1 among 3 (from 2025-12-28 on)"
        )
    generation = 2 if has_residual else 1
    version = beside.get("checkpoint_version", generation)
    if not isinstance(version, int) or version not in (1, 2):
        raise CheckpointError(
            f"{path}: is checkpoint version {short(version)}; 1 and 2 can be read"
        )
    if version != generation:
        raise CheckpointError(
            f"{path}: says it is checkpoint version {version}, and holds a V{generation} policy"
        )
    is_trainers = found.entry[-1:] == (TRAINERS_ENTRY,)
    schema = beside.get("value_head_schema_version", None if is_trainers else 2)
    if generation == 2 and not (isinstance(schema, int) and schema == 2):
        raise CheckpointError(
            f"{path}: has value-head schema version {short(schema)}; 2 can be read"
        )
    return generation


def _infer_v1(path: Path, weights: Mapping[str, Tensor]) -> PolicySpec:
    _check_matrices(
        path, weights, "V1", "feature_net.0.weight", "lstm.weight_hh_l0", "slot_head.2.weight"
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


def _infer_v2(path: Path, found: PolicyWeights) -> PolicySpec:
    weights = found.weights
    hidden = "lstm.layers.0.weight_hh_l0"
    embedding = "blueprint_embedding.embedding.weight"
    _check_matrices(
        path, weights, "V2", "feature_net.0.weight", hidden, "slot_head.2.weight", embedding
    )
    feature_dim, input_dim = weights["feature_net.0.weight"].shape
    num_slots = weights["slot_head.2.weight"].shape[0]
    layers = {name.split(".")[2] for name in weights if name.startswith("lstm.layers.")}
    value_scale = _value_scale(path, found.beside)
    try:
        return PolicySpec.tamiyo_v2(
            num_slots=num_slots,
            observation_dim=input_dim - num_slots * weights[embedding].shape[1],
            feature_dim=feature_dim,
            hidden_dim=weights[hidden].shape[1],
            num_layers=len(layers),
            value_scale=value_scale,
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: its weights have an impossible shape") from error


def _check_matrices(path: Path, weights: Mapping[str, Tensor], version: str, *names: str) -> None:
    for name in names:
        if name not in weights:
            raise CheckpointError(
                f"{path}: has no {name!r}, so it is not a Tamiyo {version} policy"
            )
        if weights[name].ndim != 2:
            raise CheckpointError(
                f"{path}: {name!r} has shape {tuple(weights[name].shape)}, expected a matrix"
            )


def _value_scale(path: Path, content: Mapping[str, Any]) -> float:
    """What V2's trainer multiplies values by, once it has seen enough returns."""
    statistics = content.get("value_normalizer_state_dict")
    if statistics is None:
        return 1.0
    if not isinstance(statistics, Mapping):
        raise CheckpointError(f"{path}: has an unusable value normaliser")
    try:
        var, count = float(statistics["var"]), float(statistics["count"])
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: has an unusable value normaliser") from error
    if math.isnan(count) or not 0 <= var <= LARGEST_VARIANCE:
        raise CheckpointError(
            f"{path}: its value normaliser has variance {var:g} of {count:g} returns"
        )
    return 1.0 if count < LEAST_RETURNS else math.sqrt(var + VARIANCE_EPSILON)


def _check_contract(path: Path, content: Mapping[str, Any], spec: PolicySpec) -> None:
    """What V2's observation statistics say they are of is what the network reads."""
    metadata = content.get("metadata")
    if not isinstance(metadata, Mapping) or "obs_normalizer_mean" not in metadata:
        return
    contract = metadata.get("obs_normalizer_contract")
    if not isinstance(contract, Mapping):
        raise CheckpointError(
            f"{path}: has observation statistics without the contract that says what they are of"
        )
    slot_ids = contract.get("slot_ids")
    slot_ids = slot_ids if isinstance(slot_ids, list | tuple) else ()
    for name, found, expected in (
        ("schema_version", contract.get("schema_version"), 1),
        ("slots", len(slot_ids), spec.num_slots),
        ("base_feature_size", contract.get("base_feature_size"), BASE_FEATURES),
        ("slot_feature_size", contract.get("slot_feature_size"), SLOT_FEATURES_V3),
        ("state_dim", contract.get("state_dim"), spec.observation_dim),
        ("unknown_sentinel", contract.get("unknown_sentinel"), UNTRACKED),
    ):
        if not isinstance(found, int | float) or found != expected:
            raise CheckpointError(
                f"{path}: its observation statistics are for {name} {short(found)}, and the "
                f"policy's is {expected}"
            )
    num_features = BASE_FEATURES + SLOT_FEATURES_V3 * spec.num_slots
    if spec.observation_dim != num_features:
        raise CheckpointError(
            f"{path}: {spec.num_slots} slots make {num_features} features, and the network reads "
            f"{spec.observation_dim}"
        )
    architecture = content.get("architecture")
    own_ids = architecture.get("slot_ids") if isinstance(architecture, Mapping) else None
    if isinstance(own_ids, list | tuple) and list(map(short, own_ids)) != list(
        map(short, slot_ids)
    ):
        raise CheckpointError(
            f"{path}: its observation statistics are for the slots {short(slot_ids)}, and the "
            f"policy has {short(own_ids)}"
        )


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
        version = "V1" if spec.recurrence == "lstm" else "V2"
        raise CheckpointError(f"{path}: is not a Tamiyo {version} policy: it {' and '.join(parts)}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: {name!r} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(expected[name].shape)}"
            )
        if not expected[name].is_floating_point():  # the index of "no blueprint"
            if tensor.dtype != torch.int64 or int(tensor) != spec.num_blueprints:
                raise CheckpointError(f"{path}: {name!r} is not {spec.num_blueprints}")
        elif not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name!r} is {tensor.dtype}, expected floating point")
        elif not tensor.float().isfinite().all():
            raise CheckpointError(f"{path}: {name!r} holds NaN or infinity")


def load_normalizer(path: Path | str, observation_dim: int) -> ObservationNormalizer:
    """Observation statistics from a file of their own, JSON, safetensors or torch: mean and var.

    A checkpoint that holds them will do too. Raises CheckpointError where they are missing, for
    another number of features, or unusable.
    """
    path = Path(path)
    content = read_file(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not mean and var")
    if {"mean", "var"} <= content.keys():
        found = {f"obs_normalizer_{name}": content[name] for name in ("mean", "var")}
        content = {"metadata": found}
    normalizer = _normalizer(path, content, observation_dim)
    if normalizer is None:
        raise CheckpointError(f"{path}: holds no observation statistics, mean and var")
    return normalizer


def _normalizer(
    path: Path, content: Mapping[str, Any], observation_dim: int
) -> ObservationNormalizer | None:
    metadata = content.get("metadata")
    needed = {"obs_normalizer_mean", "obs_normalizer_var"}
    if not isinstance(metadata, Mapping) or not needed & metadata.keys():
        return None
    try:
        normalizer = ObservationNormalizer(
            _vector(metadata["obs_normalizer_mean"]), _vector(metadata["obs_normalizer_var"])
        )
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{path}: has unusable observation statistics: {reason}") from error
    if len(normalizer.mean) != observation_dim:
        raise CheckpointError(
            f"{path}: has observation statistics for {len(normalizer.mean)} features, "
            f"the network reads {observation_dim}"
        )
    return normalizer


def _vector(values: Any) -> Tensor:
    """float32 of a tensor, an array or a list of numbers; TypeError for a list of anything else."""
    if isinstance(values, list | tuple):
        for value in values:
            if not isinstance(value, int | float | Tensor):
                raise TypeError(f"{short(value)} is no number")
    return torch.as_tensor(values, dtype=torch.float32)
