"""`POST /act` as bare ASGI, ahead of FastAPI's routing: for any server and any test client.

The route of the same name in `service.http.app` is its documentation; `service.http.schemas` is
what both validate and show. `python -m service` has a shorter way: `service.http.connection`.
"""

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send

from service.errors import (
    Disconnected,
    Malformed,
    ServiceError,
    TooLarge,
    UnsupportedContentType,
)
from service.http.act import CONTENT_TYPE
from service.http.exchange import Exchange, Headers
from service.policy_service import PolicyService

PATH = "/act"
LONGEST_LENGTH = 18  # digits; as many as an int may have is a way to hold the loop
Response = tuple[int, Headers, bytes]


class ActEndpoint:
    """An ASGI application of one route."""

    def __init__(self, service: PolicyService) -> None:
        self.service = service
        self.max_body_bytes = service.settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        exchange = _AsgiExchange(self.service, receive, response)
        try:
            self.open(exchange, scope["headers"])
            body = await self._read_body(receive)
        except ServiceError as error:
            exchange.refuse(error)
        except Exception:
            exchange.fail()
        else:
            self.service.act(body, exchange)
        status, headers, content = await response
        if status == Disconnected.status_code:
            return  # nobody reads it
        headers += (
            (b"content-type", CONTENT_TYPE.encode()),
            (b"content-length", str(len(content)).encode()),
        )
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def open(self, exchange: Exchange, headers: Headers) -> None:
        """Raises why a request with these headers, names in lower case, need not be read."""
        content_type = content_length = None
        for name, value in headers:
            if name == b"content-type":
                content_type = value
            elif name == b"content-length":
                content_length = value
            elif name == b"x-session-id":
                if exchange.session_header not in (None, value):
                    raise Malformed("`X-Session-Id` is given twice, with two names")
                exchange.session_header = value
            elif name in (b"content-encoding", b"transfer-encoding"):
                _check_encoding(name, value)
            elif name == b"expect":
                exchange.expects_continue = value.lower() == b"100-continue"
        if content_type != b"application/json":
            _check_content_type(content_type)
        if content_length is not None:
            self._check_announced(content_length)
        self.service.check_open()

    def check_length(self, num_bytes: int) -> None:
        """Raises TooLarge for a body, or the part of one, that is more than anybody needs."""
        if num_bytes > self.max_body_bytes:
            raise TooLarge(f"the body is larger than {self.max_body_bytes} bytes")

    def _check_announced(self, length: bytes) -> None:
        if not length.isdigit():
            raise Malformed("the Content-Length is not a number")
        self.check_length(int(length[: LONGEST_LENGTH + 1]))

    async def _read_body(self, receive: Receive) -> bytearray:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected("the client hung up")
            body += message.get("body", b"")
            self.check_length(len(body))
            if not message.get("more_body", False):
                return body


class _AsgiExchange(Exchange):
    __slots__ = ("_cycle", "_response")

    def __init__(
        self, service: PolicyService, receive: Receive, response: "asyncio.Future[Response]"
    ) -> None:
        super().__init__(service.metrics)
        self._response = response
        # ASGI has no question for whether the client still waits: `receive` would have to be
        # awaited in a task beside each request. Uvicorn knows; under another server it always does.
        self._cycle: Any = getattr(receive, "__self__", None)

    def is_wanted(self) -> bool:
        return not (self._response.done() or getattr(self._cycle, "disconnected", False))

    def respond(self, status: int, headers: Headers, content: bytes) -> None:
        if not self._response.done():  # by being cancelled
            self._response.set_result((status, headers, content))


def _check_content_type(given: bytes | None) -> None:
    if given is None:
        raise UnsupportedContentType(f"there is no Content-Type; send {CONTENT_TYPE}")
    content_type = given.decode("latin-1").partition(";")[0].strip().lower()
    if content_type != CONTENT_TYPE:
        raise UnsupportedContentType(f"the content type is {content_type!r}; send {CONTENT_TYPE}")


def _check_encoding(header: bytes, given: bytes) -> None:
    plain = "chunked" if header == b"transfer-encoding" else "identity"
    encodings = [token.strip().lower() for token in given.decode("latin-1").split(",")]
    for encoding in encodings:
        if encoding not in ("", plain):
            name = "-".join(word.capitalize() for word in header.decode().split("-"))
            raise UnsupportedContentType(f"the {name} is {encoding[:80]!r}; send the body as it is")
