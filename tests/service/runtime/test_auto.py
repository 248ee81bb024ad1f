"""What `--runtime auto` takes."""

import importlib.util
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.artifact import open_artifact
from export.exporter import export_policy
from export.manifest import Manifest, bucket_sizes, timed_sizes
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from model.step_spec import StepSpec
from service.runtime import auto
from service.runtime.auto import Measurement, best, choose_runtime, measure, rows_are_alike
from service.runtime.load import load_runtime, runs_on
from service.server import load_policy
from service.settings import Settings
from tests.running_server import running_server
from tests.service.fakes import Arrays, SummingRuntime
from tests.service.gpu_stand_in import GpuStandIn, as_on_a_gpu
from tests.specs import TINY_LSTMS, TINY_MLPS, TINY_V1

BATCH_SIZES = (1, 2, 4)
SIZES = bucket_sizes(64)


@pytest.fixture(scope="module")
def two_formats(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("formats") / "tiny"
    formats = ("torchscript", "onnx")
    export_policy(policy, None, output, name="tiny", formats=formats, max_batch_size=4)
    return output


def choose(directory: Path) -> str:
    artifact = open_artifact(directory)
    return choose_runtime(artifact, device="cpu", num_threads=1, batch_sizes=BATCH_SIZES)


def test_the_fastest_over_all_batch_sizes_is_taken() -> None:
    fast_alone = Measurement({1: 1e-5, 64: 9e-3}, True)
    fast_together = Measurement({1: 2e-5, 64: 1e-3}, True)
    assert best({"a": fast_alone, "b": fast_together}) == "b"


def test_one_whose_rows_are_alike_comes_before_a_faster_one() -> None:
    fast, alike = Measurement({1: 1e-5}, False), Measurement({1: 9e-5}, True)
    assert best({"a": fast, "b": alike}) == "b"
    assert best({"a": fast}) == "a"


def test_fastest_is_what_takes_the_least_share_of_the_others_time_at_each_size() -> None:
    """Not in all: or large batches would decide, of which there are few."""
    fast_alone = Measurement({1: 1e-5, 64: 1.5e-3}, True)
    fast_together = Measurement({1: 4e-5, 64: 1e-3}, True)
    assert best({"a": fast_alone, "b": fast_together}) == "a"


def test_no_batch_is_measured_that_the_artifact_was_not_checked_with(two_formats: Path) -> None:
    with running_server(two_formats, "--runtime", "auto", "--max-batch-size", "64") as server:
        measured = re.findall(r"auto: batch of (\d+)", server.log())
    assert [int(size) for size in measured] == [1, 2, 4]


def test_where_batches_are_padded_only_full_ones_are_measured(two_formats: Path) -> None:
    flags = ("--runtime", "auto", "--max-batch-size", "3", "--pad-batches")
    with running_server(two_formats, *flags) as server:
        measured = re.findall(r"auto: batch of (\d+)", server.log())
    assert measured == ["3"]


def test_machine_code_runs_on_the_device_it_was_made_for_and_others_move(
    two_formats: Path,
) -> None:
    manifest = Manifest.read(two_formats)
    formats = manifest.formats | {"aoti": manifest.formats["torchscript"]}
    manifest = manifest.model_copy(update={"formats": formats})
    runs = {name: runs_on(name, manifest, "cuda") for name in ("aoti", "torchscript")}
    assert runs == {"aoti": False, "torchscript": True}
    assert runs_on("aoti", manifest, "cpu")


class DependsOnItsBatch(SummingRuntime):
    """A policy whose rows are worth a little more in some places of some batches."""

    def __init__(self, spec: StepSpec, more: Callable[[Arrays], NDArray[Any] | float]) -> None:
        super().__init__(spec)
        self.more = more

    def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
        step = super().bind(inputs, outputs)

        def run() -> None:
            step()
            outputs["value"][:] += np.float32(1e-3) * self.more(inputs)

        return run


def places(inputs: Arrays) -> NDArray[np.int64]:
    return np.arange(len(inputs["observation"]))


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(lambda inputs: len(places(inputs)), id="in larger batches"),
        pytest.param(lambda inputs: places(inputs) > 0, id="behind the first"),
        pytest.param(lambda inputs: places(inputs) >= 32, id="from 32 to 63"),
        pytest.param(places, id="by place"),
        pytest.param(lambda inputs: len(places(inputs)) == 64, id="in the largest batch"),
        pytest.param(lambda inputs: len(places(inputs)) == 36, id="in batches of 36"),
    ],
)
def test_rows_that_depend_on_their_batch_are_not_alike(
    more: Callable[[Arrays], NDArray[Any] | float], spec: PolicySpec
) -> None:
    assert not rows_are_alike(DependsOnItsBatch(spec, more), spec, SIZES)


