"""Steps that are right inside, and deal wrongly with what goes in, what comes out, or when.

Inputs and outputs are found by the manifest's names. `OFF` is by how much an output is off where
that is the whole fault.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from export.formats import LoadedStep
from export.manifest import Array, step_inputs, step_outputs
from export.step import PolicyStep, StepOutput
from tests.export.gate_cases import Case

OFF = 1.0
OVERWHELMING = 1e3
"""Noise on a choice that decides for it, whatever the logits."""
MOST_FEATURES = 8
"""Of an observation, evenly spaced, each of which is ignored in turn."""
Make = Callable[[], LoadedStep]
Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]
InputChange = Callable[[Inputs], Inputs]
OutputChange = Callable[[Inputs, Outputs], Outputs]
Condition = Callable[[Inputs], Tensor]
"""Which rows something happens in: bool `[B]`."""


class NamedStep(NamedTuple):
    """The right step of a case, by names."""

    case: Case
    step: PolicyStep
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]

    @classmethod
    def of(cls, case: Case) -> "NamedStep":
        spec = case.policy.spec
        return cls(case, case.step(), step_inputs(spec), step_outputs(spec))

    def run(self, given: Inputs) -> Outputs:
        outputs = self.step(*(given[array.name] for array in self.inputs))
        return dict(zip((array.name for array in self.outputs), outputs, strict=True))

    def named(self, inputs: tuple[Tensor, ...]) -> Inputs:
        return dict(zip((array.name for array in self.inputs), inputs, strict=True))

    def packed(self, outputs: Outputs) -> StepOutput:
        return tuple(outputs[array.name] for array in self.outputs)

    def columns(self, head: str) -> slice:
        spec = self.case.policy.spec
        at = spec.head_names.index(head)
        start = sum(spec.head_sizes[:at])
        return slice(start, start + spec.head_sizes[at])


def wrong_dealings(case: Case) -> Iterator[tuple[str, Make]]:
    right = NamedStep.of(case)
    for name, change in _input_changes(right):
        yield name, partial(with_inputs, right, change)
    for name, effect in _output_changes(right):
        yield name, partial(with_outputs, right, effect)
    for name, condition in _conditions(right):
        yield f"value off {name}", partial(_off_where, right, "value", condition)
        yield f"c off {name}", partial(_off_where, right, "state_c_out", condition)
    yield from _masks_misread(right)
    yield from _with_memory(right)
    yield from _impure(right)


def with_inputs(right: NamedStep, change: InputChange) -> LoadedStep:
    return lambda *inputs: right.packed(right.run(change(right.named(inputs))))


def with_outputs(right: NamedStep, change: OutputChange) -> LoadedStep:
    def changed(*inputs: Tensor) -> StepOutput:
        given = right.named(inputs)
        return right.packed(change(given, right.run(given)))

    return changed


def _replaced(name: str, change: Callable[[Tensor], Tensor]) -> InputChange:
    return lambda given: {**given, name: change(given[name])}


def _with_column(at: int, source: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def changed(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, at] = source(x)
        return x

    return changed


def _input_changes(right: NamedStep) -> Iterator[tuple[str, InputChange]]:
    spec = right.case.policy.spec
    ignored: dict[str, Callable[[Tensor], Tensor]] = {
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
        neighbour = (at + 1) % spec.observation_dim
        moved = _with_column(at, lambda x, n=neighbour: x[:, n])  # type: ignore[misc]
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
    for what, by in (("x 1.2", 1.2), ("x 0.9", 0.9), ("negated", -1.0)):
        yield f"noise {what}", _replaced("noise", lambda noise, by=by: noise * by)  # type: ignore[misc]
    yield from _state_changes(right)
    if spec.blueprint_embedding_dim is not None:
        for slot in range(spec.num_slots):
            none = _with_column(slot, lambda x: torch.full((len(x),), -1))
            yield f"blueprint of slot {slot} ignored", _replaced("blueprint_index", none)
        yield (
            "blueprints of slots reversed",
            _replaced("blueprint_index", lambda x: x.flip(1)),
        )
        yield "no blueprint read as the first", _replaced("blueprint_index", lambda x: x.clamp(0))
        for index in range(spec.num_blueprints):
            merged = _replaced(
                "blueprint_index",
                lambda x, i=index: torch.where(x == i, -1, x),  # type: ignore[misc]
            )
            yield f"blueprint {index} read as none", merged
    if spec.has_slot_by_op:
        yield from _slot_mask_changes(right)


def _state_changes(right: NamedStep) -> Iterator[tuple[str, InputChange]]:
    if right.case.precision == "fp32":
        for name in ("state_h_in", "state_c_in"):
            yield f"{name} rounded to float16", _replaced(name, lambda x: x.half().float())
            yield f"{name} rounded to bf16", _replaced(name, lambda x: x.bfloat16().float())
    yield "state_h_in clamped at 0.9", _replaced("state_h_in", lambda h: h.clamp(-0.9, 0.9))
    for bound in (10.0, 25.0, 100.0):
        clamp = _replaced("state_c_in", lambda c, b=bound: c.clamp(-b, b))  # type: ignore[misc]
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


def _transposed(mask: Tensor) -> Tensor:
    return mask.transpose(1, 2).reshape(mask.shape)


def _with_op_free(op: int) -> Callable[[Tensor], Tensor]:
    return _with_column(op, lambda mask: torch.ones_like(mask[:, 0]))


def _with_bit_free(op: int, slot: int) -> Callable[[Tensor], Tensor]:
    def freed(mask: Tensor) -> Tensor:
        mask = mask.clone()
        mask[:, op, slot] = True
        return mask

    return freed


def _with_unit_ignored(unit: int) -> Callable[[Tensor], Tensor]:
    def ignoring(state: Tensor) -> Tensor:
        state = state.clone()
        state[..., unit] = 0.0
        return state

    return ignoring


def _swapped(one: str, other: str) -> InputChange:
    return lambda given: {**given, one: given[other], other: given[one]}


def _zeroed(columns: slice) -> Callable[[Tensor], Tensor]:
    def zeroed(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, columns] = 0.0
        return x

    return zeroed


def _rolled(columns: slice) -> Callable[[Tensor], Tensor]:
    def rolled(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, columns] = x[:, columns].roll(1, 1)
        return x

    return rolled


def _masks_misread(right: NamedStep) -> Iterator[tuple[str, Make]]:
    """A head's mask read as all-true in some rows: where one choice is forbidden, and so on."""
    for head in right.case.policy.spec.head_names:
        for where, rows in (
            ("one choice is forbidden", _one_is_forbidden),
            ("one choice is forbidden and logits are close", _one_is_forbidden_and_close),
            ("one choice is allowed", _one_is_allowed),
        ):
            yield f"mask of {head} ignored where {where}", partial(_misread, right, head, rows)


