"""A CPU in a GPU's place: what is told that it runs on `cuda`, and does not."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from export.loaders.protocol import RenewableStep
from export.manifest import Device, Manifest
from service.runtime.cpu_device import CpuDevice
from service.runtime.load import load_runtime


class GpuStandIn(CpuDevice):
    """In the place of `CudaDevice`; knows what it was made with and how often it was used."""

    def __init__(self, *, tf32: bool = False) -> None:
        super().__init__()
        self.tf32 = tf32
        self.num_captured = self.num_submitted = 0

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.num_captured += 1
        return super().capture(run)

    def submit(self, work: Callable[[], None]) -> Future[None]:
        self.num_submitted += 1
        return super().submit(work)


def as_on_a_gpu(
    directory: Path, manifest: Manifest, *, name: str, device: Device, num_threads: int
) -> RenewableStep:
    """In the place of `load_runtime`: a step that says it is on the device, and is on the CPU."""
    loaded: Any = load_runtime(
        directory, manifest, name=name, device="cpu", num_threads=num_threads
    )
    loaded.device = device
    step: RenewableStep = loaded
    return step
