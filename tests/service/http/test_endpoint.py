"""`POST /act` as bare ASGI: what httpx's transport cannot do to it."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from model.spec import PolicySpec
from tests.service.conftest import MakeClient
from tests.service.fakes import AppClient, SummingRuntime

HEADERS = [(b"content-type", b"application/json")]


class Cycle:
    """A request whose client hangs up once its body has been read, as uvicorn tells of it."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.disconnected = False

    async def receive(self) -> dict[str, Any]:
        self.disconnected = True
        return {"type": "http.request", "body": self.body, "more_body": False}


@pytest.fixture
def client(make_client: MakeClient) -> AppClient:
    return make_client()


def test_a_client_that_hangs_up_before_its_turn_costs_no_model_time(
    client: AppClient, runtime: SummingRuntime, spec: PolicySpec
) -> None:
    body = {"session_id": "a", "episode_start": True, "observation": [1.0] * spec.observation_dim}
    cycle = Cycle(json.dumps(body).encode())
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    runtime.batch_sizes.clear()
    endpoint = client.app.act_endpoint
    client.run(endpoint({"headers": HEADERS}, cycle.receive, send))
    assert runtime.batch_sizes == []
    assert sent == []
    assert 'tamiyo_act_requests_total{result="disconnected"} 1.0' in client.get("/metrics").text
    assert "a" not in client.engine.sessions


def test_a_request_whose_task_is_cancelled_costs_no_model_time(
    client: AppClient, runtime: SummingRuntime, spec: PolicySpec
) -> None:
    body = {"session_id": "a", "episode_start": True, "observation": [1.0] * spec.observation_dim}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: Any) -> None:
        raise AssertionError("it is answered")

    async def cancel() -> None:
        task = asyncio.ensure_future(client.app.act_endpoint({"headers": HEADERS}, receive, send))
        while not len(client.engine.batcher):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        await client.engine.stop()

    runtime.batch_sizes.clear()
    client.run(cancel())
    assert runtime.batch_sizes == []


def test_uvicorn_still_says_that_a_client_hung_up_where_we_look_for_it() -> None:
    assert "disconnected" in RequestResponseCycle.__init__.__code__.co_names


@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_a_body_may_come_in_pieces(client: AppClient, spec: PolicySpec, chunks: int) -> None:
    body = json.dumps({"observation": [1.0] * spec.observation_dim}).encode()
    size = -(-len(body) // chunks)
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    client.run(client.app.act_endpoint({"headers": HEADERS}, receive, send))
    assert sent[0]["status"] == 200
    assert json.loads(sent[1]["body"])["value"] == 1.0


@pytest.mark.parametrize("length", ["9" * 400, "12a", "-1", ""])
def test_a_length_that_is_none_is_refused_before_the_body_is_read(
    client: AppClient, length: str
) -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body is read")

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [*HEADERS, (b"content-length", length.encode())]
    client.run(client.app.act_endpoint({"headers": headers}, receive, send))
    assert sent[0]["status"] == (413 if length.isdigit() else 400)


def test_a_body_of_no_announced_length_is_read_to_its_limit(make_client: MakeClient) -> None:
    client = make_client(max_body_bytes=20_000)
    read = 0
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        assert read <= 3
        return {"type": "http.request", "body": b" " * 10_000, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    client.run(client.app.act_endpoint({"headers": HEADERS}, receive, send))
    assert sent[0]["status"] == 413


def test_an_exception_nobody_foresaw_is_500_with_a_fixed_text(
    client: AppClient, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        raise ZeroDivisionError("secret")

    async def send(message: Any) -> None:
        sent.append(message)

    client.run(client.app.act_endpoint({"headers": HEADERS}, receive, send))
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"]) == {"error": "internal error", "error_type": "internal"}
    assert "ZeroDivisionError: secret" in caplog.text


def test_a_server_s_own_prefix_is_no_part_of_the_path(client: AppClient) -> None:
    async def posted() -> httpx.Response:
        transport = httpx.ASGITransport(client.app, root_path="/tamiyo")
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            body = {"observation": [0.0] * client.served.manifest.spec.observation_dim}
            return await http.post("/tamiyo/act", json=body)

    assert client.run(posted()).status_code == 200
