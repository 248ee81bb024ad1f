"""A runtime that keeps states, as a loaded step that is given them: to be compared with others."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.step_spec import StepSpec
from service.runtime.protocol import Runtime


class KeepingStep:
    """A `LoadedStep` over a runtime with at least twice as many rows as any batch has.

    A call brings and takes away the states that it was bound with: all of them, or none.
    """

    def __init__(self, runtime: Runtime, spec: StepSpec) -> None:
        self.name = runtime.name
        self.device = runtime.device
        self.inputs = set(runtime.inputs)
        self._runtime = runtime
        self._states = spec.states

    def bind(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]
    ) -> Callable[[], None]:
        num = len(inputs["observation"])
        read_rows = np.arange(num)
        write_rows = read_rows + num
        brought = tuple([inputs[s.input] for s in self._states if s.input in inputs])
        taken = [outputs[s.output] for s in self._states if s.output in outputs]

        def run() -> None:
            runtime = self._runtime
            if brought:
                runtime.write(read_rows, brought)
            for name, array in runtime.inputs.items():
                array[:num] = inputs[name]
            runtime.launch(read_rows, write_rows)
            for name, array in runtime.collect().arrays.items():
                outputs[name][:] = array
            if taken:
                for array, state in zip(taken, runtime.read(write_rows), strict=True):
                    array[:] = state

        return run
