"""How far float32 alone moves a policy's answers: what an artifact and eager may differ by.

Where LayerNorms stand between the products, rounding stays near the tolerance's size whatever goes
in. Without them a far observation makes large numbers, of which large errors are left when they
cancel, and a state carries its own errors on. What each operation rounds is followed through the
network beside its numbers: errors of many operations are independent, so that their squares add up
(a running error analysis: Higham, Accuracy and Stability of Numerical Algorithms, chapter 3).
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from export.manifest import Precision
from model.recurrence import State
from model.sb3.normalizer import VecNormalizer
from model.sb3.policy import SB3Policy

GATE_ERROR = 2.5e-7
"""Absolute, of a sigmoid near 0: onnxruntime's is up to 1.4e-7 off where torch's is 6e-10."""
UNIT = 2.0**-24
"""What one operation rounds, relative to its result."""
PRODUCT_UNIT: dict[Precision, float] = {"fp32": UNIT, "bf16": 2.0**-9}
"""The same of a product, whose terms are summed in float32."""
MARGIN = 6.0
"""Standard errors that two right steps may be apart."""
LARGEST_SLACK = 1e-3
"""Of most rows: beyond it an artifact cannot be told from another policy's."""


class Slack(NamedTuple):
    """What each number may be off beside the tolerance: logits `[B, choices]`, value `[B]`, states.

    None is nothing.
    """

    states: State
    logits: Tensor | None = None
    value: Tensor | None = None

    def is_large(self, value: Tensor, most: float = LARGEST_SLACK) -> Tensor:
        """Which rows may be further off than `most`, bool `[B]`: in relation to the `value` `[B]`
        that is computed, where it is more than 1. None, where there is no slack."""
        if self.logits is None or self.value is None:
            return torch.zeros_like(value, dtype=torch.bool)
        of_value = self.value / value.abs().clamp(min=1.0)
        parts = [self.logits, of_value[:, None], *(of.flatten(1) for of in self.states)]
        return torch.cat(parts, dim=1).amax(1) > most


class FloatError(Protocol):
    """One step's slack, of a policy whose states before it are `state`, off by `error` each.

    `error` is the slack of the step before.
    """

    def __call__(self, observation: Tensor, state: State, error: State) -> Slack: ...


def of_gates(observation: Tensor, state: State, error: State) -> Slack:
    """A gate is right to some 1e-7, however closed, and is multiplied by what the cell held."""
    return Slack(tuple(GATE_ERROR * state[at | 1].abs() for at in range(len(state))))


class MlpsError:
    """Of MLPs, and LSTMs before them, without a norm anywhere."""

    def __init__(
        self, policy: SB3Policy, normalizer: VecNormalizer | None, precision: Precision
    ) -> None:
        self._normalizer = normalizer
        self._recurrences = [
            [
                _Product(torch.cat([w_ih, w_hh], dim=1), b_ih + b_hh, precision)
                for w_ih, w_hh, b_ih, b_hh in layers
            ]
            for layers in policy.recurrences()
        ]
        actor, critic = (policy.mlp_extractor[name] for name in ("policy_net", "value_net"))
        self._is_apart = policy.critic is not None
        before = [] if policy.critic is None else [policy.critic]
        self._actor = _layers([*actor.children(), policy.action_net], precision)
        self._value = _layers([*before, *critic.children(), policy.value_net], precision)

    def __call__(self, observation: Tensor, state: State, error: State) -> Slack:
        x = observation if self._normalizer is None else self._normalizer(observation)
        x, state = x.double(), _wide(state)  # what is far has squares as far
        error = tuple(of_state / MARGIN for of_state in _wide(error))
        numbers = _Numbers(x, torch.zeros_like(x) if self._normalizer is None else 4 * UNIT * x)
        read = [numbers]
        states: State = ()
        for at, cells in enumerate(self._recurrences):
            own = slice(2 * at, 2 * at + 2)
            y, h, c = _lstm(cells, numbers, state[own], error[own])
            states = (*states, h, c)
            read.append(y)
        actor = read[1] if len(read) > 1 else numbers
        critic = numbers if self._is_apart else read[-1]
        logits = _run(self._actor, actor).error
        value = _run(self._value, critic).error
        return Slack(
            tuple(MARGIN * of_state.float() for of_state in states),
            MARGIN * logits.float(),
            MARGIN * value.squeeze(-1).float(),
        )


