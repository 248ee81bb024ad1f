"""A toy growing network: slots with seeds in a life cycle, to ask a policy sensible questions.

What is legal and what the policy sees are the trainer's own rules and features, V1's or V2's
(`model.action_masks`, `model.observations`). What grows is invented; no network is trained.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np

from model.action_masks import (
    MASKS_V1,
    MASKS_V2,
    BoolArray,
    MaskRules,
    Slots,
    compute_action_masks,
)
from model.lifecycle import (
    ADVANCE,
    ALPHA_ALGORITHM_OF_STYLE,
    ALPHA_SPEED_EPOCHS,
    ALPHA_TARGETS,
    BLENDING,
    DOWN,
    EMPTY,
    FOSSILIZE,
    FOSSILIZED,
    GERMINATE,
    GERMINATED,
    HOLD,
    HOLDING,
    PRUNE,
    SET_ALPHA_TARGET,
    TEMPO_EPOCHS,
    TRAINING,
    UP,
    WAIT,
)
from model.observations import (
    BASE_FEATURES,
    HISTORY,
    SLOT_FEATURES_V1,
    SLOT_FEATURES_V1_WITH_TELEMETRY,
    SLOT_FEATURES_V3,
    Alpha,
    SeedsV1,
    SeedsV3,
    Training,
    TrainingV1,
    TrainingV3,
    observe_v1,
    observe_v3,
)
from model.spec import PolicySpec
from model.step_spec import SLOT_BY_OP, StepSpec

LOSS_AT_NOTHING = 3.0

RecordT = TypeVar("RecordT", bound=Training | Alpha)


@dataclass(frozen=True)
class Game:
    """What one of the trainer's versions plays by."""

    preset: Callable[..., PolicySpec]
    rules: MaskRules
    episode_length: int
    features_per_slot: tuple[int, ...]

    def is_of(self, spec: StepSpec) -> bool:
        """Whether the policy reads and decides what this version's does."""
        if "slot" not in spec.head_names:
            return False
        num_slots = spec.num_slots
        dims = [BASE_FEATURES + features * num_slots for features in self.features_per_slot]
        return spec.observation_dim in dims and _interface(spec) == _interface(
            self.preset(num_slots=num_slots)
        )


V1_FEATURES = (SLOT_FEATURES_V1, SLOT_FEATURES_V1_WITH_TELEMETRY)
GAMES = (
    # V1 judges slots by op too, and leaves it to the policy to find out.
    Game(PolicySpec.tamiyo_v1, replace(MASKS_V1, has_slot_by_op=True), 25, V1_FEATURES),
    Game(PolicySpec.tamiyo_v2, MASKS_V2, 150, (SLOT_FEATURES_V3,)),
)


def game_of(spec: StepSpec) -> Game:
    """The game this policy plays; ValueError where it is none that there are observations for."""
    for game in GAMES:
        if game.is_of(spec):
            return game
    raise ValueError(
        f"the policy {spec.name!r} reads {spec.observation_dim} features with heads "
        f"{', '.join(spec.head_names)}; the demo plays Tamiyo V1 (23 features and 39 for each "
        "slot, or 65 with telemetry) and V2 (23 and 31)"
    )


def _interface(spec: StepSpec) -> tuple[Any, ...]:
    reads_blueprints = spec.blueprint_embedding_dim is not None
    return spec.head_names, spec.head_sizes, spec.op_index, spec.has_slot_by_op, reads_blueprints


