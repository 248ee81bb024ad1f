"""One HTTP/1.1 connection, from its first byte to its end.

What is read, what is still to be answered, until when: all of it stands here. The parser is
httptools'. `POST /act` goes from it straight to the policy, which is a third less than what a
request costs by way of ASGI; every other request goes uvicorn's way to FastAPI.
"""

import asyncio
import logging
from collections import deque
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import httptools
from pydantic_core import to_json
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from service.errors import (
    Draining,
    HeadersTooLarge,
    Malformed,
    RequestTimeout,
    ServiceError,
)
from service.http.act import Headers
from service.http.codec import JSON, SAFETENSORS
from service.http.incoming import AsgiRequest, DirectRequest

if TYPE_CHECKING:
    from service.http.connections import Connections

logger = logging.getLogger(__name__)

LARGEST_HEAD = 65536
"""Bytes of a request line and headers, of trailers, or of what stands between pieces of a body."""
LINGER_S = 5.0
LINGER_BYTES = 64 * 1024 * 1024
"""A connection closed with input unread is reset, and its client may lose the answer by that: so
much is read, unheeded, of what a client still sends after its last answer."""
NEVER = float("inf")

STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
CONTENT_HEADERS = {
    name: f"content-type: {name}\r\ncontent-length: %d\r\n".encode() for name in (JSON, SAFETENSORS)
}
OF_UPGRADES = (b"upgrade", b"http2-settings")


