"""What only a GPU can show: graphs, copies, memory, and that a launch does not wait."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from export.loaders.torch_step import TorchStep
from export.manifest import ArtifactError, Manifest, bucket_sizes, step_inputs, step_outputs
from service.runtime.cuda_device import CudaDevice
from service.runtime.device_runtime import DeviceRuntime
from service.runtime.load import load_runtime
from tests.gpu.conftest import LARGEST, Exported, Note
from tests.gpu.device import needs_cuda
from tests.service.runtime.test_device_runtime import parameters_of
from tests.specs import TINY_V1

pytestmark = [pytest.mark.gpu, needs_cuda]

RUNTIMES = {"torchscript": "torchscript", "eager": "pt2", "aoti": "aoti"}
SIZES = bucket_sizes(LARGEST)
NUM_BATCHES = 50
SPIN_CYCLES = 1_000_000_000
"""Half a second or so."""
SEGMENT_MIB = 2.0
"""What torch takes of a GPU's memory at once, at least."""


class Counting(CudaDevice):
    """Counts captures, and the memory that each reserves, in MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.reserved_mib: list[float] = []

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        before = torch.cuda.memory_reserved()
        captured = super().capture(run)
        self.reserved_mib.append((torch.cuda.memory_reserved() - before) / 2**20)
        return captured


class OnGpu:
    """A runtime of V1 on the GPU, warmed up, and its device."""

    def __init__(self, artifact: Path, runtime: str) -> None:
        manifest = Manifest.read(artifact)
        loaded = load_runtime(artifact, manifest, name=runtime, device="cuda", num_threads=1)
        assert isinstance(loaded, TorchStep)
        self.loaded = loaded
        self.device = Counting()
        self.runtime = DeviceRuntime(
            loaded,
            self.device,
            spec=TINY_V1,
            num_rows=2 * LARGEST,
            inputs=step_inputs(TINY_V1),
            outputs=step_outputs(TINY_V1),
            batch_sizes=SIZES,
        )
        self.runtime.warm_up()

    def launch(self, num: int = LARGEST) -> None:
        rows = np.arange(num, dtype=np.intp)
        self.runtime.launch(rows, rows + LARGEST)

    def step(self, num: int = LARGEST) -> None:
        self.launch(num)
        self.runtime.collect()


@pytest.fixture(params=RUNTIMES)
def on_gpu(request: pytest.FixtureRequest, exported: Exported) -> OnGpu:
    return OnGpu(exported(TINY_V1.name, RUNTIMES[request.param]), request.param)


def test_there_is_a_graph_for_each_batch_size_and_they_share_their_memory(
    on_gpu: OnGpu, note: Note
) -> None:
    reserved_mib = on_gpu.device.reserved_mib
    assert len(reserved_mib) == len(SIZES)
    largest, *others = reserved_mib  # which is the first
    assert sum(others) <= max(largest, 2 * SEGMENT_MIB)
    by_size = dict(zip(reversed(SIZES), reserved_mib, strict=True))
    said = ", ".join(f"{size}: {mib:g}" for size, mib in by_size.items() if mib)
    note(f"{on_gpu.runtime.name}: MiB reserved by capture, by batch size: {said or 'none'}")


def test_a_batch_is_one_copy_there_one_launch_and_one_copy_back(
    on_gpu: OnGpu, tmp_path: Path, note: Note
) -> None:
    on_gpu.step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for at in range(NUM_BATCHES):
            on_gpu.step(SIZES[at % len(SIZES)])
        torch.cuda.synchronize()
    names = [event.name for event in profiled.events()]
    counts = {
        what: sum(name.startswith(what) for name in names)
        for what in ("Memcpy HtoD", "Memcpy DtoH", "cudaGraphLaunch", "cudaLaunchKernel")
    }
    note(f"{on_gpu.runtime.name}: in {NUM_BATCHES} batches {counts}")
    assert counts == {
        "Memcpy HtoD": NUM_BATCHES,
        "Memcpy DtoH": NUM_BATCHES,
        "cudaGraphLaunch": NUM_BATCHES,
        "cudaLaunchKernel": 0,
    }


def test_nothing_is_allocated_while_serving(on_gpu: OnGpu) -> None:
    def num_allocated() -> int:
        stats = torch.cuda.memory_stats()
        return int(stats["allocation.all.allocated"]) + int(stats["segment.all.allocated"])

    on_gpu.step()
    before = num_allocated()
    for at in range(NUM_BATCHES):
        on_gpu.step(SIZES[at % len(SIZES)])
    assert num_allocated() == before


def test_a_launch_returns_while_the_gpu_works_and_another_follows_it(on_gpu: OnGpu) -> None:
    on_gpu.step()
    spin: Callable[[int], None] = torch.cuda._sleep
    busy = on_gpu.device.submit(partial(spin, SPIN_CYCLES))
    on_gpu.launch()
    on_gpu.launch(3)
    assert not busy.done()
    assert not on_gpu.runtime.is_done()
    assert len(on_gpu.runtime.collect().arrays["action"]) == LARGEST
    assert len(on_gpu.runtime.collect().arrays["action"]) == 3
    assert on_gpu.runtime.is_idle()


def test_new_weights_are_copies_between_launches_and_no_capture(
    on_gpu: OnGpu, exported: Exported
) -> None:
    artifact = exported(TINY_V1.name, "torchscript", "fp32", "cpu")
    steps = [on_gpu.loaded.with_parameters(parameters_of(artifact, s)) for s in (0.5, 2.0, 1.0)]
    on_gpu.runtime.prepare(steps[0])()  # machine code's first ones are captured, in its own place
    before = len(on_gpu.device.reserved_mib)
    for step in steps:
        on_gpu.launch()
        adopt = on_gpu.runtime.prepare(step)
        on_gpu.runtime.collect()
        adopt()
        on_gpu.step()
    assert len(on_gpu.device.reserved_mib) == before


def test_products_are_in_float32_unless_tf32_is_asked_for(note: Note) -> None:
    """As 256 wide sums show, of numbers whose last bits TF32 leaves out."""
    a, b = torch.rand(2, 256, 256, device="cuda")
    products = {}
    for tf32 in (False, True):
        device = CudaDevice(tf32=tf32)
        product = torch.empty_like(a)

        def multiply(out: Tensor = product) -> None:
            torch.mm(a, b, out=out)

        with device.as_served():
            device.submit(multiply).result()
            replay = device.capture(multiply)
        assert torch.get_float32_matmul_precision() == "highest"
        product.zero_()
        device.settle()
        device.submit(replay).result()
        products[tf32] = product.double()
    exact = a.double() @ b.double()
    off = {tf32: float((of - exact).abs().max() / exact.max()) for tf32, of in products.items()}
    note(f"products are {off[False]:.1e} off in float32, and {off[True]:.1e} in TF32")
    assert off[False] < 5e-6
    if torch.cuda.get_device_capability() >= (8, 0):
        assert 2 * off[False] < off[True] < 1e-2


def count(number: Tensor) -> None:
    number.add_(1)


@pytest.mark.parametrize("is_broken_off", [False, True])
@pytest.mark.parametrize("has_another", [False, True])
def test_a_capture_that_fails_says_why_and_the_next_one_works(
    is_broken_off: bool, has_another: bool
) -> None:
    """Broken off by CUDA, or by an error of ours; beside another one that serves, or alone."""
    device = CudaDevice()
    number = torch.zeros(1, device="cuda")
    device.settle()
    work = partial(count, number)
    device.submit(work).result()

    def fails() -> None:
        work()
        if is_broken_off:
            number.item()  # waits for the stream, which is not to be waited for
        raise ArtifactError("not the manifest's")

    before = torch.cuda.current_stream()
    with device.as_served():
        others = [device.capture(work)] * has_another
        with pytest.raises(RuntimeError if is_broken_off else ArtifactError):
            device.capture(fails)
        assert torch.cuda.current_stream() == before
        replays = [*others, device.capture(work), device.capture(work)]
    for replay in replays:
        device.submit(replay).result()
    assert number.item() == 1 + len(replays)


def test_others_are_served_while_a_step_is_captured(on_gpu: OnGpu) -> None:
    """And a capture waits for none of them."""
    on_gpu.step()
    spin: Callable[[int], None] = torch.cuda._sleep
    number = torch.zeros(1, device="cuda")
    on_gpu.device.settle()
    work = partial(count, number)
    on_gpu.device.submit(work).result()  # its kernel is loaded then, which may wait for others
    busy = on_gpu.device.submit(partial(spin, SPIN_CYCLES))
    with on_gpu.device.as_served():
        replay = on_gpu.device.capture(work)
    assert not busy.done()
    on_gpu.step()
    on_gpu.device.submit(replay).result()
    assert number.item() == 2
