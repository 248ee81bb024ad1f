"""`POST /act` as bare ASGI, ahead of FastAPI's routing: for any server and any test client.

The route of the same name in `service.http.app` is its documentation; `service.http.schemas` is
what both validate and show. `python -m service` has a shorter way: `service.http.connection`.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any

from starlette.types import Receive, Scope, Send

from service.errors import Disconnected, ServiceError
from service.http.act import Act, Exchange, Headers
from service.http.body import read_body
from service.http.codec import JSON
from service.metrics import Metrics

PATH = "/act"
Response = tuple[int, Headers, bytes]


class ActEndpoint:
    """An ASGI application of one route."""

    def __init__(self, act: Act, metrics: Metrics) -> None:
        self._act = act
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = AsgiExchange(self._metrics, receive)
        read = self._read(exchange, scope["headers"], receive)
        status, headers, content = await exchange.answered(self._act, read)
        if status == Disconnected.status_code:
            return  # nobody reads it
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _read(self, exchange: Exchange, headers: Headers, receive: Receive) -> bytearray:
        self._act.open(exchange, headers)
        return await read_body(receive, exchange.reads.max_body_bytes)


class AsgiExchange(Exchange):
    """One whose response a coroutine waits for."""

    __slots__ = ("_cycle", "_response")

    def __init__(self, metrics: Metrics, receive: Receive) -> None:
        super().__init__(metrics)
        self._response: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        # ASGI has no question for whether the client still waits: `receive` would have to be
        # awaited in a task beside each request. Uvicorn knows; under another server it always does.
        self._cycle: Any = getattr(receive, "__self__", None)

    async def answered(self, act: Act, read: Awaitable[bytes | bytearray]) -> Response:
        """To the body that `read` gives, once that has let the request in; or to what it raises."""
        try:
            body = await read
        except ServiceError as error:
            self.refuse(error)
        except Exception:
            self.fail()
        else:
            act.run(body, self)
        return await self._response

    def is_wanted(self) -> bool:
        return not (self._response.done() or getattr(self._cycle, "disconnected", False))

    def respond(
        self, status: int, headers: Headers, content: bytes, content_type: str = JSON
    ) -> None:
        if self._response.done():  # by being cancelled
            return
        headers += (
            (b"content-type", content_type.encode()),
            (b"content-length", str(len(content)).encode()),
        )
        self._response.set_result((status, headers, content))
