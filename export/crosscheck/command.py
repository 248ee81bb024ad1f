"""`python -m export crosscheck`: an artifact beside Stable-Baselines3 itself, where that is."""

import argparse
import hashlib
import sys
from pathlib import Path

import torch
from rich.console import Console

from export.artifact import Artifact, open_artifact
from export.comparison import ParityError
from export.console import fail, name_unlisted, say, summarize
from export.crosscheck.comparison import compare
from export.crosscheck.recording import ALGORITHMS, Draw, Recording, record
from export.format_kinds import FORMAT_KINDS
from export.judge import Judge
from export.loaders.load import RUNTIME_OF, load_step
from export.manifest import ArtifactError, FormatParity
from export.options import IDENTITY
from export.process import plain_process
from export.signature import load_public_key
from export.stopping import Stopped, stoppable
from model.checkpoint_file import CheckpointError, read_content
from model.sb3.spec import SB3Spec


def run(options: argparse.Namespace) -> int:
    """The exit code; where it is not 0, one line on stderr says why, and SystemExit is raised."""
    if not options.run_pickles:
        fail(
            f"crosscheck has stable_baselines3 load {options.model}, which runs the pickles in it: "
            "code of whoever made the file. --run-pickles says that you trust it; nothing was run"
        )
    try:
        with stoppable():
            return _crosscheck(options)
    except Stopped as stopped:
        fail(str(stopped), code=stopped.code)
    except (ArtifactError, CheckpointError) as error:
        fail(str(error))
    except ParityError as error:
        fail(f"{options.artifact}: {error}", code=1)
    except OSError as error:
        fail(f"{error.filename or 'the temporary directory'}: cannot be written ({error.strerror})")


def _crosscheck(options: argparse.Namespace) -> int:
    trusted = options.trusted and load_public_key(options.trusted)
    artifact = open_artifact(options.artifact, trusted=trusted)
    model = read_content(options.model)
    spec = _spec(artifact, options.model, model)
    formats = _formats(artifact, options.formats)
    statistics = _statistics(artifact, options.normaliser)
    files = [options.model, *([] if statistics is None else [Path(options.normaliser)])]
    sys.stderr.write(
        f"export: running the pickles in {' and '.join(map(str, files))}, by stable_baselines3, in "
        "a process of its own\n"
    )
    sys.stderr.flush()
    with Console(stderr=True).status("running stable_baselines3") as status:
        draw = Draw(options.steps, options.environments, options.seed)
        recording = record(model, statistics, spec, draw)
        status.update("running each format beside it")
        parity = _compared(artifact, spec, formats, recording)
    summarize(artifact.manifest, parity, judge="stable_baselines3")
    say(
        f"{options.artifact} does what stable_baselines3 does with {options.model}, for "
        f"{draw.steps} steps of {draw.environments} environments"
    )
    name_unlisted(artifact)
    return 0


def _spec(artifact: Artifact, path: Path, model: bytes) -> SB3Spec:
    """The artifact's, exported from this very file, by a trainer whose class is known."""
    manifest = artifact.manifest
    spec = manifest.spec
    if not isinstance(spec, SB3Spec):
        raise ArtifactError(f"{artifact.directory}: is no policy of Stable-Baselines3")
    if manifest.source.sha256 != hashlib.sha256(model).hexdigest():
        raise ArtifactError(
            f"{artifact.directory}: was not exported from {path}, whose SHA-256 is not the one in "
            "its manifest"
        )
    if spec.name not in ALGORITHMS:
        raise ArtifactError(
            f"{artifact.directory}: its policy is a class of the user's own, and which trainer "
            f"saved it is not known; those of {', '.join(ALGORITHMS)} are crosschecked"
        )
    if manifest.precision != "fp32":
        raise ArtifactError(
            f"{artifact.directory}: computes in {manifest.precision}, and stable_baselines3 in fp32"
        )
    return spec


def _formats(artifact: Artifact, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """Those asked for, or every one that runs on a CPU."""
    manifest = artifact.manifest
    runnable = [
        name
        for name in manifest.formats
        if manifest.device == "cpu" or not FORMAT_KINDS[name].is_native
    ]
    formats = runnable if asked in (None, ("all",)) else asked
    for name in formats or ():
        if name not in runnable:
            raise ArtifactError(
                f"{artifact.directory}: has no {name} for a CPU; it has {', '.join(runnable)}"
            )
    if not formats:
        raise ArtifactError(f"{artifact.directory}: holds nothing that runs on a CPU")
    return tuple(formats)


def _statistics(artifact: Artifact, normaliser: str | None) -> bytes | None:
    """VecNormalize's own pickle, where the artifact has statistics."""
    given = normaliser not in (None, IDENTITY)
    if given != artifact.manifest.has_normalizer:
        what = "has statistics" if artifact.manifest.has_normalizer else "has no statistics"
        how = "brings them to" if artifact.manifest.has_normalizer else "would bring some to"
        raise ArtifactError(
            f"{artifact.directory}: {what}, and --normaliser FILE {how} stable_baselines3"
        )
    if normaliser is None or not given:
        return None
    if Path(normaliser).suffix in (".npz", ".json"):
        raise ArtifactError(
            f"{normaliser}: stable_baselines3 takes the .pkl that VecNormalize.save wrote"
        )
    return read_content(Path(normaliser))


def _compared(
    artifact: Artifact, spec: SB3Spec, formats: tuple[str, ...], recording: Recording
) -> dict[str, FormatParity]:
    manifest = artifact.manifest
    try:
        with plain_process(), torch.inference_mode():
            steps = {
                name: load_step(
                    artifact.read(manifest.formats[name]),
                    name=RUNTIME_OF[name],
                    file=manifest.formats[name],
                    inputs=manifest.inputs,
                    outputs=manifest.outputs,
                    device="cpu",
                    num_threads=1,
                )
                for name in formats
            }
            judge = Judge(artifact.read(manifest.weights), spec, torch.device("cpu"))
            return compare(steps, recording, judge, manifest.max_batch_size)
    except ArtifactError as error:
        raise ArtifactError(f"{artifact.directory}: {error}") from error
