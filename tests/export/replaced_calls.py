"""A step with one of its calls replaced by a near one: what a compiler or an author gets wrong.

The calls are those that torch sees (`torch.sigmoid`, `a + b`, ...), counted in the order the step
makes them, so that nothing here depends on how the step's modules are arranged.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from export.manifest import Precision
from export.packed_step import StepInput, StepOutput
from export.tamiyo_step import TamiyoStep

Call = Callable[..., Any]
Instead = Callable[..., Any]
"""Takes the call that it stands in for, and that call's arguments."""

TINY = 1e-3
"""Float constants up to it guard against 0; the others say something."""
MASKED = -1e4


class Made(NamedTuple):
    """One call of a step: the `at`-th of its name."""

    name: str
    at: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> Iterator[Tensor]:
        """Those among the arguments, alone or in a list."""
        for value in (*self.args, *self.kwargs.values()):
            parts = value if isinstance(value, (list, tuple)) else (value,)
            yield from (part for part in parts if isinstance(part, Tensor))


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Made] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        at = sum(call.name == func.__name__ for call in self.calls)
        self.calls.append(Made(func.__name__, at, args, kwargs))
        return func(*args, **kwargs)


class _Replacer(TorchFunctionMode):
    def __init__(self, name: str, at: int, instead: Instead) -> None:
        super().__init__()
        self.name = name
        self.at = at
        self.instead = instead
        self.seen = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ != self.name:
            return func(*args, **kwargs)
        self.seen += 1
        if self.seen - 1 != self.at:
            return func(*args, **kwargs)
        return self.instead(func, *args, **kwargs)


def calls_of(step: TamiyoStep, inputs: StepInput) -> list[Made]:
    """Every call the step makes, in order."""
    recorder = _Recorder()
    with torch.inference_mode(), recorder:
        step(*inputs)
    return recorder.calls


def with_call_replaced(
    step: TamiyoStep, name: str, at: int, instead: Instead
) -> Callable[..., StepOutput]:
    """The step with the `at`-th call of `name` replaced."""

    def replaced(*inputs: Tensor) -> StepOutput:
        replacer = _Replacer(name, at, instead)
        with replacer:
            outputs: StepOutput = step(*inputs)
        assert replacer.seen > at, f"the step makes no {name} {at}"
        return outputs

    return replaced


def near_calls(step: TamiyoStep, precision: Precision) -> Iterator[tuple[str, str, int, Instead]]:
    """`(what is wrong, call, which, replacement)` for every call that has a near one."""
    for made in calls_of(step, step.example(2)):
        for what, instead in _near(made, precision):
            yield f"{made.name} {made.at} {what}", made.name, made.at, instead


def _near(made: Made, precision: Precision) -> Iterator[tuple[str, Instead]]:
    yield from POINTWISE.get(made.name, {}).items()
    if made.name == "argmax" and precision == "fp32":  # in bf16 equal ones are common
        yield "by the last of equal ones", _last_tie
    if made.name in ("add", "__add__"):
        yield from _dropped_operands(made)
    elif made.name == "mul":
        yield from _scaled_constants(made)
    elif made.name == "linear":
        yield from _near_products(made, precision)
    elif made.name == "layer_norm":
        yield from _near_norms(made)
    elif made.name == "chunk":
        for one in range(4):
            for other in range(one):
                yield f"gives parts {other} and {one} swapped", _parts_swapped(other, one)
    elif made.name in ("cat", "stack") and _may_be_reversed(made.args[0]):
        yield "takes its parts in reverse", lambda call, parts, **how: call(parts[::-1], **how)
    elif made.name == "sum" and not made.kwargs.get("keepdim"):
        yield "by the mean", lambda call, x, *a, **how: torch.mean(x, *a, **how)
    elif made.name in ("where", "clamp", "__rdiv__", "__rtruediv__", "__rsub__"):
        yield from _scaled_constants(made)
        if made.name == "where":
            yield "always the first", lambda call, c, a, b: call(torch.ones_like(c), a, b)
            yield "always the second", lambda call, c, a, b: call(torch.zeros_like(c), a, b)
    elif made.name == "lt":
        yield "by at most", lambda call, a, b: torch.le(a, b)


def _may_be_reversed(parts: list[Tensor]) -> bool:
    return len(parts) > 1 and len({part.shape for part in parts}) == 1


def _rational_sigmoid(call: Call, x: Tensor) -> Tensor:
    return 0.5 + 0.5 * x / (1 + x.abs())


def _pade_tanh(call: Call, x: Tensor) -> Tensor:
    return (x * (27 + x * x) / (27 + 9 * x * x)).clamp(-1, 1)


def _input_clamped(bound: float) -> Instead:
    return lambda call, x, **how: call(x.clamp(-bound, bound), **how)


def _input_scaled(by: float) -> Instead:
    return lambda call, x, *a, **how: call(x * by, *a, **how)


