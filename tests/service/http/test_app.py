"""The application's routes and life, and that every error has the one documented form."""

import asyncio
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from prometheus_client.parser import text_string_to_metric_families

from export.manifest import Manifest
from model.spec import PolicySpec
from service.http.app import create_app
from service.http.connections import Connections
from service.settings import Settings
from tests.service.conftest import MakeClient
from tests.service.fakes import AppClient, Served, SummingRuntime, single, submitted
from tests.service.http.bodies import body, error_of


def samples(client: AppClient) -> dict[str, float]:
    """Every sample of /metrics by its name and labels, as Prometheus' own parser reads them."""
    response = client.get("/metrics")
    assert response.status_code == 200
    return {
        sample.name + "".join(f" {name}={value}" for name, value in sample.labels.items()): (
            sample.value
        )
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_a_live_server_says_so_before_and_after_its_warm_up(make_client: MakeClient) -> None:
    for is_warm in (False, True):
        response = make_client(is_warm=is_warm).get("/healthz")
        assert (response.status_code, response.json()) == (200, {"alive": True})


def test_act_is_503_until_the_warm_up_has_ended(make_client: MakeClient, spec: PolicySpec) -> None:
    cold = make_client(is_warm=False)
    for response in (cold.act(body(spec)), cold.get("/readyz")):
        error_of(response, 503, "not_ready")
        assert int(response.headers["Retry-After"]) >= 1
    warm = make_client()
    assert warm.get("/readyz").json() == {"ready": True}
    assert warm.act(body(spec)).status_code == 200


def test_the_server_answers_while_it_warms_up(
    make_client: MakeClient, runtime: SummingRuntime
) -> None:
    client = make_client(is_warm=False)
    runtime.gate = gate = threading.Event()

    async def warm_up() -> None:
        async with client.app.router.lifespan_context(client.app):
            error_of(await client.http.get("/readyz"), 503, "not_ready")
            assert (await client.http.get("/healthz")).status_code == 200
            gate.set()
            assert client.engine.warm_up.done is not None
            await client.engine.warm_up.done
            assert (await client.http.get("/readyz")).status_code == 200

    try:
        client.run(warm_up())
    finally:
        gate.set()


def test_a_policy_that_fails_to_warm_up_never_gets_ready(
    make_client: MakeClient, runtime: SummingRuntime, spec: PolicySpec
) -> None:
    client = make_client(is_warm=False)
    runtime.failure = RuntimeError("broken")

    async def fail() -> None:
        client.engine.start()
        assert client.engine.warm_up.done is not None
        with pytest.raises(RuntimeError, match="broken"):
            await client.engine.warm_up.done

    client.run(fail())
    runtime.failure = None
    error_of(client.get("/readyz"), 503, "not_ready")
    error_of(client.act(body(spec)), 503, "not_ready")


def test_a_warm_up_that_ends_after_the_server_s_end_is_no_error(
    make_client: MakeClient, runtime: SummingRuntime
) -> None:
    client = make_client(is_warm=False)
    runtime.gate = threading.Event()
    errors: list[Any] = []

    async def stop_while_warming() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, error: errors.append(error))
        client.engine.start()
        while not runtime.batch_sizes:
            await asyncio.sleep(0)
        await client.engine.stop()
        assert client.engine.warm_up.is_running()
        assert runtime.gate is not None
        runtime.gate.set()
        while client.engine.warm_up.is_running():
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    client.run(stop_while_warming())
    assert errors == []
    assert len(runtime.batch_sizes) == 1, "the step that ran, and no other"


def test_every_batch_size_is_warm_when_the_server_is_ready(
    make_client: MakeClient, runtime: SummingRuntime
) -> None:
    make_client(max_batch_size=6)
    assert set(runtime.batch_sizes) == {1, 2, 4, 6}


def test_requests_that_arrive_together_ride_together(
    make_client: MakeClient, runtime: SummingRuntime, spec: PolicySpec
) -> None:
    client = make_client(max_batch_size=8)
    runtime.batch_sizes.clear()
    answers = client.act_at_once([body(spec, n) for n in range(20)])
    assert [answer.json()["value"] for answer in answers] == list(range(20))
    assert len(runtime.batch_sizes) < 20
    assert max(runtime.batch_sizes) == 8


def test_a_stopped_server_takes_no_new_work(client: AppClient, spec: PolicySpec) -> None:
    client.run(client.engine.stop())
    error_of(client.act(body(spec)), 503, "draining")
    assert client.get("/healthz").status_code == 200


