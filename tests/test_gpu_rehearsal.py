"""`make test-gpu` where no GPU is: skipped in a sentence, or rehearsed on the CPU."""

import os
import subprocess
import sys

import pytest

from tests.gpu.device import HAS_GPU
from tests.running_server import ROOT

pytestmark = pytest.mark.skipif(HAS_GPU, reason="there is a GPU here")

ONE = "two_batches and tiny-mlps and torchscript"


def outcome(*arguments: str) -> list[str]:
    """The last lines of a run of `tests/gpu` that ended well."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu"]
    of_ours = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=of_ours, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_without_a_gpu_all_is_skipped_and_one_line_says_so() -> None:
    said = outcome()
    assert "gpu: skipped, as no GPU is visible here; nothing was run" in said
    assert "passed" not in said[-1]


def test_the_rehearsal_runs_and_says_what_it_is() -> None:
    said = outcome("--rehearse", "-k", ONE)
    assert "gpu: a rehearsal on the CPU; nothing ran on a GPU" in said
    assert "1 passed" in said[-1]
