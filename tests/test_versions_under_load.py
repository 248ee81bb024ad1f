"""Weights pushed back and forth under load: no request fails, and no answer is of two versions.

Every version is exported as an artifact of its own too. Each environment is stepped again, alone,
by the artifacts of the versions that its answers name: the server's answers are these, bit for bit.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from export.loaders.protocol import LoadedStep
from model.spec import PolicySpec
from service.bench.connection import Connection
from service.bench.load import Session, new_sessions
from service.bench.pool import POOL_SIZE, Pool
from service.bench.replay import Differences, replay
from service.bench.wire import Wire, wire_of
from tests.export.gate_cases import statistics
from tests.loaded_step import load_from
from tests.pushes import SAFETENSORS, TIMEOUT_S, Learner
from tests.random_inputs import random_policy
from tests.running_server import RunningServer, running_server
from tests.specs import TINY_V1 as V1
from tests.specs import TINY_V2 as V2

NUM_VERSIONS = 3
NUM_CHANGES = 30
ROLLBACK_EVERY = 5
ANSWERS_BETWEEN = 12
"""The least there are between two changes."""
NUM_CLIENTS = 3
"""Of each kind."""


class Version(NamedTuple):
    name: str
    body: bytes
    loaded: LoadedStep


class Kind(NamedTuple):
    """What clients of one kind send."""

    wire: Wire
    sessions: list[Session]


def versions_of(spec: PolicySpec, fmt: str, directory: Path) -> list[Version]:
    made = []
    for seed in range(NUM_VERSIONS):
        learner = Learner(random_policy(spec, seed), statistics(spec.observation_dim))
        manifest = learner.export(directory / f"version-{seed}", fmt)
        body = learner.push().written()
        loaded = load_from(directory / f"version-{seed}", fmt)
        made.append(Version(manifest.policy_version, body, loaded))
    return made


class Load:
    """Clients that act until the last change is made, each on a connection of its own."""

    def __init__(self, server: RunningServer, kinds: Sequence[Kind]) -> None:
        self._url = server.address
        self._kinds = kinds
        self._is_over = False
        self._num_answers = 0
        self._enough = asyncio.Event()
        self._wanted = ANSWERS_BETWEEN

    async def run(self, versions: Sequence[Version]) -> Counter[int]:
        """The statuses of the changes; each client's answers are in its session."""
        clients = [
            asyncio.ensure_future(self._act(kind.wire, session))
            for kind in self._kinds
            for session in kind.sessions
        ]
        try:
            statuses = await self._change(versions)
        finally:
            self._is_over = True
        await asyncio.gather(*clients)
        return statuses

    async def _act(self, wire: Wire, session: Session) -> None:
        connection = Connection(f"{self._url}/act", wire.content_type)
        step = 0
        while not self._is_over:
            at = (session.seed + step) % POOL_SIZE
            starts = session.starts(step)
            body = wire.body(session.session_id, session.seed, step, at, starts)
            answer = await connection.post(body)
            assert answer.status == 200, answer.content
            session.pool_index.append(at)
            session.answers.append(answer.content)
            step += 1
            self._num_answers += 1
            if self._num_answers >= self._wanted:
                self._enough.set()
        connection.close()

    async def _change(self, versions: Sequence[Version]) -> Counter[int]:
        statuses: Counter[int] = Counter()
        headers = {"Content-Type": SAFETENSORS}
        async with httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT_S) as http:
            others = cycle([*versions[1:], versions[0]])
            for number in range(1, NUM_CHANGES + 1):
                await self._enough.wait()
                if number % ROLLBACK_EVERY == 0:
                    answer = await http.post("/policy/rollback")
                else:
                    body = next(others).body
                    answer = await http.put("/policy/weights", content=body, headers=headers)
                statuses[answer.status_code] += 1
                self._wanted = self._num_answers + ANSWERS_BETWEEN
                self._enough.clear()
            await self._enough.wait()
        return statuses


def differences(
    kinds: Sequence[Kind], pool: Pool, loaded: Mapping[str, LoadedStep], spec: PolicySpec
) -> list[Differences]:
    return [replay(kind.sessions, pool, kind.wire, loaded, spec) for kind in kinds]


def versions_named(kind: Kind) -> list[list[str]]:
    return [
        [kind.wire.version(content) for content in session.answers] for session in kind.sessions
    ]


class Served(NamedTuple):
    """What is served, and how; `atol` is what a batch's size may change in torch's products."""

    spec: PolicySpec
    fmt: str
    flags: tuple[str, ...] = ()
    atol: float = 0.0


SERVED = {
    "v1, onnx": Served(V1, "onnx"),
    "v2, onnx, in parts": Served(V2, "onnx", ("--max-batch-size", "4")),
    "v1, torchscript, row by row": Served(V1, "torchscript", ("--max-batch-size", "1")),
    "v2, torchscript": Served(V2, "torchscript", atol=2e-5),
}


@pytest.mark.parametrize("name", SERVED)
def test_every_answer_is_to_the_bit_that_of_the_artifact_of_the_version_it_names(
    name: str, tmp_path: Path
) -> None:
    spec, fmt, flags, atol = SERVED[name]
    versions = versions_of(spec, fmt, tmp_path)
    pool = Pool.random(spec, seed=3)
    kinds = [
        Kind(wire_of(form, spec, pool, num_rows), new_sessions(NUM_CLIENTS, 100 * at, num_rows))
        for at, (form, num_rows) in enumerate(
            [("json", None), ("json", 10), ("safetensors", 10), ("safetensors", 33)]
        )
    ]
    with running_server(tmp_path / "version-0", *flags) as server:
        load = asyncio.wait_for(Load(server, kinds).run(versions), TIMEOUT_S)
        assert asyncio.run(load) == {200: NUM_CHANGES}
        assert server.stop() == 0
        assert "Traceback" not in server.log()
    loaded = {version.name: version.loaded for version in versions}
    for kind, found in zip(kinds, differences(kinds, pool, loaded, spec), strict=True):
        assert found.answers > 0
        assert found.other_actions == 0
        assert found.largest <= atol
        named = versions_named(kind)
        assert {version for of in named for version in of} == loaded.keys()
        assert all(len(set(of)) > 1 for of in named), "states were carried over changes"
