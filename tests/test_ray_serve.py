"""Replicas behind Ray Serve: sessions stay where their state is, weights are all replicas'.

One local Ray, with what deploy/ray-serve.yaml says but for the addresses, serves all of this file's
tests, in their order.
"""

import asyncio
import importlib.util
import json
import os
import re
import signal
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, ProcessCollector

from service.bench.connection import Connection
from service.bench.load import Session, new_sessions
from service.bench.pool import POOL_SIZE, Pool
from service.bench.replay import replay
from service.bench.wire import Wire, wire_of
from tamiyo_client import AsyncVectorPolicyClient, SessionLost, VectorPolicyClient
from tests.loaded_step import load_from
from tests.pushes import SAFETENSORS, Learner
from tests.random_inputs import random_policy
from tests.running_server import ROOT, RunningServer, running, running_server, service_command
from tests.specs import TINY_V1, TINY_V2
from tests.test_faults import FAULTS, MODEL, Script, alone, disturbed, scripts, vector_scripts

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is in the extra `ray`"),
    pytest.mark.timeout(600),
]

TIMEOUT_S = 240.0
"""Ray takes a minute to start where others have the cores."""
NUM_ANSWERS = 15
"""Of a session, before something happens to it and again afterwards."""
NUM_STATELESS = 40
NUM_CLIENTS = 16
NUM_ROWS = 2
Json = dict[str, Any]


class Cluster:
    """What is deployed, and how it is."""

    def __init__(self, process: RunningServer, directory: Path) -> None:
        self.address = process.address
        self.host_and_port = process.host_and_port
        self._process = process
        self._directory = directory

    def deploy(self, policy: Path, weights: Path | None, *, num_replicas: int = 2) -> None:
        """Hands the configuration to Serve; what becomes of it is seen later."""
        config = yaml.safe_load((ROOT / "deploy" / "ray-serve.yaml").read_text())
        config["proxy_location"] = "HeadOnly"
        del config["http_options"]
        (application,) = config["applications"]
        application["args"]["artifact"] = str(policy)
        (deployment,) = application["deployments"]
        deployment["user_config"]["artifact"] = str(weights)
        if weights is None:
            del deployment["user_config"]
        del deployment["autoscaling_config"]
        deployment |= {"num_replicas": num_replicas, "ray_actor_options": {"num_cpus": 0.1}}
        file = self._directory / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        self._told(f"deploy {file}", "deployed")

    def serve(self, policy: "Version", weights: "Version", *, num_replicas: int = 2) -> list[str]:
        """Returns once so many replicas do; with a session's name for each."""
        self.deploy(policy.artifact, weights.artifact, num_replicas=num_replicas)
        until(lambda: len(self.replicas()) == num_replicas)
        names = self.one_name_each(num_replicas)
        until(lambda: {self.version(name) for name in names} == {weights.name})
        return names

    def application(self) -> Json:
        seen = self._told("look", "seen: ").removeprefix("seen: ")
        application: Json = json.loads(seen)["policy"]
        return application

    def replicas(self) -> dict[str, int]:
        """The processes of those that run."""
        deployments = self.application()["deployments"]
        replicas = deployments["Policy"]["replicas"] if "Policy" in deployments else []
        return {r["replica_id"]: r["pid"] for r in replicas if "RUNNING" in r["state"]}

    def homes(self, names: Sequence[str]) -> dict[str, float]:
        """When the process began that each session comes to."""
        return {name: self.metrics(name)["process_start_time_seconds"] for name in names}

    def metrics(self, session_id: str) -> dict[str, float]:
        """Of the replica that the session comes to."""
        lines = self.get("/metrics", session_id).text.splitlines()
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
        }

    def version(self, session_id: str) -> str:
        version: str = self.get("/policy", session_id).json()["policy_version"]
        return version

    def get(self, path: str, session_id: str) -> httpx.Response:
        headers = {"X-Session-Id": session_id}
        answer = httpx.get(f"{self.address}{path}", headers=headers, timeout=TIMEOUT_S)
        return answer.raise_for_status()

    def one_name_each(self, number: int) -> list[str]:
        """A session's name for each of so many replicas."""
        names: dict[float, str] = {}
        for at in count():
            name = f"one-{at}"
            names.setdefault(self.homes([name])[name], name)
            if len(names) == number:
                return list(names.values())
        raise AssertionError

    def log(self) -> str:
        """Whatever replicas have written."""
        logs = (self._directory / "session_latest" / "logs").glob("**/*")
        files = [file for file in logs if re.search(r"worker.*\.(out|err)|replica_", file.name)]
        return "".join(file.read_text() for file in files)

    def _told(self, command: str, text: str) -> str:
        stdin = self._process.process.stdin
        assert stdin is not None
        stdin.write(f"{command}\n")
        stdin.flush()
        return self._process.output.wait_for(text)


