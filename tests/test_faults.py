"""Exactly once, whatever the network does: sessions under faults against one at a time.

They are of one environment or of many, in every form there is. Clients of raw sockets cut
connections before, during and after an answer, send requests twice and ahead of their turn, retry,
and run out of time. Every session's answers must be, to the last bit, those of the same session run
alone and undisturbed.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from export.exporter import export_policy
from export.manifest import Manifest
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from service.runtime.load import load_runtime
from service.settings import Settings
from tests.balancer import balanced, needs_haproxy
from tests.connection import Address, Connection
from tests.forms import JSON, SAFETENSORS, Form, inference
from tests.random_inputs import random_masks, random_observations
from tests.running_server import RunningServer, running_server
from tests.service.fakes import AppClient, Served

NUM_SESSIONS = 200
NUM_STEPS = 200
EPISODE_LENGTH = 50
NUM_VECTORS = 40
NUM_ROWS = 16
NUM_VECTOR_STEPS = 100
START_SHARE = 0.05
TIMEOUT_S = 240.0
FAULTS = {
    "none": 70,
    "cut before the body ends": 5,
    "cut before the answer": 6,
    "cut in the answer": 6,
    "sent twice": 6,
    "sent ahead of its turn": 4,
    "out of time": 3,
}
MODEL = "tiny"
OIP, OIP_BINARY = (inference(MODEL, is_binary=is_binary) for is_binary in (False, True))
FORMS = (JSON, SAFETENSORS, OIP, OIP_BINARY)
"""Of vectors; lone environments send JSON."""
Json = dict[str, Any]


class Script(NamedTuple):
    """All one environment will ever ask: its requests' bodies, step by step."""

    session_id: str
    form: Form
    bodies: list[Json]


def scripts(spec: PolicySpec, num_sessions: int, num_steps: int) -> list[Script]:
    rng = np.random.default_rng(5)
    made = []
    for index in range(num_sessions):
        observations = random_observations(spec, rng, num_steps)
        masks = random_masks(spec, rng, num_steps)
        bodies = []
        for at in range(num_steps):
            episode, step = divmod(at, EPISODE_LENGTH)
            body: Json = {
                "session_id": f"env-{index}",
                "episode": str(episode),
                "step": step,
                "observation": observations[at],
                "action_mask": {head: mask[at] for head, mask in masks.items()},
                "deterministic": index % 5 == 0,
            }
            if step == 0:
                body |= {"episode_start": True, "seed": index * 1000 + episode}
            bodies.append(body)
        made.append(Script(f"env-{index}", JSON, bodies))
    return made


def vector_scripts(spec: PolicySpec) -> list[Script]:
    """Runs of vectors whose rows start episodes at random.

    They are in turn in each form, and half of those bring a seed for each row that starts.
    """
    rng = np.random.default_rng(6)
    made = []
    for index in range(NUM_VECTORS):
        observations = random_observations(spec, rng, NUM_VECTOR_STEPS, NUM_ROWS)
        masks = random_masks(spec, rng, NUM_VECTOR_STEPS, NUM_ROWS)
        starts = rng.random((NUM_VECTOR_STEPS, NUM_ROWS)) < START_SHARE
        starts[0] = True
        bodies = []
        for step in range(NUM_VECTOR_STEPS):
            body: Json = {
                "session_id": f"vector-{index}",
                "run": "0",
                "step": step,
                "observation": observations[step],
                "action_mask": {head: mask[step] for head, mask in masks.items()},
                "deterministic": index % 5 == 0,
            }
            if starts[step].any():
                body["episode_start"] = starts[step]
                if index // len(FORMS) % 2:
                    body["seed"] = rng.integers(2**64, size=NUM_ROWS, dtype=np.uint64)
                elif step == 0:
                    body["seed"] = index
            bodies.append(body)
        made.append(Script(f"vector-{index}", FORMS[index % len(FORMS)], bodies))
    return made


class Environment:
    """Sends its script's requests in order, each until it has its answer, through faults."""

    def __init__(self, script: Script, host: str, port: int, seen: Counter[str]) -> None:
        self._script = script
        self._host_and_port = (host, port)
        self._connection = Connection(host, port)
        self._form = script.form
        self._random = random.Random(script.session_id)
        self._seen = seen

    async def run(self) -> list[bytes]:
        answers = []
        for at in range(len(self._script.bodies)):
            content, is_first = None, True
            while content is None:
                (fault,) = self._random.choices(list(FAULTS), list(FAULTS.values()))
                if fault == "sent ahead of its turn" and not is_first:
                    continue  # after a lost attempt it may be its turn
                self._seen[fault] += 1
                content = await self._attempt(at, fault)
                is_first = False
            answers.append(content)
        self._connection.cut()
        return answers

    async def _attempt(self, at: int, fault: str) -> bytes | None:
        """The step's answer, or None where the fault has cost it."""
        body = self._script.bodies[at]
        if fault == "cut before the body ends":
            await self._send(body, share=self._random.uniform(0.1, 0.9))
            self._connection.cut()
            return None
        if fault == "cut before the answer":
            await self._send(body)
            self._connection.cut()
            return None
        if fault == "cut in the answer":
            await self._send(body)
            await self._connection.begin_to_receive()
            self._connection.cut()
            return None
        if fault == "sent twice":
            return await self._twice(body)
        if fault == "sent ahead of its turn":
            await self._ahead(at)
        if fault == "out of time":
            body = body | {"timeout_ms": 1e-6}
        await self._send(body)
        answer = await self._connection.receive()
        if fault == "out of time" and answer.status == 504:
            return None
        assert answer.status == 200, answer
        self._seen["replayed"] += answer.is_replay
        return answer.content

    async def _twice(self, body: Json) -> bytes:
        other = Connection(*self._host_and_port)
        twice = self._form.request(body)
        await asyncio.gather(self._connection.send(twice), other.send(twice))
        one, two = await asyncio.gather(self._connection.receive(), other.receive())
        other.cut()
        assert (one.status, two.status) == (200, 200), (one, two)
        assert one.content == two.content
        assert one.is_replay or two.is_replay
        return one.content

    async def _ahead(self, at: int) -> None:
        """The next step of the episode first: it is not its turn, and nothing comes of it."""
        following = self._script.bodies[at + 1 : at + 2]
        if following and following[0]["step"]:
            await self._send(following[0])
            answer = await self._connection.receive()
            assert answer.status in (404, 409, 410), answer

    async def _send(self, body: Json, share: float = 1.0) -> None:
        await self._connection.send(self._form.request(body), share)


