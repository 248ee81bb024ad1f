"""A step on a device, to be timed: alone on what is there, and as a batch with its two copies."""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.loaders.torch_step import TorchStep
from export.manifest import Manifest
from export.timing import Call
from model.step_spec import StepSpec
from service.bench.pool import POOL_SIZE, Pool
from service.runtime.cpu_device import CpuDevice
from service.runtime.cuda_device import CudaDevice
from service.runtime.device_runtime import RUNS_BEFORE_CAPTURE, DeviceRuntime
from service.runtime.device_states import DeviceStates
from service.runtime.device_step import READ_ROW, WRITE_ROW, DeviceStep, Packing
from service.runtime.load import with_states
from service.runtime.protocol import Runtime


def given(spec: StepSpec, rows: int) -> dict[str, NDArray[Any]]:
    pool = Pool.random(spec, seed=0)
    return {name: array[np.arange(rows) % POOL_SIZE] for name, array in pool.by_name().items()}


def captured(
    device: CudaDevice | CpuDevice, manifest: Manifest, loaded: TorchStep, rows: int
) -> Call:
    """The step alone, whose batch and states are on the device already."""
    states = DeviceStates(manifest.spec, 2 * rows, device.torch_device)
    packing = Packing(states, manifest.inputs, manifest.outputs)
    brought = device.host_buffer(rows, packing.brought.row_bytes)
    arrays = packing.brought.views(brought.numpy())
    for name, array in given(manifest.spec, rows).items():
        arrays[name][:] = array
    arrays[READ_ROW][:], arrays[WRITE_ROW][:] = np.arange(rows), np.arange(rows) + rows
    results = device.host_buffer(rows, packing.given.row_bytes)
    on_device = [buffer.to(device.torch_device) for buffer in (brought, results)]
    step = DeviceStep(loaded.enliven(), states, packing, *on_device)
    device.settle()
    run = partial(step, rows)
    with device.as_served():
        for _ in range(RUNS_BEFORE_CAPTURE):
            device.submit(run).result()
        replay = device.capture(run)
    return lambda kept=step: replay()  # which works on the tensors that the step keeps


def batch(
    device: CudaDevice | CpuDevice | None, manifest: Manifest, loaded: TorchStep, rows: int
) -> Call:
    """A batch from the host's memory to the host's: its states on the device, or on the host."""
    if device is None:
        runtime: Runtime = with_states(loaded, manifest, num_rows=2 * rows, batch_sizes=(rows,))
    else:
        runtime = DeviceRuntime(
            loaded,
            device,
            spec=manifest.spec,
            num_rows=2 * rows,
            inputs=manifest.inputs,
            outputs=manifest.outputs,
            batch_sizes=(rows,),
        )
    runtime.warm_up()
    of_batch, row = given(manifest.spec, rows), np.arange(rows)

    def run() -> None:
        for name, array in of_batch.items():
            runtime.inputs[name][:] = array
        runtime.launch(row, row + rows)
        runtime.collect()

    return run