@settings(max_examples=20, deadline=None)
@given(
    size_and_place=st.sampled_from(SIZES[1:]).flatmap(
        lambda size: st.tuples(st.just(size), st.integers(0, size - 1))
    )
)
def test_one_place_of_one_batch_size_is_enough(
    spec: PolicySpec, size_and_place: tuple[int, int]
) -> None:
    size, place = size_and_place
    runtime = DependsOnItsBatch(
        spec, lambda inputs: (places(inputs) == place) * float(len(places(inputs)) == size)
    )
    assert not rows_are_alike(runtime, spec, SIZES)


def test_in_batches_of_one_size_rows_may_depend_on_that_size(spec: PolicySpec) -> None:
    runtime = DependsOnItsBatch(spec, lambda inputs: len(places(inputs)))
    measured = measure(runtime, spec, (64,))
    assert measured.rows_are_alike
    assert tuple(measured.seconds) == (64,)
    assert set(runtime.batch_sizes) == {64}


@settings(max_examples=40, deadline=None)
@given(
    size_and_places=st.integers(2, 80).flatmap(
        lambda size: st.tuples(
            st.just(size),
            st.sets(st.integers(0, size - 1), min_size=1, max_size=size - 1),
        )
    )
)
def test_in_batches_of_one_size_rows_may_not_depend_on_their_places(
    spec: PolicySpec, size_and_places: tuple[int, set[int]]
) -> None:
    """Whichever places are unlike the others."""
    size, unlike = size_and_places
    runtime = DependsOnItsBatch(spec, lambda inputs: np.isin(places(inputs), [*unlike]) * 1.0)
    assert not rows_are_alike(runtime, spec, (size,))


@pytest.mark.parametrize("of", [TINY_MLPS, TINY_V1, TINY_LSTMS], ids=lambda of: of.name)
def test_rows_are_compared_and_timed_with_numbers_that_are_not_zero(of: StepSpec) -> None:
    names = ["observation", "noise", *(state.input for state in of.states)]
    are_zero: list[bool] = []

    def look(inputs: Arrays) -> float:
        are_zero.extend(not inputs[name].all() for name in names)
        return 0.0

    assert measure(DependsOnItsBatch(of, look), of, (1, 2)).rows_are_alike
    assert len(are_zero) > 10
    assert not any(are_zero)


@pytest.mark.parametrize("row", [0, 21, 42, 63])
def test_one_row_in_one_batch_size_is_enough(row: int, spec: PolicySpec) -> None:
    """Every row is in a batch of every size."""
    alone: list[float] = []

    def that_row_of_two(inputs: Arrays) -> NDArray[Any] | float:
        first = inputs["observation"][:, 0]
        if len(first) == 1 and len(alone) < 64:
            alone.append(float(first[0]))
        return (first == alone[row]) * 1.0 if len(first) == 2 else 0.0

    assert not rows_are_alike(DependsOnItsBatch(spec, that_row_of_two), spec, SIZES)


@pytest.mark.parametrize("largest", [1, 4, 6, 64, 300])
def test_rows_of_their_own_are_alike_and_every_timed_size_is_timed(
    largest: int, spec: PolicySpec
) -> None:
    runtime = SummingRuntime(spec)
    measured = measure(runtime, spec, bucket_sizes(largest))
    assert measured.rows_are_alike
    assert tuple(measured.seconds) == timed_sizes(largest)
    assert min(measured.seconds.values()) > 0
    assert set(runtime.batch_sizes) == set(bucket_sizes(largest))


