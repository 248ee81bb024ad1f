"""A server that keeps states as on a GPU, on the CPU: a program, over an artifact's own policy.

`python -m tests.service.device_server MODE FLAGS` is `python -m service FLAGS` of one of torch's
runtimes. In MODE `gated` the device says on stdout `step N`, for N rows, as it begins a request's
batch, and waits for a line on stdin, which may say `lost`; in `free` it does not. In `broken` it
fails whatever it is given, and in `lost` it is lost from the first. An interpreter that comes to
its end says so.
"""

import atexit
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from math import inf

from export.loaders.protocol import LoadedStep
from export.manifest import Manifest
from service import server
from service.engine import engine
from service.runtime.cpu_device import CpuDevice
from service.runtime.device_runtime import DeviceRuntime
from service.runtime.protocol import DeviceLost, Rows


class GatedDevice(CpuDevice):
    """`num_rows` are those of the batch that is submitted next; 0 is what is none of a request."""

    num_rows = 0
    is_lost = False

    def submit(self, work: Callable[[], None]) -> Future[None]:
        num_rows, self.num_rows = self.num_rows, 0
        if not num_rows:
            return super().submit(work)

        def wait_and_work() -> None:
            sys.stdout.write(f"step {num_rows}\n")
            sys.stdout.flush()
            if sys.stdin.readline() == "lost\n":
                self.is_lost = True
            if self.is_lost:
                raise DeviceLost("an illegal memory access was encountered")
            work()

        return super().submit(wait_and_work)


class BrokenDevice(CpuDevice):
    error: Exception = RuntimeError("out of memory")

    def submit(self, work: Callable[[], None]) -> Future[None]:
        def fail() -> None:
            raise self.error

        return super().submit(fail)


class LostDevice(BrokenDevice):
    error = DeviceLost("an illegal memory access was encountered")


class TellingRuntime(DeviceRuntime):
    """Tells its device how many rows it launches."""

    gated: GatedDevice

    def launch(self, read_rows: Rows, write_rows: Rows, *, beside_s: float = inf) -> None:
        self.gated.num_rows = len(read_rows)
        super().launch(read_rows, write_rows, beside_s=beside_s)


def on_a_device(
    loaded: LoadedStep,
    manifest: Manifest,
    *,
    num_rows: int,
    batch_sizes: Sequence[int],
    tf32: bool = False,
) -> DeviceRuntime:
    """In the place of `service.runtime.load.with_states`. TF32 is a GPU's."""
    assert not tf32
    device = DEVICES[mode]()
    runtime = TellingRuntime if mode == "gated" else DeviceRuntime
    made = runtime(
        loaded,
        device,
        spec=manifest.spec,
        num_rows=num_rows,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        batch_sizes=batch_sizes,
    )
    if isinstance(made, TellingRuntime) and isinstance(device, GatedDevice):
        made.gated = device
    return made


DEVICES: dict[str, type[CpuDevice]] = {
    "gated": GatedDevice,
    "free": CpuDevice,
    "broken": BrokenDevice,
    "lost": LostDevice,
}

if __name__ == "__main__":
    mode = sys.argv.pop(1)
    atexit.register(print, "the interpreter's end")
    engine.with_states = on_a_device  # type: ignore[attr-defined]
    raise SystemExit(server.main())
