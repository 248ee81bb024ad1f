"""Many environments at once against a running service, each waiting for its own answers."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from export.manifest import Spec
from model.lifecycle import OP_NAMES
from model.step_spec import StepSpec
from service.bench.batch_sizes import batch_sizes
from service.demo.environment import GrowingNetwork, game_of
from tamiyo_client import AsyncVectorPolicyClient, PolicyError, VectorAct

RETRIES = 3


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


class Player:
    """Environments that move together, each through one episode after another.

    A step that is refused ends all their episodes, and begins another run.
    """

    def __init__(self, client: AsyncVectorPolicyClient, spec: StepSpec, seed: int) -> None:
        self._client = client
        self._spec = spec
        self._randoms = [np.random.default_rng(seed + row) for row in range(client.num_envs)]
        self._networks = [self._new(row) for row in range(client.num_envs)]

    async def play(self, steps: int, tally: Tally, on_step: Callable[[int], None]) -> None:
        """Takes `steps` steps with every environment."""
        for step in range(steps):
            sent_s = time.perf_counter()
            try:
                act = await self._client.act(**_stacked([n.request() for n in self._networks]))
            except PolicyError as error:
                tally.errors[f"{error.status or 0} {error.error_type}"] += 1
                self._client.restart()
                over = [True] * len(self._networks)
            else:
                rows = _rows(act)
                over = [self._apply(row, rows[row], step, tally) for row in range(len(rows))]
            tally.latencies_ms.append((time.perf_counter() - sent_s) * 1000)
            on_step(len(self._networks))
            self._client.reset(over)
            for row in np.flatnonzero(over).tolist():
                self._end(row, tally)

    def _apply(self, row: int, action: dict[str, int], step: int, tally: Tally) -> bool:
        """Whether the episode is over: also where it cannot go on without a legal step."""
        network = self._networks[row]
        illegal = network.illegal(action)
        for head in illegal:
            name = f"{self._client.session_id}[{row}], step {step}"
            tally.broken_masks.append(f"{name}: {head} {action[head]}")
        if not illegal:
            tally.ops[OP_NAMES[action["op"]]] += 1
            network.apply(action)
        return bool(illegal) or network.is_over

    def _end(self, row: int, tally: Tally) -> None:
        history = self._networks[row].history
        tally.episodes += 1
        tally.accuracy_gain += history[-1] - history[0]
        self._networks[row] = self._new(row)

    def _new(self, row: int) -> GrowingNetwork:
        return GrowingNetwork(self._spec, self._randoms[row])


def _rows(act: VectorAct) -> list[dict[str, int]]:
    return [dict(zip(act.heads, row, strict=True)) for row in act.multi_discrete.tolist()]


def _stacked(requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What each environment would ask by itself, as the client is asked."""
    masks = [request["action_mask"] for request in requests]
    inputs = {name for name in requests[0] if name not in ("observation", "action_mask")}
    return {
        "observations": [request["observation"] for request in requests],
        "action_masks": {head: [mask[head] for mask in masks] for head in masks[0]},
        "inputs": {name: [request[name] for request in requests] for name in inputs},
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

    Raises PolicyError or OSError where the server cannot be reached, ValueError where its policy
    is not one this demo has observations for.
    """
    firsts = range(0, num_envs, num_rows)
    run = f"demo-{time.time_ns():x}"
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                AsyncVectorPolicyClient(
                    url,
                    min(num_rows, num_envs - first),
                    seed=seed + first,
                    session_id=f"{run}-{first}",
                    retries=RETRIES,
                )
            )
            for first in firsts
        ]
        described = await clients[0].policy()
        spec = TypeAdapter(Spec).validate_python(described["spec"])
        game_of(spec)
        before = await batch_sizes(url)
        tally = Tally()
        players = [
            Player(client, spec, seed + first)
            for first, client in zip(firsts, clients, strict=True)
        ]
        started_s = time.perf_counter()
        await asyncio.gather(*(player.play(steps, tally, on_step) for player in players))
        tally.elapsed_s = time.perf_counter() - started_s
        after = await batch_sizes(url)
    return tally, {bound: after[bound] - before.get(bound, 0.0) for bound in after}
