"""The tests' oracle for Stable-Baselines3's networks: plain NumPy float64, row by row.

Written from the description of the trainer's networks (`mlp_extractor`, `lstm_actor`, ...) and
sharing no code with `model/`. Slow, and simple enough to check by reading.

    naive = NaiveSB3(weights, "Tanh")
    row = naive.row(observation, masks, states)
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "Tanh": math.tanh,
    "ReLU": lambda x: x if x > 0 else 0.0,
    "ELU": lambda x: x if x > 0 else math.expm1(x),
    "GELU": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "SiLU": lambda x: x * _sigmoid(x),
    "LeakyReLU": lambda x: x if x > 0 else 0.01 * x,
    "Identity": lambda x: x,
    "Softsign": lambda x: x / (1 + abs(x)),
}


class NaiveRow(NamedTuple):
    """Logits before any mask, the value, and the states by the names of ours."""

    logits: Floats
    value: float
    states: dict[str, Floats]


class NaiveSB3:
    """A policy from its trainer's state_dict. Every argument may be float32: it is widened."""

    def __init__(self, weights: Mapping[str, ArrayLike], activation: str) -> None:
        self.weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
        self.activation = np.vectorize(ACTIVATIONS[activation], otypes=[np.float64])

    def row(self, observation: ArrayLike, states: Mapping[str, ArrayLike]) -> NaiveRow:
        """One environment's step; `states` each `[layers, hidden]`."""
        x = np.asarray(observation, np.float64)
        after: dict[str, Floats] = {}
        actor = critic = x
        if "lstm_actor.weight_ih_l0" in self.weights:
            actor, after["h"], after["c"] = self._lstm("lstm_actor", x, states["h"], states["c"])
            critic = actor
        if "lstm_critic.weight_ih_l0" in self.weights:
            critic, after["critic_h"], after["critic_c"] = self._lstm(
                "lstm_critic", x, states["critic_h"], states["critic_c"]
            )
        if "critic.weight" in self.weights:
            critic = self._linear("critic", x)
        logits = self._linear("action_net", self._mlp("policy_net", actor))
        value = self._linear("value_net", self._mlp("value_net", critic))
        return NaiveRow(logits, float(value[0]), after)

    def _mlp(self, name: str, x: Floats) -> Floats:
        at = 0
        while f"mlp_extractor.{name}.{at}.weight" in self.weights:
            x = self.activation(self._linear(f"mlp_extractor.{name}.{at}", x)) if x.size else x
            at += 2
        return x

    def _lstm(
        self, name: str, x: Floats, h: ArrayLike, c: ArrayLike
    ) -> tuple[Floats, Floats, Floats]:
        h, c = np.array(h, np.float64), np.array(c, np.float64)
        for layer in range(len(h)):
            w_ih, w_hh, b_ih, b_hh = (
                self.weights[f"{name}.{part}_l{layer}"]
                for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            i, f, g, o = np.split(w_ih @ x + b_ih + w_hh @ h[layer] + b_hh, 4)
            c[layer] = _sigmoids(f) * c[layer] + _sigmoids(i) * np.tanh(g)
            h[layer] = x = _sigmoids(o) * np.tanh(c[layer])
        return x, h, c

    def _linear(self, name: str, x: Floats) -> Floats:
        result: Floats = self.weights[f"{name}.weight"] @ x + self.weights[f"{name}.bias"]
        return result


def log_probs(logits: Floats, mask: ArrayLike, sizes: tuple[int, ...]) -> Floats:
    """Of the allowed choices of each head; -inf of the others."""
    parts = []
    masked = np.where(np.asarray(mask, np.bool_), logits, -np.inf)
    for part in np.split(masked, np.cumsum(sizes)[:-1]):
        shifted = part - part.max()
        parts.append(shifted - np.log(np.exp(shifted).sum()))
    return np.concatenate(parts)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


_sigmoids = np.vectorize(_sigmoid, otypes=[np.float64])
