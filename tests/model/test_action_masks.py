"""Our masks against the recorded ones, and what must hold of any mask."""

import subprocess
import sys
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.action_masks import (
    MASKS_V1,
    MASKS_V2,
    BoolArray,
    MaskRules,
    Slots,
    compute_action_masks,
)
from model.lifecycle import BLENDING, DOWN, EMPTY, FOSSILIZED, OPS, PRUNE, STAGES, WAIT
from model.spec import PolicySpec
from tests.golden import golden_json, needs_golden

Situation = dict[str, Any]

SLOT_IDS = ("r0c0", "r0c1", "r0c2")
HELD = {"stage": FOSSILIZED, "seed_age_epochs": 9, "alpha_mode": 0}
VERSIONS = [
    pytest.param("masks_v1", MASKS_V1, id="v1"),
    pytest.param("masks_v2", MASKS_V2, id="v2"),
]


def masks_of(situations: list[Situation], rules: MaskRules) -> dict[str, BoolArray]:
    """One call for situations with the same slots."""
    (slot_ids,) = {tuple(s["slot_ids"]) for s in situations}
    slots = Slots.from_states(
        slot_ids,
        [s["slot_states"] for s in situations],
        [s["enabled_slots"] for s in situations],
        rules,
    )
    return compute_action_masks(
        slots,
        rules,
        total_seeds=[s["total_seeds"] for s in situations],
        max_seeds=[s["max_seeds"] for s in situations],
        topology=[s["topology"] for s in situations],
        allow_governor_override=[s["allow_governor_override"] for s in situations],
        disable_advance=[s["disable_advance"] for s in situations],
    )


def assert_recorded(masks: dict[str, BoolArray], situations: list[Situation]) -> None:
    assert masks.keys() == situations[0]["expected"].keys()
    for head, mask in masks.items():
        assert mask.dtype == np.bool_
        expected = np.array([s["expected"][head] for s in situations], bool)
        np.testing.assert_array_equal(mask, expected, err_msg=head)


@needs_golden
@pytest.mark.parametrize(("recorded", "rules"), VERSIONS)
def test_masks_are_the_recorded_ones_in_batches(recorded: str, rules: MaskRules) -> None:
    situations = golden_json(recorded)["situations"]
    assert len(situations) == 220
    sizes = []
    by_size = groupby(sorted(situations, key=num_slots), num_slots)
    for _, group in by_size:
        batch = list(group)
        sizes.append(len(batch))
        assert_recorded(masks_of(batch, rules), batch)
    assert min(sizes) > 20


@needs_golden
@pytest.mark.parametrize(("recorded", "rules"), VERSIONS)
def test_masks_are_the_recorded_ones_alone(recorded: str, rules: MaskRules) -> None:
    for situation in golden_json(recorded)["situations"]:
        assert_recorded(masks_of([situation], rules), [situation])


@needs_golden
@pytest.mark.parametrize(("recorded", "rules"), VERSIONS)
def test_prune_age_is_the_recorded_one(recorded: str, rules: MaskRules) -> None:
    assert rules.min_prune_age_epochs == golden_json(recorded)["min_prune_age"]


def num_slots(situation: Situation) -> int:
    return len(situation["slot_ids"])


def invalid_call(case: str) -> dict[str, Any]:
    """A call of this kind. The recording has no inputs, only what came of them."""
    call: dict[str, Any] = {
        "slot_states": dict.fromkeys(SLOT_IDS),
        "enabled_slots": ["r0c0"],
        "topology": "cnn",
    }
    change: dict[str, dict[str, Any]] = {
        "unknown_topology": {"topology": "ring"},
        "empty_enabled": {"enabled_slots": []},
        "unknown_enabled_slot": {"enabled_slots": ["r0c0", "r9c9"]},
        "missing_state_key": {
            "slot_states": {"r0c0": HELD, "r0c2": None},
            "enabled_slots": ["r0c0", "r0c1"],
        },
    }
    return call | change[case]


