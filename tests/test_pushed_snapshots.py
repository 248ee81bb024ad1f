"""Pushed weights outlive the process: servers that end and begin again while a learner pushes.

Each answer names its version. Stepped again, alone, by the artifacts of the versions they name,
the trajectories are these, bit for bit: no restart shows, and none brings older weights back.
"""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from model.spec import PolicySpec
from service.bench.load import Session, new_sessions
from service.bench.pool import POOL_SIZE, Pool
from service.bench.replay import replay
from service.bench.wire import Wire, wire_of
from service.engine.engine import Engine
from service.runtime.load import load_runtime
from service.runtime.protocol import DeviceLost
from service.settings import Settings
from tests.connection import Connection, Message
from tests.pushes import TIMEOUT_S, Learner, put
from tests.random_inputs import random_policy
from tests.running_server import ROOT, clean_environment, running_server
from tests.specs import TINY_V1 as V1
from tests.test_snapshots import RETRY_S, Home, Progress, home_of
from tests.test_versions_under_load import Version, versions_of

NUM_RESTARTS = 5
NUM_STEPS = 120
NUM_CLIENTS = 4
"""Of each kind."""


async def act(home: Home, wire: Wire, session: Session, progress: Progress) -> None:
    """All steps of a session, each sent until it is answered for good."""
    connection = Connection(home.host, home.port)
    home.stack.callback(connection.cut)
    for step in range(NUM_STEPS):
        at = (session.seed + step) % POOL_SIZE
        starts = session.starts(step)
        body = wire.body(session.session_id, session.seed, step, at, starts)
        while True:
            try:
                await connection.send(Message(body, {"Content-Type": wire.content_type}))
                answer = await connection.receive()
            except (OSError, asyncio.IncompleteReadError):
                pass
            else:
                if answer.status != 503:
                    break
            connection.cut()
            await asyncio.sleep(RETRY_S)
        assert answer.status == 200, answer
        session.pool_index.append(at)
        session.answers.append(answer.content)
        await progress.made()


async def play(
    directory: Path,
    flags: tuple[str, ...],
    kinds: list[tuple[Wire, list[Session]]],
    versions: list[Version],
) -> list[str]:
    """The versions that served after each restart, of which one was pushed before each."""
    with home_of(directory / "version-0", directory / "sessions", *flags) as home:
        progress = Progress()
        playing = [
            asyncio.ensure_future(act(home, wire, session, progress))
            for wire, sessions in kinds
            for session in sessions
        ]
        served = []
        share = len(playing) * NUM_STEPS / (NUM_RESTARTS + 1)
        for nth in range(NUM_RESTARTS):
            await progress.reaches(share * (nth + 0.5))
            pushed = versions[(nth + 1) % len(versions)]
            answer = await asyncio.to_thread(put, home.server.address, pushed.body)
            assert answer.status_code == 200, answer.text
            await progress.reaches(share * (nth + 1))
            await home.restart()
            response = await asyncio.to_thread(httpx.get, f"{home.server.address}/policy")
            served.append(response.json()["policy_version"])
        await asyncio.gather(*playing)
        return served


@pytest.mark.parametrize("fmt", ["onnx", "torchscript"])
def test_no_client_can_tell_that_the_server_was_restarted_between_pushes(
    fmt: str, tmp_path: Path
) -> None:
    versions = versions_of(V1, fmt, tmp_path)
    pool = Pool.random(V1, seed=3)
    kinds = [
        (wire_of(form, V1, pool, num_rows), new_sessions(NUM_CLIENTS, 100 * at, num_rows))
        for at, (form, num_rows) in enumerate([("json", None), ("safetensors", 10)])
    ]
    flags = ("--max-batch-size", "1") if fmt == "torchscript" else ()  # whose rows else depend
    playing = play(tmp_path, flags, kinds, versions)
    served = asyncio.run(asyncio.wait_for(playing, TIMEOUT_S))
    assert served == [versions[(n + 1) % len(versions)].name for n in range(NUM_RESTARTS)]
    loaded = {version.name: version.loaded for version in versions}
    for wire, sessions in kinds:
        found = replay(sessions, pool, wire, loaded, V1)
        num_rows = sessions[0].num_rows or 1
        assert found == (NUM_CLIENTS * NUM_STEPS * num_rows, 0, 0, 0.0)


def observe(url: str, spec: PolicySpec, session: str, step: int) -> httpx.Response:
    body = {
        "session_id": session,
        "episode": "one",
        "step": step,
        "episode_start": step == 0,
        "observation": [0.1] * spec.observation_dim,
    }
    return httpx.post(f"{url}/act", json=body)


