"""The routes that change weights, over the fake policy, whose one parameter scales its value."""

import asyncio
import gc
import json
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from export.manifest import Manifest, Parameter, step_inputs, step_outputs
from export.parameters import Parameters
from model.spec import PolicySpec
from model.step_spec import StepSpec
from service.engine.engine import Engine
from service.http.weights_codec import WeightsCodec
from service.settings import Settings
from tests.loaded_step import allocated
from tests.named_version import version_of
from tests.service.fakes import TIMEOUT_S, AppClient, Served, SummingRuntime
from tests.service.http.bodies import Json, body
from tests.service.http.test_connection import Answer, Server
from tests.service.http.test_connection import scenario as over_sockets

ROWS, STEPS = 32, 4
SAFETENSORS = "application/vnd.safetensors"


class Renewed(SummingRuntime):
    """The fake policy; a step made with other parameters waits for `next_gate`, if it is set."""

    next_gate: threading.Event | None = None

    def with_parameters(self, parameters: Parameters) -> "Renewed":
        other = super().with_parameters(parameters)
        assert isinstance(other, Renewed)
        other.gate, other.next_gate = self.next_gate, None
        return other


@pytest.fixture
def loaded(spec: PolicySpec) -> Renewed:
    return Renewed(spec)


@pytest.fixture
def served_manifest(manifest: Manifest) -> Manifest:
    parameters = (Parameter(name="scale", dtype="float32", shape=(1,)),)
    return manifest.model_copy(update={"parameters": parameters, "parameters_sha256": "0" * 64})


@pytest.fixture
def client(artifact: Path, served_manifest: Manifest, loaded: Renewed) -> Iterator[AppClient]:
    settings = Settings(artifact=artifact, max_batch_size=4)
    with AppClient(Served.make(served_manifest, loaded, settings)) as client:
        yield client


def parameters_of(scale: float) -> dict[str, NDArray[np.float32]]:
    return {"scale": np.array([scale], dtype=np.float32)}


def version(scale: float) -> str:
    return version_of(parameters_of(scale))


def push_body(spec: StepSpec, scale: float, *, probed: float | None = None) -> bytes:
    """Scale and a probe, of a policy with that scale, or with `probed`."""
    probe: dict[str, list[NDArray[Any]]] = {}
    inputs = allocated(step_inputs(spec), ROWS)
    outputs = allocated(step_outputs(spec), ROWS)
    step = SummingRuntime(spec).with_parameters(parameters_of(scale if probed is None else probed))
    run = step.bind(inputs, outputs)
    rng = np.random.default_rng(1)
    inputs["action_mask"][:] = True
    first = {name: inputs[name].copy() for name in (s.input for s in spec.states)}
    for _ in range(STEPS):
        inputs["observation"][:, 0] = rng.integers(1, 5, ROWS)
        inputs["noise"][:] = rng.normal(size=inputs["noise"].shape)
        run()
        for name, array in (inputs | outputs).items():
            if name not in first:
                probe.setdefault(name, []).append(array.copy())
        for state in spec.states:
            inputs[state.input][:] = outputs[state.output]
    tensors = first | {name: np.stack(arrays) for name, arrays in probe.items()}
    return save(
        {**parameters_of(scale), **{f"probe.{name}": tensor for name, tensor in tensors.items()}}
    )


def put(client: AppClient, content: bytes, query: str = "", **headers: str) -> httpx.Response:
    return client.run(putting(client, content, query, **headers))


async def putting(
    client: AppClient, content: bytes, query: str = "", **headers: str
) -> httpx.Response:
    of = {name.replace("_", "-"): value for name, value in headers.items()}
    headers = {"Content-Type": SAFETENSORS} | of
    return await client.http.put(f"/policy/weights{query}", content=content, headers=headers)


def roll_back(client: AppClient, query: str = "", **headers: str) -> httpx.Response:
    of = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.request("POST", f"/policy/rollback{query}", headers=of)


