"""Is an artifact still what was exported, and does it still do what its policy does, here?"""

from collections.abc import Callable

import torch

from export.artifact import Artifact
from export.format_kinds import FORMAT_KINDS
from export.loaders.load import RUNTIME_OF, load_step
from export.manifest import ArtifactError, Device, FormatParity, Manifest
from export.parameters import sha256
from export.parity import Gate
from export.process import plain_process
from export.weights import pack


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
    contents = {file.file: artifact.read(file) for file in manifest.files}
    if device == "cuda" and not torch.cuda.is_available():
        raise ArtifactError(f"{directory}: is to run on CUDA, and no CUDA device is visible")
    on_stage("loading the formats")
    try:
        with plain_process():
            steps = {
                name: load_step(
                    contents[file.file],
                    name=RUNTIME_OF[name],
                    file=file,
                    inputs=manifest.inputs,
                    outputs=manifest.outputs,
                    device=device,
                    num_threads=1,
                )
                for name, file in formats.items()
            }
            gate = Gate(
                contents[manifest.weights.file],
                manifest.spec,
                precision=manifest.precision,
                max_batch_size=manifest.max_batch_size,
                device=torch.device(device),
            )
            weights = contents[manifest.weights.file]
            if manifest.parameters and _version(weights, manifest) != manifest.policy_version:
                raise ArtifactError("the weights are not those that the policy's version names")
            on_stage("running the policy's own episodes, and each format beside it")
            return gate.check(steps).parity.formats
    except ArtifactError as error:
        raise ArtifactError(f"{directory}: {error}") from error


def _version(weights: bytes, manifest: Manifest) -> str:
    return f"sha256:{sha256(pack(weights, manifest.spec, manifest.precision))}"
