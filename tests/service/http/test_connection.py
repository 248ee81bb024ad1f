"""Connections on real sockets; `POST /act` by both its ways, which must answer alike."""

import asyncio
import gc
import json
import logging
import socket
import struct
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import pytest
import uvicorn
from fastapi import Request
from safetensors.numpy import load, save
from uvicorn.server import ServerState

from model.spec import PolicySpec
from service.errors import Overloaded
from service.http.codec import JSON, SAFETENSORS
from service.http.connection import LARGEST_HEAD
from service.http.connections import Connections
from service.http.incoming import AsgiRequest, DirectRequest
from tests.service.conftest import MakeClient
from tests.service.fakes import AppClient, SummingRuntime, single, submitted

MAX_BODY_BYTES = 4096


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    content: bytes


class Connection:
    """A client that sends exactly the bytes it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, *pieces: bytes) -> None:
        self._writer.write(b"".join(pieces))

    async def answer(self) -> Answer:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
        assert head[0].startswith("HTTP/1.1 "), head
        names = [line.partition(": ") for line in head[1:-1]]
        headers = {name.lower(): value for name, _, value in names}
        assert len(headers) == len(names), f"a header is given twice: {head}"
        content = await self._reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(int(head[0].split()[1]), headers, content)

    async def is_closed(self) -> bool:
        return await self._reader.read(1) == b""

    async def drain(self) -> None:
        await self._writer.drain()

    async def finish_sending(self) -> None:
        await self._writer.drain()
        self._writer.write_eof()

    def reset(self) -> None:
        own: socket.socket = self._writer.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def stop_reading(self) -> None:
        self._reader._transport.pause_reading()  # type: ignore[attr-defined]


class Server:
    """The application on a socket of its own, by one way or the other."""

    def __init__(self, address: tuple[str, int], connections: Connections) -> None:
        self.address = address
        self.connections = connections

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Connection]:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(self.address)
        reader, writer = await asyncio.open_connection(sock=client)
        try:
            yield Connection(reader, writer)
        finally:
            writer.close()

    def begin_shutdown(self) -> None:
        for connection in list(self.connections):
            connection.shutdown()

    def cancel_tasks(self) -> None:
        """As uvicorn does once its patience has ended."""
        for connection in self.connections:
            for task in connection.server.tasks:
                task.cancel()


@asynccontextmanager
async def serving(
    client: AppClient, *, direct: bool = True, limit: int | None = None
) -> AsyncIterator[Server]:
    served = client.served
    connections = Connections(client.app.act, served.metrics, served.settings, limit=limit)
    if not direct:
        connections.act_targets.clear()
    config = uvicorn.Config(
        client.app, lifespan="off", log_config=None, proxy_headers=False, ws="none"
    )
    config.load()
    state = ServerState()
    state.default_headers = [(b"date", b"today")]
    listener = await asyncio.get_running_loop().create_server(
        lambda: connections.accept(config, state, {}), "127.0.0.1", 0
    )
    try:
        yield Server(listener.sockets[0].getsockname()[:2], connections)
    finally:
        listener.close()
        for connection in connections:
            connection.transport.abort()


@pytest.fixture
def client(make_client: MakeClient) -> AppClient:
    return make_client(max_body_bytes=MAX_BODY_BYTES)


def scenario(
    client: AppClient, play: Callable[[Server], Coroutine[Any, Any, Any]], **options: Any
) -> Any:
    async def in_turn() -> Any:
        async with serving(client, **options) as server:
            return await play(server)

    return client.run(in_turn())


def body_of(spec: PolicySpec, x: float = 1.0, **fields: Any) -> bytes:
    return json.dumps({"observation": [x] * spec.observation_dim, "seed": 3, **fields}).encode()


def file_of(spec: PolicySpec, num_rows: int) -> tuple[bytes, list[float]]:
    """A stateless request in safetensors, and the values that the fake policy answers."""
    observation = np.arange(num_rows, dtype=np.float32)[:, None].repeat(spec.observation_dim, 1)
    file = save({"observation": observation}, {"seed": "3"})
    assert len(file) > MAX_BODY_BYTES
    return post(file).replace(JSON.encode(), SAFETENSORS.encode()), observation[:, 0].tolist()


def post(body: bytes, *headers: str, target: str = "/act", version: str = "1.1") -> bytes:
    lines = [f"POST {target} HTTP/{version}", "Host: test", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", *headers, "", ""]).encode() + body


def chunked(body: bytes, size: int) -> bytes:
    head = (
        "POST /act HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    chunks = [body[at : at + size] for at in range(0, len(body), size)]
    return head.encode() + b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"


def plain_requests(spec: PolicySpec) -> dict[str, bytes]:
    good = body_of(spec)
    return {
        "a good one": post(good),
        "a name in other letters": post(good).replace(b"Content-Type", b"cOnTeNt-TyPe"),
        "a charset": post(good).replace(b"application/json", b"application/json; charset=utf-8"),
        "in chunks": chunked(good, 7),
        "a query": post(good, target="/act?x=1"),
        "an escaped path": post(good, target="/%61ct"),
        "an absolute target": post(good, target="http://test/act"),
        "a last one": post(good, "Connection: close"),
        "of HTTP/1.0": post(good, version="1.0"),
        "of HTTP/1.0, kept": post(good, "Connection: keep-alive", version="1.0"),
        "an upgrade": post(good, "Connection: Upgrade", "Upgrade: websocket"),
        "an upgrade to HTTP/2, as Java asks for it": post(
            good, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAM"
        ),
        "its last one with an upgrade": post(good, "Connection: close, Upgrade", "Upgrade: h2c"),
        "in chunks with an upgrade": chunked(good, 7).replace(
            b"Host:", b"Connection: Upgrade\r\nUpgrade: h2c\r\nHost:"
        ),
        "who waits to be asked on": post(good, "Expect: 100-continue"),
        "a type of no name": post(good).replace(b"application/json", b""),
        "spaces behind values": post(
            body_of(spec, session_id="nobody"), "X-Session-Id: nobody \t"
        ).replace(b"Content-Length: ", b"Content-Length:  "),
        "an expectation of HTTP/1.0": post(good, "Expect: 100-continue", version="1.0"),
        "gzip": post(good, "Content-Encoding: gzip"),
        "two encodings": post(good, "Content-Encoding: identity, br"),
        "as it is": post(good, "Content-Encoding: identity"),
        "gzip on the way": chunked(good, 7).replace(b"chunked", b"gzip, chunked"),
        "a session in the headers too": post(
            body_of(spec, session_id="nobody"), "X-Session-Id: nobody"
        ),
        "another session in the headers": post(
            body_of(spec, session_id="nobody"), "X-Session-Id: somebody"
        ),
        "two sessions in the headers": post(
            body_of(spec, session_id="nobody"), "X-Session-Id: nobody", "X-Session-Id: somebody"
        ),
        "a session in the headers alone": post(good, "X-Session-Id: nobody"),
        "a deadline that has passed": post(body_of(spec, timeout_ms=1e-6)),
        "with trailers": chunked(good, 7)[:-2] + b"Content-Type: text/plain\r\n\r\n",
        "a proxy's request": b"CONNECT test:80 HTTP/1.1\r\nHost: test\r\n\r\n",
        "no target": post(good, target="*"),
        "a target in other letters": post(good).replace(b"/act", b"/\xff"),
        "no JSON": post(b"{"),
        "nothing": post(b""),
        "a wrong type": post(good).replace(b"application/json", b"text/plain"),
        "no type": post(good).replace(b"Content-Type: application/json\r\n", b""),
        "too large": post(b" " * (MAX_BODY_BYTES + 1)),
        "as large as may be": post(good.ljust(MAX_BODY_BYTES)),
        "too large, in chunks": chunked(b" " * (MAX_BODY_BYTES + 1), 1000),
        "a wrong length of observation": post(b'{"observation": [1]}'),
        "an unknown session": post(body_of(spec, session_id="nobody")),
        "another method": post(good).replace(b"POST", b"PUT"),
        "another route": post(good, target="/action"),
        "a URL without a path": b"GET http://test HTTP/1.1\r\nHost: test\r\n\r\n",
        "an expectation without a body": b"GET /healthz HTTP/1.1\r\nExpect: 100-continue\r\n\r\n",
        "no body asked for": b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n",
        "a length that is none": post(good).replace(b"Length: ", b"Length: x"),
        "two lengths": post(good, "Content-Length: 7"),
        "a length and chunks": post(good, "Transfer-Encoding: chunked"),
        "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    }


REFUSED_BY_THE_PARSER = {
    "a proxy's request",
    "a target in other letters",
    "a length that is none",
    "two lengths",
    "a length and chunks",
    "no HTTP",
}
"""Of these in pieces, the later ones would meet a closed connection."""

GO_ON = {"a good one", "an expectation without a body", "who waits to be asked on", "gzip"}
"""Some whose connection has no reason to end."""

STATUS = {
    "no JSON": 400,
    "nothing": 400,
    "a wrong type": 415,
    "no type": 415,
    "a type of no name": 415,
    "gzip": 415,
    "two encodings": 415,
    "gzip on the way": 415,
    "another session in the headers": 400,
    "two sessions in the headers": 400,
    "a session in the headers alone": 400,
    "a session in the headers too": 404,
    "a deadline that has passed": 504,
    "too large": 413,
    "too large, in chunks": 413,
    "a wrong length of observation": 422,
    "an unknown session": 404,
    "spaces behind values": 404,
    "another method": 405,
    "another route": 404,
    "no target": 404,
} | dict.fromkeys(REFUSED_BY_THE_PARSER, 400)
"""Of those that are not answered with 200."""


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        (name, pieces)
        for name in plain_requests(PolicySpec.tamiyo_v1())
        for pieces in (1, 2, 50)
        if pieces == 1 or name not in REFUSED_BY_THE_PARSER
    ],
)
def test_both_ways_answer_a_request_alike(
    client: AppClient, spec: PolicySpec, name: str, pieces: int
) -> None:
    request = plain_requests(spec)[name]
    size = -(-len(request) // pieces)

    async def play(server: Server) -> tuple[Answer, bool]:
        async with server.connect() as connection:
            for at in range(0, len(request), size):
                connection.send(request[at : at + size])
                await asyncio.sleep(0)
            answer = await connection.answer()
            if answer.status == 100:
                answer = await connection.answer()
            if answer.headers.get("connection") == "close":
                return answer, await connection.is_closed()
            connection.send(post(body_of(spec)))  # what is left of the first one harms nobody
            return answer, (await connection.answer()).status == 200

    direct, other = (scenario(client, play, direct=direct) for direct in (True, False))
    assert direct == other
    assert direct[1]
    assert direct[0].status == STATUS.get(name, 200)
    assert direct[0].headers["content-type"] == "application/json"
    if name in GO_ON:
        assert "connection" not in direct[0].headers


class Unforeseen(BaseException):
    """Nothing that Starlette would answer."""


def test_whatever_ends_a_route_its_client_is_told_in_json(
    client: AppClient, caplog: pytest.LogCaptureFixture
) -> None:
    @client.app.get("/broken")
    async def broken() -> None:
        raise Unforeseen

    async def play(server: Server) -> Answer:
        async with server.connect() as connection:
            connection.send(b"GET /broken HTTP/1.1\r\nHost: test\r\n\r\n")
            answer = await connection.answer()
            assert await connection.is_closed()
            return answer

    answer: Answer = scenario(client, play)
    assert (answer.status, answer.headers["content-type"]) == (500, "application/json")
    assert json.loads(answer.content) == {"error": "internal error", "error_type": "internal"}
    assert "Unforeseen" in caplog.text


@pytest.mark.parametrize("error", [Unforeseen, asyncio.CancelledError])
def test_a_route_that_ends_so_after_its_client_was_told_why_adds_nothing(
    client: AppClient, error: type[BaseException]
) -> None:
    @client.app.post("/broken")
    async def broken(request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        raise error

    async def play(server: Server) -> Answer:
        async with server.connect() as connection:
            connection.send(b"POST /broken HTTP/1.1\r\nHost: test\r\n")
            connection.send(b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
            answer = await connection.answer()
            assert await connection.is_closed()
            return answer

    answer: Answer = scenario(client, play)
    assert answer.status == 400
    assert 'tamiyo_unread_requests_total{result="malformed"} 1.0' in client.get("/metrics").text
    assert 'tamiyo_unread_requests_total{result="draining"}' not in client.get("/metrics").text
    assert 'tamiyo_unread_requests_total{result="internal"}' not in client.get("/metrics").text


def test_a_good_request_takes_the_short_way(client: AppClient, spec: PolicySpec) -> None:
    """Or all of this module would compare uvicorn with itself."""

    async def play(server: Server) -> type[Any]:
        async with server.connect() as connection:
            connection.send(post(body_of(spec)))
            await connection.answer()
            (served,) = server.connections
            return type(served.current)

    assert scenario(client, play) is DirectRequest
    assert scenario(client, play, direct=False) is AsgiRequest


@pytest.mark.parametrize("direct", [True, False])
def test_headers_of_every_answer_are_those_of_its_second(
    client: AppClient, spec: PolicySpec, direct: bool
) -> None:
    async def play(server: Server) -> list[str]:
        dates = []
        async with server.connect() as connection:
            for _ in range(3):
                connection.send(post(body_of(spec)))
                dates.append((await connection.answer()).headers["date"])
                (served,) = server.connections
                served.server.default_headers = [(b"date", b"day %d" % len(dates))]
        return dates

    assert scenario(client, play, direct=direct) == ["today", "day 1", "day 2"]


@pytest.mark.parametrize("direct", [True, False])
def test_pipelined_requests_are_answered_in_order(
    client: AppClient, spec: PolicySpec, direct: bool
) -> None:
    start = body_of(spec, 1.0, session_id="a", episode_start=True)
    steps = [body_of(spec, 10.0**n, session_id="a", step=n) for n in range(1, 5)]
    requests = [post(start), b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n", *map(post, steps)]

    async def play(server: Server) -> list[Any]:
        async with server.connect() as connection:
            connection.send(*requests)
            return [json.loads((await connection.answer()).content) for _ in requests]

    first, alive, *rest = scenario(client, play, direct=direct)
    assert alive == {"alive": True}
    assert [answer["value"] for answer in (first, *rest)] == [1, 11, 111, 1111, 11111]


@pytest.mark.parametrize("direct", [True, False])
def test_a_pipelined_request_refused_at_once_waits_for_the_one_before(
    client: AppClient, spec: PolicySpec, direct: bool
) -> None:
    async def play(server: Server) -> list[int]:
        async with server.connect() as connection:
            connection.send(post(body_of(spec)), post(b"{"), post(body_of(spec)))
            return [(await connection.answer()).status for _ in range(3)]

    assert scenario(client, play, direct=direct) == [200, 400, 200]


def test_a_client_that_hangs_up_before_its_turn_costs_no_model_time(
    client: AppClient, runtime: SummingRuntime, spec: PolicySpec
) -> None:
    runtime.batch_sizes.clear()

    async def play(server: Server) -> None:
        async with server.connect() as connection:
            connection.send(post(body_of(spec, session_id="a", episode_start=True)))
            await until_it_is_read(server)
            (served,) = server.connections
            served.transport.abort()  # before the loop's next turn, where its batch would run
            await client.engine.stop()  # once everything that waits has been answered

    scenario(client, play)
    assert "a" not in client.engine.sessions
    assert runtime.batch_sizes == []


def test_a_replay_says_so(client: AppClient, spec: PolicySpec) -> None:
    start = post(body_of(spec, session_id="a", episode_start=True, step=0))

    async def play(server: Server) -> list[Answer]:
        async with server.connect() as connection:
            answers = []
            for _ in range(2):
                connection.send(start)
                answers.append(await connection.answer())
            return answers

    first, second = scenario(client, play)
    assert "replayed" not in first.headers
    assert second.headers["replayed"] == "true"
    assert second.content == first.content


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("kind", ["answered at once", "waiting for one another"])
def test_a_client_that_reads_nothing_is_not_written_to_without_end(
    client: AppClient, spec: PolicySpec, direct: bool, kind: str
) -> None:
    """Its answers stay in the socket and in a buffer of some size, not in ever more memory."""
    requests = {
        "answered at once": post(b'{"observation": [1], "' + b"x" * 2000 + b'": 0}'),
        "waiting for one another": post(body_of(spec)) * 3,
    }[kind]

    async def play(server: Server) -> None:
        async with server.connect() as connection:
            connection.send(post(b"{"))
            await connection.answer()
            (served,) = server.connections
            served.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
            )
            connection.stop_reading()
            while not served.flow.write_paused:
                connection.send(requests)
                await asyncio.sleep(0)
            for _ in range(1000):
                connection.send(requests)
                await asyncio.sleep(0)
            assert served.transport.get_write_buffer_size() < 200_000
            assert served.flow.read_paused

    scenario(client, play, direct=direct)


@pytest.mark.parametrize("direct", [True, False])
def test_a_body_that_arrives_after_the_shutdown_began_is_answered(
    client: AppClient, spec: PolicySpec, direct: bool
) -> None:
    answer = answer_to_a_request_in_two_parts(client, spec, direct=direct, sends_the_rest=True)
    assert answer.status == 200


@pytest.mark.parametrize("direct", [True, False])
def test_a_body_that_never_arrives_is_refused_before_the_drain_ends(
    make_client: MakeClient, spec: PolicySpec, direct: bool
) -> None:
    client = make_client(drain_s=0)
    answer = answer_to_a_request_in_two_parts(client, spec, direct=direct, sends_the_rest=False)
    assert (answer.status, json.loads(answer.content)["error_type"]) == (503, "draining")


def answer_to_a_request_in_two_parts(
    client: AppClient, spec: PolicySpec, *, direct: bool, sends_the_rest: bool
) -> Answer:
    """Between the two the server begins to shut down; after the answer it hangs up."""
    request = post(body_of(spec))

    async def play(server: Server) -> tuple[Answer, bool]:
        async with server.connect() as connection:
            connection.send(request[:-10])
            await until_it_is_read(server)
            server.begin_shutdown()
            if sends_the_rest:
                connection.send(request[-10:])
            return await connection.answer(), await connection.is_closed()

    answer: Answer
    answer, is_closed = scenario(client, play, direct=direct)
    assert answer.headers["connection"] == "close"
    assert is_closed
    return answer


async def until_it_is_read(server: Server) -> None:
    while not any(connection.current for connection in server.connections):
        await asyncio.sleep(0)


BOTH_WAYS = pytest.mark.parametrize("direct", [True, False])
SHORT_S = 0.1
HEAD = b"POST /act HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"


def error_type(answer: Answer) -> str:
    assert answer.headers["content-type"] == "application/json"
    word: str = json.loads(answer.content)["error_type"]
    return word


def count_of(client: AppClient, metric: str) -> float:
    (value,) = [
        float(line.split()[1])
        for line in client.get("/metrics").text.splitlines()
        if line.startswith(f"{metric} ")
    ] or [0.0]
    return value


@BOTH_WAYS
def test_a_connection_without_a_request_is_closed_after_its_time_and_not_before(
    make_client: MakeClient, spec: PolicySpec, direct: bool
) -> None:
    client = make_client(keep_alive_s=SHORT_S, read_timeout_s=100)

    async def play(server: Server) -> float:
        loop = asyncio.get_running_loop()
        async with server.connect() as unused, server.connect() as connection:
            connection.send(post(body_of(spec)))
            await connection.answer()
            answered_s = loop.time()
            assert await connection.is_closed()
            assert await unused.is_closed()
            return loop.time() - answered_s

    assert scenario(client, play, direct=direct) >= SHORT_S


@BOTH_WAYS
def test_it_may_stay_longer_between_requests_than_a_request_may_take_to_arrive(
    make_client: MakeClient, spec: PolicySpec, direct: bool
) -> None:
    client = make_client(keep_alive_s=100, read_timeout_s=SHORT_S)

    async def play(server: Server) -> int:
        async with server.connect() as slow, server.connect() as connection:
            connection.send(post(body_of(spec)))
            await connection.answer()
            slow.send(b"POST")
            await slow.answer()  # the time for a request has passed
            connection.send(post(body_of(spec)))
            return (await connection.answer()).status

    assert scenario(client, play, direct=direct) == 200


UNFINISHED = {
    "a line": b"POST /a",
    "a head": HEAD + b"Content-Len",
    "a head of another route": b"GET /healthz HTTP/1.1\r\nHost:",
    "a body": HEAD + b'Content-Length: 100\r\n\r\n{"obs',
    "a body that has not begun": HEAD + b"Content-Length: 100\r\n\r\n",
    "a chunk": HEAD + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"obs',
    "trailers": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nTrailer",
}


@BOTH_WAYS
@pytest.mark.parametrize("what", UNFINISHED)
def test_a_request_that_does_not_all_arrive_in_time_is_408_and_the_last(
    make_client: MakeClient, direct: bool, what: str
) -> None:
    client = make_client(read_timeout_s=SHORT_S)

    async def play(server: Server) -> Answer:
        async with server.connect() as connection:
            connection.send(UNFINISHED[what])
            answer = await connection.answer()
            assert await connection.is_closed()
            assert len(server.connections) == 0
            return answer

    answer = scenario(client, play, direct=direct)
    assert (answer.status, error_type(answer)) == (408, "request_timeout")
    assert answer.headers["connection"] == "close"


@BOTH_WAYS
def test_a_byte_now_and_then_does_not_prolong_it(make_client: MakeClient, direct: bool) -> None:
    client = make_client(read_timeout_s=SHORT_S)

    async def play(server: Server) -> Answer:
        async with server.connect() as connection:
            connection.send(HEAD, b"Content-Length: 4000\r\n\r\n")
            answer = asyncio.ensure_future(connection.answer())
            while not answer.done():
                connection.send(b" ")
                await asyncio.wait({answer}, timeout=SHORT_S / 10)
            return answer.result()

    assert scenario(client, play, direct=direct).status == 408


@BOTH_WAYS
def test_time_in_which_a_batch_holds_the_loop_does_not_make_a_request_late(
    make_client: MakeClient, spec: PolicySpec, direct: bool
) -> None:
    client = make_client(read_timeout_s=SHORT_S)
    request = post(body_of(spec))

    async def play(server: Server) -> Answer:
        async with server.connect() as connection:
            connection.send(request[:-10])
            await until_it_is_read(server)
            connection.send(request[-10:])  # by the time the loop reads again, it is long here
            time.sleep(3 * SHORT_S)
            return await connection.answer()

    assert scenario(client, play, direct=direct).status == 200


@BOTH_WAYS
@pytest.mark.parametrize(
    "refused",
    [
        HEAD.replace(b"json", b"xml") + b"Content-Length: 100\r\n\r\n",
        HEAD + b"Content-Length: 1\r\nX-Session-Id: a\r\nX-Session-Id: b\r\n\r\n",
    ],
)
def test_what_is_refused_at_its_headers_still_has_to_arrive(
    make_client: MakeClient, direct: bool, refused: bytes
) -> None:
    """The answer comes at once; then the connection is closed, without a second one."""
    client = make_client(read_timeout_s=SHORT_S)

    async def play(server: Server) -> tuple[int, bool]:
        async with server.connect() as connection:
            connection.send(refused)
            return (await connection.answer()).status, await connection.is_closed()

    assert scenario(client, play, direct=direct) in [(415, True), (400, True)]


@BOTH_WAYS
def test_a_file_is_read_and_answered_beyond_the_limit_of_json(
    client: AppClient, spec: PolicySpec, direct: bool
) -> None:
    request, observed = file_of(spec, num_rows=200)

    async def play(server: Server) -> list[Answer]:
        async with server.connect() as connection:
            answers = []
            for accept in (SAFETENSORS, JSON):
                connection.send(request.replace(b"Host:", b"Accept: %b\r\nHost:" % accept.encode()))
                answers.append(await connection.answer())
            return answers

    in_file, in_json = scenario(client, play, direct=direct)
    assert in_file.headers["content-type"] == SAFETENSORS
    assert in_json.headers["content-type"] == JSON
    assert load(in_file.content)["value"].tolist() == observed
    assert json.loads(in_json.content)["value"] == observed


@BOTH_WAYS
def test_a_file_that_is_refused_at_its_headers_ends_no_connection(
    make_client: MakeClient, spec: PolicySpec, direct: bool
) -> None:
    """However much longer it is than a JSON body may be."""
    client = make_client(max_body_bytes=MAX_BODY_BYTES, is_warm=False)
    request, _ = file_of(spec, num_rows=200)

    async def play(server: Server) -> list[int]:
        async with server.connect() as connection:
            statuses = []
            for _ in range(3):
                connection.send(request)
                statuses.append((await connection.answer()).status)
            return statuses

    assert scenario(client, play, direct=direct) == [503] * 3


@BOTH_WAYS
def test_who_sends_all_of_a_body_too_large_still_gets_the_answer(
    make_client: MakeClient, direct: bool
) -> None:
    """Many a client reads nothing before it has sent everything."""
    client = make_client(max_body_bytes=MAX_BODY_BYTES)

    async def play(server: Server) -> Answer:
        async with server.connect() as connection:
            connection.send(HEAD, b"Content-Length: 20000000\r\n\r\n")
            for _ in range(20):
                connection.send(b" " * 1_000_000)
                await connection.drain()
            answer = await connection.answer()
            assert await connection.is_closed()
            return answer

    assert scenario(client, play, direct=direct).status == 413


@BOTH_WAYS
def test_what_follows_a_last_request_is_not_read_nor_answered(
    client: AppClient, spec: PolicySpec, direct: bool, caplog: pytest.LogCaptureFixture
) -> None:
    last = post(body_of(spec), "Connection: close")
    refused = last.replace(b"json", b"xml")

    async def play(server: Server) -> list[int]:
        statuses = []
        for request in (last, refused, b"rubbish\r\n\r\n"):
            async with server.connect() as connection:
                connection.send(request, post(body_of(spec)), b"rubbish\r\n\r\n")
                statuses.append((await connection.answer()).status)
                assert await connection.is_closed()
        return statuses

    assert scenario(client, play, direct=direct) == [200, 415, 400]
    assert caplog.records == []


LARGE = {
    "a header": HEAD + b"X: " + b"a" * 100_000,
    "many headers": HEAD + b"X: a\r\n" * 20_000,
    "a header without end": HEAD + b"X" * 100_000,
    "a line": b"GET /" + b"a" * 100_000,
    "a method": b"A" * 100_000,
    "a trailer": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: " + b"a" * 200_000,
    "many trailers": HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    + b"X: aaaaaaaaaaa\r\n" * 20_000,
    "a chunk's extension": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2;a=" + b"b" * 200_000,
}


@BOTH_WAYS
@pytest.mark.parametrize("pieces", [1, 9])
@pytest.mark.parametrize("what", LARGE)
def test_headers_larger_than_anybody_needs_are_refused_and_not_kept(
    client: AppClient, spec: PolicySpec, direct: bool, what: str, pieces: int
) -> None:
    size = -(-len(LARGE[what]) // pieces)

    async def play(server: Server) -> Answer:
        async with server.connect() as connection:
            for at in range(0, len(LARGE[what]), size):
                connection.send(LARGE[what][at : at + size])
                await asyncio.sleep(0)
            answer = await connection.answer()
            assert await connection.is_closed()
            return answer

    answer = scenario(client, play, direct=direct)
    if what == "a method":
        assert (answer.status, error_type(answer)) == (400, "malformed")
    else:
        assert (answer.status, error_type(answer)) == (431, "headers_too_large")


@BOTH_WAYS
def test_headers_as_large_as_they_may_be_are_read(
    client: AppClient, spec: PolicySpec, direct: bool
) -> None:
    request = post(body_of(spec), "X: ")
    head, _, body = request.partition(b"\r\n\r\n")
    padded = head + b"a" * (LARGEST_HEAD - len(head) - 4) + b"\r\n\r\n"
    assert len(padded) == LARGEST_HEAD

    async def play(server: Server, head: bytes) -> int:
        async with server.connect() as connection:
            connection.send(head, body)
            return (await connection.answer()).status

    assert scenario(client, lambda server: play(server, padded), direct=direct) == 200
    more = padded.replace(b"X: a", b"X: aa")
    assert scenario(client, lambda server: play(server, more), direct=direct) == 431


@BOTH_WAYS
def test_a_body_too_large_is_not_read_to_its_end(client: AppClient, direct: bool) -> None:
    async def play(server: Server) -> Answer:
        async with server.connect() as connection:
            connection.send(HEAD, b"Content-Length: 300000000\r\n\r\n")
            answer = await connection.answer()
            assert await connection.is_closed()
            with suppress(ConnectionError):
                while len(server.connections):
                    connection.send(b" " * 65536)
                    await connection.drain()
            return answer

    answer = scenario(client, play, direct=direct)
    assert (answer.status, answer.headers["connection"]) == (413, "close")


@BOTH_WAYS
@pytest.mark.parametrize("limit", ["LINGER_S", "LINGER_BYTES"])
def test_a_connection_lingers_for_a_while_and_for_some_megabytes(
    client: AppClient, direct: bool, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client has its last answer, and neither closes nor (the first one) sends."""
    limits = {"LINGER_S": 1000.0, "LINGER_BYTES": 10**9} | {limit: 0}
    for name, value in limits.items():
        monkeypatch.setattr(f"service.http.connection.{name}", value)

    async def play(server: Server) -> None:
        async with server.connect() as connection:
            connection.send(HEAD, b"Content-Length: 300000000\r\n\r\n")
            await connection.answer()
            while len(server.connections):
                if limit == "LINGER_BYTES":
                    connection.send(b" ")
                await asyncio.sleep(0)

    scenario(client, play, direct=direct)


