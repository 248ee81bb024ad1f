"""The load generator's connection, against a server that does as it is told."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest

from service.bench.connection import Connection, Response
from tests.service.fakes import run

BODY = b"{}"


class Reaction(NamedTuple):
    """What the server sends for a request, and whether it hangs up then."""

    content: bytes
    hangs_up: bool = False


OK = Reaction(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")


def with_server(
    reactions: list[Reaction], play: Callable[[Connection], Awaitable[Any]]
) -> tuple[Any, list[int]]:
    """What `play` returns, and how many requests each connection brought."""
    left, requests = list(reactions), []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(0)
        hangs_up = False
        while left and not hangs_up:
            try:
                await reader.readuntil(b"\r\n\r\n" + BODY)
            except asyncio.IncompleteReadError:
                break
            requests[-1] += 1
            content, hangs_up = left.pop(0)
            writer.write(content)
        writer.close()

    async def scenario() -> Any:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        connection = Connection(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/act")
        try:
            return await play(connection)
        finally:
            connection.close()
            server.close()

    return run(scenario()), requests


async def post_twice(connection: Connection) -> list[Response]:
    return [await connection.post(BODY) for _ in range(2)]


def test_requests_share_a_connection() -> None:
    answers, requests = with_server([OK, OK], post_twice)
    assert answers == [Response(200, b"{}", 0.0)] * 2
    assert requests == [2]


def test_a_server_that_closes_after_its_answer_is_connected_to_anew() -> None:
    last = Reaction(OK.content.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"), hangs_up=True)
    answers, requests = with_server([last, OK], post_twice)
    assert [answer.status for answer in answers] == [200, 200]
    assert requests == [1, 1]


def test_how_long_a_server_asks_to_wait_is_kept() -> None:
    refused = Reaction(b"HTTP/1.1 429 Too Many\r\nretry-after: 3\r\nContent-Length: 0\r\n\r\n")
    answers, _ = with_server([refused, OK], post_twice)
    assert [answer.retry_after_s for answer in answers] == [3.0, 0.0]


@pytest.mark.parametrize("content", [b"", b"no HTTP\r\n\r\n", OK.content[:30], OK.content[:-1]])
def test_no_answer_is_an_os_error_and_the_next_request_connects_anew(content: bytes) -> None:
    async def play(connection: Connection) -> Response:
        with pytest.raises(OSError, match=r"closed before|not HTTP"):
            await connection.post(BODY)
        return await connection.post(BODY)

    answer, requests = with_server([Reaction(content, hangs_up=True), OK], play)
    assert answer.status == 200
    assert requests == [1, 1]
