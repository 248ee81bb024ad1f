"""How bytes travel: httpcore's connection pools, with threads and with asyncio.

httpcore is what httpx sends with, in both worlds, and by itself takes half of what httpx does
(docs/client.md has the figures).
"""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import Any

import httpcore

from tamiyo_client.exchange import Broken, Call, Reply, Result, Send, Wait

FAILURES = (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError)
HEADERS = {"User-Agent": "tamiyo-client"}


class Transport:
    """Runs calls on the caller's thread, over one connection that is kept open."""

    def __init__(self, ssl_context: ssl.SSLContext | None) -> None:
        self._pool = httpcore.ConnectionPool(ssl_context=ssl_context, max_connections=1)

    def run(self, call: Call[Result]) -> Result:
        """The call's result. Raises what the call does."""
        outcome: Reply | Broken | None = None
        while True:
            try:
                effect = call.send(outcome)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            if isinstance(effect, Wait):
                time.sleep(effect.seconds)
                outcome = None
            else:
                outcome = self._send(effect)

    def _send(self, send: Send) -> Reply | Broken:
        try:
            return _reply(self._pool.request(**_arguments(send)))
        except FAILURES as failure:
            return Broken(failure)

    def close(self) -> None:
        """Closes the connection."""
        self._pool.close()


class AsyncTransport:
    """Runs calls on the running event loop, over one connection that is kept open."""

    def __init__(self, ssl_context: ssl.SSLContext | None) -> None:
        self._pool = httpcore.AsyncConnectionPool(ssl_context=ssl_context, max_connections=1)

    async def run(self, call: Call[Result]) -> Result:
        """The call's result. Raises what the call does."""
        outcome: Reply | Broken | None = None
        while True:
            try:
                effect = call.send(outcome)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            if isinstance(effect, Wait):
                await asyncio.sleep(effect.seconds)
                outcome = None
            else:
                outcome = await self._send(effect)

    async def _send(self, send: Send) -> Reply | Broken:
        try:
            return _reply(await self._pool.request(**_arguments(send)))
        except FAILURES as failure:
            return Broken(failure)

    async def close(self) -> None:
        """Closes the connection."""
        await self._pool.aclose()


def _arguments(send: Send) -> dict[str, Any]:
    return {
        "method": send.method,
        "url": send.url,
        "headers": {**HEADERS, **send.headers},
        "content": send.body,
        "extensions": {
            "timeout": dict.fromkeys(("connect", "read", "write", "pool"), send.timeout_s)
        },
    }


def _reply(response: httpcore.Response) -> Reply:
    headers = {name.decode().lower(): value.decode("latin-1") for name, value in response.headers}
    return Reply(response.status, headers, response.content)