def until(is_so: Callable[[], bool]) -> None:
    """Returns once it is; what is asked takes its time."""
    ends_s = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < ends_s
        time.sleep(0.1)


def tracebacks(log: str) -> list[str]:
    """Those that lead through the service; Ray has some of its own when an actor is killed."""
    lines = r"(?:.*\n){0,2}.*Traceback(?:.*\n){30}"
    return [found for found in re.findall(lines, log) if str(ROOT / "service") in found]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Version(NamedTuple):
    artifact: Path
    name: str


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Version]:
    """Two exports of one policy."""
    made = []
    for seed in range(2):
        directory = tmp_path_factory.mktemp(f"version-{seed}") / MODEL
        manifest = Learner(random_policy(TINY_V1, seed)).export(directory, "onnx")
        made.append(Version(directory, manifest.policy_version))
    return made


@pytest.fixture(scope="module")
def cluster(versions: list[Version]) -> Iterator[Cluster]:
    # Ray's sockets lie there, whose paths may have a hundred characters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as name:
        settings = ["RAY_USAGE_STATS_ENABLED=0", "RAY_SERVE_LOG_TO_STDERR=0", f"HOME={name}"]
        # Ray ends a proxy that is not ready in five seconds, or healthy in ten.
        settings += [
            f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S={TIMEOUT_S}" for check in ("READY", "HEALTH")
        ]
        program = service_command()[:1]
        command = ["env", *settings, *program, "-m", "tests.ray_cluster", name, str(free_port())]
        with running(command) as process:
            cluster = Cluster(process, Path(name))
            cluster.serve(versions[0], versions[0])
            yield cluster
            found = tracebacks(cluster.log())
            assert not found, found[0]
            assert process.process.stdin is not None
            process.process.stdin.close()
            assert process.wait() == 0


MADE: dict[str, Callable[[], list[Script]]] = {
    "lone environments": lambda: scripts(TINY_V1, 20, 50),
    "vectors": lambda: vector_scripts(TINY_V1)[:10],
}


@pytest.mark.parametrize("kind", MADE)
def test_every_trajectory_is_bit_for_bit_the_undisturbed_one(
    cluster: Cluster, versions: list[Version], kind: str
) -> None:
    made = MADE[kind]()
    got, seen = asyncio.run(asyncio.wait_for(disturbed(cluster.host_and_port, made), TIMEOUT_S))
    for fault in FAULTS:
        assert seen[fault] > 5, seen
    assert seen["replayed"] > 5, seen
    expected = alone(versions[0].artifact, made)
    for script, answers, undisturbed in zip(made, got, expected, strict=True):
        for at, (one, other) in enumerate(zip(answers, undisturbed, strict=True)):
            assert one == other, f"{script.session_id}, step {at}"
    homes = Counter(cluster.homes([script.session_id for script in made]).values())
    assert len(homes) == 2
    assert min(homes.values()) > len(made) / 5


def test_requests_of_no_session_go_to_all_replicas(cluster: Cluster) -> None:
    names = cluster.one_name_each(2)

    def answered() -> list[float]:
        key = 'tamiyo_act_requests_total{result="ok"}'
        return [cluster.metrics(name)[key] for name in names]

    before = answered()
    with httpx.Client(base_url=cluster.address, timeout=TIMEOUT_S) as http:
        for _ in range(NUM_STATELESS):
            body = {"observation": [0.0] * TINY_V1.observation_dim}
            assert http.post("/act", json=body).status_code == 200
    shares = [now - was for now, was in zip(answered(), before, strict=True)]
    assert sum(shares) == NUM_STATELESS
    assert min(shares) > NUM_STATELESS / 5


def test_what_is_refused_is_refused_in_the_same_words(cluster: Cluster) -> None:
    with httpx.Client(base_url=cluster.address, timeout=TIMEOUT_S) as http:
        for content, status, error_type in (
            (b"{", 400, "malformed"),
            (b'{"observation": [0.0]}', 422, "invalid"),
            (b" " * 300_000, 413, "too_large"),
        ):
            headers = {"Content-Type": "application/json"}
            answer = http.post("/act", content=content, headers=headers)
            assert (answer.status_code, answer.json()["error_type"]) == (status, error_type)
        of_session = {"X-Session-Id": "env-ended"}
        body = {
            "session_id": "env-ended",
            "episode_start": True,
            "observation": [0.0] * TINY_V1.observation_dim,
        }
        assert http.post("/act", json=body, headers=of_session).status_code == 200
        assert http.delete("/sessions/env-ended", headers=of_session).status_code == 204
        assert http.delete("/sessions/env-ended", headers=of_session).status_code == 404


