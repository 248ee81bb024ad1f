"""States and batches on a device, here the CPU, against the same in host memory: bit for bit."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from export.exporter import export_policy
from export.loaders.torch_step import Live, TorchStep
from export.manifest import ArtifactError, Manifest, step_inputs, step_outputs
from export.parameters import Parameters
from model.sb3.spec import SB3Spec
from model.spec import PolicySpec
from model.step_spec import StepSpec
from service.runtime.arrays import Arrays, allocate, first
from service.runtime.auto import measure, rows_are_alike
from service.runtime.cpu_device import CpuDevice
from service.runtime.device_runtime import Device, DeviceRuntime
from service.runtime.device_states import DeviceStates
from service.runtime.host import HostRuntime, HostStates
from service.runtime.keeping_step import KeepingStep
from service.runtime.load import load_runtime
from service.runtime.protocol import DeviceLost, Outputs, Rows, Runtime, State
from tests.random_inputs import random_policy
from tests.sb3.policies import random_sb3
from tests.service.fakes import TIMEOUT_S
from tests.specs import TINY_LSTMS, TINY_MLPS, TINY_V1, TINY_V2

NUM_ROWS = 40
SIZES = (1, 2, 4, 8)
NUM_LAUNCHES = 40
POLICIES = {spec.name: spec for spec in (TINY_V1, TINY_V2, TINY_MLPS, TINY_LSTMS)}
FORMATS = ("torchscript", "pt2", "aoti")
RUNTIMES = ("torchscript", "eager", "aoti")


def exported(spec: StepSpec, directory: Path, *, seed: int, formats: Sequence[str]) -> Path:
    assert isinstance(spec, PolicySpec | SB3Spec)
    policy = random_sb3(spec, seed) if isinstance(spec, SB3Spec) else random_policy(spec, seed=seed)
    export_policy(policy, None, directory, name="t", formats=formats, max_batch_size=SIZES[-1])
    return directory


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The artifact of a policy by its name, made once."""
    made: dict[str, Path] = {}

    def artifact(name: str) -> Path:
        if name not in made:
            directory = tmp_path_factory.mktemp("device") / name
            made[name] = exported(POLICIES[name], directory, seed=0, formats=FORMATS)
        return made[name]

    return artifact


def loaded_from(artifact: Path, runtime: str) -> TorchStep:
    manifest = Manifest.read(artifact)
    loaded = load_runtime(artifact, manifest, name=runtime, device="cpu", num_threads=1)
    assert isinstance(loaded, TorchStep)
    return loaded


def on_host(loaded: TorchStep, spec: StepSpec) -> HostRuntime:
    return HostRuntime(
        loaded,
        HostStates(spec, NUM_ROWS),
        inputs=step_inputs(spec),
        outputs=step_outputs(spec),
        batch_sizes=SIZES,
    )


def on_device(
    loaded: TorchStep,
    spec: StepSpec,
    device: Device | None = None,
    *,
    of: type[DeviceRuntime] = DeviceRuntime,
) -> DeviceRuntime:
    return of(
        loaded,
        device or CpuDevice(),
        spec=spec,
        num_rows=NUM_ROWS,
        inputs=step_inputs(spec),
        outputs=step_outputs(spec),
        batch_sizes=SIZES,
    )