@dataclass
class Seed:
    """What grows in a slot; `alpha` is how much of it the network feels."""

    blueprint: int
    tempo_epochs: int
    alpha_target: float
    alpha_algorithm: int
    talent: float
    stage: int = GERMINATED
    age_epochs: int = 0
    stage_epochs: int = 0
    alpha: float = 0.0
    steps_total: int = 0
    steps_done: int = 0

    @property
    def steps_left(self) -> int:
        return self.steps_total - self.steps_done

    @property
    def alpha_mode(self) -> int:
        if self.steps_left == 0:
            return HOLD
        return UP if self.alpha_target >= self.alpha else DOWN

    def enter(self, stage: int) -> None:
        self.stage, self.stage_epochs = stage, 0

    def ramp(self, target: float, steps: int) -> None:
        self.alpha_target, self.steps_total, self.steps_done = target, steps, 0
        if steps == 0:
            self.alpha = target

    def tick(self) -> None:
        self.age_epochs += 1
        self.stage_epochs += 1
        if self.steps_left:
            self.alpha += (self.alpha_target - self.alpha) / self.steps_left
            self.steps_done += 1

    def report(self) -> dict[str, float]:
        """What either version's trainer would see of it."""
        velocity = (self.alpha_target - self.alpha) / self.steps_left if self.steps_left else 0.0
        contribution = self.alpha * self.talent
        return {
            "stage": self.stage,
            "blueprint": self.blueprint,
            "alpha": self.alpha,
            "alpha_target": self.alpha_target,
            "alpha_mode": self.alpha_mode,
            "alpha_steps_total": self.steps_total,
            "alpha_steps_done": self.steps_done,
            "time_to_target": self.steps_left,
            "alpha_velocity": velocity,
            "alpha_algorithm": self.alpha_algorithm,
            "counterfactual_contribution": contribution,
            "contribution_velocity": velocity * self.talent,
            "blend_tempo_epochs": self.tempo_epochs,
            "improvement_since_stage_start": contribution,
            "gradient_norm": abs(self.talent),
            "gradient_health": 1.0,
            "gradient_health_prev": 1.0,
            "epochs_in_current_stage": self.stage_epochs,
            "epochs_total": self.age_epochs,
        }


