"""A loaded step as the gate runs it: in batches, as a server does, each row on its own state."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.episodes import Moment
from export.loaders.load import first_line
from export.loaders.protocol import LoadedStep
from export.manifest import Array, step_inputs, step_outputs
from model.step_spec import StepSpec

Arrays = dict[str, NDArray[Any]]


class StepFault(Exception):
    """The step fails, or does what a step must not; the message says what."""


class CarriedStep:
    """Runs a step for `num_rows` rows and keeps their states, in batches of at most `largest`.

    Each step has arrays of its own, filled anew for each batch, so that what one step does to its
    inputs reaches no other.
    """

    def __init__(self, step: LoadedStep, spec: StepSpec, *, num_rows: int, largest: int) -> None:
        self._step = step
        self._spec = spec
        self._inputs = allocated(step_inputs(spec), largest)
        self._outputs = allocated(step_outputs(spec), largest)
        self._results = allocated(step_outputs(spec), num_rows)
        self._calls: dict[int, Callable[[], None]] = {}

    def run(self, moment: Moment) -> dict[str, Tensor]:
        """One step of every row: the outputs by the manifest's names, `[num_rows, ...]`.

        Raises StepFault where the step raises, or writes to its inputs.
        """
        states = (torch.from_numpy(self._results[of.output]) for of in self._spec.states)
        state = moment.restarted(tuple(states))
        given = {name: array.numpy() for name, array in moment.inputs(self._spec, state).items()}
        for rows in moment.batches:
            self._run(given, rows.numpy())
        return {name: torch.from_numpy(array) for name, array in self._results.items()}

    def _run(self, given: Mapping[str, NDArray[Any]], rows: NDArray[np.int64]) -> None:
        num_rows = len(rows)
        inputs = {name: array[:num_rows] for name, array in self._inputs.items()}
        outputs = {name: array[:num_rows] for name, array in self._outputs.items()}
        for name, array in inputs.items():
            np.take(given[name], rows, axis=0, out=array, mode="clip")
        for array in outputs.values():
            array.fill(-1 if array.dtype == np.int64 else np.nan)  # what is not written shows
        call = self._calls.get(num_rows)
        try:
            if call is None:
                call = self._calls[num_rows] = self._step.bind(inputs, outputs)
            call()
        except Exception as error:  # whatever the format's own runtime raises
            raise StepFault(
                f"the step fails: {first_line(error)} (batch size {num_rows})"
            ) from error
        for name, array in inputs.items():
            if not np.array_equal(array, given[name][rows]):
                raise StepFault(f"the step writes to its input {name!r} (batch size {num_rows})")
        for name, array in outputs.items():
            self._results[name][rows] = array


def allocated(arrays: tuple[Array, ...], num_rows: int) -> Arrays:
    """Zeros, by name."""
    return {
        array.name: np.zeros((num_rows, *map(int, array.shape[1:])), dtype=np.dtype(array.dtype))
        for array in arrays
    }
