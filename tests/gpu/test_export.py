"""Exports made on the device, each format behind the gate there, and verified from their files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from export.artifact import open_artifact
from export.manifest import Precision
from export.verify import verify_artifact
from tests.gpu.conftest import Exported
from tests.gpu.device import DEVICE
from tests.running_server import ROOT
from tests.specs import TINY_V1, TINY_V2

pytestmark = pytest.mark.gpu

FORMATS = ("torchscript", "pt2", "aoti")


@pytest.mark.parametrize("policy", [TINY_V1.name, TINY_V2.name])
@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_exported_on_the_device_does_what_the_policy_does(
    fmt: str, precision: Precision, policy: str, exported: Exported
) -> None:
    artifact = open_artifact(exported(policy, fmt, precision))
    assert artifact.manifest.device == DEVICE
    parity = verify_artifact(artifact)
    assert parity.keys() == {fmt}


def test_so_does_the_command_line_s(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "export", "--preset", "tamiyo-v1", "--seed", "0"]
    command += ["--device", DEVICE, "--formats", "torchscript", "--output", str(tmp_path / "v1")]
    verify = [sys.executable, "-m", "export", "verify", str(tmp_path / "v1")]
    for each in (command, verify):
        done = subprocess.run(each, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "v1" / "manifest.json").read_text())
    assert manifest["device"] == DEVICE
