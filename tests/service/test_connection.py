"""Connections on real sockets; `POST /act` by both its ways, which must answer alike."""

import asyncio
import gc
import json
import socket
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
import uvicorn
from uvicorn.server import ServerState

from model.spec import PolicySpec
from service.connections import Connections
from service.incoming import AsgiRequest, DirectRequest
from tests.service.conftest import MakeClient
from tests.service.fakes import AppClient, SummingRuntime

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


@asynccontextmanager
async def serving(
    client: AppClient, *, direct: bool = True, limit: int | None = None
) -> AsyncIterator[Server]:
    connections = Connections(client.app.act_endpoint, limit=limit)
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
        "an upgrade to HTTP/2": post(good, "Connection: Upgrade", "Upgrade: h2c"),
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
        "no body asked for": b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n",
        "a length that is none": post(good).replace(b"Length: ", b"Length: x"),
        "two lengths": post(good, "Content-Length: 7"),
        "a length and chunks": post(good, "Transfer-Encoding: chunked"),
        "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    }


REFUSED_BY_THE_PARSER = {
    "an upgrade",
    "an upgrade to HTTP/2",
    "a length that is none",
    "two lengths",
    "a length and chunks",
    "no HTTP",
}
"""Of these in pieces, the later ones would meet a closed connection."""


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
            if answer.headers.get("connection") == "close" or name == "of HTTP/1.0":
                return answer, await connection.is_closed()
            connection.send(post(body_of(spec)))  # what is left of the first one harms nobody
            return answer, (await connection.answer()).status == 200

    direct, other = (scenario(client, play, direct=direct) for direct in (True, False))
    assert direct == other
    assert direct[1]


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
            await client.service.stop()  # once everything that waits has been answered

    scenario(client, play)
    assert client.service.sessions.find("a") is None
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


def test_a_client_that_reads_nothing_is_not_written_to_without_end(
    client: AppClient, spec: PolicySpec
) -> None:
    """Its answers stay in the socket and in uvicorn's flow control, not in ever more memory."""
    request = post(b'{"observation": [1], "' + b"x" * 2000 + b'": 0}')

    async def play(server: Server) -> None:
        async with server.connect() as connection:
            connection.send(request)
            await connection.answer()
            (served,) = server.connections
            served.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
            )
            connection.stop_reading()
            while not served.flow.read_paused:
                connection.send(request)
                await asyncio.sleep(0)
            assert served.transport.get_write_buffer_size() < 1_000_000

    scenario(client, play)


def test_a_closed_connection_is_freed_without_a_garbage_collection(
    client: AppClient, spec: PolicySpec
) -> None:
    async def play(server: Server) -> list[object]:
        seen = []
        for _ in range(3):
            async with server.connect() as connection:
                connection.send(post(body_of(spec)))
                await connection.answer()
                seen += [weakref.ref(served) for served in server.connections]
            while len(server.connections):
                await asyncio.sleep(0)
        for _ in range(3):  # what the loop itself still holds
            await asyncio.sleep(0)
        return [served() for served in seen]

    gc.collect()
    gc.disable()
    try:
        assert scenario(client, play) == [None, None, None]
    finally:
        gc.enable()


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