def call_masks(call: dict[str, Any], rules: MaskRules) -> dict[str, BoolArray]:
    slots = Slots.from_states(SLOT_IDS, [call["slot_states"]], [call["enabled_slots"]], rules)
    return compute_action_masks(slots, rules, total_seeds=0, max_seeds=0, topology=call["topology"])


@needs_golden
def test_v1_accepts_the_recorded_invalid_calls() -> None:
    recorded = golden_json("masks_v1")["invalid_calls"]
    assert len(recorded) == 4
    for outcome in recorded:
        masks = call_masks(invalid_call(outcome["case"]), MASKS_V1)
        assert outcome["raises"] is None
        for head in ("op", "slot", "blueprint"):
            assert masks[head][0].tolist() == [bool(m) for m in outcome[head]], outcome["case"]


@needs_golden
def test_v2_refuses_every_recorded_invalid_call() -> None:
    recorded = golden_json("masks_v2")["invalid_calls"]
    assert {outcome["raises"] for outcome in recorded} == {"ValueError"}
    for outcome in recorded:
        with pytest.raises(ValueError, match=r"topology|enabled slot"):
            call_masks(invalid_call(outcome["case"]), MASKS_V2)


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("unknown_topology", "there is no topology 'ring'; the topologies are cnn, transformer"),
        ("empty_enabled", "environment 0 has no enabled slot"),
        (
            "unknown_enabled_slot",
            "enabled slot 'r9c9' of environment 0 is not one of the slots",
        ),
        ("missing_state_key", "enabled slot 'r0c1' of environment 0 has no state"),
    ],
)
def test_v2_says_what_is_wrong(case: str, sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + sentence + "$"):
        call_masks(invalid_call(case), MASKS_V2)


def test_state_of_a_disabled_slot_may_be_missing() -> None:
    call = invalid_call("missing_state_key") | {"enabled_slots": ["r0c0"]}
    assert call_masks(call, MASKS_V2)["op"].tolist() == [[True] + [False] * 5]


def test_first_environment_without_an_enabled_slot_is_named() -> None:
    slots = Slots.from_states(SLOT_IDS, [dict.fromkeys(SLOT_IDS)] * 3, [["r0c0"], [], []], MASKS_V2)
    with pytest.raises(ValueError, match="environment 1 has no enabled slot"):
        compute_action_masks(slots, MASKS_V2, total_seeds=0, max_seeds=0, topology="cnn")


def test_as_many_values_as_environments_are_asked_for() -> None:
    slots = Slots.from_states(SLOT_IDS, [dict.fromkeys(SLOT_IDS)], [["r0c0"]], MASKS_V2)
    with pytest.raises(ValueError, match="shape"):
        compute_action_masks(slots, MASKS_V2, total_seeds=[0, 1], max_seeds=1, topology="cnn")


def test_retired_stage_is_refused() -> None:
    stage = np.array([[EMPTY, 4], [5, 6]])
    with pytest.raises(ValueError, match="slot 0 of environment 1 is in stage 5"):
        Slots(stage, np.zeros_like(stage), np.zeros_like(stage), np.ones_like(stage, bool))


def test_arrays_of_different_shapes_are_refused() -> None:
    stage = np.full((2, 3), EMPTY)
    with pytest.raises(ValueError, match=r"four arrays \[E, S\] of one shape"):
        Slots(stage, stage[:1], stage, np.ones((2, 3), bool))


def test_one_value_for_all_is_the_same_as_one_for_each() -> None:
    stage = np.array([[EMPTY, 4, 6], [2, EMPTY, EMPTY], [6, 6, 4]])
    slots = Slots(stage, np.full((3, 3), 7), np.full((3, 3), DOWN), np.ones((3, 3), bool))
    shared = compute_action_masks(
        slots,
        MASKS_V2,
        total_seeds=2,
        max_seeds=3,
        topology="transformer",
        allow_governor_override=True,
        disable_advance=True,
    )
    each = compute_action_masks(
        slots,
        MASKS_V2,
        total_seeds=[2] * 3,
        max_seeds=[3] * 3,
        topology=["transformer"] * 3,
        allow_governor_override=[True] * 3,
        disable_advance=[True] * 3,
    )
    for head, mask in shared.items():
        np.testing.assert_array_equal(mask, each[head])


