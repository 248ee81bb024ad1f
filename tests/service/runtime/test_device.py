"""Where the policy runs, asked of NVIDIA's driver: here a library of our own in its place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from export.exporter import export_policy
from model.policy import FactoredRecurrentActorCritic
from tests.running_server import ROOT, clean_environment, service_command

TIMEOUT_S = 60.0
CHOOSE = """
import json, logging, sys
from pathlib import Path
from export.manifest import ArtifactError, Manifest
from service.runtime.device import choose_device

logging.basicConfig(level="INFO", format="%(message)s")
directory, wanted, runtime, torch_says = sys.argv[1:]
if torch_says == "not installed":
    import importlib.util
    importlib.util.find_spec = lambda name: None
elif torch_says:
    import torch
    torch.cuda.is_available = lambda: json.loads(torch_says)
try:
    chosen = choose_device(wanted, Manifest.read(Path(directory)), runtime)
except ArtifactError as error:
    chosen = str(error)
print(json.dumps([chosen, "torch" in sys.modules]))
"""


class Driver:
    """A machine whose driver shows this many GPUs; -1: its driver does not start."""

    def __init__(self, directory: Path, num_gpus: int) -> None:
        self.directory = directory
        source = directory / "driver.c"
        source.write_text(
            f"int cuInit(unsigned flags) {{ return {100 if num_gpus < 0 else 0}; }}\n"
            f"int cuDeviceGetCount(int *count) {{ *count = {abs(num_gpus)}; return 0; }}\n"
        )
        library = str(directory / "libcuda.so.1")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, str(source)], check=True)

    @property
    def environment(self) -> dict[str, str]:
        return clean_environment() | {"LD_LIBRARY_PATH": str(self.directory)}


@pytest.fixture
def one_gpu(tmp_path: Path) -> Driver:
    return Driver(tmp_path, 1)


@pytest.fixture
def no_gpu(tmp_path: Path) -> Driver:
    return Driver(tmp_path, 0)


@pytest.fixture(scope="module")
def onnx_artifact(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("onnx") / "tiny"
    export_policy(policy, None, output, name="tiny", formats=("onnx",), max_batch_size=2)
    return output


def choose(
    artifact: Path, wanted: str, driver: Driver, *, runtime: str = "auto", torch_says: str = ""
) -> tuple[str, str, bool]:
    """The device or the error, what was logged, and whether torch was imported."""
    done = subprocess.run(
        [sys.executable, "-c", CHOOSE, str(artifact), wanted, runtime, torch_says],
        env=driver.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    chosen, has_torch = json.loads(done.stdout)
    return chosen, done.stderr, has_torch


def test_a_gpu_is_taken_where_there_is_one(artifact: Path, one_gpu: Driver) -> None:
    assert choose(artifact, "auto", one_gpu, torch_says="true")[:2] == ("cuda", "")


@pytest.mark.parametrize("name", ["artifact", "onnx_artifact"])
def test_without_one_the_log_says_so_in_one_line(
    request: pytest.FixtureRequest, name: str, no_gpu: Driver
) -> None:
    device, log, has_torch = choose(request.getfixturevalue(name), "auto", no_gpu)
    assert device == "cpu"
    assert log.count("\n") == 1
    assert log.startswith("no GPU is visible here: serving on the CPU")
    assert "docker run --gpus all" in log
    assert not has_torch


def test_a_driver_that_does_not_start_shows_no_gpu(artifact: Path, tmp_path: Path) -> None:
    device, log, _ = choose(artifact, "auto", Driver(tmp_path, -1))
    assert device == "cpu"
    assert "no GPU is visible" in log


def test_a_library_that_is_no_driver_shows_no_gpu(artifact: Path, no_gpu: Driver) -> None:
    (no_gpu.directory / "libcuda.so.1").write_bytes(b"not a library")
    device, log, _ = choose(artifact, "auto", no_gpu)
    assert device == "cpu"
    assert "no GPU is visible" in log


def test_a_gpu_that_was_asked_for_and_is_not_there_is_an_error(
    artifact: Path, no_gpu: Driver
) -> None:
    error, _, has_torch = choose(artifact, "cuda", no_gpu)
    assert error.startswith("no GPU is visible here, and cuda was asked for")
    assert "docker run --gpus all" in error
    assert not has_torch


def test_a_gpu_that_was_asked_for_and_is_there_is_taken(artifact: Path, one_gpu: Driver) -> None:
    assert choose(artifact, "cuda", one_gpu) == ("cuda", "", False)


@pytest.mark.parametrize("runtime", ["auto", "onnx"])
def test_a_gpu_nothing_here_can_use_is_left_alone_and_the_log_says_why(
    onnx_artifact: Path, one_gpu: Driver, runtime: str
) -> None:
    device, log, has_torch = choose(onnx_artifact, "auto", one_gpu, runtime=runtime)
    assert device == "cpu"
    assert log.count("\n") == 1
    assert "a GPU is visible, and nothing installed here runs this artifact's onnx on it" in log
    assert not has_torch


def test_a_torch_made_for_cpus_is_not_given_a_gpu(artifact: Path, one_gpu: Driver) -> None:
    device, log, _ = choose(artifact, "auto", one_gpu, torch_says="false")
    assert device == "cpu"
    assert log.count("\n") == 1
    assert "the torch installed here cannot use it" in log


def test_where_nothing_could_use_a_gpu_nothing_is_said_of_it(
    artifact: Path, no_gpu: Driver
) -> None:
    assert choose(artifact, "auto", no_gpu, torch_says="not installed") == ("cpu", "", False)


def test_whoever_asks_for_the_cpu_gets_it_and_no_warning(artifact: Path, one_gpu: Driver) -> None:
    assert choose(artifact, "cpu", one_gpu) == ("cpu", "", False)


def test_the_service_refuses_to_start_without_the_gpu_it_is_asked_to_use(
    artifact: Path, no_gpu: Driver
) -> None:
    done = subprocess.run(
        service_command("--artifact", str(artifact), "--device", "cuda"),
        env=no_gpu.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("service: no GPU is visible here, and cuda was asked for")
    assert done.stderr.count("\n") == 1
