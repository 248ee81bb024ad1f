"""Is an artifact still what was exported, and does it still do what its policy does, here?"""

from collections.abc import Callable

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from export.artifact import Artifact
from export.exporter import NORMALIZER_PREFIX, check_format
from export.format_kinds import FORMAT_KINDS
from export.manifest import ArtifactError, Device, FormatParity
from export.parity import Reference, parity_batch_sizes
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic


def verify_artifact(
    artifact: Artifact,
    *,
    device: Device | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, FormatParity]:
    """Checks every hash, then every format's parity on `device`, by default the manifest's.

    Machine code for another device is left out of the result. The policy is rebuilt from the
    artifact's own weights, so this needs no checkpoint. Raises ArtifactError where the artifact is
    not what was exported or not for this machine, ParityError where a format does not do what the
    policy does.
    """
    manifest, directory = artifact.manifest, artifact.directory
    device = device or manifest.device
    formats = {
        name: file
        for name, file in manifest.formats.items()
        if device == manifest.device or not FORMAT_KINDS[name].is_native
    }
    if not formats:
        raise ArtifactError(f"{directory}: holds nothing but machine code for {manifest.device}")
    on_stage("checking the hashes")
    for file in manifest.files:
        artifact.read(file)
    on_stage("running the policy's own episodes")
    policy, normalizer = _rebuild(artifact, device)
    reference = Reference(
        policy,
        normalizer,
        batch_sizes=parity_batch_sizes(manifest.max_batch_size),
        precision=manifest.precision,
    )
    parity = {}
    for format_name, file in formats.items():
        on_stage(f"comparing {format_name} with the policy")
        _, run = check_format(format_name, file, directory, reference)
        parity[format_name] = run.summary()
    return parity


def _rebuild(
    artifact: Artifact, device: Device
) -> tuple[FactoredRecurrentActorCritic, ObservationNormalizer | None]:
    manifest, directory = artifact.manifest, artifact.directory
    tensors = load_tensors(artifact.read(manifest.weights))
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
    if device == "cuda" and not torch.cuda.is_available():
        raise ArtifactError(f"{directory}: is to run on CUDA, and no CUDA device is visible")
    policy = policy.to(device).eval()
    return policy, None if normalizer is None else normalizer.to(device)
