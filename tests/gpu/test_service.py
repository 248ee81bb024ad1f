"""A real service whose states are on the device: parity, faults, a restart, and new weights."""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from model.spec import PolicySpec
from service.bench.load import new_sessions
from service.bench.pool import Pool
from service.bench.wire import wire_of
from tests.connection import Address, Connection
from tests.gpu.conftest import Exported
from tests.gpu.device import DEVICE, HAS_GPU
from tests.naive import NaivePolicy
from tests.random_inputs import random_policy, weights_of
from tests.running_server import RunningServer, running, running_server
from tests.specs import TINY_V1, TINY_V2
from tests.test_faults import (
    NUM_VECTORS,
    TIMEOUT_S,
    Reached,
    Script,
    check_under_faults,
    scripts,
    vector_scripts,
)
from tests.test_versions_under_load import (
    NUM_CHANGES,
    NUM_CLIENTS,
    Kind,
    Load,
    differences,
    versions_of,
)
from tests.traffic import NUM_ENVIRONMENTS, Episodes, Json, client_of, play, run

pytestmark = pytest.mark.gpu

V1 = TINY_V1.name
NUM_SESSIONS = 40
NUM_STEPS = 100
RUNTIMES = ("torchscript", "eager", "aoti")
FORMAT_OF = {"torchscript": "torchscript", "eager": "pt2", "aoti": "aoti"}
OTHER_KERNELS_ATOL = 1e-4 if HAS_GPU else 2e-5
"""Of what a CPU gives alone; carried over many steps."""


@contextmanager
def serving(artifact: Path, *flags: str, runtime: str = "torchscript") -> Iterator[RunningServer]:
    flags = ("--device", DEVICE, "--runtime", runtime, *flags)
    if HAS_GPU:
        with running_server(artifact, *flags) as server:
            yield server
        return
    command = [sys.executable, "-m", "tests.service.device_server", "free"]
    with running([*command, "--artifact", str(artifact), "--port", "0", *flags]) as server:
        yield server


@contextmanager
def one_server(artifact: Path) -> Iterator[Reached]:
    with serving(artifact, "--pad-batches") as server:
        yield Reached(server.host_and_port, [server])


async def told(address: Address, made: Sequence[Script], steps: slice) -> list[list[bytes]]:
    """What each session is told at these steps, one session after another."""
    connection = Connection(*address)
    answers: list[list[bytes]] = []
    for script in made:
        answers.append([])
        for body in script.bodies[steps]:
            await connection.send(script.form.request(body))
            answer = await connection.receive()
            assert answer.status == 200, answer
            answers[-1].append(answer.content)
    connection.cut()
    return answers


def undisturbed(artifact: Path, made: list[Script]) -> list[list[bytes]]:
    """Each session's answers without any other, on the same device."""
    with one_server(artifact) as (address, _):
        return asyncio.run(asyncio.wait_for(told(address, made, slice(None)), TIMEOUT_S))


def test_lone_sessions_under_faults_are_told_what_each_is_told_alone(exported: Exported) -> None:
    made = scripts(TINY_V1, NUM_SESSIONS, NUM_STEPS)
    artifact = exported(V1, "torchscript")
    check_under_faults(one_server, artifact, made, at_least=NUM_SESSIONS, alone=undisturbed)


def test_vectors_under_faults_are_told_what_each_is_told_alone(exported: Exported) -> None:
    made = vector_scripts(TINY_V1)
    artifact = exported(V1, "torchscript")
    check_under_faults(one_server, artifact, made, at_least=NUM_VECTORS, alone=undisturbed)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_concurrent_sessions_follow_the_naive_policy(runtime: str, exported: Exported) -> None:
    episodes = Episodes.random(TINY_V1, 1)

    async def all_of_them(server: RunningServer) -> list[list[Json]]:
        async with client_of(server) as client:
            return await asyncio.gather(
                *(play(client, episodes, env, "naive") for env in range(NUM_ENVIRONMENTS))
            )

    with serving(exported(V1, FORMAT_OF[runtime]), runtime=runtime) as server:
        answers = run(all_of_them(server))
        assert server.stop() == 0
        assert "Traceback" not in server.log()
        assert f"{runtime} on {DEVICE}" in server.log()
    episodes.check(NaivePolicy(TINY_V1, weights_of(random_policy(TINY_V1))), answers)


def test_sessions_go_on_from_a_snapshot_of_states_on_the_device(
    exported: Exported, tmp_path: Path
) -> None:
    artifact, made = exported(V1, "torchscript"), scripts(TINY_V1, 8, 20)
    flags = ("--pad-batches", "--snapshot", str(tmp_path / "sessions"), "--snapshot-required")
    got: list[list[bytes]] = [[] for _ in made]
    for steps in (slice(0, 11), slice(11, 20)):
        with serving(artifact, *flags) as server:
            for answers, more in zip(
                got, asyncio.run(told(server.host_and_port, made, steps)), strict=True
            ):
                answers += more
            assert server.stop() == 0
    assert got == undisturbed(artifact, made)


@pytest.mark.parametrize("spec", [TINY_V1, TINY_V2], ids=lambda spec: spec.name)
def test_weights_are_swapped_under_load_and_each_answer_is_of_the_version_it_names(
    spec: PolicySpec, tmp_path: Path
) -> None:
    versions = versions_of(spec, "torchscript", tmp_path)
    pool = Pool.random(spec, seed=3)
    kinds = [
        Kind(wire_of(form, spec, pool, num_rows), new_sessions(NUM_CLIENTS, 100 * at, num_rows))
        for at, (form, num_rows) in enumerate([("json", None), ("safetensors", 33)])
    ]
    with serving(tmp_path / "version-0") as server:
        load = asyncio.wait_for(Load(server, kinds).run(versions), TIMEOUT_S)
        assert asyncio.run(load) == {200: NUM_CHANGES}
        assert server.stop() == 0
        assert "Traceback" not in server.log()
    loaded = {version.name: version.loaded for version in versions}
    for found in differences(kinds, pool, loaded, spec):
        assert found.answers > 0
        assert found.other_actions <= found.answers * (1e-3 if HAS_GPU else 0)
        assert found.largest <= OTHER_KERNELS_ATOL or found.other_actions
