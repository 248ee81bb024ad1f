"""What the policy sees of a training run: the trainer's feature vectors, for many environments.

An environment's client builds its observations here. NumPy only: this module knows neither the
network nor the service. V1 is raw and relies on the policy's running normaliser; V3, which the V2
policy reads, is scaled here, and its blueprint indices are an array of their own.

Numbers that may be missing are NaN. What a slot without a seed holds (`stage` EMPTY) is ignored.
The V1 telemetry is pinned by recordings in which accuracy stays in [0, 100], its change below 10,
alpha in [0, 1] and steps and epochs below `max_epochs`; beyond those we clip as the slot block does
(accuracy and alpha not at all).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from model.lifecycle import (
    BLENDING,
    BLUEPRINTS,
    EMPTY,
    FOSSILIZED,
    HOLDING,
    OPS,
    STAGES,
    STANDARD_TEMPO,
    TEMPO_EPOCHS,
    TRAINING,
)

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]

BASE_FEATURES = 23
SLOT_FEATURES_V1, SLOT_FEATURES_V1_WITH_TELEMETRY, SLOT_FEATURES_V3 = 39, 65, 31
HISTORY = 5
LOSS_CLIP = 10.0
SYMLOG_SCALE = 7.0
UNTRACKED = -1.0
CONTRIBUTION_DECAY_PER_EPOCH = 0.995
MAX_TEMPO_EPOCHS = 12.0
TEMPO_COLUMN = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a training run reports, an array [E] for each field.

    The histories are [E, 5], oldest first and padded on the left with NaN.
    """

    epoch: Floats
    max_epochs: Floats
    val_loss: Floats
    val_accuracy: Floats  # percent
    loss_history: Floats
    accuracy_history: Floats  # percent


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingV1(Training):
    """`Training`, and what only V1 sees of it; `max_seeds` 0 is no limit."""

    global_step: Floats
    train_loss: Floats
    loss_delta: Floats
    train_accuracy: Floats  # percent
    accuracy_delta: Floats
    plateau_epochs: Floats
    best_val_accuracy: Floats  # percent
    best_val_loss: Floats
    total_params: Floats
    total_seeds: Floats
    max_seeds: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingV3(Training):
    """`Training`, and what only V3 sees of it."""

    last_action_success: Bools
    last_action_op: Integers


@dataclass(frozen=True, slots=True, kw_only=True)
class Alpha:
    """How a seed is blended in, an array [E, S] for each field."""

    stage: Integers  # EMPTY = no seed
    alpha: Floats
    alpha_target: Floats
    alpha_mode: Integers
    alpha_steps_total: Floats
    alpha_steps_done: Floats
    time_to_target: Floats
    alpha_velocity: Floats
    alpha_algorithm: Integers


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeds(Alpha):
    """What the seeds report, an array [E, S] for each field, in action-index order."""

    blueprint: Integers
    counterfactual_contribution: Floats  # NaN = not measured
    contribution_velocity: Floats
    blend_tempo_epochs: Floats
    interaction_sum: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedsV1(Seeds):
    """`Seeds`, and what only V1 sees of them."""

    improvement_since_stage_start: Floats
    boost_received: Floats
    upstream_alpha_sum: Floats
    downstream_alpha_sum: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedsV3(Seeds):
    """`Seeds`, and what only V3 sees of them. NaN = no telemetry, or not tracked."""

    gradient_norm: Floats
    gradient_health: Floats
    has_vanishing: Bools
    has_exploding: Bools
    gradient_health_prev: Floats
    epochs_since_counterfactual: Floats
    epochs_in_current_stage: Floats
    epochs_total: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryV1(Alpha):
    """The seeds' own telemetry, an array [E, S] for each field; `stage` EMPTY = a seed without."""

    gradient_norm: Floats
    gradient_health: Floats
    has_vanishing: Bools
    has_exploding: Bools
    epochs_in_stage: Floats
    accuracy: Floats  # percent
    accuracy_delta: Floats
    epoch: Floats
    max_epochs: Floats


