"""`PUT /policy/weights` in safetensors: a policy's packed parameters by name, and a probe of it."""

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.manifest import Array, Manifest
from export.parameters import DTYPES as PARAMETER_DTYPES
from service.engine.policy_versions import Push
from service.engine.probe import Probe
from service.errors import Invalid, short
from service.http.inputs import InputReader, finite
from service.http.safetensors_file import LARGEST_HEADER_BYTES, LENGTH_BYTES, read_file

PREFIX = "probe."
LEAST_ROWS = 32
LEAST_STEPS = 4
MOST_PROBED = 1024
"""Rows times steps of a probe."""

Tensors = Mapping[str, NDArray[Any]]


class WeightsCodec:
    """Reads pushes for one artifact. `max_body_bytes` is what the largest one takes."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._reader = InputReader(manifest.spec)
        self._states = [state.input for state in manifest.spec.states]
        parameters = sum(
            prod(parameter.shape) * PARAMETER_DTYPES[parameter.dtype].itemsize
            for parameter in manifest.parameters
        )
        row = sum(
            prod(map(int, array.shape[1:])) * np.dtype(array.dtype).itemsize
            for array in (*manifest.inputs, *manifest.outputs)
        )
        self.max_body_bytes = LENGTH_BYTES + LARGEST_HEADER_BYTES + parameters + MOST_PROBED * row

    def parse(self, body: bytes | bytearray) -> Push:
        """The push; its parameters are copies, and whose they are is not looked at.

        Raises Malformed where the body is no safetensors file. Reading its probe raises Invalid
        where that is no whole one of this policy: `LEAST_ROWS` rows of `LEAST_STEPS` steps, up to
        `MOST_PROBED`.
        """
        tensors, _ = read_file(body)
        parameters = {
            name: np.array(tensor)  # a view may lie anywhere, and keeps the whole body
            for name, tensor in tensors.items()
            if not name.startswith(PREFIX)
        }
        return Push(parameters, lambda: self._probe(tensors))

    def _probe(self, tensors: Tensors) -> Probe:
        manifest = self._manifest
        given = {name[len(PREFIX) :]: t for name, t in tensors.items() if name.startswith(PREFIX)}
        observation = given.get("observation")
        if observation is None or observation.ndim != 3:
            raise Invalid(f"a probe has `{PREFIX}observation`, [steps, rows, features]")
        num_steps, num_rows, _ = observation.shape
        if num_rows < LEAST_ROWS or num_steps < LEAST_STEPS or num_rows * num_steps > MOST_PROBED:
            raise Invalid(
                f"the probe has {num_rows} rows of {num_steps} steps; it takes at least "
                f"{LEAST_ROWS} of {LEAST_STEPS}, and {MOST_PROBED} in all at most"
            )
        arrays = {array.name: array for array in (*manifest.inputs, *manifest.outputs)}
        for name in given:
            if name not in arrays:
                raise Invalid(f"`{PREFIX}{short(name)}` is nothing this policy takes or gives")
        for name, array in arrays.items():
            lead = (num_rows,) if name in self._states else (num_steps, num_rows)
            _check(given.get(name), array, lead)
        inputs = {array.name: given[array.name] for array in manifest.inputs}
        self._check_inputs(inputs)
        return Probe(inputs, {array.name: given[array.name] for array in manifest.outputs})

    def _check_inputs(self, inputs: Tensors) -> None:
        """Raises Invalid where a step could fail on them: what is not there to be looked up."""
        for name in (*self._states, "noise"):
            finite(f"{PREFIX}{name}", inputs[name], is_vector=True)
        for at, observation in enumerate(inputs["observation"]):
            others = {
                name: inputs[name][at]
                for name in ("blueprint_index", "slot_by_op_mask")
                if name in inputs
            }
            try:
                self._reader.read(observation, inputs["action_mask"][at], **others, is_vector=True)
            except Invalid as error:
                raise Invalid(f"step {at} of the probe: {error}") from error


def _check(tensor: NDArray[Any] | None, array: Array, lead: tuple[int, ...]) -> None:
    name, shape = f"{PREFIX}{array.name}", (*lead, *array.shape[1:])
    if tensor is None:
        raise Invalid(f"`{name}` is missing")
    if tensor.dtype != np.dtype(array.dtype) or tensor.shape != shape:
        raise Invalid(
            f"`{name}` is {tensor.dtype} {list(tensor.shape)}, expected {array.dtype} {list(shape)}"
        )
