"""A policy -> a verified artifact directory: the whole story of an export."""

import copy
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import save_file

from export.directory import staged
from export.formats import FORMATS, PORTABLE_FORMATS, StepSource, load_format, machine_requirement
from export.manifest import (
    SCHEMA_VERSION,
    File,
    FormatFile,
    FormatParity,
    Manifest,
    Parity,
    Source,
    step_inputs,
    step_outputs,
)
from export.parity import (
    ATOL,
    RTOL,
    STEPS,
    ParityError,
    Reference,
    check_parity,
    parity_batch_sizes,
)
from export.signature import sign
from export.step import PolicyStep
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic

WEIGHTS_FILE = "weights.safetensors"
NORMALIZER_PREFIX = "observation_normalizer."


def export_policy(
    policy: FactoredRecurrentActorCritic,
    normalizer: ObservationNormalizer | None,
    output: Path,
    *,
    name: str,
    source: Source,
    formats: Sequence[str] = PORTABLE_FORMATS,
    device: str = "cpu",
    max_batch_size: int = 256,
    overwrite: bool = False,
    sign_with: Ed25519PrivateKey | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Manifest:
    """Writes `output` with every format of `formats`, each compared with `policy` from its file.

    The directory appears complete or not at all: it is written beside `output` and renamed. Raises
    FileExistsError where `output` exists, unless it is an artifact and `overwrite` is set; and
    ParityError, leaving no artifact, where a file does not do what the policy does. `on_stage`
    hears what happens next; `sign_with` signs the manifest. The caller's policy is copied first.
    """
    policy = copy.deepcopy(policy).to(device=device, dtype=torch.float32).eval()
    normalizer = None if normalizer is None else copy.deepcopy(normalizer).to(device)
    with staged(output, overwrite=overwrite) as directory:
        on_stage("writing the weights")
        weights = _write_weights(policy, normalizer, directory / WEIGHTS_FILE)
        step = StepSource(PolicyStep(policy, normalizer).eval(), max_batch_size)
        on_stage("running the policy's own episodes")
        batch_sizes = parity_batch_sizes(max_batch_size)
        reference = Reference(policy, normalizer, batch_sizes=batch_sizes)
        files: dict[str, FormatFile] = {}
        parity: dict[str, FormatParity] = {}
        for format_name in formats:
            on_stage(f"exporting {format_name}")
            files[format_name] = _write_format(format_name, step, directory)
            on_stage(f"comparing {format_name} with the policy")
            parity[format_name] = check_format(
                format_name, files[format_name], directory, reference
            )  # fmt: skip
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=name,
            spec=policy.spec,
            precision="fp32",
            device="cuda" if device.startswith("cuda") else "cpu",
            has_normalizer=normalizer is not None,
            max_batch_size=max_batch_size,
            inputs=step_inputs(policy.spec),
            outputs=step_outputs(policy.spec),
            weights=weights,
            formats=files,
            parity=Parity(
                atol=ATOL, rtol=RTOL, batch_sizes=batch_sizes, steps=STEPS, formats=parity
            ),
            source=source,
            versions={
                "python": platform.python_version(),
                "tamiyo-serve": version("tamiyo-serve"),
                "torch": torch.__version__,
            },
        )
        manifest.write(directory)
        if sign_with is not None:
            sign(directory, sign_with)
    return manifest


def check_format(
    format_name: str, file: FormatFile, directory: Path, reference: Reference
) -> FormatParity:
    """Loads a format back from `directory`, its hash first, and compares it with the policy.

    Raises ArtifactError where the file is not the manifest's or not for this machine, ParityError
    where it does not load or does not do what the policy does.
    """
    loaded = load_format(format_name, file, directory, reference.policy.heads.valid.device)
    try:
        return check_parity(loaded, reference).summary()
    except ParityError as error:
        raise ParityError(f"{format_name} differs from the policy: {error}") from error


def _write_weights(
    policy: FactoredRecurrentActorCritic, normalizer: ObservationNormalizer | None, path: Path
) -> File:
    tensors = {name: tensor.contiguous() for name, tensor in policy.state_dict().items()}
    if normalizer is not None:
        for name, tensor in normalizer.state_dict().items():
            tensors[f"{NORMALIZER_PREFIX}{name}"] = tensor
    save_file(tensors, path, metadata={"spec": policy.spec.model_dump_json()})
    return File.describe(path)


def _write_format(format_name: str, step: StepSource, directory: Path) -> FormatFile:
    written = FORMATS[format_name]
    path = directory / written.file
    written.write(step, path)
    requires = machine_requirement(step.example[0].device) if written.is_native else None
    return FormatFile(**File.describe(path).model_dump(), requires=requires)
