"""Our feature vectors against the recorded ones, and what must hold of any."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from model.lifecycle import BLENDING, BLUEPRINTS, EMPTY, HOLDING, TRAINING
from model.observations import (
    HISTORY,
    Alpha,
    SeedsV1,
    SeedsV3,
    TelemetryV1,
    Training,
    TrainingV1,
    TrainingV3,
    observe_v1,
    observe_v3,
)
from model.spec import PolicySpec
from tests.golden import golden_json, needs_golden

FLOAT_ATOL = 1e-5

Row = dict[str, Any]
RecordT = TypeVar("RecordT", bound=Training | Alpha)
WHOLE_NUMBERS = {"stage", "blueprint", "alpha_mode", "alpha_algorithm", "last_action_op"}


def arrays(record: type[RecordT], rows: Sequence[Any], value: Callable[..., Any]) -> RecordT:
    """A record whose every field is `value(row, name)` of each row, or of each slot of each row."""

    def array(name: str) -> NDArray[Any]:
        nested = [
            [value(item, name) for item in row] if isinstance(row, list) else value(row, name)
            for row in rows
        ]
        dtype = bool if name.startswith(("has_", "last_action_s")) else float
        return np.array(nested, np.int64 if name in WHOLE_NUMBERS else dtype)

    return record(**{field.name: array(field.name) for field in fields(record)})


def training_of(record: type[RecordT], rows: Sequence[Row]) -> RecordT:
    def value(row: Row, name: str) -> Any:
        if name.endswith("_history"):
            recent = row[name][-HISTORY:]
            return [np.nan] * (HISTORY - len(recent)) + recent
        return row["metrics"].get(name, row.get(name))

    return arrays(record, rows, value)


def slots_of(rows: Sequence[Row]) -> list[list[Row | None]]:
    """Every slot's report, flat, with what the trainer tracks of the slot; None without a seed."""
    return [[flat_report(row, slot) for slot in row["slot_ids"]] for row in rows]


def flat_report(row: Row, slot: str) -> Row | None:
    report = row["reports"].get(slot)
    if report is None:
        return None
    telemetry = report["telemetry"] or {}
    gradients = ("gradient_norm", "gradient_health", "has_vanishing", "has_exploding")
    return {
        **report,
        **report["metrics"],
        **{name: telemetry[name] for name in gradients if name in telemetry},
        "alpha": report["metrics"]["current_alpha"],
        "blueprint": BLUEPRINTS.index(report["blueprint_id"]),
        "gradient_health_prev": row["gradient_health_prev"].get(slot),
        "epochs_since_counterfactual": row["epochs_since_counterfactual"].get(slot),
    }


def slot_value(report: Row | None, name: str) -> Any:
    """What is not reported is NaN; a slot without a seed holds numbers that nobody may read."""
    if report is None:
        return EMPTY if name == "stage" else 77
    missing = False if name.startswith("has_") else np.nan
    value = report.get(name)
    return missing if value is None else value


def telemetry_of(rows: Sequence[Row]) -> TelemetryV1:
    slots = [
        [(row["reports"].get(slot) or {}).get("telemetry") for slot in row["slot_ids"]]
        for row in rows
    ]
    return arrays(TelemetryV1, slots, slot_value)


def v1_of(rows: Sequence[Row]) -> tuple[TrainingV1, SeedsV1]:
    return training_of(TrainingV1, rows), arrays(SeedsV1, slots_of(rows), slot_value)


def v3_of(rows: Sequence[Row]) -> tuple[TrainingV3, SeedsV3]:
    return training_of(TrainingV3, rows), arrays(SeedsV3, slots_of(rows), slot_value)


def recorded_batches(name: str) -> list[list[Row]]:
    """The recorded rows, those with the same number of slots together."""

    def num_slots(row: Row) -> int:
        return len(row["slot_ids"])

    rows = golden_json(name)["rows"]
    assert len(rows) == 60
    batches = [list(group) for _, group in groupby(sorted(rows, key=num_slots), num_slots)]
    assert [len(batch) for batch in batches] == [45, 15]
    return batches


