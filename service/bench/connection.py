"""A keep-alive HTTP/1.1 connection that costs little, so that a load measures the server.

A general client spends several times the server's own time on a request; on the cores they share
that would be most of what is measured.
"""

import asyncio
import ssl
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import httptools


class Response(NamedTuple):
    """`retry_after_s` is 0 where the server names none."""

    status: int
    content: bytes
    retry_after_s: float


class Connection(asyncio.Protocol):
    """Posts to one URL, one request at a time; connects when there is something to send."""

    def __init__(self, url: str, content_type: str = "application/json") -> None:
        parts = urlsplit(url)
        self._is_tls = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._is_tls else 80)
        self._head = (
            f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"Content-Type: {content_type}\r\n"
        ).encode()
        self._transport: asyncio.Transport | None = None
        self._is_lost = asyncio.Event()
        self._response: asyncio.Future[Response] | None = None

    async def post(self, body: bytes, session_id: str | None = None) -> Response:
        """The answer. Raises OSError where there is none: no connection, cut off, not HTTP.

        A balancer keeps a session where it is by the name that is given for it.
        """
        loop = asyncio.get_running_loop()
        if self._transport is not None and self._transport.is_closing():
            await self._is_lost.wait()  # or its end would be taken for the next one's
        if self._transport is None:
            context = ssl.create_default_context() if self._is_tls else None
            await loop.create_connection(lambda: self, self._host, self._port, ssl=context)
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._content = b""
        self._retry_after_s = 0.0
        self._response = loop.create_future()
        named = b"" if session_id is None else b"X-Session-Id: %b\r\n" % session_id.encode()
        length = b"Content-Length: %d\r\n\r\n" % len(body)
        self._transport.write(b"%b%b%b%b" % (self._head, named, length, body))
        return await self._response

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._is_lost.clear()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"the answer is not HTTP: {error}"))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._is_lost.set()
        self._fail(error or ConnectionResetError("the connection was closed before the answer"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after" and value.isdigit():
            self._retry_after_s = float(value)

    def on_body(self, body: bytes) -> None:
        self._content += body

    def on_message_complete(self) -> None:
        if self._response is not None and not self._response.done():
            self._response.set_result(
                Response(self._parser.get_status_code(), self._content, self._retry_after_s)
            )
        if not self._parser.should_keep_alive():
            self.close()

    def _fail(self, error: Exception) -> None:
        if self._response is not None and not self._response.done():
            self._response.set_exception(error)
