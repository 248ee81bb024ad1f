"""The tests' oracle for V2: esper-lite's policy of 2026-06-21 in NumPy float64, row by row.

As `tests/naive.py`, whose LSTM cell, layers and softmax it uses, and as that sharing no code with
`model/`: residual layers, blueprints, every rule between heads, slots by op, floors, the critic.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model.spec import PolicySpec
from tests.naive import (
    Bools,
    Floats,
    Ints,
    NaivePolicy,
    masked_log_softmax,
    normalized_entropy,
    relu,
    row_mask,
)

FORCED = {
    "style": ((1, 2), 2),
    "blueprint": ((1,), 0),
    "tempo": ((1,), 1),
    "alpha_target": ((1, 2), 2),
    "alpha_speed": ((2, 3), 0),
    "alpha_curve": ((2, 3), 0),
}
"""Head: the ops it matters for, and what it is otherwise. The slot's is the first allowed."""
NUM_BLUEPRINTS = 13
WAIT = 0
SLOT_BY_OP = "slot_by_op"


class NaiveStepV2(NamedTuple):
    """`[B, heads]` twice, `[B]`, `[B, layers, hidden]` twice, Q(s, op) `[B]`, `[B, slots]`."""

    action: Ints
    log_prob: Floats
    value: Floats
    h: Floats
    c: Floats
    q_value: Floats
    contribution: Floats


class NaiveEvaluationV2(NamedTuple):
    """`[B, T, heads]` twice, `[B, T]`, the state, Q(s, op) `[B, T]`, `[B, T, slots]`."""

    log_prob: Floats
    entropy: Floats
    value: Floats
    h: Floats
    c: Floats
    q_value: Floats
    contribution: Floats