def test_the_choice_is_logged_for_each_batch_size(
    two_formats: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        chosen = choose(two_formats)
    assert chosen in {"onnx", "torchscript"}
    *lines, last = caplog.messages
    assert [line.partition(": onnx ")[0] for line in lines] == [
        f"auto: batch of {size}" for size in BATCH_SIZES
    ]
    assert all("torchscript" in line and line.endswith(f"; {chosen}") for line in lines)
    assert last.startswith(f"auto: {chosen}; ")


def test_one_that_does_not_run_here_is_left_out(
    two_formats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoiled = Path(shutil.copytree(two_formats, tmp_path / "spoiled"))
    (spoiled / Manifest.read(spoiled).formats["onnx"].file).write_bytes(b"not a policy")
    assert choose(spoiled) == "torchscript"
    assert "onnx does not run here" in caplog.text
    assert "SHA-256" in caplog.text


Run = Callable[..., subprocess.CompletedProcess[str]]


def instead(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the processes that measure."""
    monkeypatch.setattr(subprocess, "run", run)


def test_one_that_takes_too_long_is_left_out_whatever_it_said(
    two_formats: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(command: list[str], *, timeout: float, **_: Any) -> Any:
        raise subprocess.TimeoutExpired(command, timeout, stderr=b"a warning\n")

    instead(run, monkeypatch)
    assert choose(two_formats) == "onnx"
    assert caplog.messages == [
        f"auto: {name} does not run here: to measure it takes longer than 120 s"
        for name in ("onnx", "torchscript")
    ]


@pytest.mark.parametrize(
    ("code", "stderr", "said"),
    [
        (1, "a warning\n\nCUDA error: no kernel image\n", "CUDA error: no kernel image"),
        (1, "", "returned non-zero exit status 1"),
        (-4, "a warning\n", "died with <Signals.SIGILL: 4>"),
    ],
)
def test_what_a_process_ended_with_is_told_in_a_line(
    code: int,
    stderr: str,
    said: str,
    two_formats: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(command: list[str], **_: Any) -> Any:
        raise subprocess.CalledProcessError(code, command, "", stderr)

    instead(run, monkeypatch)
    choose(two_formats)
    assert len(caplog.messages) == 2
    assert all(said in line and "\n" not in line for line in caplog.messages)


def test_an_error_in_it_is_its_last_line(
    two_formats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of CUDA's errors the last lines say where to look for help, and the first what is wrong."""
    monkeypatch.setattr(auto, "measure", fails_as_cuda_does)
    monkeypatch.setattr(sys, "argv", arguments(two_formats, "onnx", "cpu", "1", "2"))
    assert auto.main() == 1
    assert capsys.readouterr().err.splitlines()[-1] == "CUDA error: no kernel image"


def fails_as_cuda_does(*_: object) -> Measurement:
    raise RuntimeError("CUDA error: no kernel image\nCompile with TORCH_USE_CUDA_DSA")


def arguments(directory: Path, name: str, device: str, *more: str) -> list[str]:
    """Of the process that measures: one thread, and the sizes and flags in `more`."""
    return ["auto", str(directory), open_artifact(directory).sha256, name, device, "1", *more]


@pytest.mark.parametrize("tf32", [False, True])
def test_each_is_measured_as_it_will_be_served(
    tf32: bool, two_formats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command[3:])
        return subprocess.CompletedProcess(command, 0, json.dumps([{3: 1e-3}, True]), "")

    instead(run, monkeypatch)
    options: dict[str, Any] = {"max_batch_size": 3, "pad_batches": True, "tf32": tf32}
    load_policy(open_artifact(two_formats), Settings(artifact=two_formats, device="cpu", **options))
    flags = ["--tf32"] if tf32 else []
    assert commands == [
        arguments(two_formats, name, "cpu", "3", *flags)[1:] for name in ("onnx", "torchscript")
    ]


@pytest.mark.parametrize("tf32", [False, True])
def test_on_a_gpu_that_is_captured_and_with_its_states_there(
    tf32: bool,
    two_formats: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stand_ins: list[GpuStandIn],
) -> None:
    monkeypatch.setattr(auto, "load_runtime", as_on_a_gpu)
    flags = ["--tf32"] if tf32 else []
    command = arguments(two_formats, "torchscript", "cuda", "1", "2", *flags)
    monkeypatch.setattr(sys, "argv", command)
    assert auto.main() == 0
    seconds, _ = json.loads(capsys.readouterr().out)
    assert [*seconds] == ["1", "2"]
    (gpu,) = stand_ins
    assert (gpu.tf32, gpu.num_captured) == (tf32, 2)
    assert gpu.num_submitted > 100


def test_another_artifact_that_took_its_place_is_not_measured(
    two_formats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As whoever replaces a directory does, between the server's reading and the measuring."""
    replaced = Path(shutil.copytree(two_formats, tmp_path / "replaced"))
    artifact = open_artifact(replaced)
    artifact.manifest.model_copy(update={"name": "another"}).write(replaced)
    choose_runtime(artifact, device="cpu", num_threads=1, batch_sizes=BATCH_SIZES)
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert all("its manifest is no longer the one that was read" in line for line in said)


def test_where_none_runs_loading_one_says_why(two_formats: Path, tmp_path: Path) -> None:
    spoiled = Path(shutil.copytree(two_formats, tmp_path / "spoiled"))
    for file in Manifest.read(spoiled).formats.values():
        (spoiled / file.file).write_bytes(b"not a policy")
    assert choose(spoiled) == "onnx"


def test_a_lone_candidate_is_not_measured(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    assert choose(artifact) == "torchscript"


def test_without_torch_only_onnx_is_a_candidate(
    two_formats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", None)
    assert choose(two_formats) == "onnx"


def test_a_measurement_survives_its_way_as_json(two_formats: Path, spec: PolicySpec) -> None:
    manifest = Manifest.read(two_formats)
    runtime = load_runtime(two_formats, manifest, name="onnx", device="cpu", num_threads=1)
    seconds, alike = json.loads(json.dumps(measure(runtime, spec, BATCH_SIZES)))
    assert {int(size) for size in seconds} == set(BATCH_SIZES)
    assert alike is True
