"""The real runtime on the exported policy, and the engine over it."""

import importlib.util
import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor
from numpy.typing import NDArray

from export.exporter import export_policy
from export.loaders.load import FORMAT_OF
from export.loaders.onnx import OnnxStep
from export.loaders.protocol import RenewableStep
from export.loaders.torch_formats import load_eager
from export.loaders.torch_step import TorchStep
from export.loaders.torch_warnings import torch_speaks_of_itself
from export.manifest import (
    ArtifactError,
    Device,
    File,
    Manifest,
    step_inputs,
    step_outputs,
)
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from service.engine.block import Block
from service.engine.engine import Engine
from service.errors import ServiceError
from service.runtime.arrays import allocate, allocate_in_a_row
from service.runtime.device_runtime import DeviceRuntime
from service.runtime.host import HostRuntime
from service.runtime.load import load_runtime, with_states
from service.settings import Settings
from tamiyo_client.noise import gumbel_noise
from tests.naive import FLOAT_ATOL, LOG_PROB_ATOL, NaivePolicy
from tests.random_inputs import packed, random_masks, random_observations, weights_of
from tests.running_server import ROOT, clean_environment
from tests.service.fakes import Bench, Beside, Stepped
from tests.service.gpu_stand_in import GpuStandIn, as_on_a_gpu

NUM_SESSIONS = 7
NUM_STEPS = 12


