"""The load generator: against a real server, and that its replay finds what is wrong."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.exporter import export_policy
from export.loaders.protocol import LoadedStep
from export.manifest import Manifest, step_inputs, step_outputs
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from service.bench.batch_sizes import ranges
from service.bench.load import Session
from service.bench.pool import POOL_SIZE, Pool
from service.bench.replay import Differences, replay
from service.bench.wire import JsonWire
from service.engine.noise import gumbel_noise
from service.runtime.arrays import allocate
from service.runtime.load import load_runtime
from service.runtime.protocol import STATE_INPUTS, STATE_OUTPUTS
from tests.random_inputs import random_policy
from tests.running_server import ROOT, RunningServer, clean_environment, running_server

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def onnx_artifact(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("bench") / "tiny"
    export_policy(policy, None, output, name="tiny", formats=("onnx",), max_batch_size=8)
    return output


@pytest.fixture(scope="module")
def server(onnx_artifact: Path) -> Iterator[RunningServer]:
    with running_server(onnx_artifact) as server:
        yield server


def bench(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "service.bench", *map(str, arguments)],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


OF_VECTORS = ("--rows", "3")
LOADS: dict[str, tuple[str, ...]] = {
    "closed": (),
    "open": ("--rate", "100"),
    "vectors": OF_VECTORS,
    "files": (*OF_VECTORS, "--wire", "safetensors"),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_every_answer_of_a_real_server_is_the_artifacts_own(
    load: tuple[str, ...], server: RunningServer, onnx_artifact: Path
) -> None:
    done = bench(
        "--url", server.address, "--artifact", onnx_artifact, "--envs", 6, "--seconds", 0.5,
        "--json", *load,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["errors"] == {}
    assert figures["answers"] > 5
    num_rows = 3 if "--rows" in load else 1
    num_answers = figures["answers"] * num_rows
    assert figures["differences"] == {
        "answers": num_answers, "differing": 0, "other_actions": 0, "largest": 0.0,
    }  # fmt: skip
    latency = figures["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
    assert sum(figures["batches_by_size"].values()) <= figures["answers"]


def test_figures_are_shown_to_people_too(server: RunningServer) -> None:
    done = bench("--url", server.address, "--envs", 2, "--seconds", 0.2)
    assert done.returncode == 0, done.stderr
    for part in ("per second", "p99", "latency", "batch size", "answers not checked"):
        assert part in done.stdout
    assert done.stderr == ""


def test_another_artifact_than_the_servers_is_refused(
    server: RunningServer, spec: PolicySpec, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    formats = ("onnx",)
    export_policy(
        random_policy(spec, seed=9), None, other, name="o", formats=formats, max_batch_size=2
    )
    done = bench("--url", server.address, "--artifact", other, "--envs", 1, "--seconds", 0.1)
    assert done.returncode == 2
    assert "and the server has" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_server_that_is_not_there_is_a_sentence(unused_url: str) -> None:
    done = bench("--url", unused_url, "--seconds", 0.1)
    assert done.returncode == 2
    assert "does not answer" in done.stderr


@pytest.fixture
def unused_url() -> str:
    return "http://127.0.0.1:9"  # discard: nothing listens there


@pytest.fixture(scope="module")
def runtime(onnx_artifact: Path) -> LoadedStep:
    manifest = Manifest.read(onnx_artifact)
    return load_runtime(onnx_artifact, manifest, name="onnx", device="cpu", num_threads=1)


def trajectory(pool: Pool, runtime: LoadedStep, spec: PolicySpec, seed: int) -> Session:
    """What a right server answers to five steps."""
    session = Session(f"env-{seed}", seed)
    inputs, decided = allocate(step_inputs(spec), 1), allocate(step_outputs(spec), 1)
    step_once = runtime.bind(inputs, decided)
    for step in range(5):
        at = (seed + step) % POOL_SIZE
        for name, array in pool.by_name().items():
            inputs[name][0] = array[at]
        inputs["noise"][:] = gumbel_noise(
            np.array([seed], np.uint64), np.array([step], np.uint64), spec.num_choices
        )
        step_once()
        for given, carried in zip(STATE_INPUTS, STATE_OUTPUTS, strict=True):
            inputs[given][:] = decided[carried]
        session.pool_index.append(at)
        answer = {
            "action": dict(zip(spec.head_names, decided["action"][0].tolist(), strict=True)),
            "log_prob": dict(zip(spec.head_names, decided["log_prob"][0].tolist(), strict=True)),
            "value": float(decided["value"][0]),
        }
        session.answers.append(json.dumps(answer).encode())
    return session


def compared(
    sessions: list[Session], pool: Pool, runtime: LoadedStep, spec: PolicySpec
) -> Differences:
    return replay(sessions, pool, JsonWire(spec, pool, None), runtime, spec)


def spoil_value(answer: dict[str, Any]) -> None:
    answer["value"] = float(np.nextafter(np.float32(answer["value"]), np.float32(9)))


def spoil_log_prob(answer: dict[str, Any]) -> None:
    answer["log_prob"]["op"] -= 0.5


def spoil_action(answer: dict[str, Any]) -> None:
    answer["action"]["op"] += 1


@pytest.mark.parametrize(
    ("spoil", "other_actions"), [(spoil_value, 0), (spoil_log_prob, 0), (spoil_action, 1)]
)
def test_replay_counts_an_answer_that_differs_in_one_bit(
    spoil: Callable[[dict[str, Any]], None],
    other_actions: int,
    runtime: LoadedStep,
    spec: PolicySpec,
) -> None:
    pool = Pool.random(spec, seed=3)
    sessions = [trajectory(pool, runtime, spec, seed) for seed in (1, 2)]
    assert compared(sessions, pool, runtime, spec) == (10, 0, 0, 0.0)
    spoilt = copy.deepcopy(sessions)
    answer = json.loads(spoilt[1].answers[3])
    spoil(answer)
    spoilt[1].answers[3] = json.dumps(answer).encode()
    found = compared(spoilt, pool, runtime, spec)
    assert (found.answers, found.differing, found.other_actions) == (10, 1, other_actions)
    if spoil is spoil_log_prob:
        assert found.largest == pytest.approx(0.5)


def test_replay_finds_a_state_that_was_stepped_twice(runtime: LoadedStep, spec: PolicySpec) -> None:
    pool = Pool.random(spec, seed=3)
    session = trajectory(pool, runtime, spec, 1)
    del session.pool_index[2], session.answers[2]
    assert compared([session], pool, runtime, spec).differing == 2


def test_sizes_are_named_by_their_range() -> None:
    sizes = {"1.0": 3.0, "2.0": 0.0, "4.0": 5.0, "+Inf": 1.0}
    assert ranges(sizes) == {"1": 3.0, "3-4": 5.0, "5-": 1.0}
