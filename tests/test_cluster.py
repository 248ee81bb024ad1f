"""Services behind HAProxy, as `deploy/haproxy.cfg` has it: real ones, and clients that retry.

A session stays with its replica. One that restarts with its snapshot is waited for; of one that is
gone, every session is told that it is lost, and no other notices. The truth is again what the same
requests are answered by a server that nobody disturbs.
"""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any, Self

import httpx
import numpy as np
import pytest
import torch

from export.exporter import export_policy
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tamiyo_client import AsyncPolicyClient, SessionLost, errors
from tests.balancer import CONFIG, HAPROXY, Balancer, balanced, needs_haproxy
from tests.connection import Address
from tests.nameserver import nameserver
from tests.pushes import Learner
from tests.random_inputs import random_observations, random_policy
from tests.running_server import (
    ROOT,
    STOP_TIMEOUT_S,
    RunningServer,
    clean_environment,
    running,
    running_server,
)
from tests.test_faults import Script, scripts, vector_scripts
from tests.test_snapshots import (
    PATIENCE,
    Environment,
    Home,
    Progress,
    check,
    home_of,
    play,
    renamed,
    run,
    without_names,
)

NUM_SESSIONS = 40
NUM_STEPS = 50
"""One episode: a session that is lost cannot be saved by the next one's start."""
BETWEEN_SIGNALS_S = 0.002
"""Bash runs one more trap for each that comes before the first has begun: a flood has no end."""
RESTS_AT = 10
GONE_AFTER_S = 2
TIMEOUT_S = 30.0
OK = 'tamiyo_act_requests_total{result="ok"}'

pytestmark = needs_haproxy