@BOTH_WAYS
def test_a_last_request_refused_at_its_headers_ends_the_connection_once_it_is_whole(
    client: AppClient, spec: PolicySpec, direct: bool
) -> None:
    request = post(body_of(spec), "Connection: close").replace(b"json", b"xml")

    async def play(server: Server) -> int:
        async with server.connect() as connection:
            connection.send(request)
            answer = await connection.answer()
            while len(server.connections):  # long before a keep-alive's time
                await asyncio.sleep(0)
            return answer.status

    assert scenario(client, play, direct=direct) == 415


@BOTH_WAYS
def test_a_last_answer_that_is_not_read_is_not_kept_for_ever(
    make_client: MakeClient, direct: bool
) -> None:
    client = make_client(read_timeout_s=SHORT_S, keep_alive_s=SHORT_S)

    async def play(server: Server) -> None:
        async with server.connect() as connection:
            connection.send(b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n")
            await connection.answer()
            (served,) = server.connections
            connection.stop_reading()
            served.transport.set_write_buffer_limits(high=10**9)  # so that it never pauses
            served.transport.write(b" " * 20_000_000)
            connection.send(b"GET /healthz HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
            while len(server.connections):
                await asyncio.sleep(0)

    scenario(client, play, direct=direct)


@BOTH_WAYS
def test_a_body_without_end_is_not_read_on_for_a_refusal_s_sake(
    client: AppClient, direct: bool
) -> None:
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"

    async def play(server: Server) -> int:
        async with server.connect() as connection:
            connection.send(HEAD.replace(b"json", b"xml"), b"Transfer-Encoding: chunked\r\n\r\n")
            answer = await connection.answer()
            with suppress(ConnectionError):
                while len(server.connections):
                    connection.send(chunk)
                    await connection.drain()
            return answer.status

    assert scenario(client, play, direct=direct) == 415


@BOTH_WAYS
def test_bodies_that_are_refused_one_after_another_end_no_connection(
    client: AppClient, spec: PolicySpec, direct: bool
) -> None:
    """However many, as long as none is too large by itself."""
    refused = post(b" " * (MAX_BODY_BYTES // 2)).replace(b"json", b"xml")

    async def play(server: Server) -> list[int]:
        async with server.connect() as connection:
            statuses = []
            for request in (*[refused] * 5, post(body_of(spec))):
                connection.send(request)
                statuses.append((await connection.answer()).status)
            return statuses

    assert scenario(client, play, direct=direct) == [*[415] * 5, 200]


@BOTH_WAYS
def test_what_breaks_behind_a_request_is_refused_once_that_is_answered(
    client: AppClient, spec: PolicySpec, direct: bool
) -> None:
    """At once: nobody waits for the rest of what is broken."""

    async def play(server: Server) -> list[int]:
        async with server.connect() as connection:
            broken = HEAD + b"Transfer-Encoding: chunked\r\n\r\nno number\r\n"
            connection.send(post(body_of(spec)), broken)
            statuses = [(await connection.answer()).status for _ in range(2)]
            assert await connection.is_closed()
            return statuses

    assert scenario(client, play, direct=direct) == [200, 400]


@BOTH_WAYS
def test_who_waits_to_be_asked_on_and_is_refused_is_not_waited_for(
    client: AppClient, direct: bool
) -> None:
    request = HEAD.replace(b"json", b"xml") + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n"

    async def play(server: Server) -> tuple[int, bool]:
        async with server.connect() as connection:
            connection.send(request)
            return (await connection.answer()).status, await connection.is_closed()

    assert scenario(client, play, direct=direct) == (415, True)


@BOTH_WAYS
@pytest.mark.parametrize("what", ["closes", "resets"])
def test_a_client_that_leaves_is_forgotten_at_once(
    client: AppClient, spec: PolicySpec, direct: bool, what: str
) -> None:
    async def play(server: Server) -> list[object]:
        seen = []
        for _ in range(3):
            async with server.connect() as connection:
                connection.send(post(body_of(spec)))
                await connection.answer()
                seen += [weakref.ref(served) for served in server.connections]
                if what == "resets":
                    connection.reset()
            while len(server.connections):
                await asyncio.sleep(0)
        for _ in range(3):  # what the loop itself still holds
            await asyncio.sleep(0)
        return [served() for served in seen]

    gc.collect()
    gc.disable()
    try:
        assert scenario(client, play, direct=direct) == [None, None, None]
    finally:
        gc.enable()


@BOTH_WAYS
def test_a_client_that_leaves_in_its_body_is_counted(
    client: AppClient, spec: PolicySpec, direct: bool
) -> None:
    async def play(server: Server) -> None:
        async with server.connect() as connection:
            connection.send(post(body_of(spec))[:-10])
            await until_it_is_read(server)
        while len(server.connections):
            await asyncio.sleep(0)
        for _ in range(3):
            await asyncio.sleep(0)

    scenario(client, play, direct=direct)
    assert count_of(client, 'tamiyo_act_requests_total{result="disconnected"}') == 1


@BOTH_WAYS
def test_a_client_that_reads_nothing_is_given_up(
    make_client: MakeClient, spec: PolicySpec, direct: bool
) -> None:
    client = make_client(read_timeout_s=SHORT_S, keep_alive_s=SHORT_S)
    request = post(b'{"observation": [1], "' + b"x" * 2000 + b'": 0}')

    async def play(server: Server) -> None:
        async with server.connect() as connection:
            connection.send(request)
            await connection.answer()
            connection.stop_reading()
            (served,) = server.connections
            served.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
            )
            while not served.flow.write_paused:
                connection.send(request)
                await asyncio.sleep(0)
            connection.send(request)  # some of this is still read
            while len(server.connections):
                await asyncio.sleep(0)

    scenario(client, play, direct=direct)


@BOTH_WAYS
def test_what_cannot_be_read_is_answered_after_what_came_before_it(
    client: AppClient, spec: PolicySpec, direct: bool
) -> None:
    requests = [post(body_of(spec)), b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n", b"rubbish\r\n"]

    async def play(server: Server) -> list[int]:
        async with server.connect() as connection:
            connection.send(*requests, post(body_of(spec)))
            answers = [(await connection.answer()).status for _ in requests]
            assert await connection.is_closed()
            return answers

    assert scenario(client, play, direct=direct) == [200, 200, 400]


@BOTH_WAYS
def test_behind_what_cannot_be_read_nothing_more_is(
    client: AppClient, spec: PolicySpec, direct: bool
) -> None:
    async def play(server: Server) -> list[int]:
        async with server.connect() as connection:
            connection.send(post(body_of(spec)), b"rubbish\r\n")
            await until_it_is_read(server)
            (served,) = server.connections
            assert served.flow.read_paused
            return [(await connection.answer()).status for _ in range(2)]

    assert scenario(client, play, direct=direct) == [200, 400]


def test_a_body_that_its_route_does_not_read_is_not_taken_up(client: AppClient) -> None:
    may_answer = asyncio.Event()

    async def held() -> dict[str, bool]:
        await may_answer.wait()
        return {"held": True}

    client.app.add_api_route("/held", held, methods=["POST"])

    async def play(server: Server) -> int:
        async with server.connect() as connection:
            connection.send(
                b"POST /held HTTP/1.1\r\nHost: test\r\nContent-Length: 20000000\r\n\r\n"
            )
            connection.send(b" " * 20_000_000)
            await until_it_is_read(server)
            (served,) = server.connections
            while not served.flow.read_paused:
                await asyncio.sleep(0)
            assert served.current is not None
            assert len(served.current.body) < 1_000_000
            may_answer.set()
            return (await connection.answer()).status

    assert scenario(client, play) == 200


@BOTH_WAYS
def test_a_thousand_requests_in_one_packet_are_answered_in_order(
    client: AppClient, spec: PolicySpec, direct: bool
) -> None:
    healthz = b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n"
    requests = [post(body_of(spec)), *[post(b"{")] * 500, *[post(b"{"), healthz] * 250]

    async def play(server: Server) -> list[int]:
        async with server.connect() as connection:
            connection.send(*requests)
            return [(await connection.answer()).status for _ in requests]

    assert scenario(client, play, direct=direct) == [200, *[400] * 500, *[400, 200] * 250]


@BOTH_WAYS
def test_a_body_too_large_is_so_behind_another_request_too(
    client: AppClient, spec: PolicySpec, direct: bool
) -> None:
    requests = [post(body_of(spec)), post(b" " * (MAX_BODY_BYTES + 1))]
    chunks = [post(body_of(spec)), chunked(b" " * (MAX_BODY_BYTES + 1), 1000)]

    async def play(server: Server) -> list[int]:
        statuses = []
        for pair in (requests, chunks):
            async with server.connect() as connection:
                connection.send(*pair)
                statuses += [(await connection.answer()).status for _ in pair]
                assert await connection.is_closed()
        return statuses

    assert scenario(client, play, direct=direct) == [200, 413, 200, 413]


@BOTH_WAYS
def test_half_a_request_behind_one_that_waits_is_not_late_by_that(
    make_client: MakeClient, runtime: SummingRuntime, spec: PolicySpec, direct: bool
) -> None:
    """While the first one waits for the model, the server itself does not read on."""
    client = make_client(read_timeout_s=SHORT_S, max_batch_size=1)
    runtime.spoil = lambda decided: time.sleep(SHORT_S / 2)
    request = post(body_of(spec))

    async def play(server: Server) -> list[int]:
        async with AsyncExitStack() as stack:
            ahead = [await stack.enter_async_context(server.connect()) for _ in range(8)]
            connection = await stack.enter_async_context(server.connect())
            for other in ahead:
                other.send(request)
            connection.send(request, request[:-10])
            statuses = [(await connection.answer()).status]
            connection.send(request[-10:])
            return [*statuses, (await connection.answer()).status]

    assert scenario(client, play, direct=direct) == [200, 200]


@BOTH_WAYS
def test_a_full_server_says_so_before_the_body_and_keeps_the_connection(
    make_client: MakeClient, spec: PolicySpec, direct: bool
) -> None:
    client = make_client(max_waiting=1)
    request = post(body_of(spec))
    head, _, body = request.partition(b"\r\n\r\n")

    async def play(server: Server) -> tuple[Answer, int]:
        async with server.connect() as connection:
            connection.send(head, b"\r\n\r\n")
            answer = asyncio.ensure_future(connection.answer())
            while not answer.done():  # somebody else's is always there first
                with suppress(Overloaded):
                    submitted(client.engine.batcher, single(spec))
                await asyncio.sleep(0)
            while len(client.engine.batcher):
                await asyncio.sleep(0)
            connection.send(body, request)
            return answer.result(), (await connection.answer()).status

    refused, status = scenario(client, play, direct=direct)
    assert (refused.status, error_type(refused)) == (429, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert status == 200


@BOTH_WAYS
def test_a_server_that_is_not_warm_or_drains_says_so_before_the_body(
    make_client: MakeClient, spec: PolicySpec, direct: bool
) -> None:
    async def play(server: Server) -> Answer:
        async with server.connect() as connection:
            connection.send(post(body_of(spec)).partition(b"\r\n\r\n")[0], b"\r\n\r\n")
            return await connection.answer()

    cold = scenario(make_client(is_warm=False), play, direct=direct)
    assert (cold.status, error_type(cold), cold.headers["retry-after"]) == (503, "not_ready", "1")
    drained = make_client()
    drained.run(drained.engine.stop())
    answer = scenario(drained, play, direct=direct)
    assert (answer.status, error_type(answer)) == (503, "draining")


@BOTH_WAYS
@pytest.mark.parametrize("name", ["é", "🙂"])
def test_a_session_s_name_in_the_headers_may_be_any(
    client: AppClient, spec: PolicySpec, direct: bool, name: str
) -> None:
    body = body_of(spec, session_id=name, episode_start=True)

    async def play(server: Server) -> list[int]:
        async with server.connect() as connection:
            statuses = []
            for encoding in ("utf-8", "latin-1"):
                header = b"X-Session-Id: " + name.encode(encoding, errors="replace") + b"\r\nHost:"
                connection.send(post(body).replace(b"Host:", header))
                statuses.append((await connection.answer()).status)
            return statuses

    assert scenario(client, play, direct=direct) == [200, 200 if name == "é" else 400]


@pytest.mark.parametrize("target", ["/act", "/tamiyo/act", "/tamiyo/%61ct", "/tamiyo/act?x"])
@BOTH_WAYS
def test_a_proxy_s_prefix_may_be_there_or_not(
    make_client: MakeClient, spec: PolicySpec, direct: bool, target: str
) -> None:
    client = make_client(root_path="/tamiyo")

    async def play(server: Server) -> tuple[int, type[Any]]:
        async with server.connect() as connection:
            connection.send(post(body_of(spec), target=target))
            answer = await connection.answer()
            (served,) = server.connections
            return answer.status, type(served.current)

    way = DirectRequest if direct else AsgiRequest
    assert scenario(client, play, direct=direct) == (200, way)


@pytest.mark.parametrize("prefix", ["", "/tamiyo"])
def test_behind_a_proxy_s_prefix_the_documentation_finds_its_way(
    make_client: MakeClient, prefix: str
) -> None:
    client = make_client(root_path="/tamiyo")
    assert "'/tamiyo/openapi.json'" in client.get(f"{prefix}/docs").text
    document = client.get(f"{prefix}/openapi.json").json()
    assert document["servers"] == [{"url": "/tamiyo"}]
    assert client.get(f"{prefix}/healthz").status_code == 200
    assert client.get("/tamiyos/healthz").status_code == 404


def test_connections_beyond_what_there_are_descriptors_for_are_refused_with_one_warning(
    client: AppClient, spec: PolicySpec, caplog: pytest.LogCaptureFixture
) -> None:
    async def play(server: Server) -> None:
        async with server.connect() as first, server.connect() as second:
            for connection in (first, second):
                connection.send(post(body_of(spec)))
                assert (await connection.answer()).status == 200
            for _ in range(5):
                async with server.connect() as refused:
                    with suppress(ConnectionError):
                        assert await refused.is_closed()
            metrics = client.served.metrics.render().decode()
            assert "tamiyo_connections 2.0" in metrics
            first.send(post(body_of(spec)))
            assert (await first.answer()).status == 200
        while len(server.connections):
            await asyncio.sleep(0)
        async with server.connect() as again:
            again.send(post(body_of(spec)))
            assert (await again.answer()).status == 200

    with caplog.at_level(logging.WARNING, "service"):
        scenario(client, play, limit=2)
    assert len([record for record in caplog.records if "file descriptors" in record.message]) == 1
    assert count_of(client, "tamiyo_connections_refused_total") == 5
    assert count_of(client, "tamiyo_connections_limit") == 2


def test_requests_that_cannot_be_read_are_counted_by_what_was_wrong(client: AppClient) -> None:
    async def play(server: Server) -> None:
        for request in (b"rubbish\r\n\r\n", LARGE["a line"], LARGE["a line"]):
            async with server.connect() as connection:
                connection.send(request)
                await connection.answer()

    scenario(client, play)
    assert count_of(client, 'tamiyo_unread_requests_total{result="malformed"}') == 1
    assert count_of(client, 'tamiyo_unread_requests_total{result="headers_too_large"}') == 2
