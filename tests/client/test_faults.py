"""The client where the network loses things, and where the server goes away."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from model.spec import PolicySpec
from tamiyo_client import (
    AsyncPolicyClient,
    AsyncVectorPolicyClient,
    PolicyClient,
    SessionLost,
    VectorAct,
    VectorPolicyClient,
)
from tests.client.faulty_proxy import FAULTS, faulty_proxy
from tests.random_inputs import random_masks, random_observations
from tests.running_server import RunningServer, running_server

NUM_ROWS = 5
NUM_STEPS = 60
NUM_CLIENTS = 12
START_SHARE = 0.1


class Script(NamedTuple):
    """All that one client will ask."""

    seed: int
    observations: NDArray[np.float32]
    masks: dict[str, NDArray[np.bool_]]
    done: NDArray[np.bool_]


class Trajectory(NamedTuple):
    """All that it was told, as bytes."""

    actions: bytes
    log_probs: bytes
    values: bytes
    starts: bytes


def script(spec: PolicySpec, seed: int, num_rows: int) -> Script:
    rng = np.random.default_rng(seed)
    return Script(
        seed,
        random_observations(spec, rng, NUM_STEPS, num_rows),
        random_masks(spec, rng, NUM_STEPS, num_rows),
        rng.random((NUM_STEPS, num_rows)) < START_SHARE,
    )


def scripts(spec: PolicySpec, num_rows: int) -> list[Script]:
    return [script(spec, seed, num_rows) for seed in range(NUM_CLIENTS)]


def masks_at(script: Script, step: int) -> dict[str, NDArray[np.bool_]]:
    return {head: mask[step] for head, mask in script.masks.items()}


def trajectory(acts: Sequence[VectorAct]) -> Trajectory:
    return Trajectory(
        *(
            np.concatenate([getattr(act, name) for act in acts]).tobytes()
            for name in ("multi_discrete", "log_probs", "value", "episode_start")
        )
    )


def drive(url: str, script: Script) -> Trajectory:
    acts = []
    with VectorPolicyClient(url, NUM_ROWS, autoreset_mode="same_step", seed=script.seed) as client:
        for step in range(NUM_STEPS):
            acts.append(client.act(script.observations[step], masks_at(script, step)))
            client.observe(script.done[step], np.zeros(NUM_ROWS))
    return trajectory(acts)


async def drive_async(url: str, script: Script) -> Trajectory:
    acts = []
    async with AsyncVectorPolicyClient(
        url, NUM_ROWS, autoreset_mode="same_step", seed=script.seed
    ) as client:
        for step in range(NUM_STEPS):
            acts.append(await client.act(script.observations[step], masks_at(script, step)))
            client.observe(script.done[step], np.zeros(NUM_ROWS))
    return trajectory(acts)


async def drive_all_async(url: str, made: list[Script]) -> list[Trajectory]:
    return await asyncio.gather(*(drive_async(url, each) for each in made))


def check_faults(seen: Counter[str]) -> None:
    assert all(seen[fault] > NUM_CLIENTS for fault in FAULTS), seen


def test_a_lossy_network_changes_no_bit_of_a_trajectory(
    server: RunningServer, spec: PolicySpec
) -> None:
    made = scripts(spec, NUM_ROWS)
    expected = [drive(server.address, each) for each in made]
    with faulty_proxy(*server.host_and_port) as (url, seen):
        assert [drive(url, each) for each in made] == expected
        check_faults(seen)
    assert len(set(expected)) == NUM_CLIENTS


def test_nor_of_one_driven_by_asyncio(server: RunningServer, spec: PolicySpec) -> None:
    made = scripts(spec, NUM_ROWS)
    expected = [drive(server.address, each) for each in made]
    with faulty_proxy(*server.host_and_port) as (url, seen):
        assert asyncio.run(drive_all_async(url, made)) == expected
        check_faults(seen)


def test_single_environments_are_as_safe(server: RunningServer, spec: PolicySpec) -> None:
    (made,) = scripts(spec, 1)[:1]
    one = [made.observations[step, 0] for step in range(NUM_STEPS)]

    def sync(url: str) -> list[tuple[list[int], float]]:
        with PolicyClient(url) as client:
            acts = [client.act(observation, seed=3) for observation in one]
        return [(act.multi_discrete.tolist(), act.log_prob) for act in acts]

    async def with_asyncio(url: str) -> list[tuple[list[int], float]]:
        async with AsyncPolicyClient(url) as client:
            acts = [await client.act(observation, seed=3) for observation in one]
        return [(act.multi_discrete.tolist(), act.log_prob) for act in acts]

    expected = sync(server.address)
    with faulty_proxy(*server.host_and_port) as (url, _):
        assert sync(url) == expected
        assert asyncio.run(with_asyncio(url)) == expected


@pytest.mark.parametrize("is_async", [False, True])
def test_a_restart_of_the_server_under_load_is_a_lost_session_and_nothing_else(
    artifact: Path, spec: PolicySpec, is_async: bool
) -> None:
    """It drains, ends and comes back; each client then begins anew, and goes on to its end."""
    made = scripts(spec, NUM_ROWS)
    asyncio.run(asyncio.wait_for(restart_under_load(artifact, made, is_async=is_async), 120))


async def restart_under_load(artifact: Path, made: list[Script], *, is_async: bool) -> None:
    half = asyncio.Barrier(len(made) + 1)
    restarted = asyncio.Event()
    num_lost = 0

    async def run(url: str, script: Script) -> Trajectory:
        nonlocal num_lost
        acts: list[VectorAct] = []
        sync = VectorPolicyClient(url, NUM_ROWS, seed=script.seed)
        client = AsyncVectorPolicyClient(url, NUM_ROWS, seed=script.seed)
        while len(acts) < NUM_STEPS:
            step = len(acts)
            asked = script.observations[step], masks_at(script, step)
            if step == NUM_STEPS // 2 and not restarted.is_set():
                await half.wait()
            try:
                if is_async:
                    acts.append(await client.act(*asked))
                else:
                    acts.append(await asyncio.to_thread(sync.act, *asked))
            except SessionLost:
                num_lost += 1
                acts.clear()
                client.restart()
                sync.restart()
        await client.close()
        await asyncio.to_thread(sync.close)
        return trajectory(acts)

    with running_server(artifact) as before:
        _, port = before.host_and_port
        expected = [await asyncio.to_thread(undisturbed, before.address, each) for each in made]
        running = [asyncio.create_task(run(before.address, each)) for each in made]
        await half.wait()  # all are in the middle, and go on
        before.terminate()
        await asyncio.to_thread(before.wait)
    with running_server(artifact, "--port", str(port)) as after:
        restarted.set()
        assert await asyncio.gather(*running) == expected
        assert num_lost == len(made)
        assert "Traceback" not in before.log() + after.log()


def undisturbed(url: str, script: Script) -> Trajectory:
    with VectorPolicyClient(url, NUM_ROWS, seed=script.seed) as client:
        return trajectory(
            [client.act(script.observations[s], masks_at(script, s)) for s in range(NUM_STEPS)]
        )
