"""Where the policy to export comes from: a preset or a file, as the command line says."""

import argparse
import hashlib
import os
from pathlib import Path

import torch
from pydantic import ValidationError
from rich.console import Console

from export.families import Normalizer
from export.manifest import Source
from export.options import IDENTITY, PRESETS
from model.actor_critic import ActorCritic
from model.checkpoint import CheckpointError, load_checkpoint, load_normalizer
from model.checkpoint_file import read_content
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.sb3.checkpoint import is_sb3_zip, load_sb3
from model.sb3.policy import SB3Policy
from model.spec import PolicySpec


def load_source(
    options: argparse.Namespace,
) -> tuple[ActorCritic, Normalizer | None, Source]:
    """The policy, the statistics it was trained on, and what they came from.

    Raises CheckpointError where there is no such preset, or the file is no policy or not as asked.
    """
    if options.preset is not None:
        for option, given in _of_sb3(options).items():
            if given:
                raise CheckpointError(f"{option} is for a model.zip, not for a preset")
        if options.preset not in PRESETS:
            raise CheckpointError(
                f"unknown preset {options.preset!r}; the presets are {', '.join(PRESETS)}"
            )
        spec = _with_options(PRESETS[options.preset](), options)
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            policy: ActorCritic = FactoredRecurrentActorCritic(spec)
        normalizer: Normalizer | None = _chosen_normalizer(options, spec, None)
        return policy, normalizer, Source(kind="preset", name=options.preset, seed=options.seed)

    content = read_content(options.checkpoint)  # once: a trainer may be writing the next one
    read = _sb3_policy if is_sb3_zip(content) else _tamiyo
    policy, normalizer, provenance = read(options, content)
    source = Source(
        kind="checkpoint",
        name=readable(options.checkpoint.stem),
        sha256=hashlib.sha256(content).hexdigest(),
        provenance=provenance,
    )
    return policy, normalizer, source


def _tamiyo(
    options: argparse.Namespace, content: bytes
) -> tuple[ActorCritic, Normalizer | None, dict[str, str]]:
    spec, state_dict, normalizer = load_checkpoint(options.checkpoint, content)
    for option, given in _of_sb3(options).items():
        if given:
            raise CheckpointError(
                f"{option} is for Stable-Baselines3's model.zip, and {options.checkpoint} is none"
            )
    normalizer = _chosen_normalizer(options, spec, normalizer)
    policy = FactoredRecurrentActorCritic(_with_options(spec, options))
    policy.load_state_dict(state_dict, strict=True)
    return policy, normalizer, {}


def _sb3_policy(
    options: argparse.Namespace, content: bytes
) -> tuple[ActorCritic, Normalizer | None, dict[str, str]]:
    if options.probability_floors or options.outputs:
        option = "--probability-floors" if options.probability_floors else "--outputs"
        raise CheckpointError(f"{option} is of Tamiyo's, and {options.checkpoint} holds none")
    normaliser = options.normaliser
    spec, state_dict, normalizer, provenance = load_sb3(
        options.checkpoint,
        content,
        action_space=options.action_space,
        observation_space=options.observation_space,
        normaliser=normaliser if normaliser in (None, IDENTITY) else Path(normaliser),
        any_policy_class=options.any_policy_class,
    )
    policy = SB3Policy(spec)
    policy.load_state_dict(state_dict, strict=True)
    return policy, normalizer, provenance


def _of_sb3(options: argparse.Namespace) -> dict[str, object]:
    return {
        "--action-space": options.action_space,
        "--observation-space": options.observation_space,
        "--any-policy-class": options.any_policy_class,
    }


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