def changed(answer: httpx.Response) -> tuple[str, str | None]:
    assert answer.status_code == 200, answer.text
    said = answer.json()
    return said["policy_version"], said["previous_version"]


def refused(answer: httpx.Response) -> tuple[int, str]:
    assert answer.json().keys() == {"error", "error_type"}
    return answer.status_code, answer.json()["error_type"]


def act(client: AppClient, spec: PolicySpec, x: float = 1.0, **fields: Any) -> tuple[float, str]:
    answer = client.act(body(spec, x, **fields))
    assert answer.status_code == 200, answer.text
    return answer.json()["value"], answer.json()["policy_version"]


def versions(client: AppClient) -> Json:
    listed: Json = client.get("/policy/versions").json()
    return listed


def test_pushed_weights_serve_and_every_route_names_them(
    client: AppClient, spec: PolicySpec, served_manifest: Manifest
) -> None:
    own = served_manifest.policy_version
    assert act(client, spec) == (1, own)
    answer = put(client, push_body(spec, 2))
    assert changed(answer) == (version(2), own)
    assert answer.json()["probe_error"] == 0.0
    assert act(client, spec) == (2, version(2))
    assert client.get("/policy").json()["policy_version"] == version(2)
    assert version(2) in client.request("GET", "/", headers={"Accept": "text/html"}).text
    metrics = client.get("/metrics").text
    labels = f'name="{served_manifest.name}",policy_version="{version(2)}"'
    assert f"tamiyo_policy_info{{{labels}}} 1.0" in metrics
    assert 'tamiyo_weights_changes_total{result="ok"} 1.0' in metrics
    assert "tamiyo_weights_swap_seconds_count 1.0" in metrics
    listed = versions(client)
    assert [of["policy_version"] for of in listed["versions"]] == [version(2), own]
    assert [of["probe_error"] for of in listed["versions"]] == [0.0, None]
    assert (listed["policy_version"], listed["previous_version"]) == (version(2), own)


def test_sessions_go_on_from_their_states_and_seeds(client: AppClient, spec: PolicySpec) -> None:
    """The sum so far is the session's; the scale is the weights'."""
    assert act(client, spec, 3, session_id="a", episode_start=True)[0] == 3
    put(client, push_body(spec, 2))
    assert act(client, spec, 4, session_id="a", step=1) == (14, version(2))
    changed(roll_back(client))
    assert act(client, spec, 1, session_id="a", step=2)[0] == 8


def test_the_way_back_leads_once(
    client: AppClient, spec: PolicySpec, served_manifest: Manifest
) -> None:
    own = served_manifest.policy_version
    assert refused(roll_back(client)) == (409, "no_previous_version")
    for scale in (2, 3):
        put(client, push_body(spec, scale))
    assert changed(roll_back(client)) == (version(2), None)
    assert act(client, spec) == (2, version(2))
    assert refused(roll_back(client)) == (409, "no_previous_version")
    assert changed(put(client, push_body(spec, 3))) == (version(3), version(2))
    assert changed(roll_back(client)) == (version(2), None)
    serving = [of["policy_version"] for of in versions(client)["versions"]]
    assert serving == [version(s) for s in (2, 3, 2, 3, 2)] + [own]


def test_weights_that_serve_already_are_taken_again_and_change_nothing(
    client: AppClient, spec: PolicySpec, served_manifest: Manifest
) -> None:
    content = push_body(spec, 2)
    first = put(client, content)
    before = versions(client)
    assert changed(put(client, content)) == changed(first)
    assert versions(client) == before
    assert changed(roll_back(client)) == (served_manifest.policy_version, None)


