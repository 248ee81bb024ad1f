"""The commands that take torch: `python -m export`, and `verify`."""

import argparse
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from pydantic import ValidationError
from rich.console import Console

from export.console import fail, say, summarize
from export.exporter import export_policy
from export.formats import FormatError
from export.manifest import ArtifactError, Manifest, Source
from export.options import IDENTITY, PRESETS, chosen_formats
from export.parity import ParityError
from export.report import REPORT_PAGE, Report
from export.signature import load_private_key, load_public_key
from export.verify import verify_artifact
from model.checkpoint import CheckpointError, load_checkpoint, load_normalizer
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec


def run(command: str, options: argparse.Namespace) -> int:
    """The exit code; where it is not 0, one line on stderr says why, and SystemExit is raised."""
    try:
        return _verify(options) if command == "verify" else _export(options)
    except (CheckpointError, ArtifactError, FormatError, FileExistsError) as error:
        fail(str(error))
    except ParityError as error:
        fail(str(error), code=1)
    except _Stopped as stopped:
        fail(f"{stopped}; no artifact was written", code=stopped.code)


def _export(options: argparse.Namespace) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        fail("argument --device: no CUDA device is visible to torch on this machine")
    sign_with = options.sign and load_private_key(options.sign)
    progress = Console(stderr=True)
    torch.set_num_threads(1)  # the gate's many small products are slower with more
    try:
        with _stoppable() as check, progress.status("reading the policy") as status:

            def on_stage(stage: str) -> None:
                check()
                status.update(stage)

            policy, normalizer, source = _load(options)
            manifest = export_policy(
                policy,
                normalizer,
                options.output,
                name=_readable(options.name or source.name),
                source=source,
                formats=chosen_formats(options.formats, options.precision),
                device=options.device,
                precision=options.precision,
                max_batch_size=options.max_batch_size,
                sign_with=sign_with,
                overwrite=options.overwrite,
                on_stage=on_stage,
            )
    except FileExistsError:
        raise
    except OSError as error:
        fail(f"{error.filename or options.output}: cannot be written ({error.strerror})")
    except (ParityError, ArtifactError) as error:
        if isinstance(error.__cause__, OSError):  # no room for what a loader unpacks
            fail(f"no artifact was written: {error}")
        raise ParityError(f"no artifact was written: {error}") from error
    if options.json:
        sys.stdout.write(manifest.model_dump_json() + "\n")
    else:
        summarize(manifest, manifest.parity.formats, Report.read(options.output, manifest))
        say(f"{manifest.name} ({manifest.policy_version[:19]}) is in {options.output}")
        say(f"{options.output / REPORT_PAGE} shows what was compared, and how fast each format is")
    return 0


def _verify(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    with Console(stderr=True).status("reading the artifact") as status:
        parity = verify_artifact(
            options.directory,
            trusted=options.trusted and load_public_key(options.trusted),
            on_stage=status.update,
        )
    summarize(Manifest.read(options.directory), parity)
    say(f"{options.directory} is what was exported, and does what its policy does")
    return 0


def _load(
    options: argparse.Namespace,
) -> tuple[FactoredRecurrentActorCritic, ObservationNormalizer | None, Source]:
    if options.preset is not None:
        if options.preset not in PRESETS:
            raise CheckpointError(
                f"unknown preset {options.preset!r}; the presets are {', '.join(PRESETS)}"
            )
        spec = _with_options(PRESETS[options.preset](), options)
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            policy = FactoredRecurrentActorCritic(spec)
        normalizer = _chosen_normalizer(options, spec, None)
        return policy, normalizer, Source(kind="preset", name=options.preset, seed=options.seed)

    spec, state_dict, normalizer = load_checkpoint(options.checkpoint)
    normalizer = _chosen_normalizer(options, spec, normalizer)
    policy = FactoredRecurrentActorCritic(_with_options(spec, options))
    policy.load_state_dict(state_dict, strict=True)
    digest = hashlib.sha256(options.checkpoint.read_bytes()).hexdigest()
    return (
        policy,
        normalizer,
        Source(kind="checkpoint", name=_readable(options.checkpoint.stem), sha256=digest),
    )


def _readable(name: str) -> str:
    """A name as UTF-8 can have it: a file's may be any bytes."""
    return os.fsencode(name).decode("utf-8", errors="replace")


def _with_options(spec: PolicySpec, options: argparse.Namespace) -> PolicySpec:
    """The spec with the floors and outputs asked for, where it can have them."""
    try:
        if options.probability_floors:
            spec = spec.with_probability_floors(options.probability_floors)
        return spec.model_validate(spec.model_dump() | {"extra_outputs": options.outputs})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        sentence = first["msg"].removeprefix("Value error, ")
        if "probability_floor" in first["loc"]:
            head = spec.head_names[int(first["loc"][1])]
            sentence = f"--probability-floors: {head}: {sentence}, not {first['input']}"
        raise CheckpointError(sentence) from error
    except ValueError as error:
        raise CheckpointError(f"--probability-floors: {error}") from error


def _chosen_normalizer(
    options: argparse.Namespace, spec: PolicySpec, own: ObservationNormalizer | None
) -> ObservationNormalizer | None:
    """The checkpoint's statistics, or else what `--normaliser` says; without either, a warning."""
    if options.normaliser is not None and own is not None:
        raise CheckpointError(
            f"{options.checkpoint}: holds observation statistics of its own; leave out --normaliser"
        )
    if own is not None or options.normaliser == IDENTITY:
        return own
    if options.normaliser is not None:
        return load_normalizer(options.normaliser, spec.observation_dim)
    if options.checkpoint is not None:
        Console(stderr=True, soft_wrap=True).print(
            f"warning: {options.checkpoint} holds no observation statistics (V1's trainer does not "
            "save them, and a bare state_dict has none): the artifact takes observations as they "
            "come. If the policy was trained on normalised ones, its actions are wrong unless the "
            "client normalises them. --normaliser FILE brings the statistics, --normaliser "
            f"{IDENTITY} says that there are none.",
            style="bold yellow",
            highlight=False,
            markup=False,
        )
    return None


ENDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class _Stopped(KeyboardInterrupt):
    """A signal asked for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(ENDS[number])
        self.code = 128 + number


@contextmanager
def _stoppable() -> Iterator[Callable[[], None]]:
    """Both Ctrl-C and SIGTERM end the block by way of every `finally`: nothing half-done stays.

    An exception raised while Python runs a destructor is lost. The check it yields raises again.
    """
    came: list[int] = []

    def stop(number: int, frame: object) -> NoReturn:
        came.append(number)
        raise _Stopped(number)

    def check() -> None:
        if came:
            raise _Stopped(came[0])

    before = {number: signal.signal(number, stop) for number in ENDS}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
