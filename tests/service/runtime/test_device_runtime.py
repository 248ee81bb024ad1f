"""States and batches on a device, here the CPU, against the same in host memory: bit for bit."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.exporter import export_policy
from export.loaders.torch_step import TorchStep
from export.manifest import Manifest, step_inputs, step_outputs
from export.parameters import Parameters
from model.sb3.spec import SB3Spec
from model.spec import PolicySpec
from model.step_spec import StepSpec
from service.runtime.arrays import Arrays, allocate, first
from service.runtime.auto import measure, rows_are_alike
from service.runtime.cpu_device import CpuDevice
from service.runtime.device_runtime import Device, DeviceRuntime
from service.runtime.host import HostRuntime, HostStates
from service.runtime.keeping_step import KeepingStep
from service.runtime.load import load_runtime
from service.runtime.protocol import Outputs, Rows, Runtime, State
from tests.random_inputs import random_policy
from tests.sb3.policies import random_sb3
from tests.service.runtime.sums import Sums
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
