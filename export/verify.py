"""Is an artifact still what was exported, and does it still do what its policy does, here?"""

from collections.abc import Callable
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from safetensors.torch import load as load_tensors
from torch import Tensor

from export.exporter import NORMALIZER_PREFIX, check_format
from export.manifest import ArtifactError, FormatParity, Manifest
from export.parity import Reference, parity_batch_sizes
from export.signature import check_signature
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic


def verify_artifact(
    directory: Path,
    *,
    trusted: Ed25519PublicKey | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, FormatParity]:
    """Checks signature (where a `trusted` key is given), every hash, then every format's parity.

    The policy is rebuilt from the artifact's own weights, so this needs no checkpoint. Raises
    ArtifactError where the artifact is not what was exported or not for this machine, ParityError
    where a format does not do what the policy does.
    """
    if trusted is not None:
        on_stage("checking the signature")
        check_signature(directory, trusted)
    manifest = Manifest.read(directory)
    on_stage("checking the hashes")
    for file in manifest.files:
        file.read(directory)
    on_stage("running the policy's own episodes")
    policy, normalizer = _rebuild(directory, manifest)
    reference = Reference(
        policy,
        normalizer,
        batch_sizes=parity_batch_sizes(manifest.max_batch_size),
        precision=manifest.precision,
    )
    parity = {}
    for format_name, file in manifest.formats.items():
        on_stage(f"comparing {format_name} with the policy")
        _, run = check_format(format_name, file, directory, reference)
        parity[format_name] = run.summary()
    return parity


def _rebuild(
    directory: Path, manifest: Manifest
) -> tuple[FactoredRecurrentActorCritic, ObservationNormalizer | None]:
    tensors = load_tensors(manifest.weights.read(directory))
    statistics: dict[str, Tensor] = {
        name.removeprefix(NORMALIZER_PREFIX): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(NORMALIZER_PREFIX)
    }
    policy = FactoredRecurrentActorCritic(manifest.spec)
    try:
        policy.load_state_dict(tensors, strict=True)
        normalizer = ObservationNormalizer(**statistics) if statistics else None
    except (RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{directory}: its weights are not those of its spec") from error
    if manifest.device == "cuda" and not torch.cuda.is_available():
        raise ArtifactError(f"{directory}: was exported for CUDA, and no CUDA device is visible")
    policy = policy.to(manifest.device).eval()
    return policy, None if normalizer is None else normalizer.to(manifest.device)