class Both:
    """The same policy on the host and on a device, given the same."""

    def __init__(self, loaded: TorchStep, spec: StepSpec, rng: np.random.Generator) -> None:
        self.spec = spec
        self.runtimes: list[Runtime] = [on_host(loaded, spec), on_device(loaded, spec)]
        self.rng = rng
        self.all_rows = np.arange(NUM_ROWS, dtype=np.intp)
        self.under_way: list[Rows] = []
        self.write(self.all_rows)

    def write(self, rows: Rows) -> None:
        """Random states, here and there."""
        state = tuple(
            [
                self.rng.uniform(-0.9, 0.9, size=(len(rows), *of.shape)).astype(np.float32)
                for of in self.spec.states
            ]
        )
        for runtime in self.runtimes:
            runtime.write(rows, state)

    def launch(self) -> None:
        """A random batch, of random rows that no batch under way writes to."""
        free = np.setdiff1d(self.all_rows, np.concatenate([[], *self.under_way]))
        rows = self.rng.permutation(free).astype(np.intp)
        num = int(self.rng.integers(1, SIZES[-1] + 1))
        read, write = rows[:num].copy(), rows[num : 2 * num]
        read[self.rng.random(num) < 0.2] = self.runtimes[0].zero_row
        given = self.batch(num)
        for runtime in self.runtimes:
            assert list(runtime.inputs) == list(given)
            for name, array in given.items():
                runtime.inputs[name][:num] = array
            runtime.launch(read, write, beside_s=0.0)
        self.under_way.append(np.concatenate([read, write]))

    def batch(self, num: int) -> dict[str, NDArray[Any]]:
        given: dict[str, NDArray[Any]] = {}
        for array in step_inputs(self.spec):
            shape = (num, *(int(size) for size in array.shape[1:]))
            if array.dtype == "bool":
                given[array.name] = self.rng.random(shape) < 0.7
                given[array.name][..., 0] = True
            elif array.dtype == "int64":
                given[array.name] = self.rng.integers(0, 3, size=shape)
            else:
                given[array.name] = self.rng.normal(size=shape).astype(np.float32)
        for state in self.spec.states:
            del given[state.input]
        of_heads = np.cumsum([0, *self.spec.head_sizes[:-1]])
        given["action_mask"][:, of_heads] = True  # something is allowed
        is_spoilt = self.rng.random(num) < 0.1
        given["observation"][is_spoilt, -1] = self.rng.choice([np.nan, np.inf])
        return given

    def collect(self) -> Outputs:
        host, device = [runtime.collect() for runtime in self.runtimes]
        self.under_way.pop(0)
        check_alike(host, device)
        return device

    def check_states(self) -> None:
        """In all rows, the zero one included."""
        rows = np.arange(NUM_ROWS + 1, dtype=np.intp)
        host, device = [runtime.read(rows) for runtime in self.runtimes]
        check_same(host, device)
        assert not any(array[-1].any() for array in device)

    def mend(self) -> None:
        """Writes over states that are not finite: nobody goes on from them."""
        for array in self.runtimes[0].read(self.all_rows):
            is_spoilt = ~np.isfinite(array).reshape(NUM_ROWS, -1).all(axis=1)
            if is_spoilt.any():
                self.write(self.all_rows[is_spoilt])

    def run(self, num_launches: int = NUM_LAUNCHES) -> int:
        """As many batches, two under way as a rule; how many had a row that was not finite."""
        num_faulty = 0
        for _ in range(num_launches):
            self.launch()
            if len(self.under_way) == 2:
                num_faulty += self.collect().is_finite is not None
        while self.under_way:
            num_faulty += self.collect().is_finite is not None
        self.check_states()
        self.mend()
        return num_faulty


def check_alike(one: Outputs, other: Outputs) -> None:
    """They are the same, to the last bit."""
    assert list(one.arrays) == list(other.arrays)
    check_same(tuple(one.arrays.values()), tuple(other.arrays.values()))
    assert (one.is_finite is None) == (other.is_finite is None)
    if one.is_finite is not None and other.is_finite is not None:
        assert one.is_finite.tolist() == other.is_finite.tolist()


