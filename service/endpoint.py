"""`POST /act` as bare ASGI, ahead of FastAPI's routing: the one path that runs all the time.

The route of the same name in `service.app` is its documentation; `service.schemas` is what both
validate and show.
"""

import logging
from collections.abc import Callable
from typing import Any

from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from service.act import CONTENT_TYPE
from service.errors import (
    Disconnected,
    Malformed,
    ServiceError,
    TooLarge,
    UnsupportedContentType,
)
from service.policy_service import PolicyService

logger = logging.getLogger(__name__)

PATH = "/act"
LONGEST_LENGTH = 18  # digits; as many as an int may have is a way to hold the loop
Headers = list[tuple[bytes, bytes]]


class ActEndpoint:
    """An ASGI application of one route."""

    def __init__(self, service: PolicyService) -> None:
        self._service = service
        self._max_body_bytes = service.settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: Headers = []
        try:
            body = await self._read_body(scope["headers"], receive)
            content, is_replay = await self._service.act(body, is_wanted=_is_wanted(receive))
            status, result = 200, "ok"
            if is_replay:
                headers.append((b"replayed", b"true"))
                result = "replayed"
        except ServiceError as error:
            status, result = error.status_code, error.error_type
            headers += ((k.lower().encode(), v.encode()) for k, v in error.headers.items())
            content = to_json(error.body())
        except Exception:  # a bug of ours: the client gets a fixed text, the log the rest
            logger.exception("POST /act failed")
            unknown = ServiceError("internal error")
            status, result = unknown.status_code, unknown.error_type
            content = to_json(unknown.body())
        self._service.metrics.count(result)
        if result == Disconnected.error_type:
            return  # nobody reads it
        headers += (
            (b"content-type", CONTENT_TYPE.encode()),
            (b"content-length", str(len(content)).encode()),
        )
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes:
        content_type, length = b"", b"0"
        for name, value in headers:
            if name == b"content-type":
                content_type = value
            elif name == b"content-length":
                length = value
        if content_type != b"application/json":
            _check_content_type(content_type)
        if not length.isdigit():
            raise Malformed("the Content-Length is not a number")
        if len(length) > LONGEST_LENGTH or int(length) > self._max_body_bytes:
            raise self._too_large()
        body: bytes = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected("the client hung up")
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return body

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is larger than {self._max_body_bytes} bytes")


def _check_content_type(given: bytes) -> None:
    content_type = given.decode("latin-1").partition(";")[0].strip().lower()
    if content_type != CONTENT_TYPE:
        raise UnsupportedContentType(
            f"the content type is {content_type or 'missing'!r}; send {CONTENT_TYPE}"
        )


def _is_wanted(receive: Receive) -> Callable[[], bool] | None:
    """Whether the client still waits, as uvicorn knows it; under another server it always does.

    ASGI has no question for it: `receive` would have to be awaited in a task beside each request.
    """
    cycle: Any = getattr(receive, "__self__", None)
    if not hasattr(cycle, "disconnected"):
        return None
    return lambda: not cycle.disconnected