RowsOfHead = Callable[[NamedStep, Inputs, str], Tensor]


def _misread(right: NamedStep, head: str, where: RowsOfHead) -> LoadedStep:
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


def _output_changes(right: NamedStep) -> Iterator[tuple[str, OutputChange]]:
    spec, heads = right.case.policy.spec, right.step.heads

    def log_prob(change: Callable[[Inputs, Outputs], Tensor]) -> OutputChange:
        return lambda given, out: {**out, "log_prob": change(given, out)}

    def is_free(out: Outputs) -> Tensor:
        return heads.relevance[out["action"][:, spec.op_index]]

    for one, other in combinations(right.outputs, 2):
        if (one.dtype, one.shape) == (other.dtype, other.shape):
            yield (
                f"{one.name} and {other.name} swapped",
                lambda given, out, a=one.name, b=other.name: {**out, a: out[b], b: out[a]},
            )
    yield (
        "log_prob of free heads 0.09 too high",
        log_prob(lambda given, out: out["log_prob"] + 0.09 * (out["log_prob"] < 0)),
    )
    yield (
        "log_prob of forced heads 1.9e-5 too high",
        log_prob(lambda given, out: torch.where(is_free(out), out["log_prob"], 1.9e-5)),
    )
    yield (
        "log_prob of the only choice -1e-3",
        log_prob(lambda given, out: torch.where(out["log_prob"] == 0, -1e-3, out["log_prob"])),
    )
    yield (
        "log_prob with the noise",
        log_prob(lambda given, out: out["log_prob"] + _noise_of(right, given, out) * is_free(out)),
    )
    yield (
        "log_prob without the mask",
        log_prob(
            lambda given, out: torch.where(
                is_free(out), _log_prob_without_mask(right, given, out), 0.0
            )
        ),
    )
    yield "log_prob by the probability", log_prob(lambda given, out: out["log_prob"].exp())
    yield (
        "log_prob by what it adds to entropy",
        log_prob(lambda given, out: out["log_prob"] * out["log_prob"].exp()),
    )
    yield "log_prob in bf16", log_prob(lambda given, out: out["log_prob"].bfloat16().float())
    for at, head in enumerate(spec.head_names):
        other_at = (at + 1) % len(spec.heads)
        yield (
            f"log_prob of {head} by that of {spec.head_names[other_at]}",
            log_prob(lambda given, out, a=at, b=other_at: _column_from(out["log_prob"], a, b)),
        )
    for array in right.outputs[2:]:
        off = 1e-3 if right.case.precision == "fp32" else 0.1
        yield (
            f"{array.name} off by {off * spec.value_scale:g}",
            lambda given, out, name=array.name, by=off * spec.value_scale: {
                **out,
                name: out[name] + by,
            },
        )
        yield (
            f"{array.name} x 1.01",
            lambda given, out, name=array.name: {**out, name: out[name] * 1.01},
        )
    yield "state_h_out clamped at 0.9", _clamped("state_h_out", 0.9)
    for bound in (10.0, 25.0, 100.0):
        yield f"state_c_out clamped at {bound:g}", _clamped("state_c_out", bound)