class _Numbers(NamedTuple):
    """What is computed, and the standard error of it."""

    value: Tensor
    error: Tensor


_Operation = Callable[[_Numbers], _Numbers]


class _Product:
    """A product in one precision: what goes into it, and what comes out, is rounded to that."""

    def __init__(self, weight: Tensor, bias: Tensor, precision: Precision) -> None:
        self._is_rounded = precision == "bf16"
        self._unit = PRODUCT_UNIT[precision]
        self._weight = self._rounded(weight.detach().double())
        self._bias = self._rounded(bias.detach().double())
        self._squares = self._weight.square()

    def __call__(self, x: _Numbers) -> _Numbers:
        """What is summed rounds with each of the partial sums, as many as there are terms."""
        value = self._rounded(x.value)
        rounding = UNIT**2 * self._weight.shape[1]
        variance = (x.error.square() + rounding * value.square()) @ self._squares.t()
        value = nn.functional.linear(value, self._weight, self._bias)
        variance = variance + self._unit**2 * value.square()
        return _Numbers(self._rounded(value), variance.sqrt())

    def _rounded(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).double() if self._is_rounded else x


def _layers(modules: Iterable[nn.Module], precision: Precision) -> list[_Operation]:
    return [
        _Product(module.weight, module.bias, precision)
        if isinstance(module, nn.Linear)
        else partial(_activated, activation=module)
        for module in modules
    ]


def _run(operations: Iterable[_Operation], x: _Numbers) -> _Numbers:
    for operation in operations:
        x = operation(x)
    return x


def _activated(x: _Numbers, activation: Callable[[Tensor], Tensor]) -> _Numbers:
    value = activation(x.value)
    moved = (activation(x.value + x.error) - activation(x.value - x.error)) / 2
    return _Numbers(value, _root(moved, 2 * UNIT * value, torch.full_like(value, GATE_ERROR / 2)))


def _lstm(
    cells: Iterable[_Operation], x: _Numbers, state: State, error: State
) -> tuple[_Numbers, Tensor, Tensor]:
    """What the last layer gives, and the errors of h and c."""
    hs, cs = [], []
    for layer, cell in enumerate(cells):
        h, c = (_Numbers(state[at][:, layer], error[at][:, layer]) for at in range(2))
        gates = cell(_Numbers(torch.cat([x.value, h.value], -1), torch.cat([x.error, h.error], -1)))
        i, f, g, o = (
            _activated(_Numbers(value, error), torch.tanh if at == 2 else torch.sigmoid)
            for at, (value, error) in enumerate(
                zip(gates.value.chunk(4, -1), gates.error.chunk(4, -1), strict=True)
            )
        )
        c = _sum(_times(f, c), _times(i, g))
        x = _times(o, _activated(c, torch.tanh))
        hs.append(x.error)
        cs.append(c.error)
    return x, torch.stack(hs, dim=1), torch.stack(cs, dim=1)


def _sum(a: _Numbers, b: _Numbers) -> _Numbers:
    value = a.value + b.value
    return _Numbers(value, _root(a.error, b.error, UNIT * value))


def _times(a: _Numbers, b: _Numbers) -> _Numbers:
    value = a.value * b.value
    return _Numbers(value, _root(a.error * b.value, a.value * b.error, UNIT * value))


def _wide(arrays: State) -> State:
    return tuple(array.double() for array in arrays)


def _root(*errors: Tensor) -> Tensor:
    total = errors[0].square()
    for error in errors[1:]:
        total = total + error.square()
    return total.sqrt()
