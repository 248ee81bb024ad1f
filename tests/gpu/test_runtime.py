"""States, batches and weights on the device against the host's runtime on the CPU."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.artifact import open_artifact
from export.loaders.load import FORMAT_OF
from export.loaders.torch_step import TorchStep
from export.manifest import (
    Device,
    Manifest,
    Precision,
    bucket_sizes,
    step_inputs,
    step_outputs,
)
from service.runtime.arrays import Arrays, allocate
from service.runtime.auto import choose_runtime, rows_are_alike
from service.runtime.device_runtime import DeviceRuntime
from service.runtime.load import load_runtime
from service.runtime.protocol import Rows
from tests.gpu.beside_cpu import BesideCpu
from tests.gpu.conftest import LARGEST, POLICIES, Exported, Note
from tests.gpu.device import DEVICE, HAS_GPU, new_device
from tests.service.runtime.test_device_runtime import on_device, parameters_of
from tests.specs import TINY_V1, TINY_V2

pytestmark = pytest.mark.gpu

RUNTIMES = ("torchscript", "eager", "aoti")


def loaded_on(device: Device, artifact: Path, runtime: str) -> TorchStep:
    loaded = load_runtime(
        artifact, Manifest.read(artifact), name=runtime, device=device, num_threads=1
    )
    assert isinstance(loaded, TorchStep)
    return loaded


def beside_cpu(
    policy: str,
    runtime: str,
    exported: Exported,
    rng: np.random.Generator,
    precision: Precision = "fp32",
) -> tuple[BesideCpu, TorchStep, TorchStep]:
    """Both runtimes, and the steps they were made with: the CPU's first."""
    # On a GPU what judges is of another export, and never was near one.
    of_cpu = "torchscript" if HAS_GPU else runtime
    artifact = exported(policy, FORMAT_OF[runtime], precision)
    judge = exported(policy, FORMAT_OF[of_cpu], precision, "cpu")
    reference, loaded = loaded_on("cpu", judge, of_cpu), loaded_on(DEVICE, artifact, runtime)
    spec = POLICIES[policy]
    runtime_on = on_device(loaded, spec, new_device())
    return BesideCpu(reference, runtime_on, spec, rng, precision), reference, loaded


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_device_does_what_the_host_does_with_two_batches_under_way(
    policy: str, runtime: str, exported: Exported, rng: np.random.Generator
) -> None:
    both, _, _ = beside_cpu(policy, runtime, exported, rng)
    assert both.run() > 0, "rows that are not finite were among them"
    for each in both.runtimes:  # captured, and the states as they were
        each.warm_up()
    both.check_states()
    assert both.run() > 0


@pytest.mark.parametrize("policy", [TINY_V1.name, TINY_V2.name])
def test_so_it_does_in_bf16(policy: str, exported: Exported, rng: np.random.Generator) -> None:
    both, _, _ = beside_cpu(policy, "torchscript", exported, rng, "bf16")
    for each in both.runtimes:
        each.warm_up()
    both.run()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_new_weights_serve_from_the_next_launch_on_and_the_old_come_back(
    runtime: str, exported: Exported, rng: np.random.Generator
) -> None:
    both, reference, loaded = beside_cpu(TINY_V1.name, runtime, exported, rng)
    artifact = exported(TINY_V1.name, "torchscript", "fp32", "cpu")
    for each in both.runtimes:
        each.warm_up()
    for scale in (0.5, 1.5, None, 0.5):
        following = [reference, loaded]
        if scale is not None:
            parameters = parameters_of(artifact, scale)
            following = [step.with_parameters(parameters) for step in following]
        pairs = zip(both.runtimes, following, strict=True)
        adopts = [each.prepare(step) for each, step in pairs]
        both.run(4)  # those before serve still
        for adopt in adopts:
            adopt()
        both.run(8)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_whether_rows_depend_on_their_batch_is_measured_and_said(
    runtime: str, exported: Exported, note: Note
) -> None:
    loaded = loaded_on(DEVICE, exported(TINY_V1.name, FORMAT_OF[runtime]), runtime)
    is_alike = rows_are_alike(loaded, TINY_V1, bucket_sizes(LARGEST))
    said = "does not depend" if is_alike else "depends in its last bits"
    note(f"{runtime} on {DEVICE}: a row's answer {said} on the size of its batch")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_with_batches_of_one_size_rows_do_not_depend_on_their_batch(
    runtime: str, exported: Exported, rng: np.random.Generator
) -> None:
    spec = TINY_V1
    served = DeviceRuntime(
        loaded_on(DEVICE, exported(spec.name, FORMAT_OF[runtime]), runtime),
        new_device(),
        spec=spec,
        num_rows=2 * LARGEST,
        inputs=step_inputs(spec),
        outputs=step_outputs(spec),
        batch_sizes=(LARGEST,),
    )
    served.warm_up()
    given = allocate(step_inputs(spec), LARGEST)
    for array in given.values():
        if array.dtype == np.float32:
            array[:] = rng.uniform(-0.9, 0.9, size=array.shape)
    all_rows = np.arange(LARGEST, dtype=np.intp)
    served.write(all_rows, tuple([given[state.input] for state in spec.states]))
    together = stepped(served, given, all_rows)
    for num in (1, 3, LARGEST // 2, LARGEST):
        rows = rng.permutation(all_rows)[:num]
        for array, of_all in zip(stepped(served, given, rows), together, strict=True):
            assert array.tobytes() == of_all[rows].tobytes()


def stepped(runtime: DeviceRuntime, given: Arrays, rows: Rows) -> list[NDArray[Any]]:
    """What a batch of these rows is given, states included; they go to rows of their own."""
    for name, array in runtime.inputs.items():
        array[: len(rows)] = given[name][rows]
    runtime.launch(rows, rows + LARGEST)
    decided = runtime.collect()
    assert decided.is_finite is None
    return [*decided.arrays.values(), *runtime.read(rows + LARGEST)]


def test_auto_measures_the_candidates_on_the_device(
    exported: Exported, caplog: pytest.LogCaptureFixture, note: Note
) -> None:
    caplog.set_level(logging.INFO)
    artifact = open_artifact(exported(TINY_V1.name, "torchscript,aoti"))
    name = choose_runtime(artifact, device=DEVICE, num_threads=1, batch_sizes=bucket_sizes(8))
    assert name in {"torchscript", "aoti"}
    assert all(f"auto: {word}" not in caplog.text for word in ("torchscript does", "aoti does"))
    note(f"auto on {DEVICE}: {caplog.messages[-1]}")
