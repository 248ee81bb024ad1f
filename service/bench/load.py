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
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray

from model.spec import PolicySpec

POOL_SIZE = 64
RETRY_S = 0.05


@dataclass(frozen=True)
class Pool:
    """What environments observe: each step is one of these observations and masks."""

    observations: NDArray[np.float32]
    action_masks: NDArray[np.bool_]

    @classmethod
    def random(cls, spec: PolicySpec, seed: int) -> "Pool":
        """Standard normal observations, and masks that allow nine choices of ten."""
        rng = np.random.default_rng(seed)
        observations = rng.standard_normal((POOL_SIZE, spec.observation_dim), dtype=np.float32)
        masks = rng.random((POOL_SIZE, spec.num_choices)) < 0.9
        masks[:, np.cumsum([0, *spec.head_sizes[:-1]])] = True
        return cls(observations, masks)

    def bodies(self, spec: PolicySpec) -> list[dict[str, Any]]:
        ends = np.cumsum(spec.head_sizes)[:-1]
        return [
            {
                "observation": observation.tolist(),
                "action_mask": {
                    name: columns.tolist()
                    for name, columns in zip(spec.head_names, np.split(mask, ends), strict=True)
                },
            }
            for observation, mask in zip(self.observations, self.action_masks, strict=True)
        ]


@dataclass
class Session:
    """One environment's trajectory: `pool_index` and the answer of every step it has taken."""

    session_id: str
    seed: int
    pool_index: list[int] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Load:
    """What the clients saw."""

    sessions: list[Session]
    latencies_ms: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    elapsed_s: float = 0.0

    @property
    def num_answers(self) -> int:
        return sum(len(session.answers) for session in self.sessions)


class LoadGenerator:
    """Drives `num_envs` sessions against one server for `seconds`."""

    def __init__(
        self, http: aiohttp.ClientSession, spec: PolicySpec, pool: Pool, *, seconds: float
    ) -> None:
        self._http = http
        self._bodies = pool.bodies(spec)
        self._seconds = seconds

    async def closed(self, num_envs: int, seed: int, on_answer: Callable[[], None]) -> Load:
        """Every environment always waits for its answer."""
        load = self._sessions(num_envs, seed)
        start_s = time.perf_counter()

        async def run(session: Session) -> None:
            while (now_s := time.perf_counter()) < start_s + self._seconds:
                await self._step(session, load, now_s)
                on_answer()

        await asyncio.gather(*(run(session) for session in load.sessions))
        load.elapsed_s = time.perf_counter() - start_s
        return load

    async def open(
        self, num_envs: int, rate: float, seed: int, on_answer: Callable[[], None]
    ) -> Load:
        """`rate` steps a second in all fall due, evenly, the environments taking turns."""
        load = self._sessions(num_envs, seed)
        start_s = time.perf_counter()

        async def run(index: int, session: Session) -> None:
            due_s = start_s + index / rate
            while due_s < start_s + self._seconds:
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                await self._step(session, load, due_s)
                on_answer()
                due_s += num_envs / rate

        await asyncio.gather(*(run(*numbered) for numbered in enumerate(load.sessions)))
        load.elapsed_s = time.perf_counter() - start_s
        return load

    def _sessions(self, num_envs: int, seed: int) -> Load:
        run = f"bench-{time.time_ns():x}"
        return Load([Session(f"{run}-{index}", seed + index) for index in range(num_envs)])

    async def _step(self, session: Session, load: Load, since_s: float) -> None:
        step = len(session.answers)
        pool_index = (session.seed + step) % POOL_SIZE
        body = self._bodies[pool_index] | {"session_id": session.session_id, "step": step}
        if step == 0:
            body |= {"episode_start": True, "episode": "0", "seed": session.seed}
        try:
            async with self._http.post("/act", json=body) as response:
                answer = await response.json()
                status = response.status
        except (aiohttp.ClientError, TimeoutError) as error:
            load.errors[type(error).__name__] += 1
            await asyncio.sleep(RETRY_S)
            return
        if status != 200:
            load.errors[f"{status} {answer['error_type']}"] += 1
            await asyncio.sleep(RETRY_S)
            return
        load.latencies_ms.append((time.perf_counter() - since_s) * 1000)
        session.pool_index.append(pool_index)
        session.answers.append(answer)
