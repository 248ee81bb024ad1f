"""Steps that give another number than they should: of another thing, in other units, clamped."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from tests.export.gate_cases import Case
from tests.export.named_step import Inputs, Make, NamedStep, OutputChange, Outputs, with_outputs

OVERWHELMING = 1e3
"""Noise on a choice that decides for it, whatever the logits."""
LogProbChange = Callable[[NamedStep, Inputs, Outputs], Tensor]


def wrong_outputs(case: Case) -> Iterator[tuple[str, Make]]:
    right = NamedStep.of(case)
    for name, change in (*_output_changes(right), *_log_prob_changes(right)):
        yield name, partial(with_outputs, right, change)


def _output_changes(right: NamedStep) -> Iterator[tuple[str, OutputChange]]:
    scale = right.case.policy.spec.value_scale
    for one, other in combinations(right.outputs, 2):
        if (one.dtype, one.shape) == (other.dtype, other.shape):
            yield f"{one.name} and {other.name} swapped", _swapped(one.name, other.name)
    for array in right.outputs[2:]:
        off = (1e-3 if right.case.precision == "fp32" else 0.1) * scale
        yield f"{array.name} off by {off:g}", _changed(array.name, partial(torch.add, other=off))
        yield f"{array.name} x 1.01", _changed(array.name, partial(torch.mul, other=1.01))
    clamped = partial(torch.clamp, min=-0.9, max=0.9)
    yield "state_h_out clamped at 0.9", _changed("state_h_out", clamped)
    for bound in (10.0, 25.0, 100.0):
        clamped = partial(torch.clamp, min=-bound, max=bound)
        yield f"state_c_out clamped at {bound:g}", _changed("state_c_out", clamped)


def _swapped(one: str, other: str) -> OutputChange:
    return lambda given, out: {**out, one: out[other], other: out[one]}


def _changed(name: str, change: Callable[[Tensor], Tensor]) -> OutputChange:
    return lambda given, out: {**out, name: change(out[name])}


def _log_prob_changes(right: NamedStep) -> Iterator[tuple[str, OutputChange]]:
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "of free heads 0.09 too high": lambda x: x + 0.09 * (x < 0),
        "of the only choice -1e-3": lambda x: torch.where(x == 0, -1e-3, x),
        "by the probability": torch.exp,
        "by what it adds to entropy": lambda x: x * x.exp(),
        "in bf16": lambda x: x.bfloat16().float(),
    }
    names = right.case.policy.spec.head_names
    for at, head in enumerate(names):
        other = (at + 1) % len(names)
        changes[f"of {head} by that of {names[other]}"] = partial(_column_from, at, other)
    for what, change in changes.items():
        yield f"log_prob {what}", _changed("log_prob", change)
    by_inputs: dict[str, LogProbChange] = {
        "of forced heads 1.9e-5 too high": _above_zero,
        "with the noise": _with_noise,
        "without the mask": _without_mask,
    }
    for what, of_all in by_inputs.items():
        yield f"log_prob {what}", _log_prob(right, of_all)


def _log_prob(right: NamedStep, change: LogProbChange) -> OutputChange:
    return lambda given, out: {**out, "log_prob": change(right, given, out)}


def _column_from(at: int, other: int, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, at] = x[:, other]
    return x


def _is_free(right: NamedStep, out: Outputs) -> Tensor:
    """Which heads matter for the op: bool `[B, heads]`."""
    heads = right.case.policy.heads
    return heads.relevance[out["action"][:, heads.op_index]]


def _above_zero(right: NamedStep, given: Inputs, out: Outputs) -> Tensor:
    return torch.where(_is_free(right, out), out["log_prob"], 1.9e-5)


def _with_noise(right: NamedStep, given: Inputs, out: Outputs) -> Tensor:
    noise = given["noise"].gather(1, _cells(right, out))
    return out["log_prob"] + noise * _is_free(right, out)


def _without_mask(right: NamedStep, given: Inputs, out: Outputs) -> Tensor:
    """Of the same actions, by the step itself: noise makes it take them again."""
    noise = torch.zeros_like(given["noise"])
    noise.scatter_(1, _cells(right, out), OVERWHELMING)
    free = {name: torch.ones_like(x) if name.endswith("mask") else x for name, x in given.items()}
    log_prob = right.run({**free, "noise": noise})["log_prob"]
    return torch.where(_is_free(right, out), log_prob, 0.0)


def _cells(right: NamedStep, out: Outputs) -> Tensor:
    """Where each head's action is among the packed choices: `[B, heads]`."""
    starts = [right.columns(head).start for head in right.case.policy.spec.head_names]
    return out["action"] + torch.tensor(starts)
