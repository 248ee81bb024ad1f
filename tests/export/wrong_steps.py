"""Every way of being wrong that the gate must stop, for a policy, and which of them make none.

A wrong step is right but for one thing, and is built from copies: it shares nothing with the
judge. `stopped_by_gate` is the one place that knows the gate; `difference` compares with the right
step directly, and knows none.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from export.formats import LoadedStep
from export.manifest import Precision, step_outputs
from export.parity import ParityError, Reference, check_parity, parity_batch_sizes
from export.step import StepInput, StepOutput
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from tests.export.gate_cases import Case
from tests.export.replaced_calls import near_calls, with_call_replaced
from tests.export.wrong_arrays import wrong_arrays
from tests.export.wrong_dealings import wrong_dealings

ROUNDING: dict[Precision, tuple[float, float]] = {"fp32": (5e-6, 5e-6), "bf16": (1e-3, 4e-3)}
"""`atol` and `rtol`: no more than two right steps differ by."""
PROBE_ROWS = 400
PROBE_STEPS = 3


class WrongStep(NamedTuple):
    """What is wrong, and how such a step is made."""

    name: str
    make: Callable[[], LoadedStep]


class Equivalent(NamedTuple):
    """Steps that are not wrong on some cases' weights, by patterns of their names, and why."""

    step: str
    case: str
    reason: str


EQUIVALENT = (
    Equivalent(r"argmax \d+ by the last of equal ones", ".*", "a tie may be broken either way"),
    Equivalent(
        r"where \d+ with -(1000|1e\+09) for -10000",
        ".*",
        "a masked choice has probability 0 either way, and no noise makes up for a thousand",
    ),
    Equivalent(
        r"padding (x 1\.01|-\S+ for -1e4)",
        "v1.*",
        "cells that pad the table have probability 0 either way, and their noise is 0",
    ),
    Equivalent(r"heads\.forced_index \[[013-7]\] off by one", "v1.*", "no op forces these heads"),
    Equivalent(
        r"heads\.(forced_index \[[07]\] off by one|takes_first_allowed bit 7 flipped)",
        "v2.*",
        "the slot is forced to the first that is allowed, the op never",
    ),
    Equivalent(
        r"heads\.countdown \[\d+\] off by one",
        "v2.*",
        "it then equals its neighbour, and of equal ones the first is taken",
    ),
    Equivalent(
        r"argmax 1 of scores in bf16", "v2.*", "it is of integers up to 13, which bf16 has exactly"
    ),
    Equivalent(
        r"action_mask('s bit [012] ignored| of slot one choice off)",
        "v2.*",
        "which slots are allowed is slot_by_op_mask's to say",
    ),
    Equivalent(
        r"(sigmoid 0 of at most [68]|(sigmoid [12]|tanh 0) of at most [468])",
        "v[12] fresh.*",
        "no state brings a fresh gate further, at 32 units; the trained ones here go beyond 8",
    ),
)


def wrong_steps(case: Case) -> Iterator[WrongStep]:
    """The wrong steps of a policy, in an order that is always the same."""
    for name, make in wrong_arrays(case):
        yield WrongStep(name, make)
    step = case.step()
    for what, name, at, instead in near_calls(step, case.precision):
        yield WrongStep(what, partial(with_call_replaced, step, name, at, instead))
    for name, make in wrong_dealings(case):
        yield WrongStep(name, make)


def why_equivalent(case_name: str, step_name: str) -> str | None:
    """The reason why this is no wrong step of this case; None where it is one."""
    for entry in EQUIVALENT:
        if re.fullmatch(entry.step, step_name) and re.fullmatch(entry.case, case_name):
            return entry.reason
    return None


def stopped_by_gate(
    policy: FactoredRecurrentActorCritic,
    normalizer: ObservationNormalizer | None,
    precision: Precision,
    wrong: LoadedStep,
    max_batch_size: int,
) -> str | None:
    """The sentence with which the gate stops a step, None where it lets it pass."""
    reference, first = _reference(policy, normalizer, precision, max_batch_size)
    try:
        check_parity(wrong, reference)
    except ParityError as error:
        return str(error)
    finally:
        if not all(map(torch.equal, first, _first_inputs(reference))):
            _reference.cache_clear()  # the step wrote into it
    return None


@cache
def _reference(
    policy: FactoredRecurrentActorCritic,
    normalizer: ObservationNormalizer | None,
    precision: Precision,
    max_batch_size: int,
) -> tuple[Reference, list[Tensor]]:
    reference = Reference(
        policy,
        normalizer,
        batch_sizes=parity_batch_sizes(max_batch_size),
        precision=precision,
    )
    return reference, [array.clone() for array in _first_inputs(reference)]


def _first_inputs(reference: Reference) -> StepInput:
    return reference.episodes[0][0].inputs(reference.policy.initial_state(1))