def test_governor_override_prunes_a_seed_whose_alpha_moves() -> None:
    stage = np.array([[BLENDING], [BLENDING]])
    slots = Slots(stage, np.full((2, 1), 5), np.full((2, 1), DOWN), np.ones((2, 1), bool))
    masks = compute_action_masks(
        slots,
        MASKS_V2,
        total_seeds=1,
        max_seeds=0,
        topology="cnn",
        allow_governor_override=[False, True],
    )
    assert masks["op"][:, PRUNE].tolist() == [False, True]


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `compute_action_masks` where each environment has an enabled slot."""
    size, slot_count = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    shape = (size, slot_count)
    enabled = rng.random(shape) < 0.6
    enabled[np.arange(size), rng.integers(0, slot_count, size)] = True
    return {
        "slots": Slots(
            rng.choice([EMPTY, EMPTY, EMPTY, *STAGES], shape),
            rng.integers(0, 8, shape),
            rng.integers(0, 3, shape),
            enabled,
        ),
        "total_seeds": rng.integers(0, 5, size),
        "max_seeds": rng.integers(0, 5, size),
        "topology": [str(name) for name in rng.choice(["cnn", "transformer"], size)],
        "allow_governor_override": rng.random(size) < 0.5,
        "disable_advance": rng.random(size) < 0.5,
    }


@given(call=calls(), rules=st.sampled_from([MASKS_V1, MASKS_V2]))
def test_every_head_has_a_choice_and_waiting_is_one(call: dict[str, Any], rules: MaskRules) -> None:
    masks = compute_action_masks(rules=rules, **call)
    for head in masks.keys() - {"slot_by_op"}:
        assert masks[head].any(axis=1).all(), head
    assert masks["op"][:, WAIT].all()
    assert not masks["blueprint"][:, 0].any()


@given(call=calls())
def test_slots_by_op_agree_with_the_op_mask(call: dict[str, Any]) -> None:
    masks = compute_action_masks(rules=MASKS_V2, **call)
    np.testing.assert_array_equal(masks["slot_by_op"].any(axis=-1), masks["op"])
    np.testing.assert_array_equal(masks["slot_by_op"][:, WAIT], masks["slot"])
    assert not (masks["slot_by_op"] & ~masks["slot"][:, None]).any()
    assert masks["slot_by_op"].shape[1] == len(OPS)


@given(call=calls(), rules=st.sampled_from([MASKS_V1, MASKS_V2]))
def test_disabled_slots_do_not_matter(call: dict[str, Any], rules: MaskRules) -> None:
    slots = call["slots"]
    masks = compute_action_masks(rules=rules, **call)
    call["slots"] = Slots(
        np.where(slots.enabled, slots.stage, EMPTY),
        np.where(slots.enabled, slots.seed_age_epochs, 99),
        np.where(slots.enabled, slots.alpha_mode, 0),
        slots.enabled,
    )
    for head, mask in compute_action_masks(rules=rules, **call).items():
        np.testing.assert_array_equal(mask, masks[head], err_msg=head)


@pytest.mark.parametrize(
    ("rules", "spec"),
    [
        pytest.param(MASKS_V1, PolicySpec.tamiyo_v1(), id="v1"),
        pytest.param(MASKS_V2, PolicySpec.tamiyo_v2(), id="v2"),
    ],
)
def test_masks_have_the_heads_of_the_policy(rules: MaskRules, spec: PolicySpec) -> None:
    masks = call_masks({**invalid_call("unknown_topology"), "topology": "cnn"}, rules)
    by_op = masks.pop("slot_by_op", None)
    assert {head: mask.shape for head, mask in masks.items()} == {
        head.name: (1, head.size) for head in spec.heads
    }
    assert tuple(masks) == spec.head_names
    assert (by_op is not None) == spec.has_slot_by_op


def test_clients_need_no_torch() -> None:
    source = (
        "import sys, model.action_masks, model.observations; "
        "raise SystemExit('torch' in sys.modules or 'pydantic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0