def test_stopping_answers_everybody_who_waits(client: AppClient, spec: PolicySpec) -> None:
    async def stop_under_load() -> list[float]:
        waiting = [submitted(client.engine.batcher, single(spec, n)) for n in range(9)]
        await client.engine.stop()
        return [future.result().array("value")[0] for future in waiting]

    assert client.run(stop_under_load()) == list(range(9))


@pytest.mark.parametrize("session", ["env-17", "with space", "é", "%2F", "?x=1", "#", "🙂"])
def test_deleting_a_session_frees_it_whatever_its_name(
    client: AppClient, spec: PolicySpec, session: str
) -> None:
    client.act(body(spec, session_id=session, episode_start=True))
    assert len(client.engine.sessions) == 1
    path = f"/sessions/{quote(session, safe='')}"
    response = client.request("DELETE", path)
    assert (response.status_code, response.content) == (204, b"")
    assert len(client.engine.sessions) == 0
    error_of(client.act(body(spec, session_id=session)), 404, "unknown_session")
    error_of(client.request("DELETE", path), 404, "unknown_session")


def test_a_session_with_a_slash_in_its_name_can_be_deleted(
    client: AppClient, spec: PolicySpec
) -> None:
    client.act(body(spec, session_id="worker/env-17", episode_start=True))
    response = client.request("DELETE", "/sessions/worker%2Fenv-17")
    assert response.status_code == 204


def test_deleting_a_lost_session_is_410(make_client: MakeClient, spec: PolicySpec) -> None:
    client = make_client(max_sessions=1)
    for session in "ab":
        client.act(body(spec, session_id=session, episode_start=True))
    error_of(client.request("DELETE", "/sessions/a"), 410, "session_lost")


def test_a_session_deleted_while_its_step_waits_is_gone_and_harms_nobody(
    client: AppClient, spec: PolicySpec
) -> None:
    client.act(body(spec, 1, session_id="a", episode_start=True))

    async def both() -> tuple[int, int]:
        step = asyncio.ensure_future(client.post(body(spec, 10, session_id="a")))
        while not len(client.engine.batcher):
            await asyncio.sleep(0)
        deleted = await client.http.delete("/sessions/a")
        return deleted.status_code, (await step).status_code

    deleted, stepped = client.run(both())
    assert (deleted, stepped) in {(204, 404), (204, 200)}
    assert client.act(body(spec, 5, session_id="a", episode_start=True)).json()["value"] == 5


def test_policy_says_what_is_served_and_its_limits(
    make_client: MakeClient, manifest: Manifest, spec: PolicySpec
) -> None:
    client = make_client(max_batch_size=6, max_waiting=17, max_rows=5, max_body_bytes=2000)
    policy = client.get("/policy").json()
    assert policy["name"] == "tiny"
    assert policy["policy_version"] == manifest.policy_version
    assert PolicySpec.model_validate(policy["spec"]) == spec
    assert (policy["runtime"], policy["device"]) == ("summing", "cpu")
    limits = policy["limits"]
    assert (limits["max_batch_size"], limits["max_waiting"]) == (6, 17)
    assert (limits["max_rows"], limits["max_body_bytes"]) == (5, 2000)
    assert limits["max_safetensors_bytes"] > 65_536 + 5 * 8 * spec.observation_dim


def test_metrics_count_answers_by_result(client: AppClient, spec: PolicySpec) -> None:
    start = body(spec, session_id="a", episode="7", episode_start=True)
    for request in (start, start, body(spec), b"{", body(spec, session_id="nobody")):
        client.act(request)
    got = samples(client)
    results = {"ok": 2, "replayed": 1, "malformed": 1, "unknown_session": 1}
    for result, count in results.items():
        assert got[f"tamiyo_act_requests_total result={result}"] == count
    assert got["tamiyo_sessions"] == got["tamiyo_session_events_total event=started"] == 1
    assert got["tamiyo_waiting"] == 0


def test_metrics_say_of_each_session_that_is_gone_how_it_went(
    make_client: MakeClient, spec: PolicySpec
) -> None:
    client = make_client(max_sessions=2)
    for session_id in "abc":
        client.act(body(spec, session_id=session_id, episode_start=True))
    client.request("DELETE", "/sessions/b")
    got = samples(client)
    counts = {"started": 3, "evicted": 1, "ended": 1, "expired": 0}
    for event, count in counts.items():
        assert got[f"tamiyo_session_events_total event={event}"] == count
    assert got["tamiyo_sessions"] == 1


def test_asking_for_metrics_expires_what_is_idle(make_client: MakeClient, spec: PolicySpec) -> None:
    client = make_client(session_idle_s=1e-6)
    client.act(body(spec, session_id="a", episode_start=True))
    got = samples(client)
    assert got["tamiyo_sessions"] == 0
    assert got["tamiyo_session_events_total event=expired"] == 1