@pytest.fixture(scope="module")
def artifact(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("cluster") / "tiny"
    export_policy(policy, None, output, name="tiny", formats=("onnx",), max_batch_size=64)
    return output


@contextmanager
def two_servers(artifact: Path) -> Iterator[tuple[RunningServer, RunningServer]]:
    with running_server(artifact) as one, running_server(artifact) as two:
        yield one, two
        assert not any("Traceback" in server.log() for server in (one, two))


@pytest.fixture(scope="module")
def servers(artifact: Path) -> Iterator[tuple[RunningServer, RunningServer]]:
    with two_servers(artifact) as servers:
        yield servers


@pytest.fixture
def balancer(servers: tuple[RunningServer, RunningServer]) -> Iterator[Balancer]:
    with balanced(*(server.host_and_port for server in servers)) as balancer:
        yield balancer


def request_of(session_id: str, step: int, spec: PolicySpec) -> dict[str, Any]:
    return {
        "session_id": session_id,
        "episode": "0",
        "episode_start": step == 0,
        "step": step,
        "observation": [0.1] * spec.observation_dim,
    }


def test_a_session_stays_with_one_replica_and_what_is_of_none_goes_round(
    servers: tuple[RunningServer, RunningServer], balancer: Balancer, spec: PolicySpec
) -> None:
    names = [f"env-{number}" for number in range(2 * NUM_SESSIONS)]
    with httpx.Client(base_url=balancer.address, timeout=TIMEOUT_S) as client:
        for step in range(3):
            for name in names:
                body = request_of(name, step, spec)
                response = client.post("/act", json=body, headers={"X-Session-Id": name})
                assert response.status_code == 200, response.text
        kept = [server.counted("tamiyo_sessions") for server in servers]
        assert sum(kept) == len(names)
        assert min(kept) > len(names) / 4
        before = [server.counted(OK) for server in servers]
        for _ in range(20):
            body = {"observation": [0.1] * spec.observation_dim}
            assert client.post("/act", json=body).status_code == 200
        after = [server.counted(OK) for server in servers]
        assert [now - was for now, was in zip(after, before, strict=True)] == [10, 10]
        for name in names:  # which nothing but the path has
            assert client.delete(f"/sessions/{name}").status_code == 204


def test_a_name_of_any_letters_is_hashed_alike_in_a_header_and_in_a_path(
    balancer: Balancer, spec: PolicySpec
) -> None:
    names = ["a/b", "a b", "ä%2f", "日本", "?x=1", "#", "+", *map(str, range(20))]
    names += [f"{number},{number}" for number in range(10)]
    names += [f"run/sessions/{number}/" for number in range(10)]
    with httpx.Client(base_url=balancer.address, timeout=TIMEOUT_S) as client:
        for name in names:
            body = request_of(name, 0, spec)
            response = client.post("/act", json=body, headers=[(b"X-Session-Id", name.encode())])
            assert response.status_code == 200, response.text
        for name in names:
            path = "/sessions/" + "".join(f"%{byte:02X}" for byte in name.encode())
            assert client.delete(path).status_code == 204, name


@pytest.mark.parametrize("path", ["/%73essions/{}", "/below/this/sessions/{}", "/sessions/{}/%zz"])
def test_a_session_is_known_by_any_path_that_a_replica_knows_it_by(
    artifact: Path, spec: PolicySpec, path: str
) -> None:
    names = [f"env/{number}" for number in range(10)]
    prefixed = ("--root-path", "/below/this")
    with (
        running_server(artifact, *prefixed) as one,
        running_server(artifact, *prefixed) as two,
        balanced(one.host_and_port, two.host_and_port) as balancer,
        httpx.Client(base_url=balancer.address, timeout=TIMEOUT_S) as client,
    ):
        for name in names:
            name += path.partition("{}")[2]
            body = request_of(name, 0, spec)
            answer = client.post("/act", json=body, headers={"X-Session-Id": name})
            assert answer.status_code == 200, answer.text
        for name in names:
            with socket.create_connection(balancer.host_and_port, TIMEOUT_S) as raw:
                target = path.format(name)
                raw.sendall(f"DELETE {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
                assert raw.recv(1024).startswith(b"HTTP/1.1 204 "), name


CLOSED = [
    ("PUT", "/policy/weights", 403),
    ("PUT", "/policy%2fweights", 403),
    ("PUT", "/below/this/policy/weights", 403),
    ("PUT", "/policy/weights%0a", 403),  # which a route's `$` takes for its end
    ("POST", "/policy/rollback", 403),
    ("POST", "/%70olicy/rollback?x=1", 403),
    ("POST", "/below/this/%70olicy/rollback", 403),
    ("GET", "/metrics", 404),
    ("GET", "/%6detrics", 404),
    ("HEAD", "/metrics%0a", 404),
    ("GET", "/below/this/metrics?x=1", 404),
]


def test_what_is_of_one_replica_is_closed_however_its_path_is_written() -> None:
    with HangsUp() as server, balanced(server.socket.getsockname()) as balancer:
        for method, path, status in CLOSED:
            with socket.create_connection(balancer.host_and_port, TIMEOUT_S) as raw:
                head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
                raw.sendall(head.encode())
                assert raw.recv(1024).startswith(b"HTTP/1.1 %d " % status), path
        assert server.asked == []
        for method, path in (("POST", "/v2/models/policy/infer"), ("GET", "/policy/versions")):
            httpx.request(method, balancer.address + path, timeout=TIMEOUT_S)
        assert len(server.asked) == 2


def test_the_balancer_closes_everything_that_changes_the_policy(
    servers: tuple[RunningServer, RunningServer],
) -> None:
    paths = httpx.get(f"{servers[0].address}/openapi.json", timeout=TIMEOUT_S).json()["paths"]
    changing = {
        (method.upper(), path)
        for path, methods in paths.items()
        if path.startswith("/policy")
        for method in methods.keys() - {"get"}
    }
    assert changing == {(method, path) for method, path, _ in CLOSED if path in paths} - {
        ("GET", "/metrics")
    }


def test_the_bench_finds_every_answer_through_the_balancer_the_artifact_s_own(
    balancer: Balancer, artifact: Path
) -> None:
    command = [sys.executable, "-m", "service.bench", "--url", balancer.address, "--json"]
    command += ["--envs", "16", "--seconds", "1", "--artifact", str(artifact)]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["errors"], found["batches_by_size"]) == ({}, {})
    assert found["differences"]["answers"] == found["answers"] > 0
    assert found["differences"]["differing"] == 0


class HangsUp(ThreadingTCPServer):
    """Is ready, and ends every other exchange before its answer; `asked` has their lines."""

    def __init__(self) -> None:
        self.asked: list[list[bytes]] = []
        super().__init__(("127.0.0.1", 0), Exchange)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join(TIMEOUT_S)


class Exchange(StreamRequestHandler):
    server: HangsUp

    def handle(self) -> None:
        lines = list(iter(self.rfile.readline, b"\r\n"))
        if lines[0].startswith(b"GET /readyz"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        else:
            self.server.asked.append(lines)


OWN_ANSWERS: dict[str, tuple[str, str, dict[str, str], int, str]] = {
    "no replica, of a session": ("POST", "/act", {"X-Session-Id": "a"}, 503, "not_ready"),
    "no replica, of none": ("POST", "/act", {}, 503, "not_ready"),
    "no answer, of a session": ("POST", "/act", {"X-Session-Id": "a"}, 502, "unreachable"),
    "no answer, of none": ("POST", "/act", {}, 502, "unreachable"),
    "weights": ("PUT", "/policy/weights", {}, 403, "forbidden"),
    "a rollback": ("POST", "/policy/rollback", {}, 403, "forbidden"),
    "metrics": ("GET", "/metrics", {}, 404, "not_found"),
}


@pytest.mark.parametrize("case", OWN_ANSWERS)
def test_what_the_balancer_answers_itself_is_in_the_contract_s_form(case: str) -> None:
    method, path, headers, status, error_type = OWN_ANSWERS[case]
    with HangsUp() as server, socket.create_server(("127.0.0.1", 0)) as unused:
        place = (server.socket if case.startswith("no answer") else unused).getsockname()
        unused.close()
        with balanced(place) as balancer:
            answer = httpx.request(
                method, balancer.address + path, headers=headers, content=b"{}", timeout=TIMEOUT_S
            )
    if case.startswith("no answer"):
        (lines,) = server.asked  # it may have been taken: nobody but the client sends it again
        assert b"x-forwarded-for: 127.0.0.1\r\n" in lines
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers.get("Retry-After") == ("1" if status > 500 else None)
    assert set(answer.json()) == {"error", "error_type"}
    assert answer.json()["error_type"] == error_type


def test_the_client_tries_again_what_no_replica_has_refused() -> None:
    own = re.findall(
        r"http-error status (\d+) .* string '(.*?)'( hdr Retry-After 1)?$", CONFIG.read_text(), re.M
    )
    assert [int(status) for status, _, _ in own] == [400, 408, 500, 502, 503, 504]
    for status, body, waits in own:
        told = json.loads(body)
        assert set(told) == {"error", "error_type"}
        kind = errors.BY_TYPE.get(told["error_type"]) or errors.BY_STATUS.get(int(status))
        is_retried = kind is not None and issubclass(kind, errors.Unavailable)
        assert is_retried == (int(status) > 500) == bool(waits), status


def test_haproxy_accepts_its_configuration_with_the_replicas_of_either_file(tmp_path: Path) -> None:
    assert HAPROXY is not None
    for domain in ("", ".tamiyo.default.svc.cluster.local"):
        done = subprocess.run(
            [HAPROXY, "-c", "-f", str(CONFIG), "-f", str(ROOT / "deploy" / "replicas.cfg")],
            env=clean_environment() | {"DOMAIN": domain},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr
        complaints = [line for line in done.stderr.splitlines() if "config :" in line]
        assert all("could not resolve address 'tamiyo-" in line for line in complaints), complaints


@dataclass
class Reached:
    """Where clients find what serves; their connections end with the stack."""

    host: str
    port: int
    stack: ExitStack


@contextmanager
def reached(address: Address) -> Iterator[Reached]:
    with ExitStack() as stack:
        yield Reached(*address, stack)


class Life(Environment):
    """An environment that begins anew where it is told that its session is lost."""

    def __init__(self, script: Script, place: Reached) -> None:
        super().__init__(script, place)
        self.told: list[int] = []
        """What it was refused with."""

    async def lives(self, number: int, made: Callable[[], Any]) -> None:
        """Until it has so many answers, of the session it has in the end."""
        while len(self.answers) < number:
            answer = await self.ask(len(self.answers))
            if answer.status == 200:
                self.answers.append(answer.content)
                await made()
                continue
            assert answer.status in (409, 410), answer
            self.told.append(answer.status)
            self.answers.clear()
            self.script = renewed(self.script)

    @property
    def is_untouched(self) -> bool:
        return not self.told


def renewed(script: Script) -> Script:
    """The same in an episode, or run, of another name."""
    bodies = [
        body | {name: f"{body[name]}'" for name in ("episode", "run") if name in body}
        for body in script.bodies
    ]
    return script._replace(bodies=bodies)


async def nothing() -> None:
    """What there is to do on an answer, as a rule."""


def mixed(spec: PolicySpec) -> list[Script]:
    """Single environments and vectors."""
    return scripts(spec, NUM_SESSIONS, NUM_STEPS) + vector_scripts(spec)[: NUM_SESSIONS // 2]


def test_of_a_replica_that_is_killed_every_session_is_told_and_no_other_notices(
    artifact: Path, spec: PolicySpec
) -> None:
    made = mixed(spec)

    async def story(lost: RunningServer, balancer: Balancer) -> list[Life]:
        with reached(balancer.host_and_port) as place:
            lives = [Life(script, place) for script in made]
            await asyncio.gather(*(each.lives(RESTS_AT, nothing) for each in lives))
            progress = Progress()
            async with asyncio.TaskGroup() as going_on:
                for each in lives:
                    going_on.create_task(each.lives(NUM_STEPS, progress.made))
                await progress.reaches(len(lives))
                lost.process.kill()
        return lives

    with two_servers(artifact) as (one, two):
        places = [one.host_and_port, two.host_and_port]
        with balanced(*places, returns_within_s=GONE_AFTER_S) as balancer:
            lives = run(story(one, balancer))
        untouched = [each for each in lives if each.is_untouched]
        lost = [each for each in lives if not each.is_untouched]
        assert all(each.told == [410] for each in lost)
        assert two.counted('tamiyo_act_requests_total{result="session_lost"}') == len(lost)
        assert min(len(untouched), len(lost)) > len(lives) / 4
        assert two.counted('tamiyo_act_requests_total{result="step_conflict"}') == 0
        one.process.wait(TIMEOUT_S)
    check(lives, artifact)


async def act_through(
    url: str, name: str, shown: Any, begun: Callable[[], Any]
) -> tuple[list[Any], int]:
    """What the project's own client is told; where its session is lost it begins anew."""
    told: list[Any] = []
    num_lost = 0
    async with AsyncPolicyClient(url, session_id=name, **PATIENCE) as client:
        while len(told) < len(shown):
            try:
                act = await client.act(shown[len(told)], seed=7 if not told else None)
            except SessionLost:
                client.restart()
                told.clear()
                num_lost += 1
                continue
            told.append((act.action, act.log_prob, act.value))
            await begun()
    return told, num_lost


def test_clients_of_a_replica_that_is_gone_begin_anew_at_another(
    artifact: Path, spec: PolicySpec
) -> None:
    shown = random_observations(spec, np.random.default_rng(4), NUM_STEPS)
    names = [f"client-{number}" for number in range(12)]

    async def story(gone: RunningServer | None, url: str) -> list[tuple[list[Any], int]]:
        progress = Progress()
        async with asyncio.TaskGroup() as playing:
            tasks = [
                playing.create_task(act_through(url, name, shown, progress.made)) for name in names
            ]
            await progress.reaches(len(names) * RESTS_AT)
            if gone is not None:
                gone.process.kill()
        return [task.result() for task in tasks]

    with two_servers(artifact) as (one, two):
        undisturbed = run(story(None, two.address))
        places = [one.host_and_port, two.host_and_port]
        with balanced(*places, returns_within_s=GONE_AFTER_S) as balancer:
            found = run(story(one, balancer.address))
        one.process.wait(TIMEOUT_S)
    assert [told for told, _ in found] == [told for told, _ in undisturbed]
    assert {num_lost for _, num_lost in undisturbed} == {0}
    assert {num_lost for _, num_lost in found} == {0, 1}


def test_replicas_restart_one_after_the_other_and_no_client_can_tell(
    artifact: Path, spec: PolicySpec, tmp_path: Path
) -> None:
    made = mixed(spec)

    async def story(balancer: Balancer, *homes: Home) -> tuple[list[Environment], list[Any]]:
        progress = Progress()
        with reached(balancer.host_and_port) as place:
            environments = [Environment(script, place) for script in made]
            async with asyncio.TaskGroup() as playing:
                telling = playing.create_task(play(balancer.address, spec, progress.made))
                for each in environments:
                    playing.create_task(each.goes_on(NUM_STEPS, progress.made))
                for nth, home in enumerate(homes, 1):
                    await progress.reaches(len(made) * NUM_STEPS * nth / (len(homes) + 1))
                    await home.restart()
        return environments, telling.result()

    with (
        home_of(artifact, tmp_path / "one") as one,
        home_of(artifact, tmp_path / "two") as two,
        balanced((one.host, one.port), (two.host, two.port)) as balancer,
    ):
        balancer.wait_until("UP", 1, 2)
        environments, told = run(story(balancer, one, two))
        restored = [
            each.counted('tamiyo_session_events_total{event="restored"}') for each in (one, two)
        ]
        assert sum(restored) >= len(made), "all of one, and then all of the other"
        assert min(restored) > 0
    with running_server(artifact) as server:
        undisturbed = run(play(server.address, spec, nothing))
    assert told == undisturbed
    check(environments, artifact)


def test_after_a_kill_and_a_restart_with_its_snapshot_a_session_goes_on_or_is_told(
    artifact: Path, spec: PolicySpec, tmp_path: Path
) -> None:
    everybody = scripts(spec, NUM_SESSIONS, NUM_STEPS)
    kinds = {
        "resting": renamed(everybody, "resting"),
        "busy": renamed(everybody, "busy"),
        "unnamed": renamed([without_names(script) for script in everybody], "unnamed"),
    }

    async def story(killed: Home, balancer: Balancer) -> dict[str, list[Life]]:
        with reached(balancer.host_and_port) as place:
            lives = {kind: [Life(s, place) for s in some] for kind, some in kinds.items()}
            everything = [each for some in lives.values() for each in some]
            await asyncio.gather(*(each.lives(RESTS_AT, nothing) for each in everything))
            await killed.has_written(2)
            progress = Progress()
            async with asyncio.TaskGroup() as busy:
                for each in lives["busy"]:
                    busy.create_task(each.lives(NUM_STEPS, progress.made))
                await progress.reaches(len(lives["busy"]))
                await killed.kill()
                await killed.begin_again()
            for kind in ("resting", "unnamed"):
                await asyncio.gather(*(each.lives(RESTS_AT + 5, nothing) for each in lives[kind]))
        return lives

    with (
        home_of(artifact, tmp_path / "one", "--snapshot-every-s", "0.05") as one,
        home_of(artifact, tmp_path / "two") as two,
        balanced((one.host, one.port), (two.host, two.port)) as balancer,
    ):
        balancer.wait_until("UP", 1, 2)
        lives = run(story(one, balancer))
        assert two.counted('tamiyo_act_requests_total{result="session_lost"}') == 0
        lost = {kind: [e for e in some if not e.is_untouched] for kind, some in lives.items()}
        assert one.counted('tamiyo_act_requests_total{result="session_lost"}') == sum(
            map(len, lost.values())
        )
    assert lost["resting"] == []
    assert 0 < len(lost["unnamed"]) < NUM_SESSIONS, "the killed one's, and nobody else's"
    assert {status for some in lost.values() for each in some for status in each.told} == {410}
    check([each for some in lives.values() for each in some], artifact)


def test_a_replica_that_comes_back_at_another_address_has_its_place_and_its_sessions(
    artifact: Path, spec: PolicySpec, tmp_path: Path
) -> None:
    """As a pod does, whose name is gone for the time."""
    made = scripts(spec, NUM_SESSIONS, NUM_STEPS)
    names = {"one.test": "127.0.0.1", "two.test": "127.0.0.1"}

    async def story(one: Home, balancer: Balancer, stack: ExitStack) -> list[Environment]:
        async def elsewhere() -> None:
            del names["one.test"]
            assert await asyncio.to_thread(one.server.stop) == 0
            flags = ("--snapshot", str(tmp_path / "one"), "--host", "127.0.0.2")
            moved = running_server(artifact, *flags, "--port", str(one.port))
            await asyncio.to_thread(stack.enter_context, moved)
            names["one.test"] = "127.0.0.2"

        with reached(balancer.host_and_port) as place:
            progress = Progress()
            environments = [Environment(script, place) for script in made]
            async with asyncio.TaskGroup() as playing:
                for each in environments:
                    playing.create_task(each.goes_on(NUM_STEPS, progress.made))
                await progress.reaches(len(made) * RESTS_AT)
                await elsewhere()
        return environments

    with (
        home_of(artifact, tmp_path / "one") as one,
        home_of(artifact, tmp_path / "two") as two,
        nameserver(names) as asked,
        ExitStack() as stack,
    ):
        places = [("one.test", one.port), ("two.test", two.port)]
        # Longer than the test: what is not followed at once is never.
        with balanced(*places, nameserver=asked, returns_within_s=600) as balancer:
            balancer.wait_until("UP", 1, 2)
            environments = run(story(one, balancer, stack))
        assert NUM_SESSIONS / 4 < two.counted("tamiyo_sessions") < NUM_SESSIONS * 3 / 4
    check(environments, artifact)


def test_of_two_three_and_two_replicas_only_the_third_one_s_share_of_the_sessions_moves(
    artifact: Path, spec: PolicySpec, tmp_path: Path
) -> None:
    made = scripts(spec, 3 * NUM_SESSIONS, 30)

    async def steps(lives: list[Life], number: int) -> list[Life]:
        """All go so far; those that were told that their session is lost."""
        before = {id(each): len(each.told) for each in lives}
        await asyncio.gather(*(each.lives(number, nothing) for each in lives))
        return [each for each in lives if len(each.told) > before[id(each)]]

    async def story(third: Home, balancer: Balancer) -> tuple[list[Life], list[Life], list[Life]]:
        with reached(balancer.host_and_port) as place:
            lives = [Life(script, place) for script in made]
            assert await steps(lives, 10) == []
            await third.begin_again()
            await asyncio.to_thread(balancer.wait_until, "UP", 3)
            moved = await steps(lives, 20)
            assert third.counted("tamiyo_sessions") == len(moved)
            assert await asyncio.to_thread(third.server.stop) == 0
            await asyncio.to_thread(balancer.wait_until, "DOWN", 3)
            back = await steps(lives, 30)
        return lives, moved, back

    with two_servers(artifact) as (one, two), home_of(artifact, tmp_path / "three") as third:
        assert third.server.stop() == 0
        places = [one.host_and_port, two.host_and_port, (third.host, third.port)]
        with balanced(*places, returns_within_s=GONE_AFTER_S) as balancer:
            balancer.wait_until("UP", 1, 2)
            balancer.wait_until("DOWN", 3)
            lives, moved, back = run(story(third, balancer))
        assert min(server.counted("tamiyo_sessions") for server in (one, two)) > len(made) / 4
    assert len(made) / 5 < len(moved) < len(made) / 2
    assert {each.told[0] for each in moved} == {410}
    assert back == moved
    assert [each for each in lives if not each.is_untouched] == moved
    check(lives, artifact)


def test_a_push_reaches_every_replica_that_is_named(
    artifact: Path, policy: FactoredRecurrentActorCritic, tmp_path: Path
) -> None:
    newer = random_policy(policy.spec, seed=3)
    torch.save(newer.state_dict(), tmp_path / "newer.pt")
    with two_servers(artifact) as servers:
        push = [sys.executable, "-m", "export", "push", "--normaliser", "identity"]
        push += ["--checkpoint", str(tmp_path / "newer.pt")]
        for url in ("http://127.0.0.1:1", *(server.address for server in servers)):
            push += ["--to", url]
        done = subprocess.run(
            push, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120
        )
        versions = {httpx.get(f"{s.address}/policy").json()["policy_version"] for s in servers}
    assert done.returncode == 1
    assert done.stderr.startswith("export: http://127.0.0.1:1: "), done.stderr
    assert versions == {Learner(newer).version()}
    for server in servers:
        assert f"{server.address} serves {Learner(newer).version()}" in done.stdout


@contextmanager
def cluster(
    artifact: Path, state: Path | None, **settings: str
) -> Iterator[tuple[RunningServer, int]]:
    """`deploy/cluster.sh` with two replicas, and the port of its balancer."""
    port = free_ports(4)
    settings |= {
        "REPLICAS": "2",
        "PORT": str(port),
        "METRICS_BIND": f"127.0.0.1:{port + 3}",
        "STATE": str(state or ""),
        "PYTHON": sys.executable,
    }
    # A shell cannot trap what its parent ignores, as what runs in the background ignores Ctrl-C.
    command = ["env", "--default-signal=INT", *(f"{k}={v}" for k, v in settings.items())]
    command += [str(ROOT / "deploy" / "cluster.sh"), "--artifact", str(artifact)]
    with running(command) as script:
        yield script, port


def free_ports(number: int) -> int:
    """The first of so many in a row that nobody listens at."""
    for first in range(20_000, 30_000, number):
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + number):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise RuntimeError("there are none")


def processes_of(output: str) -> list[int]:
    return [int(pid) for pid in re.findall(r"^replica \d is process (\d+)", output, re.M)]


def assert_nobody_listens(first: int, number: int) -> None:
    for port in range(first, first + number):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), TIMEOUT_S)


def test_one_command_runs_a_cluster_restarts_its_replicas_and_ends_all_of_it(
    artifact: Path, spec: PolicySpec, tmp_path: Path
) -> None:
    names = [f"env-{number}" for number in range(8)]
    with cluster(artifact, tmp_path / "state") as (script, port):
        curl = script.ready_line.removeprefix("ready: ")
        done = subprocess.run(
            ["bash", "-c", curl], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
        assert json.loads(done.stdout)["step"] == 0
        processes = processes_of(script.log())
        cores = [os.sched_getaffinity(pid) for pid in processes]
        assert [len(each) for each in cores] == [1, 1]
        assert len(set.union(*cores)) == min(2, len(os.sched_getaffinity(0)))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client:

            def step(number: int) -> None:
                for name in names:
                    ask = partial(
                        client.post,
                        "/act",
                        json=request_of(name, number, spec),
                        headers={"X-Session-Id": name},
                    )
                    while (answer := ask()).status_code in (502, 503):
                        pass
                    assert answer.status_code == 200, answer.text

            step(0)
            os.kill(processes[0], signal.SIGTERM)
            script.output.wait_for("replica 1 has ended (0) and begins again")
            step(1)
        script.process.send_signal(signal.SIGINT)
        assert script.wait() == 130
        assert_nobody_listens(port, 4)
    assert {"1.sessions", "2.sessions"} <= {path.name for path in (tmp_path / "state").iterdir()}


@pytest.fixture
def heeds_sighup() -> Iterator[None]:
    """As a terminal's own programs do, though who runs these tests may be told not to (nohup)."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heeds_sighup")
def test_a_terminal_that_closes_ends_the_cluster_whatever_else_it_sends(
    artifact: Path, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with cluster(artifact, None, TMPDIR=str(temporary)) as (script, port):
        (state,) = temporary.iterdir()
        while script.process.poll() is None:
            script.process.send_signal(signal.SIGHUP)
            with suppress(subprocess.TimeoutExpired):
                script.process.wait(BETWEEN_SIGNALS_S)
        assert script.wait() == 129
        assert_nobody_listens(port, 4)
    assert not state.exists()


def test_a_replica_that_has_only_just_begun_is_ended_with_the_cluster(
    artifact: Path, tmp_path: Path
) -> None:
    (tmp_path / "ended_there").write_text(
        "set -o functrace\n"
        "trap '[[ $BASH_COMMAND != replica_of\\[* ]] || { trap - DEBUG; kill $$; }' DEBUG\n"
    )
    done = run_script(artifact, STATE=str(tmp_path / "state"), BASH_ENV=tmp_path / "ended_there")
    assert done.returncode == 143, done.stderr
    begun = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(str(tmp_path / "state").encode() in line for line in begun)


def test_the_cluster_ends_as_failed_where_haproxy_ends(artifact: Path, tmp_path: Path) -> None:
    with cluster(artifact, tmp_path / "state") as (script, port):
        (process,) = re.findall(r"^HAProxy is process (\d+)$", script.log(), re.M)
        os.kill(int(process), signal.SIGKILL)
        assert script.wait() == 1
        assert_nobody_listens(port, 4)
    assert script.log().endswith("cluster: HAProxy has ended\n")


def test_replicas_that_end_at_once_all_begin_again(artifact: Path, tmp_path: Path) -> None:
    """The second while the script sees to the first."""
    with cluster(artifact, tmp_path / "state") as (script, _):
        for process in processes_of(script.log()):
            os.kill(process, signal.SIGKILL)
        log = "".join(script.output.wait_for("has ended (137) and begins again") for _ in "12")
        assert sorted(re.findall(r"replica (\d) has", log)) == ["1", "2"]
        script.process.send_signal(signal.SIGTERM)
        assert script.wait() == 143


def test_an_end_that_comes_while_another_command_runs_is_not_missed(
    artifact: Path, tmp_path: Path
) -> None:
    """HAProxy's, just before the script says what to curl, by which time it is known to be gone."""
    (tmp_path / "ended_there").write_text(
        "set -o functrace\n"
        "trap '[[ $BASH_COMMAND != sed\\ -n* ]] || "
        "{ trap - DEBUG; kill -KILL $balancer; sleep 0.5; }' DEBUG\n"
    )
    done = run_script(artifact, STATE=str(tmp_path / "state"), BASH_ENV=tmp_path / "ended_there")
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith("cluster: HAProxy has ended\n")


def run_script(
    artifact: Path, *flags: str, **settings: str | Path
) -> "subprocess.CompletedProcess[str]":
    port = free_ports(3)
    given: dict[str, str | Path] = {
        "REPLICAS": "1",
        "PORT": str(port),
        "METRICS_BIND": f"127.0.0.1:{port + 2}",
        "PYTHON": sys.executable,
    }
    return subprocess.run(
        [ROOT / "deploy" / "cluster.sh", "--artifact", artifact, *flags],
        env=clean_environment() | given | settings,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=STOP_TIMEOUT_S,
    )


def test_the_command_says_what_it_takes(artifact: Path) -> None:
    done = run_script(artifact, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    said = re.findall(r"^  ([A-Z_]+)(?:, ([A-Z_]+))? ", done.stdout, re.M)
    script = (ROOT / "deploy" / "cluster.sh").read_text()
    taken = set(re.findall(r"\$\{([A-Z_]+):-", script))
    assert {name for names in said for name in names if name} == taken
    assert done.stdout.splitlines()[-1] == "cannot start, 1 where HAProxy has ended."


def test_the_command_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "nothing_is_installed").write_text("command() { false; }\n")
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = "{}:{}".format(*taken.getsockname())
        port = place.rpartition(":")[2]
        already = f"at {place} somebody listens already; give another"
        not_a_port = "PORT is a number from 1 to 65534, not"
        cases: dict[str, dict[str, str | Path]] = {
            "haproxy is not installed": {"BASH_ENV": tmp_path / "nothing_is_installed"},
            "REPLICAS is a number from 1, not 'two'": {"REPLICAS": "two"},
            "is not an artifact": {},
            f"{not_a_port} '08000'": {"PORT": "08000"},
            f"{not_a_port} 'http'": {"PORT": "http"},
            f"{not_a_port} '65535'": {"PORT": "65535"},
            "PYTHON is Python's command, not '/no/python'": {"PYTHON": "/no/python"},
            "STATE is a folder that can be written to": {"STATE": tmp_path / "file"},
            f"{already} PORT": {"PORT": port},
            f"{already} METRICS_BIND": {"METRICS_BIND": place},
        }
        for sentence, settings in cases.items():
            done = run_script(tmp_path, **settings)
            assert done.returncode == 2, sentence
            assert done.stdout == ""
            (line,) = done.stderr.splitlines()
            assert line.startswith("cluster: ")
            assert sentence in line
