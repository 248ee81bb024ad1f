"""Steps that read an input wrongly: not at all, in part, from its neighbour, or as another."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from tests.export.gate_cases import Case
from tests.export.named_step import (
    Change,
    InputChange,
    Inputs,
    Make,
    NamedStep,
    with_inputs,
)
from tests.loaded_step import TensorStep

MOST_FEATURES = 8
"""Of an observation, evenly spaced, each of which is ignored in turn."""
RowsOfHead = Callable[[NamedStep, Inputs, str], Tensor]
"""In which rows something happens to a head: bool `[B]`."""


def wrong_inputs(case: Case) -> Iterator[tuple[str, Make]]:
    right = NamedStep.of(case)
    for name, change in _input_changes(right):
        yield name, partial(with_inputs, right, change)
    yield from _masks_misread(right)


def _input_changes(right: NamedStep) -> Iterator[tuple[str, InputChange]]:
    spec = right.case.policy.spec
    ignored: dict[str, Change] = {
        "observation": torch.zeros_like,
        "action_mask": torch.ones_like,
        "noise": torch.zeros_like,
        "state_h_in": torch.zeros_like,
        "state_c_in": torch.zeros_like,
        "blueprint_index": lambda index: torch.full_like(index, -1),
        "slot_by_op_mask": torch.ones_like,
    }
    for array in right.inputs:
        yield f"{array.name} ignored", _replaced(array.name, ignored[array.name])
    for one, other in combinations(right.inputs, 2):
        if (one.dtype, one.shape) == (other.dtype, other.shape):
            yield f"{one.name} and {other.name} swapped", _swapped(one.name, other.name)
    for at in range(0, spec.observation_dim, -(-spec.observation_dim // MOST_FEATURES)):
        feature = _with_column(at, lambda x: torch.zeros(len(x)))
        yield f"observation's feature {at} ignored", _replaced("observation", feature)
        moved = _with_column(at, partial(_column, (at + 1) % spec.observation_dim))
        yield f"observation's feature {at} read from its neighbour", _replaced("observation", moved)
    for at in range(spec.num_choices):
        bit = _with_column(at, lambda x: torch.ones(len(x), dtype=torch.bool))
        yield f"action_mask's bit {at} ignored", _replaced("action_mask", bit)
        choice = _with_column(at, lambda x: torch.zeros(len(x)))
        yield f"noise of choice {at} ignored", _replaced("noise", choice)
    for head in spec.head_names:
        yield f"noise of {head} ignored", _replaced("noise", _zeroed(right.columns(head)))
        if spec.head_sizes[spec.head_names.index(head)] > 1:
            rolled = _rolled(right.columns(head))
            yield f"action_mask of {head} one choice off", _replaced("action_mask", rolled)
    for by in (1.2, 0.9, -1.0):
        yield f"noise x {by}", _replaced("noise", partial(_times, by))
    yield from _state_changes(right)
    if spec.blueprint_embedding_dim is not None:
        yield from _blueprint_changes(right)
    if spec.has_slot_by_op:
        yield from _slot_mask_changes(right)


def _blueprint_changes(right: NamedStep) -> Iterator[tuple[str, InputChange]]:
    spec = right.case.policy.spec
    changes: dict[str, Change] = {
        "blueprints of slots reversed": lambda x: x.flip(1),
        "no blueprint read as the first": lambda x: x.clamp(0),
    }
    for slot in range(spec.num_slots):
        changes[f"blueprint of slot {slot} ignored"] = _with_column(slot, _none)
    for index in range(spec.num_blueprints):
        changes[f"blueprint {index} read as none"] = partial(_without_blueprint, index)
    for name, change in changes.items():
        yield name, _replaced("blueprint_index", change)


def _none(index: Tensor) -> Tensor:
    return torch.full((len(index),), -1)


def _without_blueprint(blueprint: int, index: Tensor) -> Tensor:
    return torch.where(index == blueprint, -1, index)


def _state_changes(right: NamedStep) -> Iterator[tuple[str, InputChange]]:
    if right.case.precision == "fp32":
        for name in ("state_h_in", "state_c_in"):
            yield f"{name} rounded to float16", _replaced(name, lambda x: x.half().float())
            yield f"{name} rounded to bf16", _replaced(name, lambda x: x.bfloat16().float())
    yield "state_h_in clamped at 0.9", _replaced("state_h_in", lambda h: h.clamp(-0.9, 0.9))
    for bound in (10.0, 25.0, 100.0):
        clamp = _replaced("state_c_in", partial(torch.clamp, min=-bound, max=bound))
        yield f"state_c_in clamped at {bound:g}", clamp
    spec = right.case.policy.spec
    for layer in range(spec.num_layers):
        for name in ("state_h_in", "state_c_in"):
            change = _with_column(layer, lambda x: torch.zeros_like(x[:, 0]))
            yield f"{name} of layer {layer} ignored", _replaced(name, change)
    for unit in (0, spec.hidden_dim - 1):
        for name in ("state_h_in", "state_c_in"):
            change = _with_unit_ignored(unit)
            yield f"{name}'s unit {unit} ignored", _replaced(name, change)


def _slot_mask_changes(right: NamedStep) -> Iterator[tuple[str, InputChange]]:
    spec = right.case.policy.spec
    name = "slot_by_op_mask"
    yield "slot_by_op_mask one op off", _replaced(name, lambda mask: mask.roll(1, 1))
    yield "slot_by_op_mask's slots reversed", _replaced(name, lambda mask: mask.flip(2))
    yield "slot_by_op_mask read along the other dimension", _replaced(name, _transposed)
    for op in range(spec.num_ops):
        yield f"slot_by_op_mask of op {op} ignored", _replaced(name, _with_op_free(op))
        for slot in range(spec.num_slots):
            bit = _with_bit_free(op, slot)
            yield f"slot_by_op_mask's bit {op}, {slot} ignored", _replaced(name, bit)


def _masks_misread(right: NamedStep) -> Iterator[tuple[str, Make]]:
    """A head's mask read as all-true in some rows: where one choice is forbidden, and so on."""
    for head in right.case.policy.spec.head_names:
        for where, rows in (
            ("one choice is forbidden", _one_is_forbidden),
            ("one choice is forbidden and logits are close", _one_is_forbidden_and_close),
            ("one choice is allowed", _one_is_allowed),
        ):
            yield f"mask of {head} ignored where {where}", partial(_misread, right, head, rows)


