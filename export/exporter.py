"""A policy -> a verified artifact directory: the whole story of an export."""

import copy
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import save as to_safetensors

from export.directory import staged
from export.format_kinds import PORTABLE_FORMATS
from export.formats import (
    FORMATS,
    LoadedStep,
    StepSource,
    check_formats,
    load_format,
    machine_requirement,
)
from export.manifest import (
    SCHEMA_VERSION,
    File,
    FormatFile,
    Manifest,
    Parity,
    Precision,
    Source,
    step_inputs,
    step_outputs,
)
from export.measurement import EAGER, measure_latency, row_difference
from export.parity import (
    STEPS,
    ParityError,
    ParityRun,
    Reference,
    check_parity,
    parity_batch_sizes,
)
from export.report import REPORT_FILE, REPORT_PAGE, FormatReport, Report
from export.report_page import render
from export.signature import sign
from export.step import PolicyStep
from export.stopping import deferred
from export.timing import this_machine
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic

WEIGHTS_FILE = "weights.safetensors"
NORMALIZER_PREFIX = "observation_normalizer."


def export_policy(
    policy: FactoredRecurrentActorCritic,
    normalizer: ObservationNormalizer | None,
    output: Path | str,
    *,
    name: str,
    source: Source | None = None,
    formats: Sequence[str] | None = None,
    device: str = "cpu",
    precision: Precision = "fp32",
    max_batch_size: int = 256,
    overwrite: bool = False,
    sign_with: Ed25519PrivateKey | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Manifest:
    """Writes `output` with every format of `formats`, each compared with `policy` from its file.

    The directory appears complete or not at all: it is written beside `output` and renamed. Without
    `formats` it holds the portable ones that have the precision. Raises FormatError for
    formats that cannot be had so; FileExistsError where `output` exists, unless it is an artifact
    and `overwrite` is set; and ParityError, leaving no artifact, where a file does not do what the
    policy does. `source` says where the weights came from; `on_stage` hears what happens next;
    `sign_with` signs the manifest. The caller's policy is copied first.
    """
    on = torch.device(device)
    source = source or Source(kind="module", name=name)
    if formats is None:
        formats = [name for name in PORTABLE_FORMATS if precision in FORMATS[name].precisions]
    check_formats(formats, precision, on)
    policy = copy.deepcopy(policy).to(device=on, dtype=torch.float32).eval()
    normalizer = None if normalizer is None else copy.deepcopy(normalizer).to(on)
    output = Path(output)
    with deferred() as heeded, staged(output, overwrite=overwrite) as directory, heeded():
        on_stage("writing the weights")
        weights = _write_weights(policy, normalizer, directory / WEIGHTS_FILE)
        step = StepSource(PolicyStep(policy, normalizer, precision).eval(), max_batch_size)
        on_stage("running the policy's own episodes")
        reference = Reference(
            policy,
            normalizer,
            batch_sizes=parity_batch_sizes(max_batch_size),
            precision=precision,
        )
        exports = {
            format_name: _export_format(format_name, step, directory, reference, on_stage)
            for format_name in formats
        }
        parity = Parity(
            **reference.tolerance._asdict(),
            batch_sizes=reference.batch_sizes,
            steps=STEPS,
            formats={name: export.run.summary() for name, export in exports.items()},
        )
        on_stage("measuring how fast each format is")
        report = _report(
            reference,
            exports,
            name=name,
            policy_version=weights.version,
            source=source,
            max_batch_size=max_batch_size,
            parity=parity,
        )
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=name,
            spec=policy.spec,
            precision=precision,
            device=report.device,
            has_normalizer=normalizer is not None,
            max_batch_size=max_batch_size,
            inputs=step_inputs(policy.spec),
            outputs=step_outputs(policy.spec),
            weights=weights,
            formats={name: export.file for name, export in exports.items()},
            reports=_write_reports(report, directory),
            parity=parity,
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


class _Export(NamedTuple):
    file: FormatFile
    loaded: LoadedStep
    run: ParityRun
    export_seconds: float
    check_seconds: float


def _export_format(
    format_name: str,
    step: StepSource,
    directory: Path,
    reference: Reference,
    on_stage: Callable[[str], None],
) -> _Export:
    on_stage(f"exporting {format_name}")
    start = time.perf_counter()
    file = _write_format(format_name, step, directory)
    written = time.perf_counter()
    on_stage(f"comparing {format_name} with the policy")
    loaded, run = check_format(format_name, file, directory, reference)
    return _Export(file, loaded, run, written - start, time.perf_counter() - written)


def check_format(
    format_name: str, file: FormatFile, directory: Path, reference: Reference
) -> tuple[LoadedStep, ParityRun]:
    """Loads a format back from `directory`, its hash first, and compares it with the policy.

    Raises ArtifactError where the file is not the manifest's or not for this machine, ParityError
    where it does not load or does not do what the policy does.
    """
    loaded = load_format(format_name, file, directory, reference.device)
    try:
        return loaded, check_parity(loaded, reference)
    except ParityError as error:
        raise ParityError(f"{format_name} differs from the policy: {error}") from error


def _report(
    reference: Reference,
    exports: Mapping[str, _Export],
    *,
    name: str,
    policy_version: str,
    source: Source,
    max_batch_size: int,
    parity: Parity,
) -> Report:
    latency = measure_latency(reference, {name: export.loaded for name, export in exports.items()})
    return Report(
        name=name,
        policy_version=policy_version,
        source=source,
        precision=reference.precision,
        device="cuda" if reference.device.type == "cuda" else "cpu",
        max_batch_size=max_batch_size,
        measured_at=datetime.now(UTC),
        machine=this_machine(reference.device),
        parity=parity,
        eager=latency[EAGER],
        formats={
            name: FormatReport(
                export_seconds=export.export_seconds,
                check_seconds=export.check_seconds,
                latency=latency[name],
                error_by_step=tuple(export.run.error_by_step),
                row_difference=row_difference(reference, export.loaded),
            )
            for name, export in exports.items()
        },
    )


def _write_reports(report: Report, directory: Path) -> tuple[File, ...]:
    page, data = directory / REPORT_PAGE, directory / REPORT_FILE
    page.write_text(render(report), encoding="utf-8")
    data.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return File.describe(page), File.describe(data)


def _write_weights(
    policy: FactoredRecurrentActorCritic, normalizer: ObservationNormalizer | None, path: Path
) -> File:
    tensors = {name: tensor.contiguous() for name, tensor in policy.state_dict().items()}
    if normalizer is not None:
        for name, tensor in normalizer.state_dict().items():
            tensors[f"{NORMALIZER_PREFIX}{name}"] = tensor
    # Without defaults: what a later release adds to the spec leaves old policies' versions alone.
    spec = policy.spec.model_dump_json(exclude_defaults=True)
    path.write_bytes(to_safetensors(tensors, metadata={"spec": spec}))
    return File.describe(path)


def _write_format(format_name: str, step: StepSource, directory: Path) -> FormatFile:
    written = FORMATS[format_name]
    path = directory / written.file
    path.write_bytes(written.write(step))
    requires = machine_requirement(step.example[0].device) if written.is_native else None
    return FormatFile(**File.describe(path).model_dump(), requires=requires)