def check_same(one: State | tuple[Any, ...], other: State | tuple[Any, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_device_does_what_the_host_does_bit_for_bit(
    policy: str,
    runtime: str,
    artifacts: Callable[[str], Path],
    rng: np.random.Generator,
) -> None:
    both = Both(loaded_from(artifacts(policy), runtime), POLICIES[policy], rng)
    assert both.run() > 0, "rows that are not finite were among them"
    for each in both.runtimes:  # it touches no row
        each.warm_up()
    both.check_states()
    both.run()


def test_so_it_does_with_torch_s_compiler(
    artifacts: Callable[[str], Path], rng: np.random.Generator
) -> None:
    both = Both(loaded_from(artifacts(TINY_V1.name), "compile"), TINY_V1, rng)
    assert both.run() > 0


def parameters_of(artifact: Path, scale: float) -> Parameters:
    """The artifact's own, each some other number of times as large."""
    manifest = Manifest.read(artifact)
    own = loaded_from(artifact, "torchscript").enliven().parameters
    return {p.name: (own[p.name] * scale).detach().numpy() for p in manifest.parameters}


class Counting(CpuDevice):
    """Counts captures."""

    def __init__(self) -> None:
        super().__init__()
        self.num_captured = 0

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.num_captured += 1
        return super().capture(run)


@pytest.mark.parametrize(
    ("policy", "runtime"),
    [
        *((TINY_V1.name, runtime) for runtime in RUNTIMES),
        (TINY_V2.name, "eager"),
        (TINY_V2.name, "aoti"),
        (TINY_MLPS.name, "eager"),
        (TINY_LSTMS.name, "eager"),
    ],
)
def test_new_weights_serve_from_the_next_launch_on_and_the_old_come_back(
    policy: str, runtime: str, artifacts: Callable[[str], Path], rng: np.random.Generator
) -> None:
    spec, artifact = POLICIES[policy], artifacts(policy)
    own = loaded_from(artifact, runtime)
    both = Both(own, spec, rng)
    counting = Counting()
    both.runtimes[1] = on_device(own, spec, counting)
    both.write(both.all_rows)
    for each in both.runtimes:
        each.warm_up()
    assert counting.num_captured == len(SIZES)
    half, twice = [own.with_parameters(parameters_of(artifact, scale)) for scale in (0.5, 2.0)]
    before_any = answer_of(own, spec)
    captures = []
    for following in (half, twice, half, own, twice, own):
        before = counting.num_captured
        adopts = [each.prepare(following) for each in both.runtimes]
        both.run(4)  # those before serve still
        for adopt in adopts:
            adopt()
        both.run(8)
        captures.append((counting.num_captured - before) // len(SIZES))
    check_same(answer_of(own, spec), before_any)  # the others were written elsewhere
    before_any = answer_of(half, spec)
    on_device(half, spec).prepare(twice)()
    check_same(answer_of(half, spec), before_any)
    # Nobody gets at those in machine code's own file, to write to them or to read them: it is there
    # twice from the first that are brought on.
    assert captures == ([1, 0, 0, 0, 0, 0] if runtime == "aoti" else [0] * 6)


def answer_of(loaded: TorchStep, spec: StepSpec) -> tuple[NDArray[Any], ...]:
    """What it makes of one row."""
    inputs, outputs = allocate(step_inputs(spec), 1), allocate(step_outputs(spec), 1)
    loaded.bind(inputs, outputs)()
    return tuple(outputs.values())


def test_rows_that_nobody_filled_allow_everything(artifacts: Callable[[str], Path]) -> None:
    """A batch is padded with them, on either of both lanes, and a head has to have a choice."""
    runtime = on_device(loaded_from(artifacts(TINY_V1.name), "torchscript"), TINY_V1)
    for lane in range(2):
        assert runtime.inputs["action_mask"].all(), lane
        runtime.launch(np.array([0], dtype=np.intp), np.array([1], dtype=np.intp))
        runtime.collect()


def test_another_artifact_s_step_is_captured_beside_the_one_that_serves(
    artifacts: Callable[[str], Path], rng: np.random.Generator, tmp_path: Path
) -> None:
    other = exported(TINY_V1, tmp_path / "other", seed=7, formats=("torchscript",))
    first = loaded_from(artifacts(TINY_V1.name), "torchscript")
    both = Both(first, TINY_V1, rng)
    counting = Counting()
    both.runtimes[1] = on_device(first, TINY_V1, counting)
    both.write(both.all_rows)
    for following in (loaded_from(other, "torchscript"), first):
        before = counting.num_captured
        adopts = [each.prepare(following) for each in both.runtimes]
        assert counting.num_captured == before + len(SIZES)
        both.run(4)
        for adopt in adopts:
            adopt()
        both.run(8)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_weights_that_serve_from_the_start_are_captured_once_and_so_are_those_before_them(
    runtime: str, artifacts: Callable[[str], Path], rng: np.random.Generator
) -> None:
    """As after a restart, whose snapshot had weights that were pushed: and then a rollback."""
    spec, artifact = TINY_V1, artifacts(TINY_V1.name)
    own = loaded_from(artifact, runtime)
    half = own.with_parameters(parameters_of(artifact, 0.5))
    both = Both(own, spec, rng)
    counting = Counting()
    both.runtimes[1] = on_device(own, spec, counting)
    both.write(both.all_rows)
    for each in both.runtimes:
        each.prepare(half)()
        each.warm_up()
    both.run(4)
    captures = [counting.num_captured]
    for following in (own, half, own):
        for each in both.runtimes:
            each.prepare(following)()
        both.run(4)
        captures.append(counting.num_captured)
    of_own = len(SIZES) * (runtime == "aoti")
    assert captures == [len(SIZES)] + [len(SIZES) + of_own] * 3


def test_a_step_that_takes_no_parameters_is_another_step_s_like_in_nothing() -> None:
    """As those are that torch's compiler makes: another one is captured."""
    counting = Counting()
    runtime = on_device(Sums(TINY_V1, []).step(), TINY_V1, counting)
    runtime.warm_up()
    for scale in (3.0, 5.0):
        counting.num_captured = 0
        runtime.prepare(Sums(TINY_V1, [], scale).step())()
        assert counting.num_captured == len(SIZES)
        runtime.inputs["observation"][:1] = 1.0
        runtime.launch(np.array([0], dtype=np.intp), np.array([1], dtype=np.intp))
        assert runtime.collect().arrays["value"].tolist() == [scale]


def test_more_states_than_the_device_has_room_for_are_told_in_gigabytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def zeros(shape: tuple[int, ...], **_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", zeros)
    hidden = TINY_V1.states[0].shape[-1]
    with pytest.raises(MemoryError, match=rf"^{8 * hidden}\.0 GB of states do not, on cpu$"):
        DeviceStates(TINY_V1, 10**9, torch.device("cpu"))


def fails_to_copy(parameters: Mapping[str, Tensor]) -> Live:
    raise RuntimeError("a copy failed")


class Failing(CpuDevice):
    """Fails what it is given, and is lost where `is_lost`."""

    failure: Exception | None = None
    is_lost = False

    def submit(self, work: Callable[[], None]) -> Future[None]:
        def fail() -> None:
            if self.failure is not None:
                raise self.failure
            work()

        return super().submit(fail)

    def settle(self) -> None:
        if self.is_lost:
            raise DeviceLost("an illegal memory access was encountered")


def test_weights_of_which_nobody_knows_how_many_are_new_are_served_no_more(
    artifacts: Callable[[str], Path],
) -> None:
    artifact, device = artifacts(TINY_V1.name), Failing()
    own = loaded_from(artifact, "torchscript")
    adopt = on_device(own, TINY_V1, device).prepare(
        own.with_parameters(parameters_of(artifact, 0.5))
    )
    device.failure = RuntimeError("a copy failed")
    with pytest.raises(DeviceLost, match="new weights are there in part"):
        adopt()


def test_a_lost_device_is_told_wherever_it_is_met(artifacts: Callable[[str], Path]) -> None:
    artifact, device = artifacts(TINY_V1.name), Failing()
    runtime = on_device(loaded_from(artifact, "eager"), TINY_V1, device)
    arrays = step_inputs(TINY_V1), step_outputs(TINY_V1)
    other = TorchStep("t", Sums(TINY_V1, []).__call__, *arrays, enlivened=fails_to_copy)
    out_of_range = np.array([10**6], dtype=np.intp)
    for is_lost in (False, True):
        device.is_lost = is_lost
        with pytest.raises(DeviceLost if is_lost else IndexError):  # as an operation fails
            runtime.read(out_of_range)
        with pytest.raises(DeviceLost if is_lost else RuntimeError):
            runtime.prepare(other)
    row = np.array([0], dtype=np.intp)
    with pytest.raises(DeviceLost):
        runtime.write(row, tuple([np.zeros((1, *s.shape), np.float32) for s in TINY_V1.states]))


class Reading(DeviceRuntime):
    """Counts how often states are taken from it."""

    num_reads = 0

    def read(self, rows: Rows) -> State:
        self.num_reads += 1
        return super().read(rows)


def test_steps_are_timed_without_states_being_brought_and_taken(
    artifacts: Callable[[str], Path],
) -> None:
    loaded = loaded_from(artifacts(TINY_V1.name), "torchscript")
    runtime = on_device(loaded, TINY_V1, of=Reading)
    assert isinstance(runtime, Reading)
    keeping = KeepingStep(runtime, TINY_V1)
    rows_are_alike(keeping, TINY_V1, SIZES)
    num_compared, runtime.num_reads = runtime.num_reads, 0
    measure(keeping, TINY_V1, SIZES)
    assert 0 < num_compared == runtime.num_reads


@pytest.mark.parametrize("policy", POLICIES)
def test_it_can_be_measured_as_any_loaded_step(
    policy: str, artifacts: Callable[[str], Path], rng: np.random.Generator
) -> None:
    spec, loaded = POLICIES[policy], loaded_from(artifacts(policy), "torchscript")
    keeping = KeepingStep(on_device(loaded, spec), spec)
    given = allocate(step_inputs(spec), 3)
    for array in given.values():
        if array.dtype == np.float32:
            array[:] = rng.normal(size=array.shape)
    outputs, wide = allocate(step_outputs(spec), 3), allocate(step_outputs(spec), 4)
    for _ in range(2):
        loaded.bind(padded(given, 4), wide)()
        keeping.bind(given, outputs)()
        check_same(tuple(first(wide, 3).values()), tuple(outputs.values()))
    measured = measure(keeping, spec, (1, 2, 4))
    assert tuple(measured.seconds) == (1, 2, 4)


def padded(arrays: Arrays, num_rows: int) -> Arrays:
    """With rows more like the last."""
    missing = num_rows - len(arrays["observation"])
    return {
        name: np.concatenate([array, *[array[-1:]] * missing]) for name, array in arrays.items()
    }


class Sums(NamedTuple):
    """A policy of tensors: the value is the sum of `observation[0]` so far, so many times."""

    spec: StepSpec
    fail: list[Exception]
    scale: float = 1.0

    def step(self) -> TorchStep:
        return TorchStep("sums", self.__call__, step_inputs(self.spec), step_outputs(self.spec))

    def __call__(self, *given: Tensor) -> list[Tensor]:
        if self.fail:
            raise self.fail[0]
        named = dict(zip([a.name for a in step_inputs(self.spec)], given, strict=True))
        observation = named["observation"]
        named = {
            state.output: named[state.input] + observation[:, :1, None]
            for state in self.spec.states
        }
        num = len(observation)
        results = []
        for array in step_outputs(self.spec):
            if array.name in named:
                results.append(named[array.name])
            elif array.name == "value":
                results.append(named[self.spec.states[0].output][:, 0, 0] * self.scale)
            else:
                shape = (num, *(int(size) for size in array.shape[1:]))
                results.append(torch.zeros(shape, dtype=getattr(torch, array.dtype)))
        return results


class Gated(CpuDevice):
    """Its work waits to be let go, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.lets_go = threading.Semaphore(0)

    def submit(self, work: Callable[[], None]) -> Future[None]:
        def wait_and_work() -> None:
            assert self.lets_go.acquire(timeout=TIMEOUT_S)
            work()

        return super().submit(wait_and_work)


class Slow:
    """Sums on a gated device; the first state of row r is 100 + r."""

    def __init__(self) -> None:
        self.device = Gated()
        self.failures: list[Exception] = []
        self.runtime = on_device(Sums(TINY_V1, self.failures).step(), TINY_V1, self.device)
        self.done: SimpleQueue[int] = SimpleQueue()
        self.runtime.when_done = lambda: self.done.put(threading.get_ident())
        rows = np.arange(NUM_ROWS, dtype=np.intp)
        of_rows = 100 + np.arange(NUM_ROWS, dtype=np.float32)[:, None, None]
        shapes = [(NUM_ROWS, *state.shape) for state in TINY_V1.states]
        self.runtime.write(rows, tuple([np.broadcast_to(of_rows, s).copy() for s in shapes]))

    def launch(self, read: list[int], write: list[int], xs: list[float]) -> None:
        self.runtime.inputs["observation"][: len(xs), 0] = xs
        self.runtime.launch(np.array(read, dtype=np.intp), np.array(write, dtype=np.intp))

    def let_go(self) -> int:
        """One piece of work; the thread that told its end."""
        self.device.lets_go.release()
        return self.done.get(timeout=TIMEOUT_S)

    def values(self) -> list[float]:
        values: list[float] = self.runtime.collect().arrays["value"].tolist()
        return values

    def h(self, *rows: int) -> list[float]:
        state = self.runtime.read(np.array(rows, dtype=np.intp))
        of_rows: list[float] = state[0][:, 0, 0].tolist()
        return of_rows


@pytest.fixture
def slow() -> Iterator[Slow]:
    slow = Slow()
    yield slow
    slow.device.lets_go.release(100)


def test_a_launch_returns_while_the_device_works_and_another_thread_tells_its_end(
    slow: Slow,
) -> None:
    assert slow.runtime.is_idle()
    slow.launch([0, 1], [2, 3], [10, 20])
    slow.launch([4], [5], [30])
    assert not slow.runtime.is_done()
    assert slow.done.empty()
    assert slow.h(2, 3, 5) == [102, 103, 105]
    assert slow.let_go() != threading.get_ident()
    assert slow.runtime.is_done()
    assert not slow.runtime.is_idle()
    assert slow.values() == [110, 121]
    assert slow.h(2, 3, 5) == [110, 121, 105]
    assert not slow.runtime.is_done()
    slow.let_go()
    assert slow.runtime.is_idle()
    assert slow.values() == [134]
    assert slow.h(0, 1, 2, 3, 4, 5) == [100, 101, 110, 121, 104, 134]


def test_what_is_written_for_the_next_batch_is_not_read_by_the_one_under_way(slow: Slow) -> None:
    slow.launch([0, 1], [2, 3], [10, 20])
    slow.runtime.inputs["observation"][:] = 1000.0
    slow.let_go()
    assert slow.values() == [110, 121]


def test_what_steps_gave_is_kept_however_many_follow(slow: Slow) -> None:
    given = []
    for number in range(6):
        slow.launch([0, 2], [1, 3], [number, np.nan if number < 2 else 0])
        slow.let_go()
        given.append(slow.runtime.collect())
    assert [of.arrays["value"].tolist()[0] for of in given] == [100 + number for number in range(6)]
    assert [of.is_finite is None for of in given] == [False] * 2 + [True] * 4
    for of in given:
        assert of.is_finite is None or of.is_finite.tolist() == [True, False]


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_every_row_that_is_not_finite_is_named(slow: Slow, number: float) -> None:
    slow.launch([0, 1, 2], [3, 4, 5], [1.0, number, 1.0])
    slow.let_go()
    is_finite = slow.runtime.collect().is_finite
    assert is_finite is not None
    assert is_finite.tolist() == [True, False, True]
    slow.launch([0], [3], [1.0])
    slow.let_go()
    assert slow.runtime.collect().is_finite is None


def test_states_are_read_and_written_beside_the_batch_under_way(slow: Slow) -> None:
    slow.launch([0], [1], [10])
    rows = np.array([7, 9], dtype=np.intp)
    slow.runtime.write(rows, slow.runtime.read(np.array([5, 6], dtype=np.intp)))
    assert slow.h(7, 9) == [105, 106]
    slow.let_go()
    assert slow.values() == [110]


def test_a_step_that_fails_is_raised_where_it_is_collected_and_its_lane_is_free(
    slow: Slow,
) -> None:
    slow.failures.append(RuntimeError("out of memory"))
    slow.launch([0], [1], [10])
    slow.launch([2], [3], [10])
    slow.let_go()
    assert slow.runtime.is_done()
    with pytest.raises(RuntimeError, match="out of memory"):
        slow.runtime.collect()
    slow.failures.clear()
    slow.let_go()
    assert slow.values() == [112]
    assert slow.h(1, 3) == [101, 112]
    for number in range(4):
        slow.launch([0], [1], [number])
        slow.let_go()
        assert slow.values() == [100 + number]


def test_a_step_that_gives_something_else_moves_no_state(slow: Slow) -> None:
    spec = TINY_V1

    def wrong(*given: Tensor) -> list[Tensor]:
        return [result[..., :1] for result in Sums(spec, [])(*given)]

    runtime = on_device(TorchStep("w", wrong, step_inputs(spec), step_outputs(spec)), spec)
    runtime.launch(np.array([0], dtype=np.intp), np.array([1], dtype=np.intp))
    with pytest.raises(ArtifactError, match=r"output 'action' is int64 \[1, 1\], expected"):
        runtime.collect()
    assert not any(array.any() for array in runtime.read(np.array([1], dtype=np.intp)))


def test_a_warm_up_that_fails_says_so_and_one_that_is_not_wanted_ends() -> None:
    failures: list[Exception] = [RuntimeError("no kernel")]
    counting = Counting()
    runtime = on_device(Sums(TINY_V1, failures).step(), TINY_V1, counting)
    with pytest.raises(RuntimeError, match="no kernel"):
        runtime.warm_up()
    failures.clear()
    runtime.warm_up(is_wanted=lambda: counting.num_captured < 2)
    assert counting.num_captured == 2
    runtime.warm_up()
    assert counting.num_captured == 2 + len(SIZES)


class Captures(CpuDevice):
    """Keeps what was captured, in order, and knows whether products are as they are served."""

    def __init__(self) -> None:
        super().__init__()
        self.is_as_served = False
        self.captured: list[Callable[[], None]] = []

    @contextmanager
    def as_served(self) -> Iterator[None]:
        before, self.is_as_served = self.is_as_served, True
        yield
        self.is_as_served = before

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        assert self.is_as_served
        self.captured.append(run)
        return run


class Watched(NamedTuple):
    """Sums, and for each call its rows and whether it was as precise as it is to be served."""

    sums: Sums
    device: Captures
    calls: list[tuple[int, bool]]

    def step(self) -> TorchStep:
        spec = self.sums.spec
        return TorchStep("w", self.__call__, step_inputs(spec), step_outputs(spec))

    def __call__(self, *given: Tensor) -> list[Tensor]:
        self.calls.append((len(given[0]), self.device.is_as_served))
        return self.sums(*given)


def test_the_largest_batch_is_run_and_captured_first_and_all_as_they_are_to_be_served() -> None:
    """Others find room then in the memory that it took; and products are as they will be."""
    device = Captures()
    watched, another = [Watched(Sums(TINY_V1, []), device, []) for _ in range(2)]
    runtime = on_device(watched.step(), TINY_V1, device)
    for ready, calls in (
        (runtime.warm_up, watched.calls),
        (partial(runtime.prepare, another.step()), another.calls),
    ):
        assert calls == []
        ready()
        assert calls == [(size, True) for size in (8, 4, 2, 1) for _ in range(3)]
        for captured in device.captured[-len(SIZES) :]:
            captured()
        assert calls[-len(SIZES) :] == [(size, False) for size in (8, 4, 2, 1)]


class Copied(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the copies from host buffers and to them: `"there"` or `"back"`, and how many bytes."""

    def __init__(self, buffers: list[Tensor], copies: list[tuple[str, int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at = {buffer.untyped_storage().data_ptr() for buffer in buffers}
        self.copies = copies

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            to, of = args[:2]
            for which, tensor in (("there", of), ("back", to)):
                if tensor.untyped_storage().data_ptr() in self.at:
                    self.copies.append((which, tensor.nbytes))
        return func(*args, **(kwargs or {}))


class Bus(CpuDevice):
    """Sees what crosses it: all copies between its host buffers and other memory."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []
        self.copies: list[tuple[str, int]] = []

    def host_buffer(self, num_rows: int, row_bytes: int) -> Tensor:
        self.buffers.append(super().host_buffer(num_rows, row_bytes))
        return self.buffers[-1]

    def submit(self, work: Callable[[], None]) -> Future[None]:
        def watched() -> None:
            with Copied(self.buffers, self.copies):
                work()

        return super().submit(watched)


@pytest.mark.parametrize(("num", "size"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8)])
def test_a_batch_is_one_copy_there_and_one_back_of_no_more_rows_than_it_is_padded_to(
    num: int, size: int
) -> None:
    bus = Bus()
    runtime = on_device(Sums(TINY_V1, []).step(), TINY_V1, bus)
    rows = np.arange(num, dtype=np.intp)
    for _ in range(3):
        runtime.launch(rows, rows + 10)
        runtime.collect()
    brought, given = [buffer.shape[1] for buffer in bus.buffers[:2]]
    assert bus.copies == [("there", size * brought), ("back", size * given)] * 3


def test_padding_reads_zeros_and_writes_where_nobody_reads(slow: Slow) -> None:
    slow.launch([0, 1, 2, 3, 4], [10, 11, 12, 13, 14], [1e30] * 5)  # of eight
    slow.let_go()
    slow.values()
    slow.launch([5, 6, 7], [20, 21, 22], [1, 2, 3])  # of four: the last is as it was before
    slow.let_go()
    assert slow.values() == [106, 108, 110]
    assert slow.h(*range(10)) == [100 + row for row in range(10)]
    assert slow.h(*range(23, NUM_ROWS), NUM_ROWS) == [
        *(100 + row for row in range(23, NUM_ROWS)),
        0,
    ]
