"""Servers that end and begin again with `--snapshot`: real processes, and clients that retry.

After SIGTERM no client can tell that there was another server. After kill -9 a session goes on to
the last bit, or is told that it is lost; the truth is what the same requests are answered by a
server that nobody disturbs.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from export.exporter import export_policy
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tamiyo_client import AsyncPolicyClient, AsyncVectorPolicyClient
from tests.connection import Answer, Connection
from tests.random_inputs import random_observations
from tests.running_server import RunningServer, running_server
from tests.test_faults import NUM_VECTORS, Script, alone, scripts, vector_scripts

NUM_RESTARTS = 5
NUM_SESSIONS = 40
NUM_STEPS = 100
RETRY_S = 0.02
NO_ANSWER = (502, 503)
"""A balancer's, of a server that ended, and of one that is not there or not ready."""
TIMEOUT_S = 240.0
PATIENCE: dict[str, Any] = {"timeout_s": TIMEOUT_S, "retries": 10_000}


class Home:
    """Where clients find a server: always the same port, whichever process listens there."""

    def __init__(self, artifact: Path, snapshot: Path, *flags: str) -> None:
        self._artifact = artifact
        self._flags = ("--snapshot", str(snapshot), "--snapshot-required", *flags)
        self.stack = ExitStack()
        self.server = self._started("0")
        self.host, self.port = self.server.host_and_port

    def _started(self, port: str) -> RunningServer:
        flags = (*self._flags, "--port", port)
        return self.stack.enter_context(running_server(self._artifact, *flags))

    async def restart(self) -> None:
        """SIGTERM, and another."""
        assert await asyncio.to_thread(self.server.stop) == 0
        await self.begin_again()

    async def kill(self) -> None:
        self.server.process.kill()
        await asyncio.to_thread(self.server.process.wait)

    async def begin_again(self) -> None:
        assert "Traceback" not in self.server.log()
        self.server = await asyncio.to_thread(self._started, str(self.port))

    def counted(self, name: str) -> float:
        return self.server.counted(name)

    async def has_written(self, more: int) -> None:
        """So many snapshots were begun and written since it was called."""
        name = 'tamiyo_snapshots_total{result="written"}'
        enough = await asyncio.to_thread(self.counted, name) + more + 1
        while await asyncio.to_thread(self.counted, name) < enough:
            pass

    def close(self) -> None:
        self.stack.close()


@contextmanager
def home_of(artifact: Path, snapshot: Path, *flags: str) -> Iterator[Home]:
    home = Home(artifact, snapshot, *flags)
    try:
        yield home
    finally:
        home.close()


class Progress:
    """How many answers there were."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._number = 0

    async def made(self) -> None:
        async with self._changed:
            self._number += 1
            self._changed.notify_all()

    async def reaches(self, number: float) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._number >= number)


class Place(Protocol):
    """Where a server is found, or a balancer; what is on its stack ends before it does."""

    host: str
    port: int
    stack: ExitStack


class Environment:
    """Sends its script's requests in order, each until it is answered for good."""

    def __init__(self, script: Script, place: Place) -> None:
        self.script = script
        self.answers: list[bytes] = []
        self._connection = Connection(place.host, place.port)
        place.stack.callback(self.hang_up)

    async def goes_on(self, number: int, made: Callable[[], Any]) -> None:
        """Until it has so many answers."""
        while len(self.answers) < number:
            answer = await self.ask(len(self.answers))
            assert answer.status == 200, answer
            self.answers.append(answer.content)
            await made()

    def hang_up(self) -> None:
        self._connection.cut()

    async def ask(self, at: int) -> Answer:
        form, body = self.script.form, self.script.bodies[at]
        while True:
            try:
                await self._connection.send(form.request(body))
                answer = await self._connection.receive()
            except (OSError, asyncio.IncompleteReadError):
                pass
            else:
                if answer.status not in NO_ANSWER:
                    return answer
            self._connection.cut()
            await asyncio.sleep(RETRY_S)


@pytest.fixture(scope="module")
def artifact(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("snapshots") / "tiny"
    export_policy(policy, None, output, name="tiny", formats=("onnx",), max_batch_size=64)
    return output


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_S))