def _misread(right: NamedStep, head: str, where: RowsOfHead) -> TensorStep:
    def change(given: Inputs) -> Inputs:
        mask = given["action_mask"].clone()
        rows = where(right, given, head)[:, None]
        mask[:, right.columns(head)] |= rows
        changed = {**given, "action_mask": mask}
        if head == "slot" and "slot_by_op_mask" in given:
            changed["slot_by_op_mask"] = given["slot_by_op_mask"] | rows[..., None]
        return changed

    return with_inputs(right, change)


def _one_is_forbidden(right: NamedStep, given: Inputs, head: str) -> Tensor:
    forbidden = ~given["action_mask"][:, right.columns(head)]
    return forbidden.sum(-1) == 1


def _one_is_allowed(right: NamedStep, given: Inputs, head: str) -> Tensor:
    return given["action_mask"][:, right.columns(head)].sum(-1) == 1


def _one_is_forbidden_and_close(right: NamedStep, given: Inputs, head: str) -> Tensor:
    """Where the likeliest choice of all is at most 1.5 times as likely as chance has it."""
    spec = right.case.policy.spec
    free = {name: torch.ones_like(x) if name.endswith("mask") else x for name, x in given.items()}
    free["noise"] = torch.zeros_like(given["noise"])
    at = spec.head_names.index(head)
    likeliest = right.run(free)["log_prob"][:, at].exp()
    return _one_is_forbidden(right, given, head) & (likeliest < 1.5 / spec.head_sizes[at])


def _replaced(name: str, change: Change) -> InputChange:
    return lambda given: {**given, name: change(given[name])}


def _swapped(one: str, other: str) -> InputChange:
    return lambda given: {**given, one: given[other], other: given[one]}


def _column(at: int, x: Tensor) -> Tensor:
    return x[:, at]


def _times(by: float, x: Tensor) -> Tensor:
    return x * by


def _with_column(at: int, source: Change) -> Change:
    def changed(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, at] = source(x)
        return x

    return changed


def _zeroed(columns: slice) -> Change:
    def zeroed(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, columns] = 0.0
        return x

    return zeroed


def _rolled(columns: slice) -> Change:
    def rolled(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, columns] = x[:, columns].roll(1, 1)
        return x

    return rolled


def _transposed(mask: Tensor) -> Tensor:
    return mask.transpose(1, 2).reshape(mask.shape)


def _with_op_free(op: int) -> Change:
    return _with_column(op, lambda mask: torch.ones_like(mask[:, 0]))


def _with_bit_free(op: int, slot: int) -> Change:
    def freed(mask: Tensor) -> Tensor:
        mask = mask.clone()
        mask[:, op, slot] = True
        return mask

    return freed


def _with_unit_ignored(unit: int) -> Change:
    def ignoring(state: Tensor) -> Tensor:
        state = state.clone()
        state[..., unit] = 0.0
        return state

    return ignoring
