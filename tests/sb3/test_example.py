"""The example, as its first lines say: trained here, exported, served, and played to the end."""

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tamiyo_client import VectorPolicyClient
from tests.running_server import ROOT, running_server

TIMEOUT_S = 240
NUM_EPISODES = 40
WITHOUT_MEMORY = 5.7
"""What who forgets the cue can reach in the mean: 0.5 a step for the bit, a third of that more."""

sb3_contrib = pytest.importorskip("sb3_contrib", reason="sb3-contrib is in the extra `heavy`")
pytestmark = pytest.mark.timeout(2 * TIMEOUT_S)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recall")


@pytest.fixture(scope="module")
def printed(output: Path) -> str:
    done = subprocess.run(
        [sys.executable, "examples/sb3_train_and_serve.py", "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def example(printed: str) -> Iterator[Any]:
    """Its module, once it has run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield import_module("sb3_train_and_serve")


def test_what_was_trained_remembers_and_is_served_alike(printed: str) -> None:
    untrained, trained, served = (float(mean) for mean in re.findall(r": (\d+\.\d\d)\n", printed))
    assert untrained < WITHOUT_MEMORY < trained == served
    assert printed.endswith("\n100 episodes, each with the same return\n")


def test_the_returns_are_the_trainer_s_own(example: Any, output: Path) -> None:
    """In order, whoever loads the zip anew, and whichever way the service is asked."""
    model = sb3_contrib.RecurrentPPO.load(output / "model.zip", device="cpu")
    expected = example.trainers_returns(model, NUM_EPISODES)
    assert len(expected) == NUM_EPISODES
    assert len(set(expected)) > 3
    with running_server(output / "artifact") as server:
        assert example.served_returns(server.address, NUM_EPISODES) == expected
        with VectorPolicyClient(server.address, example.NUM_ENVS) as client:
            assert example.trainers_returns(client, NUM_EPISODES) == expected