def test_an_artifact_exported_from_the_pushed_weights_goes_on_from_the_snapshot(
    tmp_path: Path,
) -> None:
    """As after a night of learning: what was pushed last is deployed as an artifact."""
    versions = versions_of(V1, "onnx", tmp_path)
    flags = ("--snapshot", str(tmp_path / "sessions"), "--snapshot-required")
    with running_server(tmp_path / "version-0", *flags) as server:
        assert put(server.address, versions[1].body).status_code == 200
        first = observe(server.address, V1, "a", 0)
    with running_server(tmp_path / "version-1", *flags) as server:
        assert observe(server.address, V1, "a", 0).content == first.content
        assert observe(server.address, V1, "a", 1).json()["policy_version"] == versions[1].name


def test_after_a_restart_the_way_back_leads_to_the_artifact_s_own_weights(tmp_path: Path) -> None:
    versions = versions_of(V1, "onnx", tmp_path)
    flags = ("--snapshot", str(tmp_path / "sessions"))
    with running_server(tmp_path / "version-0", *flags) as server:
        error = put(server.address, versions[1].body).json()["probe_error"]
    with running_server(tmp_path / "version-0", *flags) as server:
        (listed,) = httpx.get(f"{server.address}/policy/versions").json()["versions"]
        assert (listed["policy_version"], listed["probe_error"]) == (versions[1].name, error)
        back = httpx.post(f"{server.address}/policy/rollback").json()
        assert (back["policy_version"], back["probe_error"]) == (versions[0].name, None)
        assert observe(server.address, V1, "a", 0).json()["policy_version"] == versions[0].name


def test_a_snapshot_with_weights_that_cannot_be_served_here_is_refused_in_a_sentence(
    tmp_path: Path,
) -> None:
    learners = [Learner(random_policy(V1, seed)) for seed in (0, 1)]
    learners[0].export(tmp_path / "artifact", "onnx", "pt2")
    flags = ("--snapshot", str(tmp_path / "sessions"))
    with running_server(tmp_path / "artifact", *flags, "--runtime", "onnx") as server:
        assert put(server.address, learners[1].push().written()).status_code == 200
        assert observe(server.address, V1, "a", 0).status_code == 200
    before = (tmp_path / "sessions").read_bytes()
    with running_server(tmp_path / "artifact", *flags, "--runtime", "compile") as server:
        assert "its weights cannot be served here: compile takes no new parameters" in server.log()
        assert observe(server.address, V1, "a", 1).status_code == 410
        manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
        served = httpx.get(f"{server.address}/policy").json()["policy_version"]
        assert served == f"sha256:{manifest['parameters_sha256']}"
    assert (tmp_path / "sessions.refused").read_bytes()[:-32] == before[:-32]


def test_one_that_the_device_cannot_go_on_from_now_is_left_as_it_is(tmp_path: Path) -> None:
    """As where the process before has the memory still: the next start may have more luck."""
    learners = [Learner(random_policy(V1, seed)) for seed in (0, 1)]
    learners[0].export(tmp_path / "artifact", "torchscript")
    flags = (
        "--device",
        "cpu",
        "--runtime",
        "torchscript",
        "--snapshot",
        str(tmp_path / "sessions"),
    )
    with running_server(tmp_path / "artifact", *flags) as server:
        assert put(server.address, learners[1].push().written()).status_code == 200
        assert observe(server.address, V1, "a", 0).status_code == 200
    before = (tmp_path / "sessions").read_bytes()
    command = [sys.executable, "-m", "tests.service.device_server", "broken", *flags]
    done = subprocess.run(
        [*command, "--artifact", str(tmp_path / "artifact"), "--port", "0"],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 1, done
    assert f"{tmp_path / 'sessions'}: left as it is, nothing can go on from it now" in done.stdout
    assert "RuntimeError: out of memory" in done.stdout
    assert (tmp_path / "sessions").read_bytes() == before
    with running_server(tmp_path / "artifact", *flags) as server:
        answer = observe(server.address, V1, "a", 1)
        assert answer.json()["policy_version"] == learners[1].version()


@pytest.mark.parametrize("error", [FileNotFoundError, ValueError, IndexError, DeviceLost])
def test_whatever_a_device_says_is_no_fault_of_the_snapshot(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learners = [Learner(random_policy(V1, seed)) for seed in (0, 1)]
    manifest = learners[0].export(tmp_path / "artifact", "onnx")
    settings = Settings(artifact=tmp_path / "artifact", snapshot=tmp_path / "sessions")
    with running_server(settings.artifact, "--snapshot", str(settings.snapshot)) as server:
        assert put(server.address, learners[1].push().written()).status_code == 200
    loaded = load_runtime(settings.artifact, manifest, name="onnx", device="cpu", num_threads=1)
    engine = Engine(manifest, loaded, settings)

    def prepare(loaded: object) -> None:
        raise error("of the device")

    monkeypatch.setattr(engine.runtime, "prepare", prepare)
    assert engine.snapshots is not None
    with pytest.raises(RuntimeError, match="its weights cannot be served now"):
        engine.snapshots.restore()
    engine.snapshots.outdate()  # which closes it
