"""Environments as clients see them: many sessions, each step sent, awaited and written down.

Closed loop: an environment sends its next step once it has the answer, as environments do. Open
loop: steps become due at a rate, whether or not the server keeps up, and a latency counts from when
the step was due: a server that falls behind cannot hide it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import cycle

import httpcore
import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from service.bench.connection import Connection, Response
from service.bench.pool import POOL_SIZE
from service.bench.wire import Wire

EPISODE_LENGTH = 100
"""Steps of a vector's rows, which start one after the other."""
RETRY_S = 0.05
TIMEOUT_S = 60.0


@dataclass
class Session:
    """A trajectory: `pool_index` and the answer, as it came, of every step it has taken.

    Of a vector, the rows observe the pool's rows from that one on. `num_rows` is None for a single
    environment, whose episode never ends.
    """

    session_id: str
    seed: int
    num_rows: int | None = None
    pool_index: list[int] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)

    def starts(self, step: int) -> NDArray[np.bool_] | None:
        """Which rows of a vector start an episode with the step."""
        if self.num_rows is None:
            return None
        starts: NDArray[np.bool_] = (step + np.arange(self.num_rows)) % EPISODE_LENGTH == 0
        return starts | (step == 0)


def new_sessions(number: int, seed: int, num_rows: int | None = None) -> list[Session]:
    """Sessions that no server has seen yet, with seeds from `seed` on."""
    run = f"bench-{time.time_ns():x}"
    return [Session(f"{run}-{index}", seed + index, num_rows) for index in range(number)]


async def end_sessions(url: str, sessions: Iterable[Session]) -> None:
    """Has the server forget them. Raises OSError where it does not answer any more."""
    async with httpcore.AsyncConnectionPool(max_connections=1) as http:
        for session in sessions:
            try:
                path = f"/sessions/{session.session_id}"
                await http.request(
                    "DELETE", url + path, headers={"X-Session-Id": session.session_id}
                )
            except (httpcore.NetworkError, httpcore.ProtocolError) as error:
                raise OSError(str(error)) from error


def nothing() -> None:
    """What there is to do on an answer, as a rule."""


@dataclass
class Load:
    """What the clients saw."""

    sessions: list[Session]
    latencies_ms: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    elapsed_s: float = 0.0

    @property
    def num_answers(self) -> int:
        return len(self.latencies_ms)


class LoadGenerator:
    """Drives sessions of one server from so many connections, or fewer for fewer sessions.

    Each connection waits for its answer and takes its sessions in turn: one, as an environment
    does, or its share of more, to see how a server bears many. Sessions go on where they stand. A
    refused step is sent again after the server's `Retry-After`, or `patience_s` if that is less.
    """

    def __init__(
        self,
        url: str,
        wire: Wire,
        *,
        num_connections: int,
        patience_s: float = float("inf"),
    ) -> None:
        self._url = f"{url.rstrip('/')}/act"
        self._wire = wire
        self._num_connections = num_connections
        self._patience_s = patience_s

    async def closed(
        self, sessions: list[Session], seconds: float, on_answer: Callable[[], None] = nothing
    ) -> Load:
        """Every environment sends its next step once it has its answer."""
        return await self._drive(sessions, seconds, None, on_answer)

    async def open(
        self,
        sessions: list[Session],
        seconds: float,
        rate: float,
        on_answer: Callable[[], None] = nothing,
    ) -> Load:
        """`rate` requests a second in all fall due, evenly, the connections taking turns."""
        return await self._drive(sessions, seconds, rate, on_answer)

    async def _drive(
        self,
        sessions: list[Session],
        seconds: float,
        rate: float | None,
        on_answer: Callable[[], None],
    ) -> Load:
        load = Load(sessions)
        number = min(self._num_connections, len(sessions))
        start_s = time.perf_counter()

        async def drive(index: int) -> None:
            connection = Connection(self._url, self._wire.content_type)
            turns = cycle(sessions[index::number])
            due_s = start_s + (index / rate if rate else 0.0)
            try:
                while due_s < start_s + seconds:
                    if rate:
                        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                    await self._step(connection, next(turns), load, due_s)
                    on_answer()
                    due_s = due_s + number / rate if rate else time.perf_counter()
            finally:
                connection.close()

        await asyncio.gather(*(drive(index) for index in range(number)))
        load.elapsed_s = time.perf_counter() - start_s
        return load

    async def _step(
        self, connection: Connection, session: Session, load: Load, since_s: float
    ) -> None:
        step = len(session.answers)
        pool_index = (session.seed + step) % POOL_SIZE
        body = self._wire.body(
            session.session_id, session.seed, step, pool_index, session.starts(step)
        )
        try:
            async with asyncio.timeout(TIMEOUT_S):
                response = await connection.post(body, session.session_id)
        except (OSError, TimeoutError) as error:
            connection.close()
            load.errors[type(error).__name__] += 1
            await asyncio.sleep(RETRY_S)
            return
        if response.status != 200:
            load.errors[_kind(response)] += 1
            await asyncio.sleep(min(response.retry_after_s or RETRY_S, self._patience_s))
            return
        load.latencies_ms.append((time.perf_counter() - since_s) * 1000)
        session.pool_index.append(pool_index)
        session.answers.append(response.content)


def _kind(response: Response) -> str:
    try:
        return f"{response.status} {from_json(response.content)['error_type']}"
    except (ValueError, LookupError, TypeError):  # of a proxy, say
        return str(response.status)
