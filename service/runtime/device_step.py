"""A loaded step, on packed rows and states in a device's memory. This module imports torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from export.loaders.torch_step import LiveStep
from export.manifest import Array
from service.runtime.device_states import DeviceStates
from service.runtime.packed_rows import Layout

READ_ROW, WRITE_ROW = "read_row", "write_row"
IS_FINITE = "is_finite"


class Packing:
    """How a step's batch is packed: what it brings beside states, and what it gives.

    With the former come the rows to read states from and to write them to, with the latter whether
    each row is finite, states included.
    """

    def __init__(
        self, states: DeviceStates, inputs: Sequence[Array], outputs: Sequence[Array]
    ) -> None:
        names = {name for state in states.specs for name in (state.input, state.output)}
        rows = [Array(name=n, dtype="int64", shape=("batch",)) for n in (READ_ROW, WRITE_ROW)]
        finite = Array(name=IS_FINITE, dtype="bool", shape=("batch",))
        self.inputs = tuple([array.name for array in inputs])
        self.outputs = tuple([array.name for array in outputs])
        self.brought = Layout([*(array for array in inputs if array.name not in names), *rows])
        self.given = Layout([*(array for array in outputs if array.name not in names), finite])


class DeviceStep:
    """Steps the first rows of `brought` into `given`: `[rows, row_bytes]` each, on the device.

    States go from the rows it names to those it names, and move only once the step has given all
    that the manifest says. Every tensor it touches is where it was at the last call of that size,
    or is its own: such a call can be captured.
    """

    def __init__(
        self,
        step: LiveStep,
        states: DeviceStates,
        packing: Packing,
        brought: Tensor,
        given: Tensor,
    ) -> None:
        self._step = step
        self._states = states
        self._packing = packing
        self._brought = tensors(packing.brought, brought)
        self._given = tensors(packing.given, given)

    @torch.inference_mode()
    def __call__(self, size: int) -> None:
        states, packing = self._states, self._packing
        # Copies, as the host's arrays are: contiguous, and where any kernel wants its numbers.
        values = {
            name: tensor[:size].clone(memory_format=torch.contiguous_format)
            for name, tensor in self._brought.items()
        }
        read_row, write_row = values.pop(READ_ROW), values.pop(WRITE_ROW)
        for of, tensor in zip(states.specs, states.tensors, strict=True):
            values[of.input] = tensor.index_select(0, read_row)
        given = self._step([values[name] for name in packing.inputs], size)
        results = dict(zip(packing.outputs, given, strict=True))
        floats = [r.reshape(size, -1) for r in results.values() if r.dtype == torch.float32]
        results[IS_FINITE] = torch.cat(floats, dim=1).isfinite().all(dim=1)
        for of, tensor in zip(states.specs, states.tensors, strict=True):
            tensor.index_copy_(0, write_row, results.pop(of.output))
        for name, result in results.items():
            self._given[name][:size].copy_(result)


def tensors(layout: Layout, buffer: Tensor) -> dict[str, Tensor]:
    """What a buffer holds, as `Layout.views` says it of a NumPy array."""
    return {
        field.name: buffer[:, field.offset : field.offset + field.num_bytes]
        .view(getattr(torch, field.dtype))
        .view(len(buffer), *field.shape)
        for field in layout.fields
    }