def _clamped(name: str, bound: float) -> OutputChange:
    return lambda given, out: {**out, name: out[name].clamp(-bound, bound)}


def _column_from(x: Tensor, at: int, other: int) -> Tensor:
    x = x.clone()
    x[:, at] = x[:, other]
    return x


def _cells(right: NamedStep, out: Outputs) -> Tensor:
    """Where each head's action is among the packed choices: `[B, heads]`."""
    starts = [right.columns(head).start for head in right.case.policy.spec.head_names]
    return out["action"] + torch.tensor(starts)


def _noise_of(right: NamedStep, given: Inputs, out: Outputs) -> Tensor:
    return given["noise"].gather(1, _cells(right, out))


def _log_prob_without_mask(right: NamedStep, given: Inputs, out: Outputs) -> Tensor:
    noise = torch.zeros_like(given["noise"])
    noise.scatter_(1, _cells(right, out), OVERWHELMING)
    free = {name: torch.ones_like(x) if name.endswith("mask") else x for name, x in given.items()}
    return right.run({**free, "noise": noise})["log_prob"]


def _conditions(right: NamedStep) -> Iterator[tuple[str, Condition]]:
    yield "in the last row", lambda given: _numbers(given) == _size(given) - 1
    yield "on an episode's first step", lambda given: ~given["state_h_in"].flatten(1).any(1)
    yield "where h is saturated", lambda given: given["state_h_in"].flatten(1).abs().amin(1) == 1
    yield "in greedy rows", lambda given: ~given["noise"].any(1)
    yield "in sampled rows", lambda given: given["noise"].any(1)
    yield "where |c| is above 10", lambda given: given["state_c_in"].flatten(1).abs().amax(1) > 10
    for head in right.case.policy.spec.head_names:
        yield f"where {head} has one choice", _one_choice(right.columns(head))
        yield f"where {head} has every choice", _every_choice(right.columns(head))
    yield "where a feature is far", lambda given: given["observation"].abs().amax(1) > 100
    largest = right.case.max_batch_size
    for size in sorted({2, 5, 100, largest}):
        if size <= largest:
            yield (
                f"in batches of {size}",
                lambda given, size=size: (_numbers(given) >= 0) & (_size(given) == size),
            )
    if largest > 64:
        yield "beyond row 64", lambda given: _numbers(given) >= 64


def _size(given: Inputs) -> int:
    return len(given["observation"])


def _numbers(given: Inputs) -> Tensor:
    return torch.arange(_size(given))


def _one_choice(columns: slice) -> Condition:
    return lambda given: given["action_mask"][:, columns].sum(1) == 1


def _every_choice(columns: slice) -> Condition:
    return lambda given: given["action_mask"][:, columns].all(1)


def _off_where(right: NamedStep, name: str, condition: Condition) -> LoadedStep:
    def off(given: Inputs, out: Outputs) -> Outputs:
        rows = condition(given).view(-1, *[1] * (out[name].ndim - 1))
        return {**out, name: out[name] + OFF * rows}

    return with_outputs(right, off)


def _with_memory(right: NamedStep) -> Iterator[tuple[str, Make]]:
    yield "value off after 20 carried steps", partial(_tired, right)
    yield "keeps its own state", partial(_stateful, right)
    yield "wrong from its second call of a size on", partial(_wrong_from_the_second, right)


def _tired(right: NamedStep) -> LoadedStep:
    calls = [0, 0]

    def run(given: Inputs, out: Outputs) -> Outputs:
        calls[:] = [calls[0] + 1 if calls[1] == _size(given) else 1, _size(given)]
        return {**out, "value": out["value"] + OFF * (calls[0] > 20)}

    return with_outputs(right, run)


def _stateful(right: NamedStep) -> LoadedStep:
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def own_state(given: Inputs) -> Inputs:
        h, c = kept.get(_size(given), (given["state_h_in"], given["state_c_in"]))
        return {**given, "state_h_in": h, "state_c_in": c}

    def run(*inputs: Tensor) -> StepOutput:
        out = right.run(own_state(right.named(inputs)))
        kept[len(inputs[0])] = (out["state_h_out"], out["state_c_out"])
        return right.packed(out)

    return run


def _wrong_from_the_second(right: NamedStep) -> LoadedStep:
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


def _writing(right: NamedStep, name: str) -> LoadedStep:
    def written(given: Inputs, out: Outputs) -> Outputs:
        x = given[name]
        x.logical_not_() if x.dtype == torch.bool else x.add_(1)
        return out

    return with_outputs(right, written)


def _in_place(name: str, output: str) -> OutputChange:
    return lambda given, out: {**out, output: given[name].copy_(out[output])}


def _reusing(right: NamedStep) -> LoadedStep:
    """Its answer to a step is overwritten by the next of that size."""
    kept: dict[int, Outputs] = {}

    def run(given: Inputs, out: Outputs) -> Outputs:
        mine = kept.setdefault(_size(given), {name: x.clone() for name, x in out.items()})
        return {name: mine[name].copy_(x) for name, x in out.items()}

    return with_outputs(right, run)
