"""The load generator: against a real server, and that its replay finds what is wrong."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save

from export.exporter import export_policy
from export.loaders.protocol import LoadedStep, RenewableStep
from export.manifest import Manifest, step_inputs, step_outputs
from export.weights import pack, pack_weights
from model.policy import FactoredRecurrentActorCritic
from model.sb3.spec import SB3Spec
from model.spec import PolicySpec
from model.step_spec import StepSpec
from service.bench.batch_sizes import ranges
from service.bench.load import Session
from service.bench.pool import POOL_SIZE, Pool
from service.bench.replay import Differences, replay
from service.bench.wire import Arrays, JsonWire, wire_of
from service.runtime.arrays import allocate
from service.runtime.load import load_runtime
from tamiyo_client.noise import gumbel_noise, row_seed
from tests.random_inputs import random_policy
from tests.running_server import ROOT, RunningServer, clean_environment, running_server
from tests.service.fakes import SummingRuntime
from tests.service.gated_server import serving
from tests.specs import TINY_LSTMS, TINY_MLPS

TIMEOUT_S = 60.0
MAX_BATCH_SIZE = 8
VERSION = "sha256:ab12"


@pytest.fixture(scope="module")
def onnx_artifact(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("bench") / "tiny"
    formats = ("onnx",)
    export_policy(policy, None, output, name="tiny", formats=formats, max_batch_size=MAX_BATCH_SIZE)
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


class Loaded(NamedTuple):
    num_rows: int
    arguments: tuple[str, ...]


FILES = "--wire", "safetensors"
LOADS = {
    "closed": Loaded(1, ()),
    "open": Loaded(1, ("--rate", "100")),
    "vectors": Loaded(3, ("--rows", "3")),
    "vectors larger than a batch": Loaded(99, ("--rows", "99")),  # some start in every step
    "files": Loaded(3, ("--rows", "3", *FILES)),
    "files larger than a batch": Loaded(99, ("--rows", "99", *FILES)),
    "files of one": Loaded(1, FILES),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_every_answer_of_a_real_server_is_the_artifacts_own(
    load: Loaded, server: RunningServer, onnx_artifact: Path
) -> None:
    done = bench(
        "--url", server.address, "--artifact", onnx_artifact, "--envs", 6, "--seconds", 0.5,
        "--json", *load.arguments,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["errors"] == {}
    assert figures["answers"] > 5
    num_answers = figures["answers"] * load.num_rows
    assert figures["differences"] == {
        "answers": num_answers, "differing": 0, "other_actions": 0, "largest": 0.0,
    }  # fmt: skip
    latency = figures["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
    batches_each = -(-load.num_rows // MAX_BATCH_SIZE)
    assert sum(figures["batches_by_size"].values()) <= figures["answers"] * batches_each


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
def runtime(onnx_artifact: Path) -> RenewableStep:
    manifest = Manifest.read(onnx_artifact)
    return load_runtime(onnx_artifact, manifest, name="onnx", device="cpu", num_threads=1)


def trajectory(pool: Pool, runtime: LoadedStep, spec: StepSpec, seed: int) -> Session:
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
        for state in spec.states:
            inputs[state.input][:] = decided[state.output]
        session.pool_index.append(at)
        answer = {
            "action": dict(zip(spec.head_names, decided["action"][0].tolist(), strict=True)),
            "log_prob": dict(zip(spec.head_names, decided["log_prob"][0].tolist(), strict=True)),
            "value": float(decided["value"][0]),
            "policy_version": VERSION,
        }
        session.answers.append(json.dumps(answer).encode())
    return session


def compared(
    sessions: list[Session], pool: Pool, runtime: LoadedStep, spec: PolicySpec
) -> Differences:
    return replay(sessions, pool, JsonWire(spec, pool, None), {VERSION: runtime}, spec)


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


def test_replay_steps_with_the_weights_of_the_version_that_each_answer_names(
    runtime: RenewableStep, spec: PolicySpec
) -> None:
    pool = Pool.random(spec, seed=3)
    other = runtime.with_parameters(pack(pack_weights(random_policy(spec, 9), None), spec, "fp32"))
    own, others = trajectory(pool, runtime, spec, 1), trajectory(pool, other, spec, 1)
    others.answers = [answer.replace(b"ab12", b"cd34") for answer in others.answers]
    wire, loaded = JsonWire(spec, pool, None), {VERSION: runtime, "sha256:cd34": other}
    assert replay([own, others], pool, wire, loaded, spec) == (10, 0, 0, 0.0)
    others.answers = [answer.replace(b"cd34", b"ab12") for answer in others.answers]
    assert replay([others], pool, wire, loaded, spec).differing == 5
    others.answers = [answer.replace(b"ab12", b"none") for answer in others.answers]
    with pytest.raises(KeyError, match="none"):
        replay([others], pool, wire, loaded, spec)


NUM_ROWS, NUM_STEPS = 99, 4
"""Of a vector: its last rows start an episode in every step but the first."""


def vector_outputs(
    pool: Pool,
    runtime: LoadedStep,
    spec: PolicySpec,
    *,
    seed_off: int = 0,
    missed: tuple[int, int] | None = None,
) -> list[Arrays]:
    """What a right server tells a vector with seed 5: all its rows in one batch.

    One that is wrong has row 7's seed off by so much, or misses the start of a (step, row).
    """
    inputs, decided = allocate(step_inputs(spec), NUM_ROWS), allocate(step_outputs(spec), NUM_ROWS)
    step_once = runtime.bind(inputs, decided)
    session, rows = Session("vector", 5, NUM_ROWS), np.arange(NUM_ROWS)
    seeds = np.zeros(NUM_ROWS, np.uint64)
    episodes, steps = np.full(NUM_ROWS, -1), np.zeros(NUM_ROWS, np.uint64)
    told = []
    for step in range(NUM_STEPS):
        starts = session.starts(step)
        assert starts is not None
        if missed is not None and missed[0] == step:
            assert starts[missed[1]]
            starts[missed[1]] = False
        episodes[starts] += 1
        steps[starts] = 0
        seeds[starts] = row_seed(5, rows, episodes)[starts]
        if step == 0:
            seeds[7] += np.uint64(seed_off)
        for name, array in pool.by_name().items():
            inputs[name][:] = array[(5 + step + rows) % POOL_SIZE]
        inputs["noise"][:] = gumbel_noise(seeds, steps, spec.num_choices)
        for state in spec.states:
            inputs[state.input][:] = np.where(starts[:, None, None], 0.0, decided[state.output])
        step_once()
        steps += np.uint64(1)
        told.append({name: decided[name].copy() for name in ("action", "log_prob", "value")})
    return told


def written_in_json(outputs: Arrays, spec: PolicySpec) -> bytes:
    by_head = {
        name: dict(zip(spec.head_names, outputs[name].T.tolist(), strict=True))
        for name in ("action", "log_prob")
    }
    others = {"value": outputs["value"].tolist(), "policy_version": VERSION}
    return json.dumps(by_head | others).encode()


def written_in_safetensors(outputs: Arrays, spec: PolicySpec) -> bytes:
    return save(outputs, {"policy_version": VERSION})


Write = Callable[[Arrays, PolicySpec], bytes]
WRITTEN: dict[str, Write] = {"json": written_in_json, "safetensors": written_in_safetensors}


def compared_vector(
    told: list[Arrays], kind: str, pool: Pool, runtime: LoadedStep, spec: PolicySpec
) -> Differences:
    session = Session("vector", 5, NUM_ROWS)
    session.pool_index = [(5 + step) % POOL_SIZE for step in range(NUM_STEPS)]
    session.answers = [WRITTEN[kind](outputs, spec) for outputs in told]
    wire = wire_of(kind, spec, pool, NUM_ROWS)
    return replay([session], pool, wire, {VERSION: runtime}, spec)


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("name", ["action", "log_prob", "value"])
def test_replay_counts_a_row_of_a_vector_that_differs_in_one_bit(
    kind: str, name: str, runtime: LoadedStep, spec: PolicySpec
) -> None:
    pool = Pool.random(spec, seed=3)
    told = vector_outputs(pool, runtime, spec)
    num_answers = NUM_ROWS * NUM_STEPS
    assert compared_vector(told, kind, pool, runtime, spec) == (num_answers, 0, 0, 0.0)
    row = told[2][name][NUM_ROWS - 1 :].view(np.int32)
    row[..., 0] ^= 1
    found = compared_vector(told, kind, pool, runtime, spec)
    assert (found.answers, found.differing) == (num_answers, 1)
    assert found.other_actions == (name == "action")


@pytest.mark.parametrize("kind", WRITTEN)
def test_replay_finds_a_row_whose_start_was_missed(
    kind: str, runtime: LoadedStep, spec: PolicySpec
) -> None:
    pool = Pool.random(spec, seed=3)
    told = vector_outputs(pool, runtime, spec, missed=(2, 98))
    found = compared_vector(told, kind, pool, runtime, spec)
    assert found.differing == NUM_STEPS - 2  # of that row, from there on


@pytest.mark.parametrize("kind", WRITTEN)
def test_replay_finds_a_row_whose_seed_is_off(
    kind: str, runtime: LoadedStep, spec: PolicySpec
) -> None:
    pool = Pool.random(spec, seed=3)
    found = compared_vector(
        vector_outputs(pool, runtime, spec, seed_off=1), kind, pool, runtime, spec
    )
    assert 0 < found.other_actions <= found.differing <= NUM_STEPS


def test_sizes_are_named_by_their_range() -> None:
    sizes = {"1.0": 3.0, "2.0": 0.0, "4.0": 5.0, "+Inf": 1.0}
    assert ranges(sizes) == {"1": 3.0, "3-4": 5.0, "5-": 1.0}


any_family = pytest.mark.parametrize("of", [TINY_MLPS, TINY_LSTMS], ids=lambda of: of.name)


@any_family
@pytest.mark.parametrize("arguments", [(), ("--rows", "3", *FILES)], ids=["json", "safetensors"])
def test_a_policy_of_any_family_is_loaded(
    of: SB3Spec, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    with serving(of, tmp_path) as server:
        done = bench("--url", server.address, "--envs", 3, "--seconds", 0.3, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["answers"] > 0
    assert figures["errors"] == {}


@any_family
def test_replay_carries_whatever_the_policy_does(of: SB3Spec) -> None:
    runtime, pool = SummingRuntime(of), Pool.random(of, 0)
    sessions = [trajectory(pool, runtime, of, seed) for seed in range(3)]
    wire = wire_of("json", of, pool, None)
    assert replay(sessions, pool, wire, {VERSION: runtime}, of) == Differences(15, 0, 0, 0.0)
    sessions[0].answers[2] = sessions[0].answers[1]
    assert replay(sessions, pool, wire, {VERSION: runtime}, of).differing == 1
