"""Which choices are legal: the trainer's action mask rules, for many environments at once.

An environment's client computes its masks here and sends them with its observation. NumPy only:
this module knows neither the network nor the service. What differs between the trainer's versions
is data, `MASKS_V1` and `MASKS_V2`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model.lifecycle import (
    ADVANCE,
    ALPHA_ALGORITHM_OF_STYLE,
    ALPHA_SPEED_EPOCHS,
    ALPHA_TARGETS,
    BLENDING,
    BLUEPRINTS,
    BLUEPRINTS_OF_TOPOLOGY,
    EMBARGOED,
    EMPTY,
    FOSSILIZE,
    FULL,
    GERMINATE,
    GERMINATED,
    HOLD,
    HOLDING,
    OPS,
    PRUNE,
    PRUNED,
    RESETTING,
    SET_ALPHA_TARGET,
    SIGMOID_ADD,
    STAGES,
    TEMPO_EPOCHS,
    TRAINING,
    WAIT,
)

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRules:
    """One version of the rules.

    `germinate_waits_for`: while an enabled slot is in one of these stages, no other is germinated.
    `is_strict`: an invalid call is a ValueError. Otherwise an unknown topology counts as cnn, an
    unknown enabled slot as nothing, a slot without a state as empty, and an environment may have
    no enabled slot at all (its slot mask then allows nothing).
    """

    min_prune_age_epochs: int
    num_alpha_curves: int
    germinate_waits_for: tuple[int, ...]
    can_disable_advance: bool
    has_slot_by_op: bool
    is_strict: bool


MASKS_V1 = MaskRules(
    min_prune_age_epochs=1,
    num_alpha_curves=3,
    germinate_waits_for=(),
    can_disable_advance=False,
    has_slot_by_op=False,
    is_strict=False,
)
MASKS_V2 = MaskRules(
    min_prune_age_epochs=5,
    num_alpha_curves=5,
    germinate_waits_for=(GERMINATED, TRAINING, PRUNED, EMBARGOED, RESETTING),
    can_disable_advance=True,
    has_slot_by_op=True,
    is_strict=True,
)


@dataclass(frozen=True, slots=True)
class Slots:
    """The slots of E environments, in action-index order; every array is [E, S].

    `stage` is EMPTY where there is no seed; the other two integers are ignored there.
    Raises ValueError for arrays of different shapes and for a stage that there is not.
    """

    stage: NDArray[np.integer[Any]]
    seed_age_epochs: NDArray[np.integer[Any]]
    alpha_mode: NDArray[np.integer[Any]]
    enabled: BoolArray

    def __post_init__(self) -> None:
        shapes = {
            a.shape for a in (self.stage, self.seed_age_epochs, self.alpha_mode, self.enabled)
        }
        if len(shapes) > 1 or self.stage.ndim != 2:
            raise ValueError(f"slots need four arrays [E, S] of one shape, not {sorted(shapes)}")
        unknown = ~np.isin(self.stage, (EMPTY, *STAGES))
        if unknown.any():
            environment, slot = np.argwhere(unknown)[0]
            raise ValueError(
                f"slot {slot} of environment {environment} is in stage "
                f"{self.stage[environment, slot]}, which there is not"
            )

    @classmethod
    def from_states(
        cls,
        slot_ids: Sequence[str],
        states: Sequence[Mapping[str, Mapping[str, int] | None]],
        enabled: Sequence[Collection[str]],
        rules: MaskRules,
    ) -> "Slots":
        """The trainer's form: by environment, `{slot_id: None or its state}` and the enabled ids.

        A state holds `stage`, `seed_age_epochs` and `alpha_mode`. Strict rules raise ValueError
        for an enabled slot that is not in `slot_ids` or that has no entry.
        """
        if rules.is_strict:
            for environment, (by_slot, ids) in enumerate(zip(states, enabled, strict=True)):
                for slot in ids:
                    if slot not in slot_ids or slot not in by_slot:
                        lack = "has no state" if slot in slot_ids else "is not one of the slots"
                        raise ValueError(
                            f"enabled slot {slot!r} of environment {environment} {lack}"
                        )
        empty = {"stage": EMPTY, "seed_age_epochs": 0, "alpha_mode": HOLD}
        rows = [[by_slot.get(slot) or empty for slot in slot_ids] for by_slot in states]

        def table(key: str) -> NDArray[np.int64]:
            return np.array([[state[key] for state in row] for row in rows], np.int64)

        return cls(
            stage=table("stage"),
            seed_age_epochs=table("seed_age_epochs"),
            alpha_mode=table("alpha_mode"),
            enabled=np.array([[slot in ids for slot in slot_ids] for ids in enabled], bool),
        )


def compute_action_masks(
    slots: Slots,
    rules: MaskRules,
    *,
    total_seeds: ArrayLike,
    max_seeds: ArrayLike,
    topology: str | Sequence[str],
    allow_governor_override: ArrayLike = False,
    disable_advance: ArrayLike = False,
) -> dict[str, BoolArray]:
    """`{head: bool [E, n]}`, True = allowed; V2 with `slot_by_op`, bool [E, 6, S].

    The keyword arguments are one value for all environments or one for each; `max_seeds` 0 is no
    limit. An op is allowed when some slot allows it, whichever slot is then chosen. Strict rules
    raise ValueError for an unknown topology and for an environment without an enabled slot.
    """
    if rules.is_strict and not slots.enabled.any(axis=1).all():
        environment = int(slots.enabled.any(axis=1).argmin())
        raise ValueError(f"environment {environment} has no enabled slot")
    num_environments = len(slots.stage)

    def column(flag: ArrayLike) -> BoolArray:
        return np.broadcast_to(np.asarray(flag, bool), num_environments)[:, None]

    def everything(size: int) -> BoolArray:
        return np.ones((num_environments, size), bool)

    slot_by_op = _slots_by_op(
        slots,
        rules,
        is_full=column((np.asarray(max_seeds) > 0) & (np.asarray(total_seeds) >= max_seeds)),
        is_overridden=column(allow_governor_override),
        is_advance_disabled=column(rules.can_disable_advance & np.asarray(disable_advance, bool)),
    )
    op = slot_by_op.any(axis=-1) | (np.array(OPS) == WAIT)
    is_alpha_chosen = op[:, [GERMINATE, SET_ALPHA_TARGET]].any(axis=1, keepdims=True)
    masks = {
        "slot": slots.enabled.astype(bool),
        "blueprint": _blueprints(topology, rules, num_environments),
        "style": is_alpha_chosen | (np.arange(len(ALPHA_ALGORITHM_OF_STYLE)) == SIGMOID_ADD),
        "tempo": everything(len(TEMPO_EPOCHS)),
        "alpha_target": is_alpha_chosen | (np.arange(len(ALPHA_TARGETS)) == FULL),
        "alpha_speed": everything(len(ALPHA_SPEED_EPOCHS)),
        "alpha_curve": everything(rules.num_alpha_curves),
        "op": op,
    }
    if rules.has_slot_by_op:
        masks["slot_by_op"] = slot_by_op
    return masks


def _slots_by_op(
    slots: Slots,
    rules: MaskRules,
    *,
    is_full: BoolArray,
    is_overridden: BoolArray,
    is_advance_disabled: BoolArray,
) -> BoolArray:
    """Which slots satisfy each op's condition: bool [E, 6, S]. The flags are [E, 1]."""
    stage, enabled = slots.stage, slots.enabled.astype(bool)
    on_hold = slots.alpha_mode == HOLD
    is_old_enough = slots.seed_age_epochs >= rules.min_prune_age_epochs
    is_busy = (enabled & np.isin(stage, rules.germinate_waits_for)).any(axis=1, keepdims=True)
    condition = {
        WAIT: enabled,
        GERMINATE: (stage == EMPTY) & ~is_full & ~is_busy,
        SET_ALPHA_TARGET: np.isin(stage, (BLENDING, HOLDING)) & on_hold,
        PRUNE: np.isin(stage, (GERMINATED, TRAINING, BLENDING, HOLDING))
        & is_old_enough
        & (on_hold | is_overridden),
        FOSSILIZE: stage == HOLDING,
        ADVANCE: np.isin(stage, (GERMINATED, TRAINING, BLENDING)) & ~is_advance_disabled,
    }
    allowed: BoolArray = enabled[:, None] & np.stack([condition[op] for op in OPS], axis=1)
    return allowed


def _blueprints(
    topology: str | Sequence[str], rules: MaskRules, num_environments: int
) -> BoolArray:
    """The blueprints of each environment's topology: bool [E, 13]."""
    names = np.broadcast_to(np.asarray(topology), num_environments)
    unknown = ~np.isin(names, list(BLUEPRINTS_OF_TOPOLOGY))
    if rules.is_strict and unknown.any():
        raise ValueError(
            f"there is no topology {str(names[unknown][0])!r}; "
            f"the topologies are {', '.join(BLUEPRINTS_OF_TOPOLOGY)}"
        )
    names = np.where(unknown, "cnn", names)
    masks = np.zeros((num_environments, len(BLUEPRINTS)), bool)
    for name, blueprints in BLUEPRINTS_OF_TOPOLOGY.items():
        masks |= (names == name)[:, None] & np.isin(np.arange(len(BLUEPRINTS)), list(blueprints))
    return masks