def test_a_push_may_be_for_one_version_only(
    client: AppClient, spec: PolicySpec, served_manifest: Manifest
) -> None:
    own = served_manifest.policy_version
    two, three = push_body(spec, 2), push_body(spec, 3)
    answer = put(client, two, If_Match=version(7))
    assert refused(answer) == (412, "version_mismatch")
    assert answer.json()["error"] == f"{own} serves, not {version(7)}"
    assert act(client, spec) == (1, own)
    assert changed(put(client, two, If_Match=f'"{own}"')) == (version(2), own)
    assert changed(put(client, two, If_Match=f'"{own}"')) == (version(2), own)  # a retry of it
    assert refused(put(client, three, If_Match=f'"{own}"')) == (412, "version_mismatch")
    assert refused(roll_back(client, If_Match=own)) == (412, "version_mismatch")
    assert act(client, spec) == (2, version(2))
    assert refused(put(client, three, If_Match=f'"{version(7)}", "{own}"'))[0] == 412
    for none in ("", " , ", '""'):
        answer = put(client, three, If_Match=none)
        assert refused(answer) == (412, "version_mismatch")
        assert answer.json()["error"] == f"{version(2)} serves, not a version without a name"
    one_of_two = f'"{version(7)}", "{version(2)}"'
    assert changed(put(client, three, If_Match=one_of_two)) == (version(3), version(2))
    assert changed(put(client, three, If_Match="*"))[0] == version(3)
    in_two_lines = [("If-Match", f'"{version(7)}"'), ("If-Match", f'"{version(3)}"')]
    back = client.request("POST", "/policy/rollback", headers=in_two_lines)
    assert changed(back) == (version(2), None)


def test_other_weights_are_refused_while_some_are_checked_and_act_goes_on(
    client: AppClient, spec: PolicySpec, served_manifest: Manifest, loaded: Renewed
) -> None:
    gate = loaded.next_gate = threading.Event()
    own = served_manifest.policy_version

    async def scenario() -> None:
        first = asyncio.ensure_future(putting(client, push_body(spec, 2)))
        while not client.engine.versions.is_changing():
            await asyncio.sleep(0)
        second = await putting(client, push_body(spec, 3))
        back = await client.http.post("/policy/rollback")
        for answer in (second, back):
            assert refused(answer) == (409, "push_conflict")
        acted = await client.post(body(spec, 1.0))
        assert (acted.json()["value"], acted.json()["policy_version"]) == (1, own)
        assert not first.done()
        gate.set()
        assert changed(await first) == (version(2), own)

    client.run(scenario())
    loaded.next_gate = None
    assert changed(put(client, push_body(spec, 3))) == (version(3), version(2))
    metrics = client.get("/metrics").text
    assert 'tamiyo_weights_changes_total{result="push_conflict"} 2.0' in metrics


def test_another_push_meanwhile_is_refused_before_its_body_is_read(
    client: AppClient, spec: PolicySpec, loaded: Renewed
) -> None:
    gate = loaded.next_gate = threading.Event()
    was_read = False

    async def unread() -> AsyncIterator[bytes]:
        nonlocal was_read
        was_read = True
        yield push_body(spec, 3)

    async def scenario() -> None:
        first = asyncio.ensure_future(putting(client, push_body(spec, 2)))
        while not client.engine.versions.is_changing():
            await asyncio.sleep(0)
        headers = {"Content-Type": SAFETENSORS, "Content-Length": "1000000"}
        second = await client.http.put("/policy/weights", content=unread(), headers=headers)
        assert refused(second) == (409, "push_conflict")
        gate.set()
        await first

    client.run(scenario())
    assert not was_read


def test_a_push_that_is_checked_is_a_step_that_the_process_s_end_does_not_wait_for(
    client: AppClient, spec: PolicySpec, loaded: Renewed
) -> None:
    gate = loaded.next_gate = threading.Event()

    async def scenario() -> None:
        while client.engine.is_stepping():  # the warm-up's thread, which is about to end
            await asyncio.sleep(0)
        push = asyncio.ensure_future(putting(client, push_body(spec, 2)))
        while not client.engine.versions.is_changing():
            await asyncio.sleep(0)
        assert client.engine.is_stepping()
        gate.set()
        assert (await push).status_code == 200
        assert not client.engine.is_stepping()

    client.run(scenario())


RESTARTS: dict[str, Callable[[AppClient, PolicySpec], httpx.Response]] = {
    "push": lambda client, spec: put(client, push_body(spec, 3), "?sessions=restart"),
    "rollback": lambda client, spec: roll_back(client, "?sessions=restart"),
    "the same again": lambda client, spec: put(client, push_body(spec, 2), "?sessions=restart"),
}