@dataclass
class GrowingNetwork:
    """One environment: `request` before an action, `apply` after it."""

    spec: StepSpec
    random: np.random.Generator
    epoch: int = 0
    accuracy: float = 40.0
    last_op: int = WAIT
    last_action_success: bool = True
    slots: list[Seed | None] = field(init=False)
    history: list[float] = field(init=False)
    masks: dict[str, BoolArray] = field(init=False)

    def __post_init__(self) -> None:
        self.game = game_of(self.spec)
        self.slots = [None] * self.spec.num_slots
        self.history = [self.accuracy]
        self.masks = self._legal()

    @property
    def is_over(self) -> bool:
        return self.epoch >= self.game.episode_length

    def request(self) -> dict[str, Any]:
        """What `POST /act` is asked: the observation and the legal choices."""
        fields: dict[str, Any] = {
            "action_mask": {name: self.masks[name].tolist() for name in self.spec.head_names}
        }
        if self.spec.has_slot_by_op:
            fields["slot_by_op_mask"] = self.masks[SLOT_BY_OP].tolist()
        if self.spec.blueprint_embedding_dim is not None:
            observation, blueprints = observe_v3(self._training(TrainingV3), self._seeds(SeedsV3))
            return fields | {
                "observation": observation[0].tolist(),
                "blueprint_index": blueprints[0].tolist(),
            }
        observation = observe_v1(self._training(TrainingV1), self._seeds(SeedsV1))
        telemetry = np.zeros(self.spec.observation_dim - observation.shape[1])  # none is reported
        return fields | {"observation": [*observation[0].tolist(), *telemetry.tolist()]}

    def illegal(self, action: Mapping[str, int]) -> list[str]:
        """The heads of an answer that are neither legal nor what they are where they must be."""
        op = action["op"]
        if not 0 <= op < self.spec.num_ops:
            return ["op"]
        wrong = []
        for head in self.spec.heads:
            mask = self.masks[head.name]
            if head.name == "slot" and self.spec.has_slot_by_op:
                mask = self.masks[SLOT_BY_OP][op]
            choice = action[head.name]
            if head.relevant_ops is None or op in head.relevant_ops:
                is_legal = 0 <= choice < head.size and bool(mask[choice])
            elif isinstance(head.forced_index, int):
                is_legal = choice == head.forced_index
            else:
                is_legal = choice == mask.argmax()
            if not is_legal:
                wrong.append(head.name)
        return wrong

    def apply(self, action: Mapping[str, int]) -> None:
        """One epoch: the action where it is possible for its slot, then everything grows."""
        op, slot = action["op"], action["slot"]
        self.last_op = op
        self.last_action_success = bool(self.masks[SLOT_BY_OP][op, slot])
        if self.last_action_success:
            self._act(op, slot, action)
        for growing in self.slots:
            if growing is not None:
                growing.tick()
                self.accuracy += 0.3 * growing.alpha * growing.talent
        self.accuracy += float(self.random.normal(0.2, 0.5))
        self.accuracy = min(max(self.accuracy, 0.0), 100.0)
        self.history.append(self.accuracy)
        self.epoch += 1
        self.masks = self._legal()

    def _act(self, op: int, slot: int, action: Mapping[str, int]) -> None:
        seed = self.slots[slot]
        if op == GERMINATE:
            self.slots[slot] = Seed(
                action["blueprint"],
                TEMPO_EPOCHS[action["tempo"]],
                ALPHA_TARGETS[action["alpha_target"]],
                ALPHA_ALGORITHM_OF_STYLE[action["style"]],
                talent=float(self.random.normal(1.0, 1.0)),
            )
        elif op == PRUNE:
            self.slots[slot] = None
        elif seed is None:  # waiting
            return
        elif op == SET_ALPHA_TARGET:
            seed.enter(BLENDING)
            seed.ramp(
                ALPHA_TARGETS[action["alpha_target"]], ALPHA_SPEED_EPOCHS[action["alpha_speed"]]
            )
        elif op == FOSSILIZE:
            seed.enter(FOSSILIZED)
        elif op == ADVANCE and seed.stage == GERMINATED:
            seed.enter(TRAINING)
        elif op == ADVANCE and seed.stage == TRAINING:
            seed.enter(BLENDING)
            seed.ramp(seed.alpha_target, seed.tempo_epochs)
        elif op == ADVANCE and seed.alpha_mode == HOLD and seed.alpha_target == 1.0:
            seed.enter(HOLDING)

    def _legal(self) -> dict[str, BoolArray]:
        """By head and `slot_by_op`: every slot enabled, and no limit of seeds."""

        def of_slots(value: str, empty: int) -> Any:
            seeds = [empty if seed is None else getattr(seed, value) for seed in self.slots]
            return np.array([seeds])

        slots = Slots(
            stage=of_slots("stage", EMPTY),
            seed_age_epochs=of_slots("age_epochs", 0),
            alpha_mode=of_slots("alpha_mode", HOLD),
            enabled=np.ones((1, len(self.slots)), np.bool_),
        )
        masks = compute_action_masks(
            slots, self.game.rules, total_seeds=0, max_seeds=0, topology="cnn"
        )
        return {name: mask[0] for name, mask in masks.items()}

    def _training(self, record: type[RecordT]) -> RecordT:
        losses = [LOSS_AT_NOTHING * (1 - accuracy / 100) for accuracy in self.history]
        before = max(len(self.history) - 2, 0)
        unknown = [np.nan] * max(HISTORY - len(self.history), 0)
        best = int(np.argmax(self.history))
        report = {
            "epoch": self.epoch,
            "max_epochs": self.game.episode_length,
            "val_loss": losses[-1],
            "val_accuracy": self.accuracy,
            "loss_history": unknown + losses[-HISTORY:],
            "accuracy_history": unknown + self.history[-HISTORY:],
            "global_step": self.epoch * 100,
            "train_loss": losses[-1],
            "loss_delta": losses[-1] - losses[before],
            "train_accuracy": self.accuracy,
            "accuracy_delta": self.history[-1] - self.history[before],
            "plateau_epochs": len(self.history) - 1 - best,
            "best_val_accuracy": self.history[best],
            "best_val_loss": losses[best],
            "total_params": 1e5,
            "total_seeds": sum(seed is not None for seed in self.slots),
            "max_seeds": len(self.slots),
            "last_action_success": self.last_action_success,
            "last_action_op": self.last_op,
        }
        return record(**{each.name: np.array([report[each.name]]) for each in fields(record)})

    def _seeds(self, record: type[RecordT]) -> RecordT:
        """What is not of a seed's report is zero, as is all of a slot without one."""
        reports = [{"stage": EMPTY} if seed is None else seed.report() for seed in self.slots]

        def array(name: str) -> Any:
            return np.array([[report.get(name, 0) for report in reports]])

        return record(**{each.name: array(each.name) for each in fields(record)})