def observe_v1(
    training: TrainingV1, seeds: SeedsV1, telemetry: TelemetryV1 | None = None
) -> NDArray[np.float32]:
    """Obs V1: [E, 23 + 39 * S], or with telemetry [E, 23 + 65 * S].

    Raises ValueError for arrays of the wrong shape and for a stage or blueprint that there is not.
    """
    _check(training, seeds)
    contribution = np.where(
        np.isnan(seeds.counterfactual_contribution),
        seeds.improvement_since_stage_start,
        seeds.counterfactual_contribution,
    )
    slots = _columns(
        _seed_columns(seeds, contribution, training.max_epochs),
        np.minimum(seeds.interaction_sum / 10, 1),
        np.minimum(seeds.boost_received / 5, 1),
        np.minimum(seeds.upstream_alpha_sum / 3, 1),
        np.minimum(seeds.downstream_alpha_sum / 3, 1),
        _one_hot(seeds.blueprint, range(len(BLUEPRINTS))),
    )
    empty = np.zeros(slots.shape[-1])
    empty[TEMPO_COLUMN] = TEMPO_EPOCHS[STANDARD_TEMPO] / MAX_TEMPO_EPOCHS
    blocks = [_base_v1(training), _of_seeds(seeds, slots, empty)]
    if telemetry is not None:
        _check_shapes(telemetry, seeds.stage.shape)
        blocks.append(_of_seeds(telemetry, _telemetry_columns(telemetry), 0.0))
    return _flat(*blocks)


def observe_v3(training: TrainingV3, seeds: SeedsV3) -> tuple[NDArray[np.float32], Integers]:
    """Obs V3, [E, 23 + 31 * S], and the blueprint indices [E, S], -1 in a slot without a seed.

    Raises ValueError for arrays of the wrong shape and for a stage or blueprint that there is not.
    """
    _check(training, seeds)
    max_epochs = training.max_epochs[:, None]
    slots = _columns(
        _seed_columns(
            seeds, _or_if_missing(seeds.counterfactual_contribution, 0.0), training.max_epochs
        ),
        np.clip(seeds.interaction_sum / 10, -1, 1),
        _or_if_missing(_symlog(seeds.gradient_norm) / SYMLOG_SCALE, 0.0),
        _or_if_missing(seeds.gradient_health, 0.0),
        seeds.has_vanishing,
        seeds.has_exploding,
        _or_if_missing(seeds.gradient_health_prev, UNTRACKED),
        _fraction(seeds.epochs_in_current_stage, max_epochs),
        _or_if_missing(CONTRIBUTION_DECAY_PER_EPOCH**seeds.epochs_since_counterfactual, UNTRACKED),
        _fraction(seeds.epochs_total, max_epochs),
    )
    features = _flat(_base_v3(training, seeds.stage), _of_seeds(seeds, slots, 0.0))
    return features, np.where(seeds.stage == EMPTY, EMPTY, seeds.blueprint)


def _base_v1(training: TrainingV1) -> Floats:
    def clipped(loss: Floats) -> Floats:
        return np.clip(loss, -LOSS_CLIP, LOSS_CLIP)

    return _columns(
        training.epoch,
        training.global_step,
        clipped(training.train_loss),
        clipped(training.val_loss),
        clipped(training.loss_delta),
        training.train_accuracy,
        training.val_accuracy,
        clipped(training.accuracy_delta),
        training.plateau_epochs,
        training.best_val_accuracy,
        clipped(training.best_val_loss),
        _or_if_missing(clipped(training.loss_history), 0.0),
        _or_if_missing(training.accuracy_history, 0.0),
        training.total_params,
        training.total_seeds / np.maximum(training.max_seeds, 1),
    )


def _base_v3(training: TrainingV3, stage: Integers) -> Floats:
    return _columns(
        _fraction(training.epoch, training.max_epochs),
        _symlog(training.val_loss) / SYMLOG_SCALE,
        training.val_accuracy / 100,
        _or_if_missing(_symlog(training.loss_history) / SYMLOG_SCALE, UNTRACKED),
        _or_if_missing(training.accuracy_history / 100, UNTRACKED),
        (stage == TRAINING).mean(axis=1),
        (stage == BLENDING).mean(axis=1),
        np.isin(stage, (HOLDING, FOSSILIZED)).mean(axis=1),
        training.last_action_success,
        _one_hot(training.last_action_op, OPS),
    )


