"""Where the policy to export comes from: a preset or a file, as the command line says."""

import argparse
import hashlib
import os
from pathlib import Path

import torch
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor

from export.manifest import Source
from export.options import IDENTITY, PRESETS
from model.checkpoint import CheckpointError, load_checkpoint, load_normalizer
from model.checkpoint_file import read_content
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec


def load_source(
    options: argparse.Namespace,
) -> tuple[FactoredRecurrentActorCritic, ObservationNormalizer | None, Source]:
    """The policy, the statistics it was trained on, and what they came from.

    Raises CheckpointError where there is no such preset, or the file is no policy or not as asked.
    """
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

    (spec, state_dict, normalizer), sha256 = _read_once(options.checkpoint)
    normalizer = _chosen_normalizer(options, spec, normalizer)
    policy = FactoredRecurrentActorCritic(_with_options(spec, options))
    policy.load_state_dict(state_dict, strict=True)
    source = Source(kind="checkpoint", name=readable(options.checkpoint.stem), sha256=sha256)
    return policy, normalizer, source


def _read_once(
    path: Path,
) -> tuple[tuple[PolicySpec, dict[str, Tensor], ObservationNormalizer | None], str]:
    """What a checkpoint holds, and the SHA-256 of that: a trainer may be writing the next one."""
    content = read_content(path)
    return load_checkpoint(path, content), hashlib.sha256(content).hexdigest()


def readable(name: str) -> str:
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