class NaivePolicyV2(NaivePolicy):
    """A V2 policy from its `state_dict` as arrays; `floors` is `{head: probability}`.

    `masks` may hold `slot_by_op` `[..., ops, slots]`, which then stands in for the slot's own.
    Values are as the network learns them, not in returns.
    """

    def __init__(
        self,
        spec: PolicySpec,
        weights: Mapping[str, ArrayLike],
        normalizer_mean: ArrayLike | None = None,
        normalizer_var: ArrayLike | None = None,
        *,
        floors: Mapping[str, float],
    ) -> None:
        super().__init__(spec, weights, normalizer_mean, normalizer_var)
        self.floors = floors

    def output_row(
        self, observation: Floats, blueprints: Ints, h: Floats, c: Floats
    ) -> tuple[Floats, Floats, Floats]:
        """What heads and critic read of one row, `[hidden]`, and its new h and c."""
        embedding = self.weights["blueprint_embedding.embedding.weight"]
        embedded = [embedding[NUM_BLUEPRINTS if index == -1 else index] for index in blueprints]
        x = np.concatenate([self.normalize(observation), *embedded])
        x = relu(self._layer_norm("feature_net.1", self._linear("feature_net.0", x)))
        if "lstm.input_proj.weight" in self.weights:
            x = self._linear("lstm.input_proj", x)
        new_h, new_c = np.empty_like(h), np.empty_like(c)
        for layer in range(self.spec.num_layers):
            names = f"lstm.layers.{layer}." + "{}_l0"
            new_h[layer], new_c[layer] = self._cell(names, x, h[layer], c[layer])
            x = x + self._layer_norm(f"lstm.layer_norms.{layer}", new_h[layer])
        return x, new_h, new_c

    def logits_row(self, y: Floats) -> dict[str, Floats]:
        return {name: self._head(name, y) for name in self.spec.head_names}

    def critic_row(self, y: Floats, op: int) -> tuple[float, float, Floats]:
        """V(s), Q(s, op) and the slots' contributions."""
        one_hot = np.zeros(self.spec.num_ops)
        one_hot[op] = 1.0
        return (
            self._funnel("state_value_head", y),
            self._funnel("q_head", np.concatenate([y, one_hot])),
            self._contribution(y),
        )

    def step_v2(
        self,
        observation: ArrayLike,
        blueprint_index: ArrayLike,
        masks: Mapping[str, Bools],
        noise: ArrayLike | None = None,
        h: ArrayLike | None = None,
        c: ArrayLike | None = None,
    ) -> NaiveStepV2:
        """One step of every row, as `NaivePolicy.step`, with blueprints `[B, slots]`."""
        observation = np.asarray(observation, np.float64)
        blueprints = np.asarray(blueprint_index, np.int64)
        num_rows = len(observation)
        if noise is None:
            noise = np.zeros((num_rows, self.spec.num_choices))
        noises = np.split(np.asarray(noise, np.float64), np.cumsum(self.spec.head_sizes)[:-1], -1)
        noise_of = dict(zip(self.spec.head_names, noises, strict=True))
        h, c = self._state(num_rows, h, c)
        rows = []
        for row in range(num_rows):
            y, new_h, new_c = self.output_row(observation[row], blueprints[row], h[row], c[row])
            logits = self.logits_row(y)
            taken: dict[str, tuple[int, float]] = {}
            for name in ("op", *(name for name in self.spec.head_names if name != "op")):
                op = taken["op"][0] if taken else None
                log_probs, mask = self._scores(name, logits[name], masks, (row,), op)
                taken[name] = _decision(name, op, log_probs, mask, noise_of[name][row])
            action, log_prob = zip(*(taken[name] for name in self.spec.head_names), strict=True)
            critic = self.critic_row(y, taken["op"][0])
            rows.append((action, log_prob, critic[0], new_h, new_c, *critic[1:]))
        return NaiveStepV2(*(np.array(column) for column in zip(*rows, strict=True)))

    def evaluate_v2(
        self,
        observations: ArrayLike,
        blueprint_index: ArrayLike,
        actions: ArrayLike,
        masks: Mapping[str, Bools],
        h: ArrayLike | None = None,
        c: ArrayLike | None = None,
    ) -> NaiveEvaluationV2:
        """Stored actions `[B, T, heads]` scored; masks and blueprints are `[B, T, ...]`."""
        observations = np.asarray(observations, np.float64)
        blueprints = np.asarray(blueprint_index, np.int64)
        actions = np.asarray(actions, np.int64)
        num_rows, length, _ = observations.shape
        h, c = (part.copy() for part in self._state(num_rows, h, c))
        log_prob, entropy = np.zeros(actions.shape), np.zeros(actions.shape)
        value, q_value = np.empty((num_rows, length)), np.empty((num_rows, length))
        contribution = np.empty((num_rows, length, self.spec.num_slots))
        for row, t in np.ndindex(num_rows, length):
            y, h[row], c[row] = self.output_row(
                observations[row, t], blueprints[row, t], h[row], c[row]
            )
            logits = self.logits_row(y)
            op = int(actions[row, t, self.spec.op_index])
            critic = self.critic_row(y, op)
            value[row, t], q_value[row, t], contribution[row, t] = critic
            for at, name in enumerate(self.spec.head_names):
                log_probs, mask = self._scores(name, logits[name], masks, (row, t), op)
                if forced_index(name, op, mask) is None:
                    log_prob[row, t, at] = log_probs[actions[row, t, at]]
                    entropy[row, t, at] = normalized_entropy(log_probs, mask)
        return NaiveEvaluationV2(log_prob, entropy, value, h, c, q_value, contribution)

    def _scores(
        self,
        name: str,
        logits: Floats,
        masks: Mapping[str, Bools],
        row: tuple[int, ...],
        op: int | None,
    ) -> tuple[Floats, Bools]:
        mask = row_mask(masks, name, row, len(logits))
        if name == "slot" and SLOT_BY_OP in masks:
            mask = np.asarray(masks[SLOT_BY_OP][row][op], np.bool_)
        if not mask.any():  # of an op that needs no slot
            return logits, mask
        if not self.floors.get(name):
            return masked_log_softmax(logits, mask), mask
        with np.errstate(divide="ignore"):
            return np.log(floored(logits, mask, self.floors[name])), mask

    def _head(self, name: str, y: Floats) -> Floats:
        """The blueprint's has one layer more."""
        if name != "blueprint":
            return self._mlp(f"{name}_head", y)
        x = relu(self._linear("blueprint_head.2", relu(self._linear("blueprint_head.0", y))))
        return self._linear("blueprint_head.4", x)

    def _funnel(self, name: str, x: Floats) -> float:
        x = relu(self._layer_norm(f"{name}.1", self._linear(f"{name}.0", x)))
        x = relu(self._layer_norm(f"{name}.4", self._linear(f"{name}.3", x)))
        return float(self._linear(f"{name}.8", relu(self._linear(f"{name}.6", x)))[0])

    def _contribution(self, x: Floats) -> Floats:
        name = "contribution_predictor"
        x = relu(self._layer_norm(f"{name}.1", self._linear(f"{name}.0", x)))
        return self._linear(f"{name}.6", relu(self._linear(f"{name}.4", x)))


def _decision(
    name: str, op: int | None, log_probs: Floats, mask: Bools, noise: Floats
) -> tuple[int, float]:
    """One head's choice and its log-prob; the op itself is chosen before there is one."""
    forced = None if op is None else forced_index(name, op, mask)
    if forced is not None:
        return forced, 0.0
    choice = int(np.argmax(log_probs + noise))
    return choice, float(log_probs[choice])


def forced_index(name: str, op: int, mask: Bools) -> int | None:
    """What a head is where it does not matter for `op`; None where it does."""
    if name == "slot":
        return int(mask.argmax()) if op == WAIT else None
    ops, forced = FORCED.get(name, ((op,), 0))
    return None if op in ops else forced


def floored(logits: Floats, mask: Bools, floor: float) -> NDArray[np.float64]:
    """One head's probabilities with a floor, 0 where not allowed."""
    prob = np.exp(masked_log_softmax(logits[mask], np.ones(int(mask.sum()), np.bool_)))
    f = min(floor, 0.99 / len(prob))
    low = prob < f
    prob[~low] *= (1 - low.sum() * f) / prob[~low].sum()
    prob[low] = f
    whole = np.zeros(len(logits))
    whole[mask] = prob
    return whole