def test_metrics_count_batches_by_size(
    make_client: MakeClient, runtime: SummingRuntime, spec: PolicySpec
) -> None:
    client = make_client(max_batch_size=8)
    assert samples(client)["tamiyo_batch_size_count"] == 0
    client.act_at_once([body(spec, n) for n in range(20)])
    got = samples(client)
    assert got["tamiyo_batch_size_sum"] == 20
    assert got["tamiyo_batch_size_bucket le=8.0"] == got["tamiyo_batch_size_count"] < 20
    assert got["tamiyo_step_seconds_count"] == got["tamiyo_batch_size_count"]


def test_two_servers_in_one_process_count_for_themselves(
    make_client: MakeClient, spec: PolicySpec
) -> None:
    busy, idle = make_client(), make_client()
    busy.act(body(spec))
    assert samples(busy)["tamiyo_act_requests_total result=ok"] == 1
    assert "tamiyo_act_requests_total result=ok" not in samples(idle)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/nope"), ("POST", "/act/"), ("DELETE", "/sessions"), ("GET", "/%2F")],
)
def test_an_unknown_path_is_404_in_the_one_form(client: AppClient, method: str, path: str) -> None:
    error_of(client.request(method, path), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/act", "POST"),
        ("PUT", "/act", "POST"),
        ("POST", "/policy", "GET, HEAD"),
        ("GET", "/sessions/a", "DELETE"),
        ("POST", "/healthz", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
        ("POST", "/docs", "GET, HEAD"),
        ("DELETE", "/openapi.json", "GET, HEAD"),
        ("OPTIONS", "/act", "POST"),
        ("OPTIONS", "/metrics", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_405_in_the_one_form_and_names_the_right_one(
    client: AppClient, method: str, path: str, allowed: str
) -> None:
    response = client.request(method, path)
    error_of(response, 405, "method_not_allowed")
    assert response.headers["Allow"] == allowed


@pytest.mark.parametrize("path", ["/act", "/sessions/a"])
def test_head_is_a_wrong_method_where_get_is(client: AppClient, path: str) -> None:
    got, head = client.get(path), client.request("HEAD", path)
    assert got.status_code == head.status_code == 405
    assert got.headers == head.headers


def test_an_exception_nobody_foresaw_is_500_with_a_fixed_text(
    client: AppClient, spec: PolicySpec
) -> None:
    client.engine.runtime.device = 3  # type: ignore[assignment]
    assert error_of(client.get("/policy"), 500, "internal") == "internal error"
    assert client.act(body(spec)).status_code == 200


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_failure_of_ours(
    client: AppClient,
) -> None:
    messages = [
        {"type": "http.request", "body": b'{"observ', "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/act",
        "raw_path": b"/act",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    client.run(client.app(scope, receive, send))
    assert samples(client)["tamiyo_act_requests_total result=internal"] == 0


@pytest.mark.parametrize("length", [b"\xb2", b"1" * 5000])
def test_no_content_length_is_an_internal_error(client: AppClient, length: bytes) -> None:
    headers = {b"Content-Type": b"application/json", b"Content-Length": length}
    response = client.request("POST", "/act", content=b"{}", headers=headers)
    assert response.status_code in (400, 413)


def test_a_step_that_waits_behind_its_start_keeps_its_session(
    make_client: MakeClient, spec: PolicySpec
) -> None:
    client = make_client(max_sessions=1)
    start, step, rival = client.act_at_once(
        [
            body(spec, 1, session_id="a", episode_start=True),
            body(spec, 10, session_id="a", step=1),
            body(spec, 1, session_id="b", episode_start=True),
        ]
    )
    assert (start.status_code, step.status_code) == (200, 200)
    assert step.json()["value"] == 11
    error_of(rival, 429, "overloaded")


def test_the_interactive_documentation_answers(client: AppClient) -> None:
    response = client.get("/docs")
    assert response.status_code == 200
    assert "text/html" in response.headers["content-type"]


def test_making_the_application_starts_nothing(
    artifact: Path, manifest: Manifest, runtime: SummingRuntime
) -> None:
    create_app(*Served.make(manifest, runtime, Settings(artifact=artifact)))
    assert runtime.batch_sizes == []


def test_connections_that_nothing_limits_have_no_limit(client: AppClient) -> None:
    Connections(client.app.act, client.served.metrics, client.served.settings, limit=None)
    assert samples(client)["tamiyo_connections_limit"] == float("inf")
