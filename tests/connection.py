"""A raw socket to a server, that can stop in the middle of what it sends or receives."""

import asyncio
from typing import NamedTuple


class Answer(NamedTuple):
    status: int
    content: bytes
    is_replay: bool


class Connection:
    """Speaks just enough HTTP to post to /act; connects when there is something to send."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, content_type: str, content: bytes, share: float = 1.0) -> None:
        """Sends the request, or the first `share` of its bytes."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(*self._address)
        head = (
            f"POST /act HTTP/1.1\r\nHost: test\r\nContent-Type: {content_type}\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        request = head.encode() + content
        self._writer.write(request[: int(share * len(request))])
        await self._writer.drain()

    async def receive(self) -> Answer:
        head = await self._reader.readuntil(b"\r\n\r\n")
        status_line, *lines = head.decode().strip().split("\r\n")
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
        }
        content = await self._reader.readexactly(int(headers["content-length"]))
        is_replay = headers.get("replayed") == "true"
        return Answer(int(status_line.split()[1]), content, is_replay)

    async def begin_to_receive(self) -> None:
        await self._reader.readexactly(12)  # HTTP/1.1 200

    def cut(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None
