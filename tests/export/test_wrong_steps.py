"""The gate stops every wrong step, and what is named equivalent is.

Each policy is tried with a third of them here, one policy after the other with another third;
`python -m benchmarks.wrong_steps` tries all, and prints how many were stopped, on which policies.
"""

import pytest

from tests.export.gate_cases import CASES, Case, case_of
from tests.export.probe import difference
from tests.export.wrong_steps import stopped_by_gate, why_equivalent, wrong_steps
from tests.golden import needs_golden
from tests.loaded_step import TensorStep
from tests.machine import needs_bf16

EVERY_CASE = [
    pytest.param(
        name,
        marks=[
            mark
            for mark, is_needed in (
                (needs_golden, "recorded" in name),
                (needs_bf16, "bf16" in name),
            )
            if is_needed
        ],
    )
    for name in CASES
]


def stopped(case: Case, step: TensorStep) -> bool:
    sentence = stopped_by_gate(
        case.policy, case.normalizer, case.precision, step, case.max_batch_size
    )
    return sentence is not None


@pytest.mark.parametrize("name", EVERY_CASE)
def test_the_right_step_passes(name: str) -> None:
    case = case_of(name)
    assert not stopped(case, case.step())


@pytest.mark.parametrize("name", EVERY_CASE)
def test_every_wrong_step_is_stopped(name: str) -> None:
    case = case_of(name)
    third = list(CASES).index(name) % 3
    passed = [
        step.name
        for step in list(wrong_steps(case))[third::3]
        if why_equivalent(name, step.name) is None and not stopped(case, step.make())
    ]
    assert passed == []


@pytest.mark.parametrize("name", EVERY_CASE)
def test_what_is_named_equivalent_differs_by_no_more_than_rounding(name: str) -> None:
    case = case_of(name)
    different = {
        step.name: difference(case, step.make())
        for step in wrong_steps(case)
        if why_equivalent(name, step.name) is not None
    }
    assert different
    assert {step: how for step, how in different.items() if how is not None} == {}


@pytest.mark.parametrize("name", EVERY_CASE)
def test_no_two_wrong_steps_have_one_name(name: str) -> None:
    names = [step.name for step in wrong_steps(case_of(name))]
    assert len(names) > 400
    assert len(set(names)) == len(names)
