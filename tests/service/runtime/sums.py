"""A policy of tensors that anybody can follow, for a device's runtime."""

from typing import NamedTuple

import torch
from torch import Tensor

from export.loaders.torch_step import TorchStep
from export.manifest import step_inputs, step_outputs
from model.step_spec import StepSpec


class Sums(NamedTuple):
    """A policy of tensors: the value is the sum of `observation[0]` so far, so many times."""

    spec: StepSpec
    fail: list[Exception]
    scale: float = 1.0

    def step(self) -> TorchStep:
        return TorchStep("sums", self.__call__, step_inputs(self.spec), step_outputs(self.spec))

    def __call__(self, *given: Tensor) -> list[Tensor]:
        if self.fail:
            raise self.fail[0]
        named = dict(zip([a.name for a in step_inputs(self.spec)], given, strict=True))
        observation = named["observation"]
        named = {
            state.output: named[state.input] + observation[:, :1, None]
            for state in self.spec.states
        }
        num = len(observation)
        results = []
        for array in step_outputs(self.spec):
            if array.name in named:
                results.append(named[array.name])
            elif array.name == "value":
                results.append(named[self.spec.states[0].output][:, 0, 0] * self.scale)
            else:
                shape = (num, *(int(size) for size in array.shape[1:]))
                results.append(torch.zeros(shape, dtype=getattr(torch, array.dtype)))
        return results
