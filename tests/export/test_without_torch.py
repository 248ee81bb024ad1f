"""`pip install ./client .`, no extras, for real: what needs no torch works, the rest says so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from export.exporter import export_policy
from export.manifest import Manifest
from model.policy import FactoredRecurrentActorCritic

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ("pyproject.toml", "README.md", "LICENSE", "client", "model", "export", "service")
INSTALL_TIMEOUT_S = 280
TIMEOUT_S = 60
IGNORED = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")

pytestmark = pytest.mark.timeout(INSTALL_TIMEOUT_S + TIMEOUT_S)


def copied_project(directory: Path) -> Path:
    """What is installed, away from the working tree: pip builds where the source lies."""
    for name in PROJECT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, directory / name, ignore=IGNORED)
        else:
            shutil.copy(source, directory / name)
    return directory


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment that has the project and its base dependencies."""
    directory = tmp_path_factory.mktemp("install")
    subprocess.run(
        [sys.executable, "-m", "venv", directory / "venv"], check=True, timeout=TIMEOUT_S
    )
    python = directory / "venv" / "bin" / "python"
    (directory / "project").mkdir()
    project = copied_project(directory / "project")
    done = subprocess.run(
        [
            *(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--constraint", ROOT / "constraints.txt", project / "client", project),
        ],
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return python


@pytest.fixture(scope="module")
def artifact(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("artifacts") / "tiny"
    export_policy(policy, None, output, name="tiny", formats=("torchscript",), max_batch_size=2)
    return output


def environment() -> dict[str, str]:
    """Without what would let another environment's packages in."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(python: Path, cwd: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def test_no_torch_is_installed(installed: Path, tmp_path: Path) -> None:
    done = run(
        installed, tmp_path, "-c", "import export, sys; print(export.__file__); import torch"
    )
    assert str(installed.parent.parent) in done.stdout
    assert "No module named 'torch'" in done.stderr


@pytest.mark.parametrize("command", [(), ("verify",), ("inspect",)])
def test_help_needs_no_torch(installed: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    done = run(installed, tmp_path, "-m", "export", *command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(" ".join(("usage: python -m export", *command)))


def test_inspect_needs_no_torch(installed: Path, tmp_path: Path, artifact: Path) -> None:
    done = run(installed, tmp_path, "-m", "export", "inspect", artifact)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"tiny: {Manifest.read(artifact).policy_version}")
    done = run(installed, tmp_path, "-m", "export", "inspect", artifact, "--json")
    assert Manifest.model_validate_json(done.stdout) == Manifest.read(artifact)
    done = run(installed, tmp_path, "-m", "export", "inspect", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"export: {tmp_path}: is not an artifact")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--preset", "tamiyo-v1", "--output", "out"),
        ("--checkpoint", "best.pt", "--output", "out", "--formats", "onnx"),
        ("--preset", "tamiyo-v2", "--output", "out", "--device", "cuda", "--sign", "key.pem"),
        ("verify", "out"),
        ("verify", "out", "--trusted", "key.pub"),
    ],
)
def test_everything_else_names_the_extra_it_takes(
    installed: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done = run(installed, tmp_path, "-m", "export", *arguments)
    command = "verify" if arguments[0] == "verify" else "export"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"export: {command} takes torch, which is not installed; the extra 'torch' brings it: "
        "pip install 'tamiyo-serve[torch]'\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--output"),
        (("--output", "out"), "--checkpoint --preset is required"),
        (("--preset", "tamiyo-v1", "--seed", "one", "--output", "out"), "--seed"),
        (("inspect",), "DIR"),
        (("verify", "out", "--nonesuch"), "--nonesuch"),
    ],
)
def test_bad_arguments_are_refused_for_what_they_are(
    installed: Path, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    done = run(installed, tmp_path, "-m", "export", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_service_s_help_needs_no_torch(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-m", "service", "--help")
    assert (done.returncode, done.stderr) == (0, "")
