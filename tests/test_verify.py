"""`deploy/verify.sh` on a host whose docker is a script: what it asks, and the verdict it draws."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.running_server import ROOT

DOCKER = r"""#!/bin/bash
echo "$*" >> "$ASKED"
case "$*" in
  image*) echo 1000000 ;;
  *"--detach"*) echo container ;;
  *"-m pytest"*) printf '%s\n' "$TESTS" "60 passed in 1 s"; exit "$TESTS_CODE" ;;
  *"-m benchmarks.gpu"*)
    asked=$* && mounted=${asked#*:ro --volume }
    echo "# a table" > "${mounted%%:/figures*}/gpu.md"
    echo "96 rows" ;;
  "run --rm --env TAMIYO_DEVICE=cuda"*) echo "service: no GPU is visible here"; exit 2 ;;
  run*) echo "said" ;;
  logs*) printf '%s\n' "no GPU is visible here" "ready: " ;;
  *State.ExitCode*) echo 0 ;;
  *State.Running*) echo true ;;
  exec*tamiyo_sessions*) exit 1 ;;
  exec*/policy*) echo "v1 torchscript on cuda" ;;
  *) echo "line" ;;
esac
"""


def verified(tmp_path: Path, tests: str = "gpu: ran on a card", code: int = 0) -> tuple[int, str]:
    """The exit code, and what it said."""
    for name, content in {"docker": DOCKER, "nvidia-smi": "#!/bin/sh\necho card\n"}.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    of_docker = {"ASKED": str(tmp_path / "asked"), "TESTS": tests, "TESTS_CODE": str(code)}
    done = subprocess.run(
        ["deploy/verify.sh"],
        cwd=ROOT,
        env=os.environ
        | of_docker
        | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FIGURES": str(tmp_path / "figures")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


def test_where_all_holds_the_host_serves_and_the_figures_stay(tmp_path: Path) -> None:
    code, said = verified(tmp_path)
    assert code == 0, said
    assert "VERDICT: this host serves tamiyo on cuda." in said
    assert "FAIL" not in said
    assert (tmp_path / "figures" / "gpu.md").read_text() == "# a table\n"
    assert "60 passed" in (tmp_path / "figures" / "tests").read_text()
    asked = (tmp_path / "asked").read_text()
    assert f"--gpus all --volume {ROOT}:/src:ro" in asked
    assert "rm --force container" in asked


@pytest.mark.parametrize(
    ("tests", "tests_code"),
    [("gpu: ran on a card", 1), ("gpu: skipped, as no GPU is visible here", 0)],
    ids=["failed", "skipped"],
)
def test_tests_that_fail_or_are_all_skipped_are_the_host_s_failure(
    tmp_path: Path, tests: str, tests_code: int
) -> None:
    code, said = verified(tmp_path, tests, tests_code)
    assert code == 1
    assert "FAIL  tests/gpu: 60 passed" in said
    assert tests in said
    assert "VERDICT: this host does not serve tamiyo as it should." in said


def test_single_tests_that_were_skipped_are_told(tmp_path: Path) -> None:
    """As of a format that cannot be exported there."""
    skipped = "SKIPPED [9] tests/gpu/conftest.py:88: aoti: no compiler"
    code, said = verified(tmp_path, f"{skipped}\ngpu: ran on a card")
    assert code == 0
    assert skipped in said