@pytest.mark.parametrize(("method", "path"), [("PUT", "weights"), ("POST", "rollback")])
def test_no_request_changes_the_weights_of_one_replica(
    cluster: Cluster, method: str, path: str
) -> None:
    headers = {"Content-Type": SAFETENSORS}
    url = f"{cluster.address}/policy/{path}"
    answer = httpx.request(method, url, headers=headers, timeout=TIMEOUT_S)
    assert (answer.status_code, answer.json()["error_type"]) == (403, "forbidden")
    assert "user_config" in answer.json()["error"]


class Clients(ABC):
    """Clients, each on a connection of its own, that act until told."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []
        self._is_over = False

    @abstractmethod
    def acting(self) -> list[Coroutine[Any, Any, None]]: ...

    @abstractmethod
    def num_answers(self) -> list[int]:
        """How many each has."""

    def wait_for_more(self) -> None:
        """Returns when each has some more answers; raises what one of them did."""
        wanted = min(self.num_answers()) + NUM_ANSWERS

        def has_come() -> bool:
            for task in self._tasks:
                if task.done():
                    task.result()
            return min(self.num_answers()) >= wanted

        until(has_come)

    def run(self, during: Callable[[], None]) -> None:
        """`during` happens to them."""
        asyncio.run(asyncio.wait_for(self._run(during), TIMEOUT_S))

    async def _run(self, during: Callable[[], None]) -> None:
        self._tasks = [asyncio.create_task(client) for client in self.acting()]
        try:
            await asyncio.to_thread(during)
        finally:
            self._is_over = True
        await asyncio.gather(*self._tasks)


class Load(Clients):
    """Sessions of all forms."""

    def __init__(self, cluster: Cluster, pool: Pool) -> None:
        super().__init__()
        self._url = f"{cluster.address}/act"
        self.kinds: list[tuple[Wire, list[Session]]] = [
            (wire_of(form, TINY_V1, pool, num_rows), new_sessions(4, 100 * at, num_rows))
            for at, (form, num_rows) in enumerate([("json", None), ("json", 3), ("safetensors", 5)])
        ]

    def acting(self) -> list[Coroutine[Any, Any, None]]:
        return [self._act(wire, session) for wire, sessions in self.kinds for session in sessions]

    def num_answers(self) -> list[int]:
        return [len(session.answers) for _, sessions in self.kinds for session in sessions]

    async def _act(self, wire: Wire, session: Session) -> None:
        connection = Connection(self._url, wire.content_type)
        for step in count():
            at = (session.seed + step) % POOL_SIZE
            starts = session.starts(step)
            body = wire.body(session.session_id, session.seed, step, at, starts)
            answer = await connection.post(body, session.session_id)
            assert answer.status == 200, answer.content
            session.pool_index.append(at)
            session.answers.append(answer.content)
            if self._is_over:
                break
        connection.close()


def test_every_replica_takes_the_weights_of_another_artifact_while_it_acts(
    cluster: Cluster, versions: list[Version]
) -> None:
    pool = Pool.random(TINY_V1, seed=3)
    load = Load(cluster, pool)
    first, second = versions
    names = cluster.serve(first, first)

    def change() -> None:
        load.wait_for_more()
        cluster.deploy(first.artifact, second.artifact)
        until(lambda: [cluster.version(name) for name in names] == [second.name] * 2)
        load.wait_for_more()

    load.run(change)
    loaded = {version.name: load_from(version.artifact, "onnx") for version in versions}
    for wire, sessions in load.kinds:
        found = replay(sessions, pool, wire, loaded, TINY_V1)
        assert found.answers > 0
        assert found.differing == 0
        for session in sessions:
            named = [wire.version(content) for content in session.answers]
            assert sorted(set(named), key=named.index) == [first.name, second.name]
            assert named == sorted(named, key=[first.name, second.name].index)


def test_an_artifact_of_another_policy_is_refused_in_words_and_the_weights_stay(
    cluster: Cluster, versions: list[Version], tmp_path: Path
) -> None:
    Learner(random_policy(TINY_V2)).export(tmp_path / "other", "onnx")
    first, second = versions
    names = cluster.serve(first, second)
    before = cluster.replicas()
    cluster.deploy(first.artifact, tmp_path / "other")
    refused = 'tamiyo_weights_changes_total{result="invalid"}'
    until(lambda: all(cluster.metrics(name).get(refused) == 1 for name in names))
    assert [cluster.version(name) for name in names] == [second.name] * 2
    until(lambda: cluster.replicas() == before)
    assert "this is another policy's artifact: its observation_dim is 7" in cluster.log()

    # One that starts has no weights to stay with.
    cluster.deploy(first.artifact, tmp_path / "other", num_replicas=3)
    until(lambda: "another policy's artifact" in json.dumps(cluster.application()))
    assert cluster.replicas() == before
    assert [cluster.version(name) for name in names] == [second.name] * 2


def test_a_replica_that_starts_later_has_the_same_weights(
    cluster: Cluster, versions: list[Version]
) -> None:
    first, second = versions
    cluster.serve(first, second)
    before = cluster.replicas()
    cluster.deploy(first.artifact, second.artifact, num_replicas=3)
    until(lambda: len(cluster.replicas()) == 3)
    assert before.items() < cluster.replicas().items()
    assert {cluster.version(name) for name in cluster.one_name_each(3)} == {second.name}


class Told(NamedTuple):
    """One call's answer. `has_lost` where the session had to begin anew for it."""

    log_probs: NDArray[np.float32]
    value: NDArray[np.float32]
    has_lost: bool


