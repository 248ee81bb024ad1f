"""What a policy's owner saw it do, for new weights to show that they do the same here."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.loaders.protocol import LoadedStep
from export.manifest import Array, Manifest
from service.errors import Invalid
from service.runtime.arrays import Arrays, allocate

IN_RETURNS = ("value", "q_value")


class Probe(NamedTuple):
    """Some rows over some steps: what went in and what came out, by the manifest's names.

    All are `[steps, rows, ...]` but the states that went in, `[rows, ...]`: those of the first
    step. From there on they are carried.
    """

    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]

    def error(self, step: LoadedStep, manifest: Manifest, *, unit: float) -> float:
        """The largest error of any output, weighed as `Parity` has it, once all are within it.

        `unit` is what one of the network's own is worth in returns. Raises Invalid at the first
        number beyond the artifact's tolerance, and where an action is another.
        """
        num_rows = self.inputs["observation"].shape[1]
        size = min(num_rows, manifest.max_batch_size)
        inputs, outputs = (allocate(arrays, size) for arrays in (manifest.inputs, manifest.outputs))
        run = step.bind(inputs, outputs)
        states = {state.input: state.output for state in manifest.spec.states}
        errors = [0.0]
        for first in range(0, num_rows, size):
            rows = np.arange(first, first + size) % num_rows  # the last ones are padded with some
            for name in states:
                inputs[name][:] = self.inputs[name][rows]
            for at in range(len(self.inputs["observation"])):
                for name, given in self.inputs.items():
                    if name not in states:
                        inputs[name][:] = given[at][rows]
                run()
                errors += [
                    self._compared(array, outputs, manifest, at, rows, unit)
                    for array in manifest.outputs
                ]
                for into, out in states.items():
                    inputs[into][:] = outputs[out]
        return max(errors)

    def _compared(
        self,
        array: Array,
        outputs: Arrays,
        manifest: Manifest,
        at: int,
        rows: NDArray[np.intp],
        unit: float,
    ) -> float:
        name, got = array.name, outputs[array.name]
        expected = self.outputs[name][at][rows]
        if array.dtype == "int64":
            is_wrong, weighed = got != expected, np.zeros(1)
        else:
            atol = manifest.parity.atol * (unit if name in IN_RETURNS else 1.0)
            allowed = atol + manifest.parity.rtol * np.abs(expected)
            with np.errstate(invalid="ignore", divide="ignore"):  # infinities are wrong as well
                error = np.abs(got - expected)
                is_wrong = ~((error <= allowed) & np.isfinite(error))  # an infinity allows itself
                weighed = np.where(error == 0, 0.0, error * (manifest.parity.atol / allowed))
        if is_wrong.any():
            row, *rest = np.argwhere(is_wrong)[0]
            where = "".join(f"[{index}]" for index in (at, rows[row], *rest))
            raise Invalid(
                f"`probe.{name}{where}` is {expected[row, *rest]:.9g}, and with these parameters "
                f"the step gives {got[row, *rest]:.9g}: they are not of the policy that made the "
                "probe"
            )
        return float(weighed.max())
