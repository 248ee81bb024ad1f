"""Steps with a wrong array: every parameter and buffer of the packed step, and of the policy.

A change that leaves every array as it is (zeros scaled, equal arrays swapped, what bf16 rounds
away) makes no wrong step.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations

import torch
from torch import Tensor
from torch.func import functional_call

from export.packed_step import StepOutput
from export.tamiyo_step import TamiyoStep
from model.policy import FactoredRecurrentActorCritic
from tests.export.gate_cases import Case
from tests.export.named_step import Change, Make
from tests.export.replaced_calls import calls_of
from tests.loaded_step import TensorStep

MOST_CELLS = 48
"""Rules (booleans, indices) up to this size are wrong cell by cell, larger ones as a whole."""
EXTRA_OF = {"q_head": "q_value", "contribution_predictor": "contribution"}
"""The networks that a step has only where this output is asked for."""


def wrong_arrays(case: Case) -> Iterator[tuple[str, Make]]:
    step = case.step()
    read = _arrays_read(step)
    yield from _wrong_packed(step, read)
    yield from _swapped(step, read)
    yield from _wrong_weights(case)
    yield from _wrong_rules(case)
    yield from _wrong_statistics(case)


def _arrays_read(step: TamiyoStep) -> dict[str, Tensor]:
    """The parameters and buffers that are arguments of some call; packing alone reads the rest."""
    read = {id(x) for call in calls_of(step, step.example(2)) for x in call.tensors()}
    arrays = {**dict(step.named_parameters()), **dict(step.named_buffers())}
    return {name: array for name, array in arrays.items() if id(array) in read}


def _with_arrays(step: TamiyoStep, arrays: dict[str, Tensor]) -> TensorStep:
    """The step with these in place of its own; the step itself stays as it is."""

    def run(*inputs: Tensor) -> StepOutput:
        outputs: StepOutput = functional_call(step, arrays, inputs)
        return outputs

    return run


def _wrong_packed(step: TamiyoStep, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Make]]:
    for name, array in arrays.items():
        for what, change in _changes(array):
            changed = change(array)
            if not torch.equal(changed, array):
                yield f"{name} {what}", partial(_with_arrays, step, {name: changed})


def _changes(array: Tensor) -> Iterator[tuple[str, Change]]:
    if array.dtype == torch.bool:
        for bit in range(array.numel() if array.numel() <= MOST_CELLS else 0):
            yield f"bit {bit} flipped", _flipped(bit)
        yield "all true", torch.ones_like
        yield "all false", torch.zeros_like
    elif array.is_floating_point():
        yield "x 1.01", lambda x: (x * 1.01).to(x.dtype)
        yield "zeroed", torch.zeros_like
        if (array == -1e4).any():
            for other in (-1e3, -50.0, -1e9):
                yield f"{other:g} for -1e4", _replaced_cells(other)
    else:
        for at in range(array.numel() if array.numel() <= MOST_CELLS else 0):
            yield f"[{at}] off by one", _off_by_one(at)
        yield "one cell off", lambda x: x.roll(1)


def _flipped(bit: int) -> Change:
    def flip(array: Tensor) -> Tensor:
        changed = array.flatten().clone()
        changed[bit] = ~changed[bit]
        return changed.view(array.shape)

    return flip


def _replaced_cells(value: float) -> Change:
    return lambda array: torch.where(array == -1e4, value, array)


def _off_by_one(at: int) -> Change:
    def off(array: Tensor) -> Tensor:
        changed = array.flatten().clone()
        changed[at] += 1 if changed[at] == 0 else -1
        return changed.view(array.shape)

    return off


def _swapped(step: TamiyoStep, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Make]]:
    for (one, a), (other, b) in combinations(arrays.items(), 2):
        if a.shape == b.shape and a.dtype == b.dtype and not torch.equal(a, b):
            yield f"{one} and {other} swapped", partial(_with_arrays, step, {one: b, other: a})


def _wrong_weights(case: Case) -> Iterator[tuple[str, Make]]:
    """Packed from a policy that is not quite the one."""
    for name, weight in case.policy.named_parameters():
        if EXTRA_OF.get(name.split(".")[0], "") not in ("", *case.policy.spec.extra_outputs):
            continue
        if weight.any():
            yield f"policy's {name} x 1.01", _packed_from(case, name, lambda x: x * 1.01)
        if weight.any() and "bias_" in name:  # one of two that packing adds up
            yield f"policy's {name} zeroed", _packed_from(case, name, torch.zeros_like)
    for head in case.policy.spec.head_names:
        *_, (name, _) = case.policy.get_submodule(f"{head}_head").named_children()
        last = f"{head}_head.{name}"
        for by in (0.5, 1.5):
            yield f"{head}'s logits x {by}", _with_logits_scaled(case, last, by)
        for choice in range(len(case.policy.get_parameter(f"{last}.bias"))):
            amount = 0.01 if case.precision == "fp32" else 0.3
            yield (
                f"{head}'s logit {choice} off by {amount}",
                _packed_from(case, f"{last}.bias", _raised(choice, amount)),
            )


def _raised(at: int, amount: float) -> Change:
    return lambda bias: bias + amount * (torch.arange(len(bias)) == at)


@torch.no_grad()
def _packed(case: Case, change: Callable[[FactoredRecurrentActorCritic], None]) -> TamiyoStep:
    """Packed from a changed copy of the policy."""
    policy = copy.deepcopy(case.policy)
    change(policy)
    return TamiyoStep(policy, case.normalizer, case.precision).eval()


def _packed_from(case: Case, name: str, change: Change) -> Make:
    def changed(policy: FactoredRecurrentActorCritic) -> None:
        policy.get_parameter(name).copy_(change(policy.get_parameter(name)))

    return partial(_packed, case, changed)


def _with_logits_scaled(case: Case, layer: str, by: float) -> Make:
    def changed(policy: FactoredRecurrentActorCritic) -> None:
        for parameter in policy.get_submodule(layer).parameters():
            parameter.mul_(by)

    return partial(_packed, case, changed)


def _wrong_rules(case: Case) -> Iterator[tuple[str, Make]]:
    """Packed for a spec that is not quite the one: floors, the value's scale."""
    spec = case.policy.spec
    floors = {head.name: head.probability_floor for head in spec.heads}
    for name, floor in floors.items():
        if floor > 0:
            for by in (0.0, 0.9, 1.1):
                other = spec.with_probability_floors({**floors, name: floor * by})
                yield f"{name}'s floor x {by}", case.with_spec(other).step
    for by in (1.01, 1.0 / spec.value_scale):
        other = spec.model_copy(update={"value_scale": spec.value_scale * by})
        if other != spec:
            yield f"the value's scale x {by:.3g}", case.with_spec(other).step


def _wrong_statistics(case: Case) -> Iterator[tuple[str, Make]]:
    if case.normalizer is None:
        return
    for what, mean, var in (
        ("without its normaliser's mean", 0.0, 1.0),
        ("with a normaliser's epsilon of 1.1e-4", 1.0, 1e-5),
        ("with a normaliser's epsilon of 1e-3", 1.0, 9e-4),
    ):
        yield what, case.with_statistics(mean, var).step
    yield "without its normaliser", case.with_statistics(None, 0.0).step
