"""The tests' oracle: esper-lite's V1 policy in plain NumPy float64, row by row and head by head.

Written from the description of the original network and sharing no code with `model/`, so that a
mistake made there is not repeated here. Slow, and simple enough to check by reading.

    naive = NaivePolicy(spec, weights, normalizer_mean, normalizer_var)
    step = naive.step(observation, masks, noise, h, c)
    step = naive.step(next_observation, masks, noise, step.h, step.c)
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model.spec import PolicySpec

FLOAT_ATOL = 1e-5
"""How far values, states and entropies computed in float32 may be from this policy's float64."""
LOG_PROB_ATOL = 2e-5
"""The same for log-probs: a log-softmax adds its own rounding."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MASKED_LOGIT = -1e4
LAYER_NORM_EPSILON = 1e-5
VARIANCE_EPSILON = 1e-4
CLIP = 10.0
GERMINATE = 1
SET_ALPHA_TARGET = 2
SIGMOID_ADD = 2


class NaiveStep(NamedTuple):
    """`action` and `log_prob` `[B, heads]`, `value` `[B]`, `h` and `c` `[B, layers, hidden]`."""

    action: Ints
    log_prob: Floats
    value: Floats
    h: Floats
    c: Floats


class NaiveEvaluation(NamedTuple):
    """`log_prob` and `entropy` `[B, T, heads]`, `value` `[B, T]`, and the state after the last."""

    log_prob: Floats
    value: Floats
    entropy: Floats
    h: Floats
    c: Floats


class NaivePolicy:
    """A V1 policy from its `state_dict` as arrays, and the observation statistics if it has any.

    Heads are in `spec.heads` order everywhere. Every argument may be float32: it is widened.
    """

    def __init__(
        self,
        spec: PolicySpec,
        weights: Mapping[str, ArrayLike],
        normalizer_mean: ArrayLike | None = None,
        normalizer_var: ArrayLike | None = None,
    ) -> None:
        if (normalizer_mean is None) != (normalizer_var is None):
            raise ValueError("a normaliser has both a mean and a variance")
        self.spec = spec
        self.weights = {name: np.asarray(array, np.float64) for name, array in weights.items()}
        self.mean = None if normalizer_mean is None else np.asarray(normalizer_mean, np.float64)
        self.var = None if normalizer_var is None else np.asarray(normalizer_var, np.float64)

    def zero_state(self, batch_size: int) -> tuple[Floats, Floats]:
        shape = (batch_size, self.spec.num_layers, self.spec.hidden_dim)
        return np.zeros(shape), np.zeros(shape)

    def normalize(self, observation: ArrayLike) -> Floats:
        """What the network sees of a raw observation, whatever its leading dimensions."""
        x = np.asarray(observation, np.float64)
        if self.mean is None or self.var is None:
            return x
        return np.clip((x - self.mean) / np.sqrt(self.var + VARIANCE_EPSILON), -CLIP, CLIP)

    def forward_row(
        self, observation: Floats, h: Floats, c: Floats
    ) -> tuple[dict[str, Floats], float, Floats, Floats]:
        """One row, `[D]` and two `[layers, hidden]`: logits by head, value, new h, new c."""
        x = self._linear("feature_net.0", self.normalize(observation))
        x = relu(self._layer_norm("feature_net.1", x))
        new_h, new_c = np.empty_like(h), np.empty_like(c)
        for layer in range(self.spec.num_layers):
            x, new_c[layer] = self._cell("lstm.{}_l" + str(layer), x, h[layer], c[layer])
            new_h[layer] = x
        y = self._layer_norm("lstm_ln", x)
        logits = {name: self._mlp(f"{name}_head", y) for name in self.spec.head_names}
        return logits, float(self._mlp("value_head", y)[0]), new_h, new_c

    def step(
        self,
        observation: ArrayLike,
        masks: Mapping[str, Bools] | None = None,
        noise: ArrayLike | None = None,
        h: ArrayLike | None = None,
        c: ArrayLike | None = None,
    ) -> NaiveStep:
        """One step of every row: `[B, D]`, `{head: [B, n]}`, `[B, num_choices]`, `[B, L, H]` x 2.

        Without masks everything is allowed; without noise the most likely action is taken; without
        h and c the state is zeros.
        """
        observation = np.asarray(observation, np.float64)
        batch_size = len(observation)
        if noise is None:
            noise = np.zeros((batch_size, self.spec.num_choices))
        noise = np.asarray(noise, np.float64)
        h, c = self._state(batch_size, h, c)
        new_h, new_c = np.empty_like(h), np.empty_like(c)
        action = np.empty((batch_size, len(self.spec.heads)), np.int64)
        log_prob = np.empty(action.shape)
        value = np.empty(batch_size)
        for row in range(batch_size):
            logits, value[row], new_h[row], new_c[row] = self.forward_row(
                observation[row], h[row], c[row]
            )
            start = 0
            for index, name in enumerate(self.spec.head_names):
                size = len(logits[name])
                log_probs = masked_log_softmax(logits[name], row_mask(masks, name, (row,), size))
                chosen = int(np.argmax(log_probs + noise[row, start : start + size]))
                action[row, index] = chosen
                log_prob[row, index] = log_probs[chosen]
                start += size
            if not style_matters(int(action[row, self.spec.op_index])):
                style = self.spec.head_names.index("style")
                action[row, style] = SIGMOID_ADD
                log_prob[row, style] = 0.0
        return NaiveStep(action, log_prob, value, new_h, new_c)

    def evaluate(
        self,
        observations: ArrayLike,
        actions: ArrayLike,
        masks: Mapping[str, Bools] | None = None,
        h: ArrayLike | None = None,
        c: ArrayLike | None = None,
    ) -> NaiveEvaluation:
        """Stored actions scored: `[B, T, D]`, `[B, T, heads]`, `{head: [B, T, n]}`, first state."""
        observations = np.asarray(observations, np.float64)
        actions = np.asarray(actions, np.int64)
        batch_size, length, _ = observations.shape
        h, c = self._state(batch_size, h, c)
        h, c = h.copy(), c.copy()
        log_prob, entropy = np.empty(actions.shape), np.empty(actions.shape)
        value = np.empty((batch_size, length))
        for row in range(batch_size):
            for t in range(length):
                logits, value[row, t], h[row], c[row] = self.forward_row(
                    observations[row, t], h[row], c[row]
                )
                op = int(actions[row, t, self.spec.op_index])
                for index, name in enumerate(self.spec.head_names):
                    if name == "style" and not style_matters(op):
                        log_prob[row, t, index] = entropy[row, t, index] = 0.0
                        continue
                    mask = row_mask(masks, name, (row, t), len(logits[name]))
                    log_probs = masked_log_softmax(logits[name], mask)
                    log_prob[row, t, index] = log_probs[actions[row, t, index]]
                    entropy[row, t, index] = normalized_entropy(log_probs, mask)
        return NaiveEvaluation(log_prob, value, entropy, h, c)

    def _state(
        self, batch_size: int, h: ArrayLike | None, c: ArrayLike | None
    ) -> tuple[Floats, Floats]:
        if h is None or c is None:
            return self.zero_state(batch_size)
        return np.asarray(h, np.float64), np.asarray(c, np.float64)

    def _linear(self, name: str, x: Floats) -> Floats:
        product: Floats = self.weights[f"{name}.weight"] @ x + self.weights[f"{name}.bias"]
        return product

    def _layer_norm(self, name: str, x: Floats) -> Floats:
        scaled = (x - x.mean()) / np.sqrt(x.var() + LAYER_NORM_EPSILON)
        normed: Floats = scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
        return normed

    def _cell(self, names: str, x: Floats, h: Floats, c: Floats) -> tuple[Floats, Floats]:
        """One LSTM cell, whose parameters are `names` with weight_ih and so on filled in."""
        gates = (
            self.weights[names.format("weight_ih")] @ x
            + self.weights[names.format("bias_ih")]
            + self.weights[names.format("weight_hh")] @ h
            + self.weights[names.format("bias_hh")]
        )
        i, f, g, o = np.split(gates, 4)
        new_c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        return _sigmoid(o) * np.tanh(new_c), new_c

    def _mlp(self, name: str, x: Floats) -> Floats:
        return self._linear(f"{name}.2", relu(self._linear(f"{name}.0", x)))


def style_matters(op: int) -> bool:
    """V1's one rule between heads: for any other op, style is SIGMOID_ADD and does not count."""
    return op in (GERMINATE, SET_ALPHA_TARGET)


def masked_log_softmax(logits: Floats, mask: Bools) -> Floats:
    if not mask.any():
        raise ValueError("a mask allows nothing")
    masked = np.where(mask, logits, MASKED_LOGIT)
    shifted = masked - masked.max()
    log_probs: Floats = shifted - np.log(np.exp(shifted).sum())
    return log_probs


def normalized_entropy(log_probs: Floats, mask: Bools) -> float:
    """Over the allowed choices, in units of the most it could be; 0 where there is one choice."""
    allowed = log_probs[mask]
    if len(allowed) == 1:
        return 0.0
    return float(-(np.exp(allowed) * allowed).sum() / np.log(len(allowed)))


def row_mask(
    masks: Mapping[str, Bools] | None, name: str, row: tuple[int, ...], size: int
) -> Bools:
    if masks is None or name not in masks:
        return np.ones(size, np.bool_)
    return np.asarray(masks[name][row], np.bool_)


def relu(x: Floats) -> Floats:
    return np.maximum(x, 0.0)


def _sigmoid(x: Floats) -> Floats:
    return 0.5 * (1.0 + np.tanh(0.5 * x))  # 1 / (1 + exp(-x)) that cannot overflow