@pytest.mark.parametrize("how", RESTARTS)
def test_sessions_are_given_up_where_that_is_asked_for(
    how: str, client: AppClient, spec: PolicySpec
) -> None:
    put(client, push_body(spec, 2))
    for name in ("a", "b"):
        act(client, spec, 1, session_id=name, episode_start=True)
    changed(RESTARTS[how](client, spec))
    for name, fields in (("a", {"step": 1}), ("b", {})):
        lost = client.act(body(spec, 1, session_id=name, **fields))
        assert refused(lost) == (410, "session_lost")
    assert act(client, spec, 1, session_id="a", episode_start=True, step=0)[0] in (1, 2, 3)
    assert 'tamiyo_session_events_total{event="restarted"} 2.0' in client.get("/metrics").text


REFUSED: dict[str, Callable[[AppClient, PolicySpec], httpx.Response]] = {
    "wrong probe": lambda client, spec: put(
        client, push_body(spec, 3, probed=2), "?sessions=restart"
    ),
    "another version": lambda client, spec: put(
        client, push_body(spec, 3), "?sessions=restart", If_Match=version(7)
    ),
    "nothing before": lambda client, spec: roll_back(client, "?sessions=restart"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_refused_change_gives_up_no_session(
    how: str, client: AppClient, spec: PolicySpec
) -> None:
    act(client, spec, 1, session_id="a", episode_start=True)
    before = versions(client)
    assert REFUSED[how](client, spec).status_code in (409, 412, 422)
    assert act(client, spec, 1, session_id="a", step=1)[0] == 2
    assert versions(client) == before


def test_the_last_16_versions_are_listed_the_newest_first(
    client: AppClient, spec: PolicySpec
) -> None:
    scales = range(2, 22)
    for scale in scales:
        put(client, push_body(spec, scale))
    listed = versions(client)["versions"]
    assert [of["policy_version"] for of in listed] == [version(s) for s in scales[:-17:-1]]
    since = [of["since"] for of in listed]
    assert since == sorted(since, reverse=True)


def since(client: AppClient) -> list[tuple[str, datetime]]:
    """The versions that were served, the newest first, and when each began to."""
    listed = versions(client)["versions"]
    return [(of["policy_version"], datetime.fromisoformat(of["since"])) for of in listed]


def test_a_version_is_listed_since_it_serves_and_not_since_it_was_pushed(
    client: AppClient, spec: PolicySpec, loaded: Renewed
) -> None:
    gate = loaded.next_gate = threading.Event()

    async def scenario() -> datetime:
        push = asyncio.ensure_future(putting(client, push_body(spec, 2)))
        while not client.engine.versions.is_changing():
            await asyncio.sleep(0)
        acted = await client.post(body(spec, 1.0))
        assert acted.json()["policy_version"] != version(2)
        checked = datetime.now(UTC)
        gate.set()
        changed(await push)
        return checked

    checked = client.run(scenario())
    (serves, began), (_, first) = since(client)
    assert serves == version(2)
    assert first <= checked <= began <= datetime.now(UTC)


def test_a_version_that_serves_again_is_listed_since_then(
    client: AppClient, spec: PolicySpec, served_manifest: Manifest
) -> None:
    for scale in (2, 3):
        put(client, push_body(spec, scale))
    before = since(client)
    changed(roll_back(client))
    (serves, again), *others = since(client)
    assert others == before, "what was listed stays as it was"
    assert [serves, *(name for name, _ in others)] == [
        *(version(scale) for scale in (2, 3, 2)),
        served_manifest.policy_version,
    ]
    began = [again, *(at for _, at in others)]
    assert began == sorted(began, reverse=True)


def test_the_seconds_of_a_change_are_told_of_each_that_was_tried(
    artifact: Path, served_manifest: Manifest, loaded: Renewed, spec: PolicySpec
) -> None:
    settings = Settings(artifact=artifact, max_batch_size=4)
    told: list[tuple[str, float]] = []
    served = Served.make(served_manifest, loaded, settings)
    observed = Engine(
        served_manifest,
        loaded,
        settings,
        observe_change=lambda result, seconds: told.append((result, seconds)),
    )
    with AppClient(served._replace(engine=observed)) as client:
        put(client, push_body(spec, 2))
        put(client, push_body(spec, 3, probed=2))
        roll_back(client)
        roll_back(client)
    assert [result for result, _ in told] == ["ok", "invalid", "ok", "no_previous_version"]
    assert all(seconds > 0 for _, seconds in told)


@pytest.mark.parametrize(
    "encoding", ["br", "deflate", "zstd", "x-gzip", "gzip", "GZIP", "identity, gzip", "unknown"]
)
def test_a_body_in_whatever_encoding_is_refused(
    encoding: str, client: AppClient, spec: PolicySpec
) -> None:
    answer = put(client, push_body(spec, 2), Content_Encoding=encoding)
    assert refused(answer) == (415, "unsupported_content_type")
    refused_one = encoding.lower().removeprefix("identity, ")
    sentence = f"the Content-Encoding is {refused_one!r}; send the body as it is"
    assert answer.json()["error"] == sentence
    assert act(client, spec)[0] == 1


def test_so_is_one_that_is_encoded_for_its_way(client: AppClient, spec: PolicySpec) -> None:
    answer = put(client, push_body(spec, 2), Transfer_Encoding="gzip, chunked")
    assert refused(answer) == (415, "unsupported_content_type")
    assert answer.json()["error"] == "the Transfer-Encoding is 'gzip'; send the body as it is"
    answer = put(client, push_body(spec, 2), Transfer_Encoding="chunked")
    assert changed(answer)[0] == version(2)


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
def test_a_body_that_is_said_to_be_as_it_is_is_taken(
    encoding: str, client: AppClient, spec: PolicySpec
) -> None:
    answer = put(client, push_body(spec, 2), Content_Encoding=encoding)
    assert changed(answer)[0] == version(2)


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("?sessions=restarted", "`sessions` is 'restarted', not 'keep' or 'restart'"),
        ("?session=restart", "`session` is no parameter of this route; `sessions` is"),
        ("?sessions=restart&sessions=keep", "`sessions` is given twice"),
    ],
)
def test_a_query_that_is_not_understood_is_refused(
    query: str, sentence: str, client: AppClient, spec: PolicySpec
) -> None:
    for answer in (put(client, push_body(spec, 2), query), roll_back(client, query)):
        assert refused(answer) == (400, "malformed")
        assert answer.json()["error"] == sentence
    assert act(client, spec)[0] == 1