def expected(rows: Sequence[Row], name: str) -> NDArray[Any]:
    return np.array([row["expected"][name] for row in rows])


def assert_close(actual: NDArray[np.float32], wanted: NDArray[Any]) -> None:
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, wanted, atol=FLOAT_ATOL, rtol=0.0)


@needs_golden
def test_v1_features_are_the_recorded_ones() -> None:
    for batch in recorded_batches("features_v1"):
        observation = observe_v1(*v1_of(batch))
        assert_close(observation, expected(batch, "features"))
        alone = [observe_v1(*v1_of([row])) for row in batch]
        np.testing.assert_array_equal(observation, np.concatenate(alone))


@needs_golden
def test_v1_features_with_telemetry_are_the_recorded_ones() -> None:
    for batch in recorded_batches("features_v1"):
        observation = observe_v1(*v1_of(batch), telemetry_of(batch))
        assert_close(observation, expected(batch, "features_with_telemetry"))
        alone = [observe_v1(*v1_of([row]), telemetry_of([row])) for row in batch]
        np.testing.assert_array_equal(observation, np.concatenate(alone))


@needs_golden
def test_v3_features_are_the_recorded_ones() -> None:
    for batch in recorded_batches("features_v2"):
        observation, blueprints = observe_v3(*v3_of(batch))
        assert_close(observation, expected(batch, "features"))
        assert blueprints.dtype == np.int64
        np.testing.assert_array_equal(blueprints, expected(batch, "blueprint_indices"))
        alone = [observe_v3(*v3_of([row])) for row in batch]
        np.testing.assert_array_equal(observation, np.concatenate([one for one, _ in alone]))
        np.testing.assert_array_equal(blueprints, np.concatenate([index for _, index in alone]))


def filled(record: type[RecordT], shape: tuple[int, ...]) -> RecordT:
    """Ones everywhere: DORMANT conv_light seeds in their first epoch."""

    def ones(name: str) -> NDArray[Any]:
        return np.ones((*shape, HISTORY) if name.endswith("_history") else shape)

    return record(
        **{
            field.name: ones(field.name).astype(np.int64 if field.name in WHOLE_NUMBERS else float)
            for field in fields(record)
        }
    )


def test_default_sizes_are_those_of_the_policies() -> None:
    v1 = observe_v1(filled(TrainingV1, (2,)), filled(SeedsV1, (2, 3)))
    v3, blueprints = observe_v3(filled(TrainingV3, (2,)), filled(SeedsV3, (2, 3)))
    assert v1.shape == (2, PolicySpec.tamiyo_v1().observation_dim)
    assert v3.shape == (2, PolicySpec.tamiyo_v2().observation_dim)
    assert blueprints.shape == (2, 3)
    telemetry = filled(TelemetryV1, (2, 3))
    with_telemetry = observe_v1(filled(TrainingV1, (2,)), filled(SeedsV1, (2, 3)), telemetry)
    assert with_telemetry.shape == (2, 218)


def test_slot_without_a_seed_is_zero_whatever_it_holds() -> None:
    seeds = {field.name: np.full((1, 1), np.nan) for field in fields(SeedsV3)}
    for name in WHOLE_NUMBERS & seeds.keys():
        seeds[name] = np.full((1, 1), 99)
    empty = SeedsV3(**{**seeds, "stage": np.array([[EMPTY]])})
    observation, blueprints = observe_v3(filled(TrainingV3, (1,)), empty)
    assert not observation[0, 23:].any()
    assert blueprints.tolist() == [[-1]]


def test_v1_slot_without_a_seed_has_the_standard_tempo() -> None:
    seeds = replace(filled(SeedsV1, (1, 1)), stage=np.array([[EMPTY]]))
    observation = observe_v1(filled(TrainingV1, (1,)), seeds)
    assert np.flatnonzero(observation[0, 23:]).tolist() == [14]
    assert observation[0, 23 + 14] == pytest.approx(5 / 12)


