"""Environments as clients see them: many sessions, each step sent, awaited and written down.

Closed loop: an environment sends its next step once it has the answer, as environments do. Open
loop: steps become due at a rate, whether or not the server keeps up, and a latency counts from when
the step was due: a server that falls behind cannot hide it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json, to_json

from model.spec import PolicySpec
from service.bench.connection import Connection, Response

POOL_SIZE = 64
RETRY_S = 0.05
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Pool:
    """What environments observe: each step is one of these observations and masks."""

    observations: NDArray[np.float32]
    action_masks: NDArray[np.bool_]
    blueprint_indices: NDArray[np.int64] | None = None
    slot_by_op_masks: NDArray[np.bool_] | None = None

    @classmethod
    def random(cls, spec: PolicySpec, seed: int) -> "Pool":
        """Standard normal observations, and masks that allow nine choices of ten.

        Where the policy reads them, also blueprints, and half of the slots for each op.
        """
        rng = np.random.default_rng(seed)
        observations = rng.standard_normal((POOL_SIZE, spec.observation_dim), dtype=np.float32)
        masks = rng.random((POOL_SIZE, spec.num_choices)) < 0.9
        masks[:, np.cumsum([0, *spec.head_sizes[:-1]])] = True
        blueprints = slots = None
        if spec.blueprint_embedding_dim is not None:
            blueprints = rng.integers(-1, spec.num_blueprints, (POOL_SIZE, spec.num_slots))
        if spec.has_slot_by_op:
            slots = rng.random((POOL_SIZE, spec.num_ops, spec.num_slots)) < 0.5
            slots[..., 0] = True
        return cls(observations, masks, blueprints, slots)

    def bodies(self, spec: PolicySpec) -> list[bytes]:
        """Each as the fields of a JSON object, without its braces."""
        ends = np.cumsum(spec.head_sizes)[:-1]
        bodies = []
        for at, (observation, mask) in enumerate(
            zip(self.observations, self.action_masks, strict=True)
        ):
            by_head = zip(spec.head_names, np.split(mask, ends), strict=True)
            fields: dict[str, Any] = {
                "observation": observation.tolist(),
                "action_mask": {name: columns.tolist() for name, columns in by_head},
            }
            if self.blueprint_indices is not None:
                fields["blueprint_index"] = self.blueprint_indices[at].tolist()
            if self.slot_by_op_masks is not None:
                fields["slot_by_op_mask"] = self.slot_by_op_masks[at].tolist()
            bodies.append(to_json(fields)[1:-1])
        return bodies


@dataclass
class Session:
    """A trajectory: `pool_index` and the answer, as it came, of every step it has taken."""

    session_id: str
    seed: int
    pool_index: list[int] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)


def new_sessions(number: int, seed: int) -> list[Session]:
    """Sessions that no server has seen yet, with seeds from `seed` on."""
    run = f"bench-{time.time_ns():x}"
    return [Session(f"{run}-{index}", seed + index) for index in range(number)]


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
    """Drives sessions of one server from `num_envs` connections, or fewer for fewer sessions.

    Each connection waits for its answer and takes its sessions in turn: one, as an environment
    does, or its share of more, to see how a server bears many. Sessions go on where they stand. A
    refused step is sent again after the server's `Retry-After`, or `patience_s` if that is less.
    """

    def __init__(
        self,
        url: str,
        spec: PolicySpec,
        pool: Pool,
        *,
        num_envs: int,
        patience_s: float = float("inf"),
    ) -> None:
        self._url = f"{url.rstrip('/')}/act"
        self._bodies = pool.bodies(spec)
        self._num_envs = num_envs
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
        """`rate` steps a second in all fall due, evenly, the environments taking turns."""
        return await self._drive(sessions, seconds, rate, on_answer)

    async def _drive(
        self,
        sessions: list[Session],
        seconds: float,
        rate: float | None,
        on_answer: Callable[[], None],
    ) -> Load:
        load = Load(sessions)
        num_envs = min(self._num_envs, len(sessions))
        start_s = time.perf_counter()

        async def drive(index: int) -> None:
            connection = Connection(self._url)
            turns = cycle(sessions[index::num_envs])
            due_s = start_s + (index / rate if rate else 0.0)
            try:
                while due_s < start_s + seconds:
                    if rate:
                        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                    await self._step(connection, next(turns), load, due_s)
                    on_answer()
                    due_s = due_s + num_envs / rate if rate else time.perf_counter()
            finally:
                connection.close()

        await asyncio.gather(*(drive(index) for index in range(num_envs)))
        load.elapsed_s = time.perf_counter() - start_s
        return load

    async def _step(
        self, connection: Connection, session: Session, load: Load, since_s: float
    ) -> None:
        step = len(session.answers)
        pool_index = (session.seed + step) % POOL_SIZE
        start = b'"episode_start":true,"episode":"0","seed":%d,' % session.seed if not step else b""
        body = b'{"session_id":"%b","step":%d,%b%b}' % (
            session.session_id.encode(),
            step,
            start,
            self._bodies[pool_index],
        )
        try:
            async with asyncio.timeout(TIMEOUT_S):
                response = await connection.post(body)
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
