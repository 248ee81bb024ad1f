"""Every way of being wrong that the gate must stop, for a policy, and which of them make none.

A wrong step is right but for one thing, and is built from copies: it shares nothing with the
judge. `stopped_by_gate` is the one place that knows the gate.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

from export.comparison import ParityError
from export.manifest import Precision
from export.parity import Gate
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from tests.export.gate_cases import Case
from tests.export.replaced_calls import near_calls, with_call_replaced
from tests.export.wrong_arrays import wrong_arrays
from tests.export.wrong_inputs import wrong_inputs
from tests.export.wrong_moments import wrong_moments
from tests.export.wrong_outputs import wrong_outputs
from tests.gate import gate_of, judged
from tests.loaded_step import TensorStep


class WrongStep(NamedTuple):
    """What is wrong, and how such a step is made."""

    name: str
    make: Callable[[], TensorStep]


class Equivalent(NamedTuple):
    """Steps that are not wrong on some cases' weights, by patterns of their names, and why."""

    step: str
    case: str
    reason: str


OUT_OF_REACH = (
    "no state brings a gate of these weights further at this width; the trained ones go beyond 8"
)
CANCELLED = "no bias stands between it and a LayerNorm, which cancels its scale"
WITHIN_TOLERANCE = "it is off by less than the tolerance, which is float32's rounding"
ALWAYS_ON = "this policy's critics have all their units on"
NEVER_ALIKE = "this policy's choices of that head are never that alike"
ONE_WAY = "with these floors the rule goes one way only, or its two ways meet"
EQUIVALENT = (
    Equivalent(
        "gives the same memory each time",
        ".*",
        "whoever runs a step, gate or service, copies what it gives before its next call",
    ),
    Equivalent("linear 4 in TF32", "v1 fresh.*", WITHIN_TOLERANCE),
    Equivalent(r"linear [459] in TF32|relu 6 by a leaky one", "v2 fresh", WITHIN_TOLERANCE),
    Equivalent("linear 11 in TF32", "v2, normaliser, extras", WITHIN_TOLERANCE),
    Equivalent(
        r"layer_norm [23] with epsilon 1e-06|layer_norm 2 with epsilon 0\.001",
        "v2 fresh",
        CANCELLED,
    ),
    Equivalent(
        r"outputs\.value\.layers\.[02]\.weight x 1\.01"
        r"|policy's state_value_head\.[013]\.weight x 1\.01",
        "v2 fresh",
        CANCELLED,
    ),
    Equivalent(r"layer_norm [3-7] with epsilon 1e-06", "v2, normaliser, extras", WITHIN_TOLERANCE),
    Equivalent(
        r"layer_norm [2-6] with epsilon 1e-06",
        "v2 with floors, normaliser, extras.*",
        WITHIN_TOLERANCE,
    ),
    Equivalent(
        r"relu 12 by a leaky one|relu 15 (by a leaky one|dropped)",
        "v2, normaliser, extras",
        ALWAYS_ON,
    ),
    Equivalent(
        r"relu 1[25] (by a leaky one|dropped)|relu 17 by a leaky one",
        "v2 with floors, normaliser, extras.*",
        ALWAYS_ON,
    ),
    Equivalent("linear 10 in TF32", "v2 with floors, normaliser, extras.*", WITHIN_TOLERANCE),
    Equivalent(
        r"where [16] with -50 for -10000|lt [12] by at most|clamp [2356] with min \S+ for 1e-08"
        r"|where (5|10) always the first|__rdiv__ 1 with \S+ for 0\.99",
        "v2 with floors, normaliser, extras.*",
        ONE_WAY,
    ),
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
        r"sigmoid 1 of at most [68]|sigmoid [02] of at most 8|tanh 0 of at most 4",
        "v1 in bf16",
        "it is within 3e-3 of what it would be, and bf16 rounds what a gate is of by more",
    ),
    Equivalent(
        r"mask of blueprint ignored where one choice is forbidden and logits are close",
        "v1(, normaliser| in bf16)|v2.*extras.*",
        NEVER_ALIKE,
    ),
    Equivalent(
        "mask of alpha_curve ignored where one choice is forbidden and logits are close",
        "v2, normaliser, extras",
        NEVER_ALIKE,
    ),
    Equivalent(
        "mask of tempo ignored where one choice is forbidden and logits are close",
        "v2 with floors, normaliser, extras.*",
        NEVER_ALIKE,
    ),
    Equivalent(
        r"sigmoid 0 of at most [68]|(sigmoid [12]|tanh 0) of at most [468]",
        "v1 fresh.*",
        OUT_OF_REACH,
    ),
    Equivalent(
        r"sigmoid [012] of at most [68]|tanh 0 of at most [468]",
        "v2 fresh",
        OUT_OF_REACH,
    ),
    Equivalent(
        r"sigmoid 0 of at most 8|sigmoid [12] of at most [68]|tanh 0 of at most 4",
        "v[12] recorded.*",
        OUT_OF_REACH,
    ),
    Equivalent(
        r"sigmoid [012] of at most 8|tanh 0 of at most 4",
        "v2 with floors, normaliser, extras in bf16",
        OUT_OF_REACH,
    ),
    Equivalent(
        r"sigmoid 0 of at most 6|sigmoid [12] of at most 4"
        r"|layer_norm 2 with epsilon 0\.001|layer_norm 3 with epsilon 1e-06",
        "v2 recorded in bf16",
        "it is off by less than bf16's rounding",
    ),
    Equivalent(
        r"with a normaliser's epsilon of 1\.1e-4",
        "v2 recorded in bf16",
        "no feature's variance is so small that it counts beside it",
    ),
    Equivalent(
        r"with a normaliser's epsilon of \S+",
        "v2 recorded",
        "no feature's variance is so small that it counts beside it",
    ),
    Equivalent("layer_norm 2 with epsilon 1e-06", "v2 recorded.*", WITHIN_TOLERANCE),
    Equivalent(
        "mask of blueprint ignored where one choice is forbidden and logits are close",
        "v2 recorded.*",
        NEVER_ALIKE,
    ),
    Equivalent("sigmoid 1 of at most 4", "v2 fresh in bf16", WITHIN_TOLERANCE),
    Equivalent("layer_norm [23] with epsilon 1e-06", "v2 fresh in bf16", CANCELLED),
    Equivalent(
        r"sigmoid [01] of at most [68]|(sigmoid 2|tanh 0) of at most [468]",
        "v2 fresh in bf16",
        OUT_OF_REACH,
    ),
)


def wrong_steps(case: Case) -> Iterator[WrongStep]:
    """The wrong steps of a policy, in an order that is always the same."""
    for name, make in wrong_arrays(case):
        yield WrongStep(name, make)
    step = case.step()
    for what, name, at, instead in near_calls(step, case.precision):
        yield WrongStep(what, partial(with_call_replaced, step, name, at, instead))
    for make_all in (wrong_inputs, wrong_outputs, wrong_moments):
        for name, make in make_all(case):
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
    wrong: TensorStep,
    max_batch_size: int,
) -> str | None:
    """The sentence with which the gate stops a step, None where it lets it pass."""
    try:
        judged(_gate(policy, normalizer, precision, max_batch_size), wrong)
    except ParityError as error:
        return str(error)
    return None


@cache
def _gate(
    policy: FactoredRecurrentActorCritic,
    normalizer: ObservationNormalizer | None,
    precision: Precision,
    max_batch_size: int,
) -> Gate:
    return gate_of(policy, normalizer, precision=precision, max_batch_size=max_batch_size)