def check(environments: list[Environment], artifact: Path) -> None:
    """Each was told, as far as it came, what it is told alone."""
    truth = alone(artifact, [environment.script for environment in environments])
    for environment, expected in zip(environments, truth, strict=True):
        for at, (one, other) in enumerate(zip(environment.answers, expected, strict=False)):
            assert one == other, f"{environment.script.session_id}, step {at}"


async def play(url: str, spec: PolicySpec, made: Callable[[], Any]) -> list[Any]:
    """What the project's own clients are told, which retry by themselves."""
    rng = np.random.default_rng(8)
    shown = random_observations(spec, rng, NUM_STEPS, 5)
    over = rng.random((NUM_STEPS, 4)) < 0.05
    told = []
    async with (
        AsyncVectorPolicyClient(url, 4, session_id="vector", seed=3, **PATIENCE) as vector,
        AsyncPolicyClient(url, session_id="single", **PATIENCE) as lone,
    ):
        for step in range(NUM_STEPS):
            act = await vector.act(shown[step, :4])
            vector.observe(over[step], np.zeros(4, np.bool_))
            one = await lone.act(shown[step, 4], seed=9 if step == 0 else None)
            actions = {head: array.tolist() for head, array in act.action.items()}
            told.append((actions, act.log_prob.tolist(), act.value.tolist()))
            told.append((one.action, one.log_prob, one.value))
            await made()
    return told


async def restarts(
    artifact: Path, snapshot: Path, spec: PolicySpec, made: list[Script], number: int
) -> tuple[list[Environment], list[Any]]:
    """All scripts at once, while the server ends and begins again so often."""
    with home_of(artifact, snapshot) as home:
        progress = Progress()
        environments = [Environment(script, home) for script in made]
        num_answers = (len(made) + 1) * NUM_STEPS
        telling = asyncio.create_task(play(home.server.address, spec, progress.made))
        playing = asyncio.gather(
            *(each.goes_on(NUM_STEPS, progress.made) for each in environments),
        )
        for nth in range(number):
            await progress.reaches(num_answers * (nth + 1) / (number + 1))
            await home.restart()
        await playing
        told = await telling
        if number:
            await home.restart()
            for environment in environments:
                again = await environment.ask(NUM_STEPS - 1)
                assert (again.status, again.is_replay) == (200, True)
                assert again.content == environment.answers[-1]
            restored = home.counted('tamiyo_session_events_total{event="restored"}')
            assert restored == len(made), "the clients have ended theirs"
        return environments, told


def test_no_client_can_tell_that_the_server_was_restarted(
    artifact: Path, spec: PolicySpec, tmp_path: Path
) -> None:
    made = scripts(spec, NUM_SESSIONS, NUM_STEPS) + vector_scripts(spec)[: NUM_VECTORS // 2]
    snapshot = tmp_path / "sessions"
    environments, told = run(restarts(artifact, snapshot, spec, made, NUM_RESTARTS))
    _, undisturbed = run(restarts(artifact, tmp_path / "other", spec, [], 0))
    assert told == undisturbed
    check(environments, artifact)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "sessions"]


def without_names(script: Script) -> Script:
    """The same from a client that names no run; it numbers its steps as far as it may."""
    bodies = []
    for body in script.bodies:
        left = {name: value for name, value in body.items() if name not in ("episode", "run")}
        if body["step"] == 0:  # without a name it may be a retry of another
            del left["step"]
        bodies.append(left)
    return script._replace(bodies=bodies)


def without_steps(script: Script) -> Script:
    bodies = [
        {name: value for name, value in body.items() if name != "step"}
        for body in without_names(script).bodies
    ]
    return script._replace(bodies=bodies)


def renamed(made: list[Script], prefix: str) -> list[Script]:
    return [
        Script(
            name := f"{prefix}-{script.session_id}",
            script.form,
            [body | {"session_id": name} for body in script.bodies],
        )
        for script in made
    ]


def kinds(spec: PolicySpec) -> dict[str, list[Script]]:
    """Sessions that rest while snapshots are written, and such that never do."""
    singles = scripts(spec, 10, NUM_STEPS)
    vectors = [script for script in vector_scripts(spec) if "seed" in script.bodies[0]][:10]
    of_kind = {
        "named single": singles,
        "named vector": vectors,
        "unnamed single": [without_names(script) for script in singles],
        "unnamed vector": [without_names(script) for script in vectors],
        "stepless single": [without_steps(script) for script in singles],
    }
    return {
        f"{how} {kind}": renamed(made, f"{how} {kind}".replace(" ", "-"))
        for how in ("resting", "busy")
        for kind, made in of_kind.items()
    }