def _seed_columns(seeds: Seeds, contribution: Floats, max_epochs: Floats) -> Floats:
    """The first 22 features of a slot, the same in both versions: [E, S, 22]."""
    return _columns(
        np.ones(seeds.stage.shape),
        _one_hot(seeds.stage, STAGES),
        seeds.alpha,
        np.clip(contribution / 10, -1, 1),
        np.clip(seeds.contribution_velocity / 10, -1, 1),
        seeds.blend_tempo_epochs / MAX_TEMPO_EPOCHS,
        *_schedule(seeds, max_epochs[:, None]),
    )


def _telemetry_columns(telemetry: TelemetryV1) -> Floats:
    return _columns(
        _one_hot(telemetry.stage, STAGES),
        np.minimum(telemetry.gradient_norm / 10, 1),
        telemetry.gradient_health,
        telemetry.has_vanishing,
        telemetry.has_exploding,
        np.minimum(telemetry.epochs_in_stage / 50, 1),
        telemetry.accuracy / 100,
        np.clip(telemetry.accuracy_delta / 10, -1, 1),
        telemetry.alpha,
        _fraction(telemetry.epoch, telemetry.max_epochs),
        *_schedule(telemetry, telemetry.max_epochs),
    )


def _schedule(alpha: Alpha, max_epochs: Floats) -> tuple[Floats, ...]:
    """The seven features of where alpha goes, and how."""
    return (
        alpha.alpha_target,
        alpha.alpha_mode / 2,
        _fraction(alpha.alpha_steps_total, max_epochs),
        _fraction(alpha.alpha_steps_done, max_epochs),
        _fraction(alpha.time_to_target, max_epochs),
        np.clip(alpha.alpha_velocity, -1, 1),
        (alpha.alpha_algorithm - 1) / 2,
    )


def _symlog(x: Floats) -> Floats:
    return np.sign(x) * np.log1p(np.abs(x))


def _fraction(count: Floats, limit: Floats) -> Floats:
    """`count` of `limit`, at most 1; a slot without a seed may hold a limit of 0."""
    return np.minimum(count / np.maximum(limit, 1), 1)


def _or_if_missing(x: Floats, missing: float) -> Floats:
    return np.where(np.isnan(x), missing, x)


def _one_hot(index: Integers, choices: Sequence[int]) -> Bools:
    hot: Bools = index[..., None] == np.array(choices)
    return hot


def _columns(*features: Floats | Bools) -> Floats:
    """Features side by side along a new last axis; those with one more axis are several."""
    axes = min(f.ndim for f in features)
    return np.concatenate([f if f.ndim > axes else f[..., None] for f in features], axis=-1)


def _of_seeds(seeds: Alpha, slots: Floats, empty: Floats | float) -> Floats:
    """The features of every slot, `empty` in those without a seed."""
    return np.where(seeds.stage[..., None] == EMPTY, empty, slots)


def _flat(*blocks: Floats) -> NDArray[np.float32]:
    return np.concatenate([b.reshape(len(b), -1) for b in blocks], axis=1).astype(np.float32)


def _check(training: Training, seeds: Seeds) -> None:
    _check_shapes(training, training.epoch.shape)
    _check_shapes(seeds, (len(training.epoch), seeds.stage.shape[-1]))
    known = (seeds.stage == EMPTY) | (
        np.isin(seeds.stage, STAGES) & (seeds.blueprint >= 0) & (seeds.blueprint < len(BLUEPRINTS))
    )
    if not known.all():
        environment, slot = np.argwhere(~known)[0]
        raise ValueError(
            f"slot {slot} of environment {environment} is in stage "
            f"{seeds.stage[environment, slot]} with blueprint {seeds.blueprint[environment, slot]}"
        )


def _check_shapes(record: Training | Alpha, shape: tuple[int, ...]) -> None:
    for field in fields(record):
        expected = (*shape, HISTORY) if field.name.endswith("_history") else shape
        actual = getattr(record, field.name).shape
        if actual != expected:
            raise ValueError(f"{field.name} has shape {actual}, not {expected}")
