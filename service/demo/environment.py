"""A toy growing network: slots with seeds in a life cycle, their observations and legal masks.

Enough of esper-lite's V1 rules to ask a policy sensible questions; no network is trained. The
observation is V1's layout without telemetry, 23 + 39 per slot, with invented training curves.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model.spec import PolicySpec

EPISODE_LENGTH = 25
BASE_FEATURES = 23
SLOT_FEATURES = 39
NUM_BLUEPRINTS = 13
SIGMOID_ADD, FULL = 2, 2
CNN_BLUEPRINTS = range(1, 8)
TEMPO_EPOCHS = (3, 5, 8)
ALPHA_TARGETS = (0.5, 0.7, 1.0)
ALPHA_STEPS = (0, 3, 5, 8)

WAIT, GERMINATE, SET_ALPHA_TARGET, PRUNE, FOSSILIZE, ADVANCE = range(6)
OPS: Final = ("wait", "germinate", "set alpha", "prune", "fossilize", "advance")

# Positions in the observation's one-hot of stages.
GERMINATED, TRAINING, BLENDING, HOLDING, FOSSILIZED = 2, 3, 4, 5, 6


@dataclass
class Seed:
    """What grows in a slot; `alpha` is how much of it the network feels."""

    blueprint: int
    tempo: int
    alpha_target: float
    talent: float
    stage: int = GERMINATED
    age: int = 0
    alpha: float = 0.0
    alpha_steps_left: int = 0

    @property
    def is_on_hold(self) -> bool:
        return self.alpha_steps_left == 0

    def ramp(self, target: float, steps: int) -> None:
        self.alpha_target, self.alpha_steps_left = target, steps
        if steps == 0:
            self.alpha = target

    def tick(self) -> None:
        self.age += 1
        if self.alpha_steps_left:
            self.alpha += (self.alpha_target - self.alpha) / self.alpha_steps_left
            self.alpha_steps_left -= 1
        if self.stage == BLENDING and self.is_on_hold and self.alpha_target == 1.0:
            self.stage = HOLDING


@dataclass
class GrowingNetwork:
    """One environment: `observe` and `masks` before an action, `apply` after it."""

    spec: PolicySpec
    random: np.random.Generator
    epoch: int = 0
    accuracy: float = 40.0
    slots: list[Seed | None] = field(default_factory=list)
    history: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        sizes = dict(zip(self.spec.head_names, self.spec.head_sizes, strict=True))
        self.slots = [None] * sizes["slot"]
        self.history = [self.accuracy]

    @property
    def is_over(self) -> bool:
        return self.epoch >= EPISODE_LENGTH

    def masks(self) -> dict[str, list[bool]]:
        """What may be done now, per head: the V1 rules, every slot enabled, no seed limit."""
        seeds = [seed for seed in self.slots if seed is not None]
        can_germinate = len(seeds) < len(self.slots)
        can_retarget = any(s.stage in (BLENDING, HOLDING) and s.is_on_hold for s in seeds)
        styles = can_germinate or can_retarget
        op = [True] * len(OPS)
        op[GERMINATE] = can_germinate
        op[SET_ALPHA_TARGET] = can_retarget
        op[PRUNE] = any(s.stage != FOSSILIZED and s.age >= 1 and s.is_on_hold for s in seeds)
        op[FOSSILIZE] = any(s.stage == HOLDING for s in seeds)
        op[ADVANCE] = any(s.stage in (GERMINATED, TRAINING, BLENDING) for s in seeds)
        return {
            "op": op,
            "slot": [True] * len(self.slots),
            "blueprint": [index in CNN_BLUEPRINTS for index in range(NUM_BLUEPRINTS)],
            "style": [styles or index == SIGMOID_ADD for index in range(4)],
            "alpha_target": [styles or index == FULL for index in range(3)],
        }

    def observe(self) -> list[float]:
        """The observation, zeros after the features this toy knows."""
        features = np.zeros(self.spec.observation_dim, dtype=np.float32)
        features[:BASE_FEATURES] = self._base_features()
        for slot, seed in enumerate(self.slots):
            start = BASE_FEATURES + slot * SLOT_FEATURES
            features[start : start + SLOT_FEATURES] = self._slot_features(seed)
        values: list[float] = features.tolist()
        return values

    def apply(self, action: dict[str, int]) -> None:
        """One epoch: the action where it is possible for its slot, then everything grows."""
        op, seed = action["op"], self.slots[action["slot"]]
        if op == GERMINATE and seed is None:
            self.slots[action["slot"]] = Seed(
                action["blueprint"],
                TEMPO_EPOCHS[action["tempo"]],
                ALPHA_TARGETS[action["alpha_target"]],
                talent=float(self.random.normal(1.0, 1.0)),
            )
        elif seed is not None:
            self._treat(op, seed, action)
        for growing in self.slots:
            if growing is not None:
                growing.tick()
                self.accuracy += 0.3 * growing.alpha * growing.talent
        self.accuracy += float(self.random.normal(0.2, 0.5))
        self.accuracy = min(max(self.accuracy, 0.0), 100.0)
        self.history.append(self.accuracy)
        self.epoch += 1

    def _treat(self, op: int, seed: Seed, action: dict[str, int]) -> None:
        if op == ADVANCE and seed.stage == GERMINATED:
            seed.stage = TRAINING
        elif op == ADVANCE and seed.stage == TRAINING:
            seed.stage = BLENDING
            seed.ramp(seed.alpha_target, seed.tempo)
        elif op == SET_ALPHA_TARGET and seed.stage in (BLENDING, HOLDING) and seed.is_on_hold:
            seed.stage = BLENDING
            seed.ramp(
                ALPHA_TARGETS[action["alpha_target"]], ALPHA_STEPS[action["alpha_speed"]]
            )  # fmt: skip
        elif op == FOSSILIZE and seed.stage == HOLDING:
            seed.stage = FOSSILIZED
        elif op == PRUNE and seed.stage != FOSSILIZED and seed.age >= 1 and seed.is_on_hold:
            self.slots[action["slot"]] = None

    def _base_features(self) -> NDArray[np.float32]:
        loss = 3.0 * (1 - self.accuracy / 100)
        delta = self.history[-1] - self.history[-2] if len(self.history) > 1 else 0.0
        recent = np.zeros(5)
        known = self.history[-5:]
        recent[5 - len(known) :] = known
        best = max(self.history)
        seeds = sum(seed is not None for seed in self.slots) / len(self.slots)
        losses = np.where(recent > 0, 3.0 * (1 - recent / 100), 0.0)
        head = [self.epoch, self.epoch * 100, loss, loss, -delta * 0.03, self.accuracy]
        middle = [self.accuracy, delta, 0, best, 3.0 * (1 - best / 100)]
        return np.array([*head, *middle, *losses, *recent, 1e5, seeds], dtype=np.float32)

    def _slot_features(self, seed: Seed | None) -> NDArray[np.float32]:
        features = np.zeros(SLOT_FEATURES, dtype=np.float32)
        features[14] = 5 / 12
        if seed is not None:
            features[0] = 1.0
            features[1 + seed.stage] = 1.0
            features[11] = seed.alpha
            features[12] = np.clip(seed.alpha * seed.talent / 10, -1, 1)
            features[14] = seed.tempo / 12
            features[15] = seed.alpha_target
            features[19] = seed.alpha_steps_left / EPISODE_LENGTH
            features[26 + seed.blueprint] = 1.0
        return features
