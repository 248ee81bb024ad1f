"""The fault test, where states are kept as on a GPU: answers are those of states on the host."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from export.exporter import export_policy
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.running_server import running
from tests.test_faults import (
    MODEL,
    NUM_SESSIONS,
    NUM_STEPS,
    NUM_VECTORS,
    Reached,
    alone,
    check_under_faults,
    scripts,
    vector_scripts,
)

RUNTIME = "torchscript"
PROGRAM = [sys.executable, "-m", "tests.service.device_server", "free"]


@pytest.fixture(scope="module")
def artifact(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("faults") / "tiny"
    export_policy(policy, None, output, name=MODEL, formats=(RUNTIME,), max_batch_size=64)
    return output


@contextmanager
def on_a_device(artifact: Path) -> Iterator[Reached]:
    """Padded, as torch's rows depend in their last bits on how large their batch is."""
    flags = ["--artifact", str(artifact), "--port", "0", "--device", "cpu", "--runtime", RUNTIME]
    with running([*PROGRAM, *flags, "--pad-batches"]) as server:
        yield Reached(server.host_and_port, [server])


on_the_host = partial(alone, name=RUNTIME, pad_batches=True)


def test_every_trajectory_is_bit_for_bit_the_host_s(artifact: Path, spec: PolicySpec) -> None:
    made = scripts(spec, NUM_SESSIONS, NUM_STEPS)
    check_under_faults(on_a_device, artifact, made, at_least=NUM_SESSIONS, alone=on_the_host)


def test_every_trajectory_of_vectors_is_bit_for_bit_the_host_s(
    artifact: Path, spec: PolicySpec
) -> None:
    made = vector_scripts(spec)
    check_under_faults(on_a_device, artifact, made, at_least=NUM_VECTORS, alone=on_the_host)
