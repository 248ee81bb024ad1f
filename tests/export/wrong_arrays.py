"""Steps with a wrong array: every parameter and buffer of the packed step, and of the policy.

A change that leaves every array as it is (zeros scaled, equal arrays swapped, what bf16 rounds
away) makes no wrong step.
"""

import copy
from collections.abc import Callable, Iterator
from itertools import combinations

import torch
from torch import Tensor, nn

from export.formats import LoadedStep
from export.step import PolicyStep
from model.policy import FactoredRecurrentActorCritic
from tests.export.gate_cases import Case

MOST_BITS = 128
"""Boolean buffers up to this size are wrong bit by bit."""
Make = Callable[[], LoadedStep]
Change = Callable[[Tensor], Tensor]


def wrong_arrays(case: Case) -> Iterator[tuple[str, Make]]:
    yield from _wrong_packed(case)
    yield from _swapped(case)
    yield from _wrong_weights(case)
    yield from _wrong_rules(case)
    yield from _wrong_statistics(case)


def _arrays(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _assign(step: nn.Module, name: str, value: Tensor) -> None:
    *path, last = name.split(".")
    owner = step.get_submodule(".".join(path))
    if last in owner._parameters:
        value = nn.Parameter(value, requires_grad=False)
    setattr(owner, last, value)


def _wrong_packed(case: Case) -> Iterator[tuple[str, Make]]:
    for name, array in _arrays(case.step()).items():
        for what, change in _changes(array):
            if not torch.equal(change(array), array):
                yield f"{name} {what}", _with_array(case, name, change)


def _changes(array: Tensor) -> Iterator[tuple[str, Change]]:
    if array.dtype == torch.bool:
        for bit in range(array.numel() if array.numel() <= MOST_BITS else 0):
            yield f"bit {bit} flipped", _flipped(bit)
    elif array.is_floating_point():
        yield "x 1.01", lambda x: (x * 1.01).to(x.dtype)
        yield "zeroed", torch.zeros_like
        if (array == -1e4).any():
            for other in (-1e3, -50.0, -1e9):
                yield f"{other:g} for -1e4", _replaced_cells(other)
    elif array.numel() <= MOST_BITS:
        for at in range(array.numel()):
            yield f"[{at}] off by one", _off_by_one(at)


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


def _with_array(case: Case, name: str, change: Change) -> Make:
    def make() -> PolicyStep:
        step = case.step()
        _assign(step, name, change(_arrays(step)[name]))
        return step

    return make


def _swapped(case: Case) -> Iterator[tuple[str, Make]]:
    for (one, a), (other, b) in combinations(_arrays(case.step()).items(), 2):
        if a.shape == b.shape and a.dtype == b.dtype and not torch.equal(a, b):
            yield f"{one} swapped with {other}", _with_swapped(case, one, other)


def _with_swapped(case: Case, one: str, other: str) -> Make:
    def make() -> PolicyStep:
        step = case.step()
        arrays = _arrays(step)
        _assign(step, one, arrays[other])
        _assign(step, other, arrays[one])
        return step

    return make


def _wrong_weights(case: Case) -> Iterator[tuple[str, Make]]:
    """Packed from a policy that is not quite the one."""
    for name, weight in case.policy.named_parameters():
        if weight.any():
            yield f"policy's {name} x 1.01", _packed_from(case, name, lambda x: x * 1.01)
            yield f"policy's {name} zeroed", _packed_from(case, name, torch.zeros_like)
    for head in case.policy.spec.head_names:
        last = f"{head}_head.{len(case.policy.get_submodule(f'{head}_head')) - 1}"  # type: ignore[arg-type]
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
def _changed_policy(case: Case, change: Callable[[FactoredRecurrentActorCritic], None]) -> Case:
    policy = copy.deepcopy(case.policy)
    change(policy)
    return case.with_policy(policy)


def _packed_from(case: Case, name: str, change: Change) -> Make:
    def changed(policy: FactoredRecurrentActorCritic) -> None:
        policy.get_parameter(name).copy_(change(policy.get_parameter(name)))

    return lambda: _changed_policy(case, changed).step()


def _with_logits_scaled(case: Case, layer: str, by: float) -> Make:
    def changed(policy: FactoredRecurrentActorCritic) -> None:
        for parameter in policy.get_submodule(layer).parameters():
            parameter.mul_(by)

    return lambda: _changed_policy(case, changed).step()


def _wrong_rules(case: Case) -> Iterator[tuple[str, Make]]:
    """Packed for a spec that is not quite the one: floors, the value's scale."""
    spec = case.policy.spec
    floors = {head.name: head.probability_floor for head in spec.heads}
    for name, floor in floors.items():
        if floor > 0:
            for by in (0.0, 0.9, 1.1):
                other = spec.with_probability_floors({**floors, name: floor * by})
                yield f"{name}'s floor x {by}", lambda other=other: case.with_spec(other).step()
    for by in (1.01, 1.0 / spec.value_scale):
        other = spec.model_copy(update={"value_scale": spec.value_scale * by})
        if other != spec:
            yield f"the value's scale x {by:.3g}", lambda other=other: case.with_spec(other).step()


def _wrong_statistics(case: Case) -> Iterator[tuple[str, Make]]:
    if case.normalizer is None:
        return
    for what, mean, var in (
        ("without its normaliser's mean", 0.0, 1.0),
        ("with a normaliser's epsilon of 1.1e-4", 1.0, 1e-5),
        ("with a normaliser's epsilon of 1e-3", 1.0, 9e-4),
    ):
        yield what, lambda m=mean, v=var: case.with_statistics(m, v).step()
    yield "without its normaliser", lambda: case.with_statistics(None, 0.0).step()