def lines(headers: Headers) -> bytes:
    """As they stand in a response."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


class Connection(asyncio.Protocol):
    """Reads requests, has each answered in its turn, and ends.

    `deadline_s`, on the loop's clock, is the end of its patience with a client that sends nothing,
    sends a request too slowly or does not read its answers. `Connections` watches it.
    """

    def __init__(
        self,
        shared: "Connections",
        config: Config,
        server: ServerState,
        app_state: dict[str, Any],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.shared = shared
        self.config = config
        self.server = server
        self.app_state = app_state
        self.loop = loop
        self.deadline_s = NEVER
        self.current: DirectRequest | AsgiRequest | None = None
        """The request whose turn it is, or that was the last one."""
        self.headers: Headers = []
        self._url = b""
        self._parser = httptools.HttpRequestParser(self)
        self._pipeline: deque[DirectRequest | AsgiRequest] = deque()  # behind the current one
        self._last_words: ServiceError | None = None  # once the current one is answered
        self._is_reading = False  # a request, of which not all has come
        self._incoming: DirectRequest | AsgiRequest | None = None  # that request, once its head has
        self._is_upgrade = False
        self._overhead = 0  # bytes since the request's first, its head's last, or one of its body
        self._discarded = 0  # bytes of a request that was answered before it was whole
        self._is_lingering = False
        self._is_draining = False

    # The transport's side

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.flow = FlowControl(transport)
        self.deadline_s = self.loop.time() + self.shared.keep_alive_s
        self.server.connections.add(self)  # type: ignore[arg-type]
        self.shared.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self)
        self.shared.closed(self)
        for request in (self.current, *self._pipeline):
            if request is not None and not request.response_complete:
                request.hang_up()
        self.flow.resume_writing()
        # They hold each other; without this a closed connection waits for a garbage collection.
        del self._parser
        self.current = self._incoming = None
        self._pipeline.clear()

    def eof_received(self) -> None:
        """The client is gone, or waits and sends no more: these look alike. The transport closes.

        What is answered in the turn of the loop in which it was read still reaches it.
        """
        if self.current is not None and not self.current.response_complete:
            self.current.hang_up()

    def pause_writing(self) -> None:
        self.flow.pause_writing()
        self.flow.pause_reading()  # no more requests of a client that does not read its answers
        self.deadline_s = self.loop.time() + self.shared.read_timeout_s

    def resume_writing(self) -> None:
        self.flow.resume_writing()
        if self._is_lingering or self.transport.is_closing():
            return
        if self.current is not None and not self.current.response_complete:
            self.deadline_s = NEVER
        else:
            self._rest()
        self._read_on()

    def data_received(self, data: bytes) -> None:
        if len(data) <= LARGEST_HEAD:
            self._read(data)
        else:
            for at in range(0, len(data), LARGEST_HEAD):
                self._read(data[at : at + LARGEST_HEAD])

    def _read(self, data: bytes) -> None:
        if self._is_lingering:
            self._discard(len(data))
            return
        if self._last_words is not None or self.transport.is_closing():
            return
        self._overhead += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError:
            logger.exception("a request could not be read")
            self._refuse(ServiceError("internal error"))
        except httptools.HttpParserError:
            self._refuse(Malformed("this is not an HTTP/1.1 request"))
        else:
            if not self._is_reading:
                self._overhead = 0
            elif self._overhead >= LARGEST_HEAD:
                self._refuse(HeadersTooLarge(f"the headers exceed {LARGEST_HEAD} bytes"))

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Reads the request as if it had not offered another protocol (RFC 9110, 7.8).

        Java's HttpClient offers `h2c` unasked. The parser takes what follows the head for the other
        protocol, and cannot be told otherwise: a new one reads the head again, without the offer.
        """
        self._is_upgrade = False
        method, version = self._parser.get_method(), self._parser.get_http_version()
        if method == b"CONNECT":
            self._refuse(Malformed("this is not a proxy, to CONNECT to somewhere"))
            return
        lines = [b"%b %b HTTP/%b\r\n" % (method, self._url, version.encode())]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in tokens if token.lower() not in OF_UPGRADES)
            if name not in OF_UPGRADES:
                lines.append(b"%b: %b\r\n" % (name, value))
        self._parser = httptools.HttpRequestParser(self)
        self._read(b"".join((*lines, b"\r\n")))
        self._read(rest)

    # The parser's side

    def on_message_begin(self) -> None:
        self._url = b""
        self.headers = []
        self._is_reading = True
        if not self._is_lingering:
            self.deadline_s = self.loop.time() + self.shared.read_timeout_s

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._incoming is None:  # and this is no trailer
            self.headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        self._overhead = 0
        if self._parser.should_upgrade():
            self._is_upgrade = True
        elif not (self._is_lingering or self._last_words):
            request = self._incoming = self._request()
            if request is None:
                self._refuse(Malformed("the request's target is neither a path nor a URL"))
            elif self.current is None or self.current.response_complete:
                self._start(request)
            else:
                self._pipeline.append(request)
                self.flow.pause_reading()

    def _request(self) -> DirectRequest | AsgiRequest | None:
        parser, act_targets = self._parser, self.shared.act_targets
        method, version = parser.get_method(), parser.get_http_version()
        keep_alive = parser.should_keep_alive() and version != "1.0" and not self._is_draining
        if self._url in act_targets and method == b"POST":
            return DirectRequest(self, self.headers, keep_alive=keep_alive, version=version)
        try:
            url = httptools.parse_url(self._url)
        except httptools.HttpParserInvalidURLError:
            return None
        raw_path = url.path or b"/"  # as a URL may leave it out (RFC 9112, 3.2.2)
        path = unquote(raw_path.decode("ascii"))
        if path.encode() in act_targets and method == b"POST":
            return DirectRequest(self, self.headers, keep_alive=keep_alive, version=version)
        target: dict[str, str | bytes] = {
            "path": path,
            "raw_path": raw_path,
            "query_string": url.query or b"",
        }
        return AsgiRequest(self, method.decode(), target, version, keep_alive=keep_alive)

    def on_body(self, body: bytes) -> None:
        self._overhead = 0
        request = self._incoming
        if request is None or request.response_complete:
            self._discard(len(body))
        else:
            request.feed(body)

    def on_message_complete(self) -> None:
        if self._is_upgrade:
            return
        self._is_reading = False
        self._overhead = 0
        request, self._incoming = self._incoming, None
        if request is None:
            return
        request.more_body = False
        if self._is_lingering:
            self._close()
        elif request.response_complete:
            self._rest()
        else:
            if not self.flow.write_paused:
                self.deadline_s = NEVER
            request.finish()

    # Turns

    def _start(self, request: DirectRequest | AsgiRequest) -> None:
        self.current = request
        request.start()

    def _start_next(self) -> None:
        if self._pipeline and not (self._is_lingering or self.transport.is_closing()):
            request = self._pipeline.popleft()
            self._read_on()
            self._start(request)

    def on_response_complete(self) -> None:
        """The current request is answered."""
        if self.transport.is_closing():
            return
        assert self.current is not None
        if not self.current.keep_alive:
            self.end()
        elif self._pipeline:
            # Not at once: a thousand requests in one packet would be calls a thousand deep.
            self.loop.call_soon(self._start_next)
        elif self._last_words is not None:
            self.write_refusal(self._last_words)
        else:
            self._read_on()  # a large body's end may have come in a piece too many
            if not self._is_reading:
                self._rest()

    def _rest(self) -> None:
        """Between requests."""
        self._discarded = 0
        self.deadline_s = self.loop.time() + self.shared.keep_alive_s
        if self._is_draining:
            self._close()

    def _read_on(self) -> None:
        if self.flow.read_paused and not (self._pipeline or self.flow.write_paused):
            self.flow.resume_reading()
            if self._is_reading:  # what could not be read did not come late
                self.deadline_s = self.loop.time() + self.shared.read_timeout_s

    # Answers of its own

    def write(
        self, status: int, headers: Headers, content: bytes, content_type: str = JSON
    ) -> None:
        """One whole response."""
        self.transport.write(
            b"".join(
                (
                    STATUS_LINES[status],
                    CONTENT_HEADERS[content_type] % len(content),
                    lines(headers) if headers else b"",
                    self.shared.default_lines(self.server.default_headers),
                    content,
                )
            )
        )

    def write_refusal(self, error: ServiceError) -> None:
        """The answer where there is no request to answer it, and the last one."""
        self._last_words = error
        self.shared.metrics.count_unread(error.error_type)
        self.write(error.status_code, [(b"connection", b"close")], to_json(error.body()))
        self.end()

    def _refuse(self, error: ServiceError) -> None:
        """Has what is being read answered in its turn, and nothing after it."""
        request, current = self._incoming, self.current
        if self._is_lingering or self.transport.is_closing():
            return
        if request is not None and request.response_complete:
            self.end()
        elif request is not None and request is current:
            request.keep_alive = False
            request.refuse(error)
        elif current is None or current.response_complete:
            self.write_refusal(error)
        else:
            if request is not None:
                self._pipeline.remove(request)
            self._last_words = error
            self.flow.pause_reading()

    # The end

    def shutdown(self) -> None:
        """Uvicorn's word that the server ends: what has begun to arrive may still be answered."""
        self._is_draining = True
        self.shared.drain()
        last = self._pipeline[-1] if self._pipeline else self.current
        if last is not None and not last.response_complete:
            last.keep_alive = False
        elif not self._is_reading:
            self._close()

    def give_up(self) -> None:
        """Its patience has ended, or the server's with what has not arrived yet."""
        current = self.current
        is_answering = current is not None and not current.response_complete
        if self._is_lingering or self.transport.get_write_buffer_size():
            self.transport.abort()
        elif is_answering and (current is not self._incoming or self.flow.read_paused):
            self.deadline_s = self.loop.time() + self.shared.read_timeout_s  # it waits for us
        elif not self._is_reading or (self._incoming and self._incoming.response_complete):
            self.transport.close()
        elif self._is_draining:
            self._refuse(Draining("the server is shutting down"))
        else:
            limit_s = self.shared.read_timeout_s
            self._refuse(RequestTimeout(f"the request did not all arrive within {limit_s:g} s"))
            self.transport.close()  # a client this slow sends nothing that could reset it

    def give_up_reading(self) -> None:
        if self._is_reading:
            self.give_up()

    def end(self) -> None:
        """The last answer is written: what the client still sends is read for a while, unheeded."""
        if not self._is_reading:
            self._close()
        elif not self._is_lingering:
            self._is_lingering = True
            self._discarded = 0
            self.flow.resume_reading()
            self.transport.write_eof()
            self.deadline_s = self.loop.time() + LINGER_S

    def _close(self) -> None:
        """Closes once the client has read what is written, for which it has so long."""
        self.deadline_s = self.loop.time() + self.shared.read_timeout_s
        self.transport.close()

    def _discard(self, num_bytes: int) -> None:
        self._discarded += num_bytes
        if self._is_lingering:
            if self._discarded > LINGER_BYTES:
                self.transport.abort()
        elif self._discarded > self.shared.max_discarded_bytes:
            self.end()