def _last_tie(call: Call, x: Tensor, dim: int = -1) -> Tensor:
    last: Tensor = x.shape[dim] - 1 - call(x.flip(dim), dim=dim)
    return last


def _last_largest(call: Call, x: Tensor, dim: int = -1) -> Tensor:
    """Of a last choice that is nearly as good: an argmax in bf16."""
    return torch.argmax(x.bfloat16(), dim=dim)


POINTWISE: dict[str, dict[str, Instead]] = {
    "sigmoid": {
        "by the hard one": lambda call, x: functional.hardsigmoid(x),
        "by a rational one": _rational_sigmoid,
        "of at most 4": _input_clamped(4),
        "of at most 6": _input_clamped(6),
        "of at most 8": _input_clamped(8),
    },
    "tanh": {
        "by the hard one": lambda call, x: functional.hardtanh(x),
        "by a rational one": _pade_tanh,
        "of at most 4": _input_clamped(4),
    },
    "relu": {
        "by gelu": lambda call, x, **how: functional.gelu(x),
        "by a leaky one": lambda call, x, **how: functional.leaky_relu(x, 0.001),
        "dropped": lambda call, x, **how: x,
    },
    "log_softmax": {
        "of logits 1 % too far apart": _input_scaled(1.01),
        "of logits clamped at 2": _input_clamped(2),
        "by softmax": lambda call, x, **how: torch.softmax(x, **how),
    },
    "argmax": {
        "of scores in bf16": _last_largest,
    },
}


def _dropped_operands(made: Made) -> Iterator[tuple[str, Instead]]:
    if isinstance(made.args[0], Tensor) and isinstance(made.args[1], Tensor):
        yield "without its first", lambda call, a, b: call(torch.zeros_like(a), b)
        yield "without its second", lambda call, a, b: call(a, torch.zeros_like(b))


def _scaled_constants(made: Made) -> Iterator[tuple[str, Instead]]:
    """Every float constant among the arguments by its own neighbours."""
    for at, value in enumerate(made.args):
        if type(value) is float and value not in (0.0, 1.0):
            for other in _neighbours(value):
                yield f"with {other:g} for {value:g}", _argument_replaced(at, other)
        if made.name == "where" and type(value) is int and value > 0:
            yield f"with {value - 1} for {value}", _argument_replaced(at, value - 1)
    if made.name == "clamp" and made.args[1:]:
        low, high = made.args[1:]
        for bound in _neighbours(high):
            yield f"at {bound:g} for {high:g}", _both_replaced(low * bound / high, bound)
    for name, value in made.kwargs.items():
        if type(value) is float and made.name == "clamp":
            for other in _neighbours(value):
                yield f"with {name} {other:g} for {value:g}", _keyword_replaced(name, other)


def _neighbours(value: float) -> tuple[float, ...]:
    if value == MASKED:
        return (-1e3, -50.0, -1e9)
    if value == 10.0:
        return (9.0, 11.0, 100.0, 1e6)
    if 0 < value <= TINY:
        return (value * 100, value / 100)
    return (value * 1.01, value * 0.99)


def _argument_replaced(at: int, value: float) -> Instead:
    return lambda call, *args, **how: call(*args[:at], value, *args[at + 1 :], **how)


def _both_replaced(low: float, high: float) -> Instead:
    return lambda call, x, *bounds: call(x, low, high)


def _keyword_replaced(name: str, value: float | None) -> Instead:
    return lambda call, *args, **how: call(*args, **{**how, name: value})


def _near_products(made: Made, precision: Precision) -> Iterator[tuple[str, Instead]]:
    if made.args[2] is not None and made.args[2].any():
        yield "without its bias", lambda call, x, w, b: call(x, w, None)
    if precision == "fp32":
        yield "in TF32", lambda call, x, w, b: call(tf32(x), tf32(w), b)
        yield (
            "in bf16",
            lambda call, x, w, b: call(x.bfloat16().float(), w.bfloat16().float(), b),
        )


def _near_norms(made: Made) -> Iterator[tuple[str, Instead]]:
    for epsilon in (1e-6, 1e-3):
        yield f"with epsilon {epsilon:g}", _keyword_replaced("eps", epsilon)
    if (made.kwargs["weight"] != 1).any():
        yield "without its weight", _keyword_replaced("weight", None)
    if made.kwargs["bias"].any():
        yield "without its bias", _keyword_replaced("bias", None)
    yield "dropped", lambda call, x, *a, **how: x


def _parts_swapped(one: int, other: int) -> Instead:
    def swapped(call: Call, *args: Any, **how: Any) -> tuple[Tensor, ...]:
        parts = list(call(*args, **how))
        parts[one], parts[other] = parts[other], parts[one]
        return tuple(parts)

    return swapped


def tf32(x: Tensor) -> Tensor:
    """`x` float32 rounded to the ten bits of a mantissa that TF32 keeps."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
