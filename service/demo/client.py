"""Many environments at once against a running service, each waiting for its own answers."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
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


class EnvironmentClient:
    """Steps one environment after another episode over HTTP; its session id is its name."""

    def __init__(self, http: aiohttp.ClientSession, spec: PolicySpec, name: str, seed: int) -> None:
        self._http = http
        self._spec = spec
        self._name = name
        self._random = np.random.default_rng(seed)
        self._seed = seed

    async def run(self, steps: int, tally: Tally, on_step: Callable[[], None]) -> None:
        """Takes `steps` steps, starting a new episode whenever one is over."""
        episode, step = 0, 0
        network = GrowingNetwork(self._spec, self._random)
        for _ in range(steps):
            action = await self._act(network, episode, step, tally)
            on_step()
            if action is None:  # the episode cannot go on without a legal step: start anew
                network, episode, step = self._next(network, episode, tally)
                continue
            network.apply(action)
            step += 1
            if network.is_over:
                network, episode, step = self._next(network, episode, tally)

    def _next(
        self, network: GrowingNetwork, episode: int, tally: Tally
    ) -> tuple[GrowingNetwork, int, int]:
        tally.episodes += 1
        tally.accuracy_gain += network.history[-1] - network.history[0]
        return GrowingNetwork(self._spec, self._random), episode + 1, 0

    async def _act(
        self, network: GrowingNetwork, episode: int, step: int, tally: Tally
    ) -> dict[str, int] | None:
        body = {
            "session_id": self._name,
            "episode": str(episode),
            "step": step,
            "episode_start": step == 0,
            "seed": self._seed * 10_000 + episode,
            **network.request(),
        }
        sent_s = time.perf_counter()
        status, answer = await self._post(body)
        tally.latencies_ms.append((time.perf_counter() - sent_s) * 1000)
        if status != 200:
            tally.errors[f"{status} {answer['error_type']}"] += 1
            return None
        action: dict[str, int] = answer["action"]
        illegal = network.illegal(action)
        for head in illegal:
            tally.broken_masks.append(f"{self._name}, step {step}: {head} {action[head]}")
        if illegal:
            return None
        tally.ops[OP_NAMES[action["op"]]] += 1
        return action

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


async def run_environments(
    url: str, *, num_envs: int, steps: int, seed: int, on_step: Callable[[], None]
) -> tuple[Tally, dict[str, float]]:
    """Drives `num_envs` environments for `steps` steps each; returns what they saw, and the batch
    sizes the server counted meanwhile, as `{upper bound: batches}`.

    Raises aiohttp.ClientError where the server cannot be reached, ValueError where its policy is
    not one this demo has observations for.
    """
    connections = aiohttp.TCPConnector(limit=num_envs)
    async with aiohttp.ClientSession(url, connector=connections, raise_for_status=False) as http:
        async with http.get("/policy", raise_for_status=True) as response:
            described = await response.json()
        spec = PolicySpec.model_validate(described["spec"])
        game_of(spec)
        before = await batch_sizes(http)
        tally = Tally()
        run = f"demo-{time.time_ns():x}"
        clients = [
            EnvironmentClient(http, spec, f"{run}-{index}", seed + index)
            for index in range(num_envs)
        ]
        started_s = time.perf_counter()
        await asyncio.gather(*(client.run(steps, tally, on_step) for client in clients))
        tally.elapsed_s = time.perf_counter() - started_s
        after = await batch_sizes(http)
        for index in range(num_envs):
            (await http.delete(f"/sessions/{run}-{index}")).release()
    return tally, {bound: after[bound] - before.get(bound, 0.0) for bound in after}
