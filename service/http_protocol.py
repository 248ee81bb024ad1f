"""Uvicorn's HTTP/1.1, with a shorter way for `POST /act`.

A complete request goes from the parser straight to the policy, and its answer in one write to the
socket: no task, no ASGI scope, no messages. That is a third of what a request costs.

Only the plainest requests take it. HTTP/1.0, `Expect`, `Upgrade`, a query, pipelining and a client
that does not read its answers go uvicorn's way to `service.endpoint`, as does every other route;
both ways check, answer and count through the same `Exchange`.
"""

import asyncio
from http import HTTPStatus
from typing import Self

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.act import CONTENT_TYPE
from service.endpoint import PATH, ActEndpoint
from service.errors import Disconnected, Draining, ServiceError
from service.exchange import Exchange, Headers

RAW_PATH = PATH.encode()
STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
LAST_WORDS_S = 0.5
CONTENT_HEADERS = f"content-type: {CONTENT_TYPE}\r\ncontent-length: %d\r\n".encode()


class ActProtocol(HttpToolsProtocol):
    """One connection. `serving(endpoint)` is the class to give to uvicorn's `http`."""

    endpoint: ActEndpoint

    @classmethod
    def serving(cls, endpoint: ActEndpoint) -> type[Self]:
        return type("ActProtocol", (cls,), {"endpoint": endpoint})

    def on_headers_complete(self) -> None:
        if not self._is_plain_act():
            super().on_headers_complete()
            return
        exchange = DirectExchange(self)
        self.cycle = exchange  # type: ignore[assignment]  # in what the base class asks of one
        try:
            self.endpoint.check_headers(self.headers)
            self.endpoint.service.check_open()
        except ServiceError as error:
            exchange.refuse(error)

    def _is_plain_act(self) -> bool:
        parser = self.parser
        return (
            self.url == RAW_PATH
            and parser.get_method() == b"POST"
            and not self.expect_100_continue
            and not parser.should_upgrade()
            and parser.get_http_version() == "1.1"
            and (self.cycle is None or self.cycle.response_complete)
            and not self.flow.write_paused
        )

    def on_body(self, body: bytes) -> None:
        exchange = self.cycle
        if not isinstance(exchange, DirectExchange):
            super().on_body(body)
        elif exchange.more_body and not exchange.response_complete:
            exchange.body += body
            try:
                self.endpoint.check_length(len(exchange.body))
            except ServiceError as error:
                exchange.refuse(error)

    def on_message_complete(self) -> None:
        exchange = self.cycle
        if not isinstance(exchange, DirectExchange):
            super().on_message_complete()
        elif exchange.more_body and not exchange.response_complete:
            exchange.more_body = False
            self.endpoint.service.act(exchange.body, exchange)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if isinstance(self.cycle, DirectExchange):
            # They hold each other; without this a closed connection waits for a collection.
            self.cycle = None  # type: ignore[assignment]

    def shutdown(self) -> None:
        super().shutdown()
        if isinstance(self.cycle, DirectExchange):
            # Its body may still arrive, or never: it is told before uvicorn's patience ends.
            patience_s = (self.config.timeout_graceful_shutdown or 0) - LAST_WORDS_S
            self.loop.call_later(max(0.0, patience_s), self.cycle.give_up)


class DirectExchange(Exchange):
    """One request on the short way; stands where uvicorn keeps the request of a connection."""

    __slots__ = (
        "_protocol",
        "_transport",
        "body",
        "disconnected",
        "keep_alive",
        "more_body",
        "response_complete",
    )
    message_event = asyncio.Event()
    """Uvicorn sets it where a request's task might wait; here is none."""

    def __init__(self, protocol: ActProtocol) -> None:
        super().__init__(protocol.endpoint.service.metrics)
        self._protocol = protocol
        self._transport = protocol.transport
        self.body = bytearray()  # a body in a thousand pieces is not copied a thousand times
        self.more_body = True
        self.keep_alive = protocol.parser.should_keep_alive()
        self.response_complete = False
        self.disconnected = False

    def is_wanted(self) -> bool:
        return not self._transport.is_closing()

    def give_up(self) -> None:
        """Refuses a request of which not all has come."""
        if self.more_body and not self.response_complete:
            self.refuse(Draining("the server is shutting down"))

    def respond(self, status: int, headers: Headers, content: bytes) -> None:
        if status == Disconnected.status_code or self._transport.is_closing():
            return
        self.response_complete = True
        if not self.keep_alive:
            headers.append((b"connection", b"close"))
        headers += self._protocol.server_state.default_headers
        lines = [b"%b: %b\r\n" % header for header in headers]
        self._transport.write(
            b"".join(
                (STATUS_LINES[status], CONTENT_HEADERS % len(content), *lines, b"\r\n", content)
            )
        )
        if not self.keep_alive:
            self._transport.close()
        self._protocol.on_response_complete()