@pytest.fixture(scope="module")
def all_formats(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("formats") / "tiny"
    formats = ("torchscript", "pt2", "aoti", "onnx")
    export_policy(policy, None, output, name="tiny", formats=formats, max_batch_size=8)
    return output


@pytest.fixture(scope="module", params=FORMAT_OF)
def runtime(request: pytest.FixtureRequest, all_formats: Path) -> RenewableStep:
    return load(all_formats, Manifest.read(all_formats), name=request.param)


def load(
    artifact: Path, manifest: Manifest, *, name: str = "torchscript", device: Device = "cpu"
) -> RenewableStep:
    return load_runtime(artifact, manifest, name=name, device=device, num_threads=1)


def episode_blocks(
    spec: PolicySpec, rng: np.random.Generator
) -> tuple[list[list[Block]], list[dict[str, NDArray[np.bool_]]]]:
    """`[steps][sessions]` blocks, every third session deterministic, and the steps' masks."""
    blocks, step_masks = [], []
    for step in range(NUM_STEPS):
        observations = random_observations(spec, rng, NUM_SESSIONS)
        masks = random_masks(spec, rng, NUM_SESSIONS)
        columns = packed(spec, masks)
        step_masks.append(masks)
        blocks.append(
            [
                Block(
                    (observations[at : at + 1], columns[at : at + 1]),
                    deterministic=at % 3 == 0,
                    session_id=str(at),
                    starts=step == 0,
                    seed=at if step == 0 else None,
                )
                for at in range(NUM_SESSIONS)
            ]
        )
    return blocks, step_masks


def answered(answers: list[Stepped | ServiceError]) -> list[Stepped]:
    stepped = [answer for answer in answers if isinstance(answer, Stepped)]
    assert len(stepped) == len(answers), answers
    return stepped


def test_answers_are_the_same_bits_from_a_thread_beside_the_loop(
    runtime: RenewableStep, spec: PolicySpec, rng: np.random.Generator
) -> None:
    """Torch keeps some of what decides them for each thread: grad mode, how many threads it has."""
    blocks, _ = episode_blocks(spec, rng)
    on_the_loop, beside = (
        [answered(answers) for answers in Bench(spec, over=runtime, host=host).take_waves(blocks)]
        for host in (HostRuntime, Beside)
    )
    assert on_the_loop == beside


def test_sessions_follow_the_naive_policy_step_by_step(
    runtime: RenewableStep,
    spec: PolicySpec,
    policy: FactoredRecurrentActorCritic,
    rng: np.random.Generator,
) -> None:
    naive = NaivePolicy(spec, weights_of(policy))
    bench = Bench(spec, over=runtime)
    blocks, step_masks = episode_blocks(spec, rng)
    seeds = np.arange(NUM_SESSIONS, dtype=np.uint64)
    h, c = naive.zero_state(NUM_SESSIONS)
    for step, (batch, masks) in enumerate(zip(blocks, step_masks, strict=True)):
        answers = answered(bench.take(*batch))
        noise = gumbel_noise(seeds, np.full(NUM_SESSIONS, step, np.uint64), spec.num_choices)
        noise[::3] = 0.0
        observations = np.concatenate([block.given[0] for block in batch])
        expected = naive.step(observations, masks, noise, h, c)
        h, c = expected.h, expected.c
        assert [answer.action[0] for answer in answers] == expected.action.tolist()
        np.testing.assert_allclose(
            [answer.log_prob[0] for answer in answers], expected.log_prob, atol=LOG_PROB_ATOL
        )
        np.testing.assert_allclose(
            [answer.value[0] for answer in answers], expected.value, atol=FLOAT_ATOL
        )


def test_in_onnx_a_session_is_the_same_bit_for_bit_alone_and_in_company(
    all_formats: Path, spec: PolicySpec, rng: np.random.Generator
) -> None:
    runtime = load(all_formats, Manifest.read(all_formats), name="onnx")
    assert runtime.name == "onnx"
    blocks, _ = episode_blocks(spec, rng)
    together = Bench(spec, over=runtime)
    alone = Bench(spec, over=runtime)
    for batch in blocks:
        for one, block in zip(answered(together.take(*batch)), batch, strict=True):
            assert answered(alone.take(block)) == [one]


def test_a_session_decides_the_same_alone_and_in_company(
    runtime: RenewableStep, spec: PolicySpec, rng: np.random.Generator
) -> None:
    blocks, _ = episode_blocks(spec, rng)
    together = Bench(spec, over=runtime)
    alone = Bench(spec, over=runtime)
    for batch in blocks:
        for one, block in zip(answered(together.take(*batch)), batch, strict=True):
            (other,) = answered(alone.take(block))
            assert other.action == one.action
            np.testing.assert_allclose(other.log_prob, one.log_prob, atol=LOG_PROB_ATOL)
            np.testing.assert_allclose(other.value, one.value, atol=FLOAT_ATOL)


def test_a_bound_step_reads_what_its_inputs_hold_by_then_and_leaves_them_alone(
    runtime: RenewableStep, spec: PolicySpec, rng: np.random.Generator
) -> None:
    inputs = allocate(step_inputs(spec), 2)
    outputs, floats = allocate_in_a_row(step_outputs(spec), 2)
    step = runtime.bind(inputs, outputs)
    step()
    of_zeros = floats.copy()
    inputs["observation"][:] = rng.normal(size=inputs["observation"].shape)
    inputs["state_h_in"][:] = 1.0
    given = [array.copy() for array in inputs.values()]
    step()
    assert not np.array_equal(floats, of_zeros)
    for array, before in zip(inputs.values(), given, strict=True):
        np.testing.assert_array_equal(array, before)
    other, other_floats = allocate_in_a_row(step_outputs(spec), 2)
    runtime.bind(inputs, other)()
    np.testing.assert_array_equal(other_floats, floats)


def test_the_outputs_floats_are_all_its_floats(spec: PolicySpec) -> None:
    outputs, floats = allocate_in_a_row(step_outputs(spec), 3)
    for array in outputs.values():
        assert not array.any()
        array += 1
    assert (floats == 1).all()
    assert floats.size == sum(array.size for array in outputs.values() if array.dtype == "float32")


def test_machine_code_for_another_machine_is_an_error(all_formats: Path) -> None:
    manifest = Manifest.read(all_formats)
    foreign = manifest.formats["aoti"].model_copy(update={"requires": "vsx"})
    formats = manifest.formats | {"aoti": foreign}
    with pytest.raises(ArtifactError, match=r"needs vsx, which this machine has not"):
        load(all_formats, manifest.model_copy(update={"formats": formats}), name="aoti")


@pytest.mark.parametrize("name", ["onnx", "torchscript", "aoti", "eager"])
def test_a_file_its_runtime_cannot_read_is_an_error(
    name: str, all_formats: Path, tmp_path: Path
) -> None:
    """Whoever mends the manifest's hash still has no policy."""
    copied = Path(shutil.copytree(all_formats, tmp_path / "copied"))
    manifest = Manifest.read(copied)
    file = manifest.formats[FORMAT_OF[name]]
    (copied / file.file).write_bytes(b"not a policy")
    mended = file.model_copy(update=File.describe(copied / file.file).model_dump())
    formats = manifest.formats | {FORMAT_OF[name]: mended}
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load(copied, manifest.model_copy(update={"formats": formats}), name=name)


def test_onnx_is_measured_and_runs_where_torch_is_not_even_imported(all_formats: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from export.artifact import open_artifact\n"
        "from service.runtime.auto import choose_runtime\n"
        "from service.runtime.load import load_runtime\n"
        "artifact = open_artifact(Path(sys.argv[1]))\n"
        "options = {'device': 'cpu', 'num_threads': 1}\n"
        "choose_runtime(artifact, **options, batch_sizes=(1, 2, 4, 8))\n"
        "load_runtime(artifact.directory, artifact.manifest, name='onnx', **options)\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(all_formats)], check=True, timeout=60)


@pytest.mark.parametrize("tf32", [False, True])
def test_on_a_gpu_torch_s_formats_keep_states_there_and_products_are_as_asked_for(
    tf32: bool, all_formats: Path, stand_ins: list[GpuStandIn]
) -> None:
    manifest = Manifest.read(all_formats)
    options = Settings(artifact=all_formats, tf32=tf32)
    for name in ("torchscript", "eager", "aoti", "onnx"):
        loaded = as_on_a_gpu(all_formats, manifest, name=name, device="cuda", num_threads=1)
        engine = Engine(manifest, loaded, options)
        is_there = isinstance(engine.runtime, DeviceRuntime)
        assert is_there == (name != "onnx")
    assert [gpu.tf32 for gpu in stand_ins] == [tf32] * 3


def test_machine_code_is_opened_single_threaded_for_whoever_captures_it(
    all_formats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a package waits for its other runs, which no capture may (pytorch#148601)."""
    opened: list[bool] = []
    open_package = torch._inductor.aoti_load_package

    def noting(path: str, run_single_threaded: bool) -> object:
        opened.append(run_single_threaded)
        return open_package(path, run_single_threaded=run_single_threaded)

    monkeypatch.setattr(torch._inductor, "aoti_load_package", noting)
    loaded = load(all_formats, Manifest.read(all_formats), name="aoti")
    assert isinstance(loaded, TorchStep)
    assert opened == [False]
    loaded.enliven()
    assert opened == [False, True]


@pytest.mark.parametrize("tf32", [False, True])
def test_where_there_is_no_tf32_the_log_says_so_if_it_was_asked_for(
    tf32: bool, all_formats: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = Manifest.read(all_formats)
    loaded = load_runtime(all_formats, manifest, name="onnx", device="cpu", num_threads=1)
    with_states(loaded, manifest, num_rows=2, batch_sizes=(1,), tf32=tf32)
    said = ["onnx on cpu has no TF32: products are in float32"]
    assert caplog.messages == said * tf32


def test_onnx_s_threads_do_not_spin_while_they_wait(all_formats: Path) -> None:
    """They would take the cores that the event loop and the clients need."""
    manifest = Manifest.read(all_formats)
    runtime = load_runtime(all_formats, manifest, name="onnx", device="cpu", num_threads=2)
    assert isinstance(runtime, OnnxStep)
    options = runtime._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.intra_op_num_threads == 2


def test_torchscript_runs_where_nothing_can_be_written(all_formats: Path) -> None:
    """Torch's compiler looks for a temporary directory as it is imported: not for this."""
    code = (
        "import sys, tempfile\n"
        "from pathlib import Path\n"
        "from export.artifact import open_artifact\n"
        "from service.runtime.load import load_runtime\n"
        "from service.runtime.arrays import allocate\n"
        "def no_directory(): raise FileNotFoundError('no temporary directory')\n"
        "tempfile._get_default_tempdir = no_directory\n"
        "artifact = open_artifact(Path(sys.argv[1]))\n"
        "options = {'name': 'torchscript', 'device': 'cpu', 'num_threads': 1}\n"
        "manifest = artifact.manifest\n"
        "runtime = load_runtime(artifact.directory, manifest, **options)\n"
        "arrays = [allocate(of, 2) for of in (manifest.inputs, manifest.outputs)]\n"
        "runtime.bind(*arrays)()\n"
    )
    environment = clean_environment()
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # compilers in this process may have set it
    command = [sys.executable, "-c", code, str(all_formats)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=60)


def test_a_format_the_artifact_lacks_is_an_error_that_names_those_it_has(
    artifact: Path, manifest: Manifest
) -> None:
    with pytest.raises(ArtifactError, match=r"no format 'onnx', only torchscript; export it again"):
        load(artifact, manifest, name="onnx")


def test_a_device_this_machine_lacks_is_an_error(
    artifact: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ArtifactError, match="finds no CUDA device"):
        load(artifact, manifest, device="cuda")


def test_the_graph_of_the_pt2_file_moves_to_another_device_whole(
    all_formats: Path, spec: PolicySpec
) -> None:
    """Torch's meta device computes shapes only, and refuses what is left on the CPU."""
    content = Manifest.read(all_formats).formats["pt2"].read(all_formats)
    step = load_eager(content, "meta").call
    arrays = allocate(step_inputs(spec), 3).values()
    given = [torch.from_numpy(array).to("meta") for array in arrays]
    assert [output.device.type for output in step(*given)] == ["meta"] * 5


def test_the_torchscript_file_names_no_device(all_formats: Path) -> None:
    """So it runs where its weights are loaded, whichever device traced it."""
    content = Manifest.read(all_formats).formats["torchscript"].read(all_formats)
    with torch_speaks_of_itself():
        traced = torch.jit.load(io.BytesIO(content))  # type: ignore[no-untyped-call]
    graph = str(traced.inlined_graph)
    assert "aten::" in graph
    assert "Device" not in graph
    assert "cpu" not in graph


def test_a_machine_without_torch_is_told_how_to_get_it(
    artifact: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match=r"pip install 'tamiyo-serve\[torch\]'"):
        load(artifact, manifest)


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copied"))


@pytest.mark.parametrize("at", [0, 1000, -1])
def test_a_file_with_one_bit_changed_is_refused_before_it_is_loaded(copied: Path, at: int) -> None:
    path = copied / Manifest.read(copied).formats["torchscript"].file
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"policy\.ts: its SHA-256 is not the one"):
        load(copied, Manifest.read(copied))


def test_a_missing_file_is_named(copied: Path) -> None:
    (copied / "policy.ts").unlink()
    with pytest.raises(ArtifactError, match=r"policy\.ts: cannot be read"):
        load(copied, Manifest.read(copied))
