"""The right step of a case by the manifest's names, for making wrong ones from."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from export.manifest import Array, step_inputs, step_outputs
from export.packed_step import StepOutput
from export.tamiyo_step import TamiyoStep
from tests.export.gate_cases import Case
from tests.loaded_step import TensorStep

Make = Callable[[], TensorStep]
"""Makes a wrong step anew: one that has a memory starts without any."""
Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]
Change = Callable[[Tensor], Tensor]
InputChange = Callable[[Inputs], Inputs]
OutputChange = Callable[[Inputs, Outputs], Outputs]


class NamedStep(NamedTuple):
    """Its arrays are in the manifest's order; a head's columns are those of mask and noise."""

    case: Case
    step: TamiyoStep
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


def with_inputs(right: NamedStep, change: InputChange) -> TensorStep:
    return lambda *inputs: right.packed(right.run(change(right.named(inputs))))


def with_outputs(right: NamedStep, change: OutputChange) -> TensorStep:
    def changed(*inputs: Tensor) -> StepOutput:
        given = right.named(inputs)
        return right.packed(change(given, right.run(given)))

    return changed