def difference(case: Case, wrong: LoadedStep) -> str | None:
    """Where a step differs from the right one beyond rounding, None where it nowhere does.

    Over rows meant to show it: single features far off, states zero, carried and saturated, noise
    that overrules the logits, masks from one choice to all.
    """
    atol, rtol = ROUNDING[case.precision]
    names = [array.name for array in step_outputs(case.policy.spec)]
    with torch.inference_mode():
        for number, (inputs, expected) in enumerate(_probe(case)):
            got = wrong(*(array.clone() for array in inputs))
            for name, want, have in zip(names, expected, got, strict=True):
                if have.shape != want.shape or have.dtype != want.dtype:
                    return f"{name} is {have.dtype} {tuple(have.shape)}"
                error = (have - want).abs()
                if not (error <= atol + rtol * want.abs()).all():
                    return f"{name} differs by {error.max().item():.2g} at step {number}"
    return None


@cache
def _probe(case: Case) -> list[tuple[StepInput, StepOutput]]:
    """What goes into carried steps of `PROBE_ROWS` rows, and what the right step makes of it."""
    return list(_carried(case))


def _carried(case: Case) -> Iterator[tuple[StepInput, StepOutput]]:
    step, generator = case.step(), torch.Generator().manual_seed(11)
    spec = case.policy.spec
    _, _, _, h, c, *_ = step.example(PROBE_ROWS)
    rows = torch.arange(PROBE_ROWS)
    for _ in range(PROBE_STEPS):
        restarts = (torch.rand(PROBE_ROWS, generator=generator) < 0.5)[:, None, None]
        signs = _saturating(case, generator)
        scale = torch.tensor([0.0, 1.0, 5.0, 30.0, 200.0])[rows % 5][:, None, None]
        h = torch.where(restarts, signs * scale.clamp(max=1), h)
        c = torch.where(restarts, torch.randn(c.shape, generator=generator).sign() * scale, c)
        observation = _probe_observations(case, generator)
        mask = _probe_mask((PROBE_ROWS, spec.num_choices), generator)
        for columns in torch.split(mask, list(spec.head_sizes), dim=-1):
            _allow_one(columns, generator)
        noise = _probe_noise(spec.num_choices, generator)
        inputs = [observation, mask, noise, h, c]
        if spec.blueprint_embedding_dim is not None:
            shape = (PROBE_ROWS, spec.num_slots)
            inputs.append(torch.randint(-1, spec.num_blueprints, shape, generator=generator))
        if spec.has_slot_by_op:
            by_op = _probe_mask((PROBE_ROWS, spec.num_ops * spec.num_slots), generator)
            by_op = by_op.view(PROBE_ROWS, spec.num_ops, spec.num_slots)
            _allow_one(by_op, generator)
            inputs.append(by_op)
        outputs: StepOutput = step(*inputs)
        yield tuple(inputs), outputs
        _, _, _, h, c, *_ = outputs


def _saturating(case: Case, generator: torch.Generator) -> Tensor:
    """Signs `[rows, layers, hidden]` that bring one gate of each layer as far as h can."""
    weights = [x for name, x in case.policy.named_parameters() if "weight_hh" in name]
    return torch.stack(
        [
            weight[torch.arange(PROBE_ROWS) % len(weight)].sign()
            * torch.randn(PROBE_ROWS, 1, generator=generator).sign()
            for weight in weights
        ],
        dim=1,
    )


def _probe_observations(case: Case, generator: torch.Generator) -> Tensor:
    """A third ordinary, a third tiny, a third with one feature far off."""
    dim = case.policy.spec.observation_dim
    x = torch.randn(PROBE_ROWS, dim, generator=generator)
    x[::3] *= 1e-3
    at = torch.randint(dim, (len(x[1::3]),), generator=generator)
    far = torch.nn.functional.one_hot(at, dim) * torch.randn(len(at), 1, generator=generator) * 300
    x[1::3] += far
    if case.normalizer is not None:
        x = x * case.normalizer.scale() + case.normalizer.mean
    return x


def _probe_mask(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    density = torch.rand(shape[0], 1, generator=generator) * 1.6 - 0.3
    return torch.rand(shape, generator=generator) < density


def _probe_noise(num_choices: int, generator: torch.Generator) -> Tensor:
    """None, Gumbel noise, or noise that overrules every logit."""
    uniform = torch.rand(PROBE_ROWS, num_choices, generator=generator).clamp(min=1e-20)
    noise = -torch.log(-torch.log(uniform))
    noise[1::4] = 0.0
    noise[2::4] = 1e3 * torch.rand(len(noise[2::4]), num_choices, generator=generator)
    return noise


def _allow_one(allowed: Tensor, generator: torch.Generator) -> None:
    choice = torch.randint(allowed.shape[-1], allowed.shape[:-1], generator=generator)
    allowed |= torch.nn.functional.one_hot(choice, allowed.shape[-1]).bool()
