"""The truth: `python -m export` and `python -m service` as processes, driven over real HTTP."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest
import torch

from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.golden import GOLDEN, golden_tensors, needs_golden
from tests.naive import NaivePolicy
from tests.random_inputs import weights_of
from tests.running_server import (
    ROOT,
    RunningServer,
    clean_environment,
    running_server,
    service_command,
)
from tests.traffic import (
    NUM_ENVIRONMENTS,
    NUM_STEPS,
    TIMEOUT_S,
    Episodes,
    Json,
    act,
    check_answers,
    client_of,
    play,
    run,
    stop_under_load,
)


class Exported(NamedTuple):
    """An artifact that `python -m export` wrote, and the oracle for its policy."""

    directory: Path
    naive: NaivePolicy


def export(checkpoint: Path, directory: Path) -> None:
    command = ["-m", "export", "--checkpoint", str(checkpoint), "--output", str(directory)]
    done = subprocess.run(
        [sys.executable, *command, "--formats", "torchscript,onnx"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # tests share few cores
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def exported(
    spec: PolicySpec,
    policy: FactoredRecurrentActorCritic,
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    rng = np.random.default_rng(1)
    mean, var = rng.normal(size=spec.observation_dim), rng.uniform(0.2, 3, spec.observation_dim)
    checkpoint = tmp_path_factory.mktemp("end to end") / "checkpoint.pt"
    statistics = {"obs_normalizer_mean": mean.tolist(), "obs_normalizer_var": var.tolist()}
    torch.save({"network_state_dict": policy.state_dict(), "metadata": statistics}, checkpoint)
    directory = checkpoint.parent / "artifact"
    export(checkpoint, directory)
    naive = NaivePolicy(spec, weights_of(policy), np.float32(mean), np.float32(var))
    return Exported(directory, naive)


@pytest.fixture(scope="module")
def server(exported: Exported) -> Iterator[RunningServer]:
    """One server for every test that leaves it as it was."""
    with running_server(exported.directory) as server:
        yield server
        assert server.stop() == 0
        assert "Traceback" not in server.log()


def test_concurrent_sessions_follow_the_naive_policy(
    server: RunningServer, exported: Exported, spec: PolicySpec
) -> None:
    episodes = Episodes.random(spec, 1)

    async def all_of_them() -> list[list[Json]]:
        async with client_of(server) as client:
            return await asyncio.gather(
                *(play(client, episodes, env, "concurrent") for env in range(NUM_ENVIRONMENTS))
            )

    episodes.check(exported.naive, run(all_of_them()))


def test_a_client_that_carries_the_state_gets_what_a_session_gets(
    server: RunningServer, spec: PolicySpec
) -> None:
    episodes = Episodes.random(spec, 2)

    async def stateless(client: httpx.AsyncClient) -> list[Json]:
        answers: list[Json] = []
        for step in range(NUM_STEPS):
            state = {"state": answers[-1]["state"]} if answers else {}
            answers.append(await act(client, episodes.request(0, step) | state))
        return answers

    async def both() -> tuple[list[Json], list[Json]]:
        async with client_of(server) as client:
            return await play(client, episodes, 0, "stateful"), await stateless(client)

    sessions, carried = run(both())
    for session, alone in zip(sessions, carried, strict=True):
        del session["session_id"], alone["state"]
        assert session == alone


def test_an_episode_repeats_byte_for_byte_after_a_restart(
    server: RunningServer, exported: Exported, spec: PolicySpec
) -> None:
    episodes = Episodes.random(spec, 3)

    async def bodies(of: RunningServer) -> list[bytes]:
        async with client_of(of) as client:
            return [
                (await client.post("/act", json=episodes.session_request(0, step, "again"))).content
                for step in range(NUM_STEPS)
            ]

    first = run(bodies(server))
    with running_server(exported.directory) as restarted:
        assert run(bodies(restarted)) == first


def bad_requests(spec: PolicySpec) -> list[tuple[bytes, int]]:
    """Bodies that must be refused, and the status of each."""
    zeros = [0.0] * spec.observation_dim
    nothing_allowed = {"observation": zeros, "action_mask": {"op": [False] * 6}}
    return [
        (b" " * 50_000_000, 413),
        (b'{"observation": [1, 2', 400),
        (b"\x80\x04\x95.", 400),
        (json.dumps({"observation": [float("nan"), *zeros[1:]]}).encode(), 422),
        (json.dumps(nothing_allowed).encode(), 422),
        (json.dumps({"observation": zeros, "session_id": "nobody"}).encode(), 404),
    ]


def test_bad_requests_are_refused_while_the_good_ones_among_them_are_served(
    server: RunningServer, exported: Exported, spec: PolicySpec
) -> None:
    episodes = Episodes.random(spec, 4)

    async def refused(client: httpx.AsyncClient, content: bytes, status: int) -> None:
        for _ in range(3):
            response = await client.post(
                "/act", content=content, headers={"Content-Type": "application/json"}
            )
            assert response.status_code == status
            assert response.json().keys() == {"error", "error_type"}

    async def all_at_once() -> list[list[Json]]:
        async with client_of(server) as client, asyncio.TaskGroup() as tasks:
            good = [
                tasks.create_task(play(client, episodes, env, "among bad"))
                for env in range(NUM_ENVIRONMENTS)
            ]
            for content, status in bad_requests(spec):
                tasks.create_task(refused(client, content, status))
        return [task.result() for task in good]

    episodes.check(exported.naive, run(all_at_once()))
    assert httpx.get(f"{server.address}/readyz", timeout=TIMEOUT_S).json() == {"ready": True}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_line_it_prints_works_as_it_stands(server: RunningServer) -> None:
    command = server.ready_line.removeprefix("ready: ")
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    answer = json.loads(done.stdout)
    assert answer["session_id"] == "env-0"
    assert answer["step"] == 0
    assert answer["action"]


def test_sigterm_under_load_answers_or_refuses_everything_and_exits_with_0(
    exported: Exported, spec: PolicySpec
) -> None:
    with running_server(exported.directory) as server:
        stop_under_load(server, Episodes.random(spec, 5))


def test_a_request_under_way_at_sigterm_is_answered(exported: Exported, spec: PolicySpec) -> None:
    body = json.dumps({"observation": [0.5] * spec.observation_dim}).encode()
    head = (
        "POST /act HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    )
    with (
        running_server(exported.directory) as server,
        socket.create_connection(server.host_and_port, TIMEOUT_S) as connection,
    ):
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100 Continue")
        server.terminate()
        wait_until_it_drains(server)
        connection.sendall(body)
        with connection.makefile("rb") as stream:
            status, *_ = stream.readlines()
        assert status.startswith(b"HTTP/1.1 200 ")
        assert server.wait() == 0
        assert "Traceback" not in server.log()


def test_a_server_asked_to_stop_while_it_starts_does_not_start(exported: Exported) -> None:
    command = service_command("--artifact", str(exported.directory), "--port", "0")
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            process.terminate()
            rest, _ = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "INFO" in first
    assert "ready: " not in rest
    assert "Traceback" not in rest


def wait_until_it_drains(server: RunningServer) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while "Waiting for connections to close" not in server.log():
        assert time.monotonic() < end_s, "the server does not begin to shut down"


def refused_start(*arguments: str) -> str:
    """The last line on stderr of a server that does not start."""
    done = subprocess.run(
        service_command(*arguments),
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "ready: " not in done.stdout
    return done.stderr.splitlines()[-1]


def test_a_missing_artifact_is_refused(tmp_path: Path) -> None:
    line = refused_start("--artifact", str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in line
    assert "python -m export" in line


def test_a_policy_file_with_one_bit_changed_is_refused(exported: Exported, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(exported.directory, tmp_path / "copied"))
    content = bytearray((copied / "policy.ts").read_bytes())
    content[len(content) // 2] ^= 1
    (copied / "policy.ts").write_bytes(content)
    line = refused_start("--artifact", str(copied), "--runtime", "torchscript")
    assert str(copied / "policy.ts") in line
    assert "SHA-256" in line


def test_a_truncated_manifest_is_refused(exported: Exported, tmp_path: Path) -> None:
    content = (exported.directory / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").write_bytes(content[: len(content) // 2])
    assert str(tmp_path / "manifest.json") in refused_start("--artifact", str(tmp_path))


def test_a_port_in_use_is_refused(server: RunningServer, exported: Exported) -> None:
    host, port = server.host_and_port
    line = refused_start("--artifact", str(exported.directory), "--port", str(port))
    assert line == f"service: cannot listen on {host}:{port}"


@pytest.mark.parametrize("arguments", [["--max-batch-size", "0"], ["--no-such-flag", "1"]])
def test_a_bad_flag_is_refused(exported: Exported, arguments: list[str]) -> None:
    line = refused_start("--artifact", str(exported.directory), *arguments)
    assert arguments[0] in line


@needs_golden
@pytest.mark.parametrize(
    ("checkpoint", "io", "spec"),
    [
        ("ckpt_v1_meta.pt", "ckpt_v1_io", PolicySpec.tamiyo_v1()),
        ("ckpt_v2.pt", "ckpt_v2_io", PolicySpec.tamiyo_v2()),
    ],
    ids=["V1", "V2"],
)
def test_a_trainer_s_checkpoint_is_served_with_its_recorded_actions(
    checkpoint: str, io: str, spec: PolicySpec, tmp_path: Path
) -> None:
    recorded = {name: tensor.numpy() for name, tensor in golden_tensors(io).items()}
    heads = spec.head_names
    export(GOLDEN / checkpoint, tmp_path / "artifact")
    more = {"blueprint_index": "in.blueprint_indices", "slot_by_op_mask": "in.mask.slot_by_op"}

    def request(row: int) -> Json:
        return {
            "session_id": f"row-{row}",
            "episode_start": True,
            "observation": recorded["in.raw_states"][row].tolist(),
            "action_mask": {name: recorded[f"in.mask.{name}"][row].tolist() for name in heads},
            "deterministic": True,
            **{name: recorded[key][row].tolist() for name, key in more.items() if key in recorded},
        }

    async def all_at_once(server: RunningServer) -> list[Json]:
        async with client_of(server) as client:
            rows = range(len(recorded["in.raw_states"]))
            return await asyncio.gather(*(act(client, request(row)) for row in rows))

    with running_server(tmp_path / "artifact") as server:
        answers = run(all_at_once(server))
        assert server.stop() == 0
    check_answers(
        answers,
        np.stack([recorded[f"out.actions.{name}"] for name in heads], axis=1),
        np.stack([recorded[f"out.log_probs.{name}"] for name in heads], axis=1),
        recorded["out.values"],
    )
