"""Many environments at once against a running service, each waiting for its own answers."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from model.lifecycle import OP_NAMES
from model.spec import PolicySpec
from service.bench.batch_sizes import batch_sizes
from service.demo.environment import GrowingNetwork, game_of

ATTEMPTS = 3


@dataclass
class Tally:
    """What the environments saw."""

    latencies_ms: list[float] = field(default_factory=list)
    ops: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    broken_masks: list[str] = field(default_factory=list)
    episodes: int = 0
    accuracy_gain: float = 0.0
    elapsed_s: float = 0.0


class VectorClient:
    """Steps environments that move together, each through one episode after another, over HTTP.

    Their session is called `name`; a step that is refused ends all their episodes, and begins
    another run.
    """

    def __init__(
        self, http: aiohttp.ClientSession, spec: PolicySpec, name: str, num_rows: int, seed: int
    ) -> None:
        self._http = http
        self._spec = spec
        self._name = name
        self._seed = seed
        self._randoms = [np.random.default_rng(seed + row) for row in range(num_rows)]
        self._networks = [self._new(row) for row in range(num_rows)]
        self._starts = [True] * num_rows

    async def run(self, steps: int, tally: Tally, on_step: Callable[[int], None]) -> None:
        """Takes `steps` steps with every environment."""
        run, step = 0, 0
        for _ in range(steps):
            rows = await self._act(run, step, tally)
            on_step(len(self._networks))
            if rows is None:
                run, step = run + 1, 0
                for row in range(len(self._networks)):
                    self._end(row, tally)
                continue
            self._starts = [False] * len(rows)
            for row, action in enumerate(rows):
                self._apply(row, action, step, tally)
            step += 1

    def _apply(self, row: int, action: dict[str, int], step: int, tally: Tally) -> None:
        network = self._networks[row]
        illegal = network.illegal(action)
        for head in illegal:
            tally.broken_masks.append(f"{self._name}[{row}], step {step}: {head} {action[head]}")
        if not illegal:
            tally.ops[OP_NAMES[action["op"]]] += 1
            network.apply(action)
        if illegal or network.is_over:  # it cannot go on without a legal step either
            self._end(row, tally)

    def _end(self, row: int, tally: Tally) -> None:
        history = self._networks[row].history
        tally.episodes += 1
        tally.accuracy_gain += history[-1] - history[0]
        self._networks[row] = self._new(row)
        self._starts[row] = True

    def _new(self, row: int) -> GrowingNetwork:
        return GrowingNetwork(self._spec, self._randoms[row])

    async def _act(self, run: int, step: int, tally: Tally) -> list[dict[str, int]] | None:
        """What each environment is to do; None where the step was refused."""
        body = {
            "session_id": self._name,
            "run": str(run),
            "step": step,
            "episode_start": self._starts,
            "seed": self._seed * 10_000 + run,
            **_stacked([network.request() for network in self._networks]),
        }
        sent_s = time.perf_counter()
        status, answer = await self._post(body)
        tally.latencies_ms.append((time.perf_counter() - sent_s) * 1000)
        if status != 200:
            tally.errors[f"{status} {answer['error_type']}"] += 1
            return None
        by_head: dict[str, list[int]] = answer["action"]
        choices = zip(*by_head.values(), strict=True)
        return [dict(zip(by_head, row, strict=True)) for row in choices]

    async def _post(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """One step, sent again after a broken connection: its number makes that safe."""
        failure = ""
        for _ in range(ATTEMPTS):
            try:
                async with self._http.post("/act", json=body) as response:
                    return response.status, await response.json()
            except (aiohttp.ClientError, TimeoutError) as error:
                failure = type(error).__name__
        return 0, {"error_type": failure}


def _stacked(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One request of what each environment would ask by itself."""
    return {
        name: _stacked([row[name] for row in rows])
        if isinstance(of_first, dict)
        else [row[name] for row in rows]
        for name, of_first in rows[0].items()
    }


async def run_environments(
    url: str,
    *,
    num_envs: int,
    num_rows: int,
    steps: int,
    seed: int,
    on_step: Callable[[int], None],
) -> tuple[Tally, dict[str, float]]:
    """Drives `num_envs` environments for `steps` steps each, `num_rows` or fewer in a request.

    Returns what they saw, and the batch sizes the server counted meanwhile, as `{upper bound:
    batches}`. `on_step` is told how many have taken one more step.

    Raises aiohttp.ClientError where the server cannot be reached, ValueError where its policy is
    not one this demo has observations for.
    """
    firsts = range(0, num_envs, num_rows)
    connections = aiohttp.TCPConnector(limit=len(firsts))
    async with aiohttp.ClientSession(url, connector=connections, raise_for_status=False) as http:
        async with http.get("/policy", raise_for_status=True) as response:
            described = await response.json()
        spec = PolicySpec.model_validate(described["spec"])
        game_of(spec)
        before = await batch_sizes(http)
        tally = Tally()
        run = f"demo-{time.time_ns():x}"
        clients = [
            VectorClient(
                http, spec, f"{run}-{first}", min(num_rows, num_envs - first), seed + first
            )
            for first in firsts
        ]
        started_s = time.perf_counter()
        await asyncio.gather(*(client.run(steps, tally, on_step) for client in clients))
        tally.elapsed_s = time.perf_counter() - started_s
        after = await batch_sizes(http)
        for first in firsts:
            (await http.delete(f"/sessions/{run}-{first}")).release()
    return tally, {bound: after[bound] - before.get(bound, 0.0) for bound in after}
