"""Steps that are wrong at times: in some rows, sizes or moments; and steps with side effects."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count

import torch
from torch import Tensor

from export.packed_step import StepOutput
from tests.export.gate_cases import Case
from tests.export.named_step import (
    Inputs,
    Make,
    NamedStep,
    OutputChange,
    Outputs,
    with_outputs,
)
from tests.loaded_step import TensorStep

OFF = 1.0
"""By how much an output is off where it is."""
Condition = Callable[[Inputs], Tensor]
"""In which rows something happens: bool `[B]`."""


def wrong_moments(case: Case) -> Iterator[tuple[str, Make]]:
    right = NamedStep.of(case)
    for name, condition in _conditions(right):
        yield f"value off {name}", partial(_off_where, right, "value", condition)
        yield f"c off {name}", partial(_off_where, right, "state_c_out", condition)
    yield from _with_memory(right)
    yield from _impure(right)


def _conditions(right: NamedStep) -> Iterator[tuple[str, Condition]]:
    yield "in the last row", lambda given: _numbers(given) == _size(given) - 1
    yield "on an episode's first step", lambda given: ~given["state_h_in"].flatten(1).any(1)
    yield "where h is saturated", lambda given: given["state_h_in"].flatten(1).abs().amin(1) == 1
    yield "in greedy rows", lambda given: ~given["noise"].any(1)
    yield "in sampled rows", lambda given: given["noise"].any(1)
    yield "where |c| is above 25", lambda given: given["state_c_in"].flatten(1).abs().amax(1) > 25
    for head in right.case.policy.spec.head_names:
        yield f"where {head} has one choice", _one_choice(right.columns(head))
        yield f"where {head} has every choice", _every_choice(right.columns(head))
    yield "where a feature is far", lambda given: given["observation"].abs().amax(1) > 100
    largest = right.case.max_batch_size
    for size in sorted({2, 5, 100, largest}):
        if size <= largest:
            yield f"in batches of {size}", partial(_in_batches_of, size)
    if largest > 64:
        yield "beyond row 64", lambda given: _numbers(given) >= 64


def _size(given: Inputs) -> int:
    return len(given["observation"])


def _numbers(given: Inputs) -> Tensor:
    return torch.arange(_size(given))


def _in_batches_of(size: int, given: Inputs) -> Tensor:
    return torch.full((_size(given),), _size(given) == size)


def _one_choice(columns: slice) -> Condition:
    return lambda given: given["action_mask"][:, columns].sum(1) == 1


def _every_choice(columns: slice) -> Condition:
    return lambda given: given["action_mask"][:, columns].all(1)


def _off_where(right: NamedStep, name: str, condition: Condition) -> TensorStep:
    def off(given: Inputs, out: Outputs) -> Outputs:
        rows = condition(given).view(-1, *[1] * (out[name].ndim - 1))
        return {**out, name: out[name] + OFF * rows}

    return with_outputs(right, off)


def _with_memory(right: NamedStep) -> Iterator[tuple[str, Make]]:
    yield "value off from its 21st call on", partial(_tired, right)
    yield "keeps its own state", partial(_stateful, right)
    yield "wrong from its second call of a size on", partial(_wrong_from_the_second, right)


def _tired(right: NamedStep) -> TensorStep:
    calls = count(1)

    def run(given: Inputs, out: Outputs) -> Outputs:
        return {**out, "value": out["value"] + OFF * (next(calls) > 20)}

    return with_outputs(right, run)


def _stateful(right: NamedStep) -> TensorStep:
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def own_state(given: Inputs) -> Inputs:
        h, c = kept.get(_size(given), (given["state_h_in"], given["state_c_in"]))
        return {**given, "state_h_in": h, "state_c_in": c}

    def run(*inputs: Tensor) -> StepOutput:
        out = right.run(own_state(right.named(inputs)))
        kept[len(inputs[0])] = (out["state_h_out"], out["state_c_out"])
        return right.packed(out)

    return run


def _wrong_from_the_second(right: NamedStep) -> TensorStep:
    seen: set[int] = set()

    def run(given: Inputs, out: Outputs) -> Outputs:
        is_second = _size(given) in seen
        seen.add(_size(given))
        return {**out, "value": out["value"] + OFF * is_second}

    return with_outputs(right, run)


def _impure(right: NamedStep) -> Iterator[tuple[str, Make]]:
    for array in right.inputs:
        yield f"writes into the caller's {array.name}", partial(_writing, right, array.name)
    for name, output in (("state_h_in", "state_h_out"), ("state_c_in", "state_c_out")):
        in_place = _in_place(name, output)
        yield f"gives {output} in the memory of {name}", partial(with_outputs, right, in_place)
    yield "gives the same memory each time", partial(_reusing, right)


def _writing(right: NamedStep, name: str) -> TensorStep:
    def written(given: Inputs, out: Outputs) -> Outputs:
        x = given[name]
        x.logical_not_() if x.dtype == torch.bool else x.add_(1)
        return out

    return with_outputs(right, written)


def _in_place(name: str, output: str) -> OutputChange:
    return lambda given, out: {**out, output: given[name].copy_(out[output])}


def _reusing(right: NamedStep) -> TensorStep:
    """Its answer to a step is overwritten by the next of that size."""
    kept: dict[int, Outputs] = {}

    def run(given: Inputs, out: Outputs) -> Outputs:
        mine = kept.setdefault(_size(given), {name: x.clone() for name, x in out.items()})
        return {name: mine[name].copy_(x) for name, x in out.items()}

    return with_outputs(right, run)
