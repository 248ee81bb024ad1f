"""The CPU as a device of its own: what a GPU's runtime does, where there is no GPU."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class CpuDevice:
    """A `Device` whose work runs on one thread. Nothing is captured: it runs as it is."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self._thread = ThreadPoolExecutor(1, "device")

    def host_buffer(self, num_rows: int, row_bytes: int) -> Tensor:
        return torch.zeros((num_rows, row_bytes), dtype=torch.uint8)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        return run

    def as_served(self) -> AbstractContextManager[None]:
        return nullcontext()

    def submit(self, work: Callable[[], None]) -> Future[None]:
        return self._thread.submit(work)

    def settle(self) -> None:
        """There is nothing that is not done by the time it is called."""
