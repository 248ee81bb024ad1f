"""All connections of one server: what they share, one timer for all, and how many there may be."""

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from service.http.act import Act, Headers
from service.http.connection import Connection, lines
from service.http.endpoint import PATH
from service.metrics import Metrics
from service.settings import Settings

logger = logging.getLogger(__name__)

LAST_WORDS_S = 0.5
"""Before uvicorn's patience ends, what has not arrived is told so."""
WARNS_EVERY_S = 60.0


class Connections:
    """`accept` is what uvicorn takes for `http`. Beyond `limit` connections are closed unread."""

    def __init__(
        self, act: Act, metrics: Metrics, settings: Settings, *, limit: int | None = None
    ) -> None:
        self.act = act
        self.metrics = metrics
        self.keep_alive_s = settings.keep_alive_s
        self.read_timeout_s = settings.read_timeout_s
        self.max_discarded_bytes = max(act.max_body_bytes.values())
        self.act_targets = {PATH.encode(), (settings.root_path + PATH).encode()}
        self._default_headers: Headers | None = None
        self._default_lines = b""
        self._drain_s = settings.drain_s
        self._limit = limit
        self._open: set[Connection] = set()
        self._tick_s = min(1.0, self.keep_alive_s / 4, self.read_timeout_s / 4)
        self._is_ticking = False
        self._is_draining = False
        self._warned_at_s = float("-inf")
        self.metrics.watch_connections(self.__len__, limit)

    def default_lines(self, headers: Headers) -> bytes:
        """The end of every response's head, of headers that uvicorn makes anew each second."""
        if headers is not self._default_headers:
            self._default_headers, self._default_lines = headers, lines(headers) + b"\r\n"
        return self._default_lines

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Connection]:
        """Those open now; they may close meanwhile."""
        return iter(list(self._open))

    def accept(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> Connection:
        """A new connection, as uvicorn asks for one."""
        self._loop = _loop or asyncio.get_running_loop()
        return Connection(self, config, server_state, app_state, self._loop)

    def opened(self, connection: Connection) -> None:
        self._open.add(connection)
        if self._limit is not None and len(self._open) > self._limit:
            connection.transport.abort()
            self._warn()
        if not self._is_ticking:
            self._is_ticking = True
            self._loop.call_later(self._tick_s, self._tick)

    def closed(self, connection: Connection) -> None:
        self._open.discard(connection)

    def drain(self) -> None:
        """The server ends: connections that are read until just before its patience does."""
        if not self._is_draining:
            self._is_draining = True
            self._loop.call_later(max(0.0, self._drain_s - LAST_WORDS_S), self._give_up_reading)

    def _give_up_reading(self) -> None:
        for connection in self:
            connection.give_up_reading()

    def _tick(self) -> None:
        # Where a batch has held the loop, it reads what came meanwhile before it heeds its timers.
        now_s = self._loop.time()
        for connection in self:
            if connection.deadline_s <= now_s:
                connection.give_up()
        self._is_ticking = bool(self._open)
        if self._is_ticking:
            self._loop.call_later(self._tick_s, self._tick)

    def _warn(self) -> None:
        self.metrics.connections_refused.inc()
        now_s = self._loop.time()
        if now_s - self._warned_at_s >= WARNS_EVERY_S:
            self._warned_at_s = now_s
            logger.warning(
                "%d connections are open, as many as there are file descriptors for: more are "
                "refused (`ulimit -Hn`, or in a container --ulimit nofile, raises that)",
                self._limit,
            )