def shown(name: str, at: int) -> NDArray[np.float32]:
    rng = np.random.default_rng([at, *name.encode()])
    return rng.standard_normal((NUM_ROWS, TINY_V1.observation_dim), np.float32)


class Environments(Clients):
    """Vectors of `tamiyo_client`, that begin anew where they were lost."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()
        self._address = cluster.address
        self.told: dict[str, list[Told]] = {f"trainer-{at}": [] for at in range(NUM_CLIENTS)}

    def acting(self) -> list[Coroutine[Any, Any, None]]:
        return [self._act(name) for name in self.told]

    def num_answers(self) -> list[int]:
        return [len(told) for told in self.told.values()]

    async def _act(self, name: str) -> None:
        async with AsyncVectorPolicyClient(
            self._address, NUM_ROWS, session_id=name, seed=len(name)
        ) as client:
            for at in count():
                has_lost = False
                while True:
                    try:
                        act = await client.act(shown(name, at))
                    except SessionLost:
                        client.restart()
                        has_lost = True
                    else:
                        break
                self.told[name].append(Told(act.log_probs, act.value, has_lost))
                if self._is_over:
                    break


def test_a_replica_that_is_killed_takes_its_own_sessions_along_and_no_others(
    cluster: Cluster, versions: list[Version]
) -> None:
    first, second = versions
    cluster.serve(first, second, num_replicas=3)
    environments = Environments(cluster)
    replica, pid = next(iter(cluster.replicas().items()))
    began = start_time(pid)
    homes = cluster.homes(list(environments.told))
    assert began in homes.values()
    assert len(set(homes.values())) == 3

    def kill() -> None:
        environments.wait_for_more()
        os.kill(pid, signal.SIGKILL)
        until(lambda: replica not in cluster.replicas() and len(cluster.replicas()) == 3)
        environments.wait_for_more()

    environments.run(kill)
    lost = {name for name, told in environments.told.items() if any(t.has_lost for t in told)}
    assert lost == {name for name, home in homes.items() if home == began}
    assert {cluster.version(name) for name in cluster.one_name_each(3)} == {second.name}
    with running_server(second.artifact) as plain:
        for name, told in environments.told.items():
            check_alone(plain, name, told)


def check_alone(plain: RunningServer, name: str, told: list[Told]) -> None:
    """The same calls of a server that loses nothing are answered alike, bit for bit."""
    with VectorPolicyClient(plain.address, NUM_ROWS, session_id=name, seed=len(name)) as client:
        for at, each in enumerate(told):
            if each.has_lost:
                client.restart()
            act = client.act(shown(name, at))
            assert act.log_probs.tobytes() == each.log_probs.tobytes(), f"{name}, call {at}"
            assert act.value.tobytes() == each.value.tobytes()


def start_time(pid: int) -> float:
    collector = ProcessCollector(pid=lambda: pid, registry=CollectorRegistry())
    (began,) = (
        sample.value
        for metric in collector.collect()
        for sample in metric.samples
        if sample.name == "process_start_time_seconds"
    )
    return began


def test_without_user_config_the_policy_s_own_weights_serve(
    cluster: Cluster, versions: list[Version]
) -> None:
    first, second = versions
    names = cluster.serve(first, second, num_replicas=3)
    cluster.deploy(first.artifact, None, num_replicas=3)
    until(lambda: {cluster.version(name) for name in names} == {first.name})