def alone(
    artifact: Path, made: list[Script], *, name: str = "onnx", **settings: Any
) -> list[list[bytes]]:
    """Each session's answers without any other, any batch or any fault, with states on the host."""
    manifest = Manifest.read(artifact)
    runtime = load_runtime(artifact, manifest, name=name, device="cpu", num_threads=1)
    served = Served.make(manifest, runtime, Settings(artifact=artifact, **settings))
    with AppClient(served) as client:
        return [[answer_of(client, script.form, body) for body in script.bodies] for script in made]


def answer_of(client: AppClient, form: Form, body: Json) -> bytes:
    content, headers, path = form.request(body)
    answer = client.request("POST", path, content=content, headers=headers)
    assert answer.status_code == 200
    assert "replayed" not in answer.headers
    return answer.content


async def disturbed(address: Address, made: list[Script]) -> tuple[Any, Counter[str]]:
    seen: Counter[str] = Counter()
    environments = [Environment(script, *address, seen) for script in made]
    return await asyncio.gather(*(each.run() for each in environments)), seen


@pytest.fixture(scope="module")
def artifact(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("faults") / "tiny"
    export_policy(policy, None, output, name=MODEL, formats=("onnx",), max_batch_size=64)
    return output


class Reached(NamedTuple):
    """What serves, and where clients find it."""

    address: Address
    servers: list[RunningServer]


@contextmanager
def one_server(artifact: Path) -> Iterator[Reached]:
    with running_server(artifact) as server:
        yield Reached(server.host_and_port, [server])


@contextmanager
def two_behind_haproxy(artifact: Path) -> Iterator[Reached]:
    with (
        running_server(artifact) as one,
        running_server(artifact) as two,
        balanced(one.host_and_port, two.host_and_port) as balancer,
    ):
        yield Reached(balancer.host_and_port, [one, two])


behind_each = pytest.mark.parametrize(
    "reached_at",
    [
        pytest.param(one_server, id="one server"),
        pytest.param(two_behind_haproxy, id="two behind HAProxy", marks=needs_haproxy),
    ],
)
ReachedAt = Callable[[Path], AbstractContextManager[Reached]]


def check_under_faults(
    reached_at: ReachedAt,
    artifact: Path,
    made: list[Script],
    *,
    at_least: int,
    alone: Callable[[Path, list[Script]], list[list[bytes]]] = alone,
) -> None:
    """Every session is told what it is told alone, and each fault came so often at least."""
    with reached_at(artifact) as (address, servers):
        got, seen = asyncio.run(asyncio.wait_for(disturbed(address, made), TIMEOUT_S))
        kept = [server.counted("tamiyo_sessions") for server in servers]
        assert min(kept) > sum(kept) / len(kept) / 2, kept
        assert not any("Traceback" in server.log() for server in servers)
    for fault in FAULTS:
        assert seen[fault] > at_least, seen
    assert seen["replayed"] > at_least, seen  # answers were lost, and given again
    for script, answers, expected in zip(made, got, alone(artifact, made), strict=True):
        for at, (one, other) in enumerate(zip(answers, expected, strict=True)):
            assert one == other, f"{script.session_id}, step {at}"


@behind_each
def test_every_trajectory_is_bit_for_bit_the_undisturbed_one(
    reached_at: ReachedAt, artifact: Path, spec: PolicySpec
) -> None:
    made = scripts(spec, NUM_SESSIONS, NUM_STEPS)
    check_under_faults(reached_at, artifact, made, at_least=NUM_SESSIONS)


@behind_each
def test_every_trajectory_of_vectors_is_bit_for_bit_the_undisturbed_one(
    reached_at: ReachedAt, artifact: Path, spec: PolicySpec
) -> None:
    check_under_faults(reached_at, artifact, vector_scripts(spec), at_least=NUM_VECTORS)


def test_a_seeded_session_is_the_same_among_256_others_and_after_a_restart(
    artifact: Path, spec: PolicySpec
) -> None:
    made = scripts(spec, 257, 10)

    async def run(server: RunningServer, some: list[Script]) -> list[list[bytes]]:
        async def one(script: Script) -> list[bytes]:
            connection = Connection(*server.host_and_port)
            contents = []
            for body in script.bodies:
                await connection.send(script.form.request(body))
                answer = await connection.receive()
                assert answer.status == 200, answer
                contents.append(answer.content)
            connection.cut()
            return contents

        return await asyncio.gather(*(one(script) for script in some))

    with running_server(artifact) as server:
        (by_itself,) = asyncio.run(asyncio.wait_for(run(server, made[:1]), TIMEOUT_S))
    with running_server(artifact) as server:
        among_others = asyncio.run(asyncio.wait_for(run(server, made), TIMEOUT_S))
    assert among_others[0] == by_itself
    assert len({answers[0] for answers in among_others}) == len(made)
