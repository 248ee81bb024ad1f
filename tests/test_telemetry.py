"""onnxruntime reports to its maker by default; under our programs it does not.

What it would send cannot be seen without a network, but with it comes an identifier in the user's
cache. CI in the environment also silences it, so these processes do not have that.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.running_server import ROOT, clean_environment

TIMEOUT_S = 120.0
EXPORT = ["--preset", "tamiyo-v1", "--seed", "0", "--formats", "onnx", "--output"]
LOAD = """
import sys
from pathlib import Path
from export.manifest import Manifest
from service.runtime.load import load_runtime
artifact = Path(sys.argv[1])
load_runtime(artifact, Manifest.read(artifact), name="onnx", device="cpu", num_threads=1)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    return home


def run(home: Path, *arguments: str) -> list[Path]:
    """Every file that Python, run with these arguments, leaves in its user's home."""
    environment = clean_environment() | {"HOME": str(home)}
    for name in ("CI", "XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY"):
        environment.pop(name, None)
    subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, check=True, timeout=TIMEOUT_S
    )
    return [path for path in home.rglob("*") if path.is_file()]


def test_onnxruntime_by_itself_leaves_an_identifier(home: Path) -> None:
    """If it no longer does, the other tests here cannot fail, and may have to look elsewhere."""
    assert "deviceid" in {path.name for path in run(home, "-c", "import onnxruntime")}


def test_the_exporter_leaves_nothing_and_neither_does_the_runtime(
    home: Path, tmp_path: Path
) -> None:
    artifact = tmp_path / "artifact"
    assert run(home, "-m", "export", *EXPORT, str(artifact)) == []
    assert run(home, "-c", LOAD, str(artifact)) == []
