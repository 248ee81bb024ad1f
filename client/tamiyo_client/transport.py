"""How bytes travel: httpcore's connection pools, with threads and with asyncio.

httpcore is what httpx sends with, in both worlds, and by itself takes half of what httpx does
(docs/client.md has the figures).
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import httpcore

from tamiyo_client.exchange import Broken, Call, Reply, Result, Send, Wait

FAILURES = (httpcore.NetworkError, httpcore.TimeoutException, httpcore.RemoteProtocolError)
HEADERS = {"User-Agent": "tamiyo-client"}
CLOSE_S = 1.0
SLICE_BYTES = 262_144
"""Written at once: a slow reader is given the time that is left for each."""


class _OfOneProcess:
    """A forked process has its parent's socket and session, and would step both for it."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def is_ours(self) -> bool:
        """Whether this is the process that it was made in."""
        return os.getpid() == self._pid

    def _check_process(self) -> None:
        if not self.is_ours():
            raise RuntimeError("this client is of the process that made it; make one in this one")


class Transport(_OfOneProcess):
    """Runs calls on the caller's thread, over one connection that is kept open."""

    def __init__(self, ssl_context: ssl.SSLContext | None) -> None:
        super().__init__()
        self._ssl_context = ssl_context
        self._ends_s = 0.0
        self._pool = self._new_pool()

    def _new_pool(self) -> httpcore.ConnectionPool:
        backend = _Bounded(httpcore.SyncBackend(), lambda: self._ends_s - time.monotonic())
        return httpcore.ConnectionPool(
            ssl_context=self._ssl_context, max_connections=1, network_backend=backend
        )

    def run(self, call: Call[Result]) -> Result:
        """The call's result. Raises what the call does, and RuntimeError in a forked process."""
        self._check_process()
        outcome: Reply | Broken | None = None
        while True:
            try:
                effect = call.send(outcome)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]  # a generator's has no other type
            if isinstance(effect, Wait):
                time.sleep(effect.seconds)
                outcome = None
            else:
                outcome = self._send(effect)

    def _send(self, send: Send) -> Reply | Broken:
        self._ends_s = time.monotonic() + send.timeout_s
        try:
            return _reply(self._pool.request(**_arguments(send)))
        except FAILURES as failure:
            return Broken(failure)
        except BaseException:  # of an interrupted request nobody knows what it left behind
            self._pool = self._new_pool()
            raise

    def close(self) -> None:
        """Closes the connection."""
        self._pool.close()


class AsyncTransport(_OfOneProcess):
    """Runs calls on the running event loop, over one connection that is kept open."""

    def __init__(self, ssl_context: ssl.SSLContext | None) -> None:
        super().__init__()
        self._ssl_context = ssl_context
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pool = self._new_pool()

    def _new_pool(self) -> httpcore.AsyncConnectionPool:
        return httpcore.AsyncConnectionPool(ssl_context=self._ssl_context, max_connections=1)

    async def run(self, call: Call[Result]) -> Result:
        """The call's result. Raises what the call does, and RuntimeError in a forked process."""
        self._check_process()
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # a connection is of the loop it was made on
            self._loop, self._pool = loop, self._new_pool()
        outcome: Reply | Broken | None = None
        while True:
            try:
                effect = call.send(outcome)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]  # as above
            if isinstance(effect, Wait):
                await asyncio.sleep(effect.seconds)
                outcome = None
            else:
                outcome = await self._send(effect)

    async def _send(self, send: Send) -> Reply | Broken:
        try:
            request = self._pool.request(**_arguments(send))
            return _reply(await asyncio.wait_for(request, send.timeout_s))
        except FAILURES as failure:
            return Broken(failure)
        except asyncio.TimeoutError as failure:
            await self._begin_anew()
            return Broken(failure)
        except BaseException:  # of a cancelled request nobody knows what it left behind
            await self._begin_anew()
            raise

    async def _begin_anew(self) -> None:
        pool, self._pool = self._pool, self._new_pool()
        with suppress(Exception):  # whatever ails it: it is left behind
            await asyncio.wait_for(pool.aclose(), CLOSE_S)

    async def close(self) -> None:
        """Closes the connection."""
        await self._pool.aclose()


class _Bounded(httpcore.NetworkBackend):
    """Connections whose every operation ends when the request's time does, not each in its own."""

    def __init__(self, backend: httpcore.NetworkBackend, left_s: Callable[[], float]) -> None:
        self._backend = backend
        self._left_s = left_s

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        share_s = self._left_s() / max(1, len(addresses))  # each of them may take that long
        if share_s <= 0:
            raise httpcore.ConnectTimeout(f"no time is left to connect to {host}")
        stream = self._backend.connect_tcp(host, port, share_s, local_address, socket_options)
        return _BoundedStream(stream, self._left_s)


class _BoundedStream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, left_s: Callable[[], float]) -> None:
        self._stream = stream
        self._left_s = left_s

    def _time_left_s(self) -> float:
        left_s = self._left_s()
        if left_s <= 0:
            raise httpcore.ReadTimeout("the time allowed has passed")
        return left_s

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._time_left_s())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for at in range(0, len(buffer), SLICE_BYTES):
            self._stream.write(buffer[at : at + SLICE_BYTES], self._time_left_s())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._time_left_s())
        return _BoundedStream(stream, self._left_s)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


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
    headers = {
        name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers
    }
    return Reply(response.status, headers, response.content)
