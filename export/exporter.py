"""A policy -> a verified artifact directory: the whole story of an export."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export.comparison import ParityError
from export.directory import staged
from export.families import Normalizer, family_of
from export.format_kinds import PORTABLE_FORMATS
from export.formats import FORMATS, FormatError, StepSource, check_formats
from export.loaders.load import RUNTIME_OF, load_step
from export.loaders.machine import machine_capability
from export.loaders.protocol import LoadedStep
from export.manifest import (
    LARGEST_BATCH_SIZE,
    SCHEMA_VERSION,
    ArtifactError,
    Device,
    File,
    FormatFile,
    Manifest,
    Precision,
    Source,
    step_inputs,
    step_outputs,
)
from export.measurement import EAGER, measure_latency, row_difference
from export.parameters import described, sha256
from export.parity import Gate, Verdict
from export.process import plain_process
from export.report import REPORT_FILE, REPORT_PAGE, FormatReport, Latency, Report
from export.report_page import render
from export.signature import sign
from export.stopping import deferred
from export.timing import this_machine
from export.weights import WEIGHTS_FILE, pack, pack_weights, rebuild
from model.actor_critic import ActorCritic


def export_policy(
    policy: ActorCritic,
    normalizer: Normalizer | None,
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
    formats that cannot be had so, and for a largest batch that is not 2 to 4,096; FileExistsError
    where `output` exists, unless it is an artifact and `overwrite` is set; ValueError for weights
    that are not finite; and ParityError, leaving no artifact, where a file does not do what the
    policy does. `source` says where the weights came from; `on_stage` hears what happens next;
    `sign_with` signs the manifest.

    Only the policy's weights are read: what is exported and what judges it are each built of a copy
    of them, in a process state of their own, which is given back as it was.
    """
    on: Device = "cuda" if torch.device(device).type == "cuda" else "cpu"
    source = source or Source(kind="module", name=name)
    if formats is None:
        formats = [name for name in PORTABLE_FORMATS if precision in FORMATS[name].precisions]
    check_formats(formats, precision, torch.device(device))
    _check_batch_size(max_batch_size)
    spec = policy.spec
    output = Path(output)
    with (
        deferred() as heeded,
        plain_process(),
        staged(output, overwrite=overwrite) as directory,
        heeded(),
    ):
        on_stage("writing the weights")
        weights = pack_weights(policy, normalizer)
        (directory / WEIGHTS_FILE).write_bytes(weights)
        rebuilt = rebuild(weights, spec, torch.device(device))
        step = family_of(spec).step(*rebuilt, precision)
        packed = pack(weights, spec, precision)
        source_step = StepSource(step, max_batch_size)
        exports = {}
        for format_name in formats:
            on_stage(f"exporting {format_name}")
            exports[format_name] = _export_format(format_name, source_step, directory, on)
        on_stage("running the policy's own episodes, and each format beside it")
        gate = Gate(
            weights,
            spec,
            precision=precision,
            max_batch_size=max_batch_size,
            device=torch.device(device),
        )
        steps = {name: export.step for name, export in exports.items()}
        verdict = gate.check(steps)
        on_stage("measuring how fast each format is")
        report = Report(
            name=name,
            policy_version=f"sha256:{sha256(packed)}",
            source=source,
            precision=precision,
            device=on,
            max_batch_size=max_batch_size,
            measured_at=datetime.now(UTC),
            machine=this_machine(torch.device(device)),
            parity=verdict.parity,
            **_figures(gate, exports, verdict),
        )
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=name,
            spec=spec,
            precision=precision,
            device=on,
            has_normalizer=normalizer is not None,
            max_batch_size=max_batch_size,
            inputs=step_inputs(spec),
            outputs=step_outputs(spec),
            parameters=described(packed),
            parameters_sha256=sha256(packed),
            weights=File.describe(directory / WEIGHTS_FILE),
            formats={name: export.file for name, export in exports.items()},
            reports=_write_reports(report, directory),
            parity=verdict.parity,
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
    step: LoadedStep
    seconds: float


def _check_batch_size(max_batch_size: int) -> None:
    if not 2 <= max_batch_size <= LARGEST_BATCH_SIZE:
        raise FormatError(
            f"the largest batch is {max_batch_size}; from 2 to {LARGEST_BATCH_SIZE} can be had: a "
            "graph of one row is traced otherwise, and all rows of a batch are checked at once"
        )


def _export_format(
    format_name: str, source: StepSource, directory: Path, device: Device
) -> _Export:
    start = time.perf_counter()
    written = FORMATS[format_name]
    path = directory / written.file
    path.write_bytes(written.write(source))
    requires = machine_capability(device) if written.is_native else None
    file = FormatFile(**File.describe(path).model_dump(), requires=requires)
    seconds = time.perf_counter() - start
    spec = source.step.spec
    try:
        step = load_step(
            file.read(directory),
            name=RUNTIME_OF[format_name],
            file=file,
            inputs=step_inputs(spec),
            outputs=step_outputs(spec),
            device=device,
            num_threads=1,
        )
    except ArtifactError as error:
        if isinstance(error.__cause__, OSError):  # no room for what a loader unpacks
            raise
        raise ParityError(f"{format_name} is not the policy's step: {error}") from error
    return _Export(file, step, seconds)


class _Figures(TypedDict):
    eager: tuple[Latency, ...]
    formats: dict[str, FormatReport]


def _figures(gate: Gate, exports: Mapping[str, _Export], verdict: Verdict) -> _Figures:
    judge, largest = gate.exact, gate.max_batch_size
    latency = measure_latency(judge, {name: of.step for name, of in exports.items()}, largest)
    return {
        "eager": latency[EAGER],
        "formats": {
            name: FormatReport(
                export_seconds=export.seconds,
                check_seconds=verdict.seconds[name],
                latency=latency[name],
                error_by_step=tuple(verdict.runs[name].error_by_step),
                row_difference=row_difference(judge, export.step, largest),
            )
            for name, export in exports.items()
        },
    }


def _write_reports(report: Report, directory: Path) -> tuple[File, ...]:
    page, data = directory / REPORT_PAGE, directory / REPORT_FILE
    page.write_text(render(report), encoding="utf-8")
    data.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return File.describe(page), File.describe(data)
