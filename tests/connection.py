"""A raw socket to a server, that can stop in the middle of what it sends or receives."""

import asyncio
from collections.abc import Mapping
from typing import NamedTuple

Address = tuple[str, int]


class Message(NamedTuple):
    """A request for a step, as its form has it."""

    content: bytes
    headers: Mapping[str, str]
    path: str = "/act"


class Answer(NamedTuple):
    status: int
    content: bytes
    headers: Mapping[str, str]

    @property
    def is_replay(self) -> bool:
        return self.headers.get("replayed") == "true"


class Connection:
    """Speaks just enough HTTP to post; connects when there is something to send."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, message: Message, share: float = 1.0) -> None:
        """Sends the request, or the first `share` of its bytes."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(*self._address)
        content, headers, path = message
        headers = {"Host": "test", **headers, "Content-Length": str(len(content))}
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        request = f"POST {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode() + content
        self._writer.write(request[: int(share * len(request))])
        await self._writer.drain()

    async def receive(self) -> Answer:
        head = await self._reader.readuntil(b"\r\n\r\n")
        status_line, *lines = head.decode().strip().split("\r\n")
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
        }
        content = await self._reader.readexactly(int(headers["content-length"]))
        return Answer(int(status_line.split()[1]), content, headers)

    async def begin_to_receive(self) -> None:
        await self._reader.readexactly(12)  # HTTP/1.1 200

    def cut(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None
