"""`python -m service` whose engine has its states on the CPU as a device: a program."""

import signal
from collections.abc import Sequence

from export.loaders.protocol import LoadedStep
from export.manifest import Manifest
from service import server
from service.engine import engine
from service.runtime.cpu_device import CpuDevice
from service.runtime.device_runtime import DeviceRuntime


def with_states(
    loaded: LoadedStep, manifest: Manifest, *, num_rows: int, batch_sizes: Sequence[int]
) -> DeviceRuntime:
    return DeviceRuntime(
        loaded,
        CpuDevice(),
        spec=manifest.spec,
        num_rows=num_rows,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        batch_sizes=batch_sizes,
    )


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    engine.with_states = with_states
    return server.main()


if __name__ == "__main__":
    raise SystemExit(main())