HALVES = {
    "cut short": b"Content-Length: 10\r\n\r\nabc",
    "in a chunk that is none": b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("route", ["POST /policy/rollback", "DELETE /sessions/a"])
def test_a_request_of_which_only_half_comes_changes_nothing(
    client: AppClient, spec: PolicySpec, route: str, half: str
) -> None:
    changed(put(client, push_body(spec, 2)))
    act(client, spec, 1, session_id="a", episode_start=True)

    async def play(server: Server) -> None:
        async with server.connect() as connection:
            connection.send(f"{route} HTTP/1.1\r\nHost: test\r\n".encode(), HALVES[half])
            while not server.connections:
                await asyncio.sleep(0)
            await connection.finish_sending()
            while server.connections:
                await asyncio.sleep(0)

    over_sockets(client, play)
    assert act(client, spec, 1, session_id="a") == (4, version(2))


def test_a_push_that_the_end_overtakes_is_told_so_in_json(
    client: AppClient,
    spec: PolicySpec,
    loaded: Renewed,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = loaded.next_gate = threading.Event()
    content = push_body(spec, 2)
    head = f"PUT /policy/weights HTTP/1.1\r\nHost: test\r\nContent-Type: {SAFETENSORS}\r\n"

    async def play(server: Server) -> Answer:
        async with server.connect() as connection:
            connection.send(head.encode(), b"Content-Length: %d\r\n\r\n" % len(content), content)
            while not client.engine.versions.is_changing():
                await asyncio.sleep(0)
            server.cancel_tasks()
            answer = await connection.answer()
            assert await connection.is_closed()
            gate.set()
            return answer

    answer: Answer = over_sockets(client, play)
    assert (answer.status, answer.headers["content-type"]) == (503, "application/json")
    assert json.loads(answer.content) == {
        "error": "the server is shutting down",
        "error_type": "draining",
    }
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_push_that_fails_after_its_client_hung_up_is_no_error_of_ours(
    client: AppClient, spec: PolicySpec, loaded: Renewed, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has its one warning, and nothing of a task whose end nobody asked for."""
    gate = loaded.next_gate = threading.Event()

    async def scenario() -> None:
        push = asyncio.ensure_future(putting(client, push_body(spec, 2, probed=3)))
        while not client.engine.versions.is_changing():
            await asyncio.sleep(0)
        push.cancel()
        with pytest.raises(asyncio.CancelledError):
            await push
        gate.set()
        while client.engine.versions.is_changing():
            await asyncio.sleep(0)

    client.run(scenario())
    loaded.next_gate = None
    changed(put(client, push_body(spec, 3)))  # and the engine has forgotten that one
    gc.collect()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert warning.startswith("weights of this machine refused: ")


class Body(bytearray):
    """That it is gone can be seen."""


def test_of_a_push_the_parameters_are_kept_and_not_its_body(
    served_manifest: Manifest, spec: PolicySpec
) -> None:
    body = Body(push_body(spec, 2))
    is_there = weakref.ref(body)
    parameters = WeightsCodec(served_manifest).parse(body).parameters
    del body
    gc.collect()
    assert is_there() is None
    assert parameters["scale"] == [2]


def test_a_client_that_hangs_up_while_its_push_is_checked_changes_nothing_halfway(
    client: AppClient, spec: PolicySpec, loaded: Renewed
) -> None:
    """Whoever cancels it, it is taken to its end, and others after it."""
    gate = loaded.next_gate = threading.Event()

    async def scenario() -> None:
        first = asyncio.ensure_future(putting(client, push_body(spec, 2)))
        while not client.engine.versions.is_changing():
            await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        gate.set()
        while client.engine.versions.is_changing():
            await asyncio.sleep(0)

    client.run(scenario())
    loaded.next_gate = None
    assert changed(put(client, push_body(spec, 3))) == (version(3), version(2))
    assert act(client, spec) == (3, version(3))


def test_an_artifact_of_the_first_schema_takes_no_weights_and_says_what_is_missing(
    artifact: Path, manifest: Manifest, loaded: Renewed, spec: PolicySpec
) -> None:
    first = manifest.model_copy(
        update={"schema_version": 1, "parameters": (), "parameters_sha256": None}
    )
    with AppClient(Served.make(first, loaded, Settings(artifact=artifact))) as client:
        answer = put(client, push_body(spec, 2))
        assert refused(answer) == (422, "invalid")
        assert "exported before it could name its parameters; export it again" in answer.text
        assert act(client, spec) == (1, first.policy_version)


def test_nothing_is_taken_before_the_server_is_ready_nor_while_it_ends(
    artifact: Path, served_manifest: Manifest, loaded: Renewed, spec: PolicySpec
) -> None:
    served = Served.make(served_manifest, loaded, Settings(artifact=artifact))
    content = push_body(spec, 2)
    client = AppClient(served, is_warm=False)
    with client:
        assert refused(put(client, content)) == (503, "not_ready")
        assert refused(roll_back(client)) == (503, "not_ready")
    with AppClient(Served.make(served_manifest, loaded, Settings(artifact=artifact))) as client:

        async def ending() -> None:
            await asyncio.wait_for(client.engine.batcher.drain(), TIMEOUT_S)

        client.run(ending())
        assert refused(put(client, content)) == (503, "draining")
