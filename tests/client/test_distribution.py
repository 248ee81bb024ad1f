"""The client as strangers get it: built alone, installed alone, small."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 200

pytestmark = pytest.mark.timeout(2 * TIMEOUT_S)


def run(*command: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    ).stdout


def test_its_wheel_builds_and_installs_alone(tmp_path: Path) -> None:
    source = shutil.copytree(
        ROOT / "client",
        tmp_path / "client",
        ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"),
    )
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, source)
    (wheel,) = tmp_path.glob("tamiyo_client-*.whl")
    assert "tamiyo_client/py.typed" in zipfile.ZipFile(wheel).namelist()
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    listed = json.loads(run(python, "-m", "pip", "list", "--format", "json"))
    brought = {package["name"] for package in listed} - {"pip", "setuptools"}
    needed = {"anyio", "certifi", "h11", "httpcore", "idna", "numpy", "safetensors"}
    assert brought == {"tamiyo-client", *needed, "typing_extensions"}
    run(python, "-c", "import tamiyo_client; tamiyo_client.PolicyClient('http://127.0.0.1:1')")