RESTS_AT = 30


async def one_kill(
    artifact: Path, snapshot: Path, of_kind: dict[str, list[Script]]
) -> tuple[list[Environment], dict[str, Counter[str]]]:
    """Plays until the server is killed, then goes on; what became of each kind of session."""
    with home_of(artifact, snapshot, "--snapshot-every-s", "0.05") as home:
        environments = {
            kind: [Environment(script, home) for script in made] for kind, made in of_kind.items()
        }
        progress = Progress()
        everybody = [each for some in environments.values() for each in some]
        await asyncio.gather(*(each.goes_on(RESTS_AT, progress.made) for each in everybody))
        await home.has_written(2)
        busy = [e for kind, some in environments.items() if kind.startswith("busy") for e in some]
        going_on = [
            asyncio.create_task(each.goes_on(NUM_STEPS - 5, progress.made)) for each in busy
        ]
        await progress.reaches(len(everybody) * RESTS_AT + len(busy) * 20)
        await home.kill()
        for task in going_on:
            task.cancel()
        await asyncio.gather(*going_on, return_exceptions=True)
        for environment in busy:
            environment.hang_up()
        await home.begin_again()
        became = {kind: Counter[str]() for kind in environments}
        for kind, some in environments.items():
            for environment in some:
                became[kind][await what_becomes(environment)] += 1
        lost = sum(of["lost"] for of in became.values())
        assert home.counted('tamiyo_act_requests_total{result="session_lost"}') == lost
        named = [of for kind, of in became.items() if " named " in kind]
        restored = home.counted('tamiyo_session_events_total{event="restored"}')
        proven = home.counted('tamiyo_session_events_total{event="lost"}')
        assert restored - proven == sum(of["went on"] + of["began"] for of in named)
        return everybody, became


async def what_becomes(environment: Environment) -> str:
    first = len(environment.answers)
    answer = await environment.ask(first)
    starts = environment.script.bodies[first].get("episode_start")
    if answer.status == 410:
        return "lost"
    assert answer.status == 200, answer
    environment.answers.append(answer.content)
    await environment.goes_on(first + 5, lambda: asyncio.sleep(0))
    return "began" if starts is True else "went on"


def test_after_a_kill_a_session_goes_on_to_the_last_bit_or_is_told_that_it_is_lost(
    artifact: Path, spec: PolicySpec, tmp_path: Path
) -> None:
    environments, became = run(one_kill(artifact, tmp_path / "sessions", kinds(spec)))
    check(environments, artifact)
    for kind in ("named single", "named vector"):
        assert became[f"resting {kind}"] == {"went on": 10}, became
        assert became[f"busy {kind}"]["lost"] > 0, became
    for kind in ("unnamed single", "unnamed vector", "stepless single"):
        assert became[f"resting {kind}"] == {"lost": 10}, became
        assert became[f"busy {kind}"]["went on"] == 0, became
    assert [path.name for path in tmp_path.iterdir()] == ["sessions"]


def test_after_a_kill_without_any_snapshot_since_the_start_nothing_goes_on_silently(
    artifact: Path, spec: PolicySpec, tmp_path: Path
) -> None:
    """The one that it began from is of another server's end: it is old by then."""
    (named,), (unnamed,) = scripts(spec, 1, 10), [without_steps(scripts(spec, 2, 10)[1])]

    async def story() -> tuple[Environment, Environment, list[int]]:
        with home_of(artifact, tmp_path / "sessions") as home:
            one, other = Environment(named, home), Environment(unnamed, home)
            for each in (one, other):
                await each.goes_on(3, lambda: asyncio.sleep(0))
            await home.restart()
            await one.goes_on(5, lambda: asyncio.sleep(0))
            await home.kill()
            await home.begin_again()
            statuses = [(await each.ask(len(each.answers))).status for each in (one, other)]
            return one, other, statuses

    one, other, statuses = run(story())
    assert statuses == [410, 410]
    check([one, other], artifact)
