"""States in a device's memory. Importing this module imports torch."""

from math import prod

import torch

from model.step_spec import StepSpec
from service.runtime.protocol import Rows, State


class DeviceStates:
    """`num_rows` rows of each of the policy's states, and two after them.

    The first is always zero. The other is scrap: padding writes to it, and nobody reads it.
    """

    def __init__(self, spec: StepSpec, num_rows: int, device: torch.device) -> None:
        self.zero_row = num_rows
        self.scrap_row = num_rows + 1
        self.specs = spec.states
        shapes = [(num_rows + 2, *state.shape) for state in spec.states]
        try:
            self.tensors = tuple([torch.zeros(shape, device=device) for shape in shapes])
        except torch.OutOfMemoryError as error:  # a device promises nothing that it has not
            size = 4 * sum(map(prod, shapes))
            raise MemoryError(f"{size / 1e9:.1f} GB of states do not, on {device.type}") from error

    @torch.inference_mode()
    def read(self, rows: Rows) -> State:
        """Copies of the states in these rows, on the host."""
        if not self.tensors:
            return ()
        index = torch.tensor(rows, device=self.tensors[0].device)
        return tuple([tensor.index_select(0, index).numpy(force=True) for tensor in self.tensors])

    @torch.inference_mode()
    def write(self, rows: Rows, state: State) -> None:
        """Sets the states in these rows."""
        if not self.tensors:
            return
        index = torch.tensor(rows, device=self.tensors[0].device)
        for tensor, of_rows in zip(self.tensors, state, strict=True):
            # A copy: a request's own bytes are not to be written to, and torch would say so.
            tensor.index_copy_(0, index, torch.tensor(of_rows, device=tensor.device))
