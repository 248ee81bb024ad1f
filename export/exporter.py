"""A policy -> a verified artifact directory: the whole story of an export."""

import copy
import errno
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

from export.formats import FORMATS, StepInput
from export.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    File,
    FormatParity,
    Manifest,
    Parity,
    Source,
    step_inputs,
    step_outputs,
)
from export.parity import (
    ATOL,
    BATCH_SIZES,
    RTOL,
    STEPS,
    ParityError,
    Reference,
    check_parity,
    first_line,
)
from export.step import PolicyStep
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic

WEIGHTS_FILE = "weights.safetensors"


def export_policy(
    policy: FactoredRecurrentActorCritic,
    normalizer: ObservationNormalizer | None,
    output: Path,
    *,
    name: str,
    source: Source,
    formats: Sequence[str] = tuple(FORMATS),
    device: str = "cpu",
    overwrite: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Manifest:
    """Writes `output` with every format of `formats`, each compared with `policy` from its file.

    The directory appears complete or not at all: it is written beside `output` and renamed. Raises
    FileExistsError where `output` exists, unless it is an artifact and `overwrite` is set; and
    ParityError, leaving no artifact, where a file does not do what the policy does. `on_stage`
    hears what happens next.
    """
    _check_replaceable(output, overwrite)
    policy = copy.deepcopy(policy).to(device=device, dtype=torch.float32).eval()
    normalizer = None if normalizer is None else copy.deepcopy(normalizer).to(device)
    _make_parent(output)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        on_stage("writing the weights")
        weights = _write_weights(policy, normalizer, staging / WEIGHTS_FILE)
        step = PolicyStep(policy, normalizer).eval()
        reference = Reference(policy, normalizer)
        files: dict[str, File] = {}
        parity: dict[str, FormatParity] = {}
        for format_name in formats:
            on_stage(f"exporting {format_name}")
            files[format_name] = _write_format(format_name, step, staging)
            on_stage(f"comparing {format_name} with the policy")
            parity[format_name] = _check_format(
                format_name, files[format_name], staging, reference
            )  # fmt: skip
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=name,
            spec=policy.spec,
            precision="fp32",
            device="cuda" if device.startswith("cuda") else "cpu",
            has_normalizer=normalizer is not None,
            inputs=step_inputs(policy.spec),
            outputs=step_outputs(policy.spec),
            weights=weights,
            formats=files,
            parity=Parity(
                atol=ATOL, rtol=RTOL, batch_sizes=BATCH_SIZES, steps=STEPS, formats=parity
            ),
            source=source,
            versions={
                "python": platform.python_version(),
                "tamiyo-serve": version("tamiyo-serve"),
                "torch": torch.__version__,
            },
        )
        manifest.write(staging)
        _publish(staging, output, overwrite)
        return manifest
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_replaceable(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists already; --overwrite replaces it")
    if not _is_artifact(output):
        raise FileExistsError(f"{output} is not an artifact, so it is not overwritten")


def _make_parent(output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # exists, as a file
        reason = os.strerror(errno.ENOTDIR)
        raise NotADirectoryError(errno.ENOTDIR, reason, str(output.parent)) from error


def _is_artifact(directory: Path) -> bool:
    """Whether it holds an artifact's manifest, of whatever version, or nothing at all."""
    try:
        if not any(directory.iterdir()):
            return True
        manifest = json.loads((directory / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.keys() >= {"schema_version", "formats"}


def _write_weights(
    policy: FactoredRecurrentActorCritic, normalizer: ObservationNormalizer | None, path: Path
) -> File:
    tensors = {name: tensor.contiguous() for name, tensor in policy.state_dict().items()}
    if normalizer is not None:
        tensors["observation_normalizer.mean"] = normalizer.mean
        tensors["observation_normalizer.var"] = normalizer.var
    save_file(tensors, path, metadata={"spec": policy.spec.model_dump_json()})
    return File.describe(path)


def _write_format(format_name: str, step: PolicyStep, directory: Path) -> File:
    path = directory / FORMATS[format_name].file
    with torch.no_grad():
        FORMATS[format_name].write(step, _example(step), path)
    return File.describe(path)


def _check_format(
    format_name: str, file: File, directory: Path, reference: Reference
) -> FormatParity:
    device = reference.policy.heads.valid.device
    content = file.read(directory)
    try:
        loaded = FORMATS[format_name].load(content, device)
    except Exception as error:  # whatever the format's own loader raises
        raise ParityError(f"{format_name} cannot be loaded back: {first_line(error)}") from error
    try:
        return check_parity(loaded, reference)
    except ParityError as error:
        raise ParityError(f"{format_name} differs from the policy: {error}") from error


def _example(step: PolicyStep) -> StepInput:
    """Zeros for two rows: with one, tracers take the batch for a constant."""
    heads, device = step.heads, step.heads.valid.device
    num_choices = sum(heads.sizes)
    observation_dim = step.feature_net[0].get_parameter("weight").shape[1]
    hidden_dim = step.lstm_ln.normalized_shape[0]
    state = torch.zeros(2, len(step.cells), hidden_dim, device=device)
    return (
        torch.zeros(2, observation_dim, device=device),
        torch.ones(2, num_choices, dtype=torch.bool, device=device),
        torch.zeros(2, num_choices, device=device),
        state,
        state.clone(),
    )


def _publish(staging: Path, output: Path, overwrite: bool) -> None:
    """Puts the finished directory in place; an older one is gone only once the new one stands."""
    _check_replaceable(output, overwrite)
    staging.chmod(0o755)  # mkdtemp's and safetensors' files are the owner's alone
    for file in staging.iterdir():
        file.chmod(0o644)
    if not output.exists():
        staging.rename(output)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    older = retired / output.name
    try:
        output.rename(older)
        staging.rename(output)
    except BaseException:  # an interrupt too must not cost the older artifact
        if older.exists() and not output.exists():
            older.rename(output)
        retired.rmdir()  # refuses while it still holds something
        raise
    shutil.rmtree(retired)