def test_v3_counts_the_stages_of_all_slots() -> None:
    seeds = replace(filled(SeedsV3, (1, 4)), stage=np.array([[TRAINING, BLENDING, HOLDING, EMPTY]]))
    observation, _ = observe_v3(filled(TrainingV3, (1,)), seeds)
    assert observation[0, 13:16].tolist() == [0.25, 0.25, 0.25]


@pytest.mark.parametrize(("loss_delta", "seen"), [(50.0, 10.0), (-50.0, -10.0), (9.0, 9.0)])
def test_v1_clips_the_change_of_the_loss(loss_delta: float, seen: float) -> None:
    training = replace(filled(TrainingV1, (1,)), loss_delta=np.array([loss_delta]))
    assert observe_v1(training, filled(SeedsV1, (1, 1)))[0, 4] == seen


def test_v1_clips_the_change_of_a_seeds_accuracy() -> None:
    """Our choice: no recorded row goes beyond 10."""
    telemetry = replace(filled(TelemetryV1, (1, 2)), accuracy_delta=np.array([[50.0, -50.0]]))
    observation = observe_v1(filled(TrainingV1, (1,)), filled(SeedsV1, (1, 2)), telemetry)
    assert observation[0, 101:].reshape(2, 26)[:, 16].tolist() == [1.0, -1.0]


def test_absent_telemetry_may_be_all_zeros() -> None:
    training, seeds = filled(TrainingV1, (1,)), filled(SeedsV1, (1, 2))
    zeros = {field.name: np.zeros((1, 2), np.int64) for field in fields(TelemetryV1)}
    telemetry = TelemetryV1(**{**zeros, "stage": np.array([[EMPTY, EMPTY]])})
    observation = observe_v1(training, seeds, telemetry)
    np.testing.assert_array_equal(observation[:, :101], observe_v1(training, seeds))
    assert not observation[:, 101:].any()


@pytest.mark.parametrize("stage", [5, 11, -2])
def test_stage_that_there_is_not_is_refused(stage: int) -> None:
    seeds = replace(filled(SeedsV1, (2, 1)), stage=np.array([[1], [stage]]))
    with pytest.raises(ValueError, match=f"slot 0 of environment 1 is in stage {stage}"):
        observe_v1(filled(TrainingV1, (2,)), seeds)


@pytest.mark.parametrize("blueprint", [-1, 13])
def test_blueprint_that_there_is_not_is_refused(blueprint: int) -> None:
    seeds = replace(filled(SeedsV3, (1, 2)), blueprint=np.array([[1, blueprint]]))
    with pytest.raises(ValueError, match=f"slot 1 .* with blueprint {blueprint}"):
        observe_v3(filled(TrainingV3, (1,)), seeds)


def test_arrays_of_the_wrong_shape_are_named() -> None:
    training, seeds = filled(TrainingV3, (3,)), filled(SeedsV3, (3, 3))
    with pytest.raises(ValueError, match=r"alpha_velocity has shape \(3,\), not \(3, 3\)"):
        observe_v3(training, replace(seeds, alpha_velocity=np.ones(3)))
    with pytest.raises(ValueError, match=r"loss_history has shape \(3, 4\), not \(3, 5\)"):
        observe_v3(replace(training, loss_history=np.ones((3, 4))), seeds)
    with pytest.raises(ValueError, match=r"stage has shape \(2, 3\), not \(3, 3\)"):
        observe_v3(training, filled(SeedsV3, (2, 3)))
    with pytest.raises(ValueError, match=r"stage has shape \(3, 2\), not \(3, 3\)"):
        observe_v1(filled(TrainingV1, (3,)), filled(SeedsV1, (3, 3)), filled(TelemetryV1, (3, 2)))
