"""A loop of 64 environments through the client, against less and against nothing in between.

`python -m benchmarks.client --artifact DIR` prints environment steps per second: of the client,
sync and with asyncio; of the same bytes over a bare connection; and of the policy in the loop's own
process, by ONNX Runtime and as one would write it in eager PyTorch. All take a turn each round; one
loop, so one request at a time. `--wrk SCRIPT` adds wrk with one connection, which makes no arrays:
peers/act_vector.lua of the project's reference material posts observations of 64 rows.
"""

import argparse
import asyncio
import os
import re
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.serving import serving
from benchmarks.step import NaivePolicy, random_inputs
from export.manifest import Manifest
from model.policy import FactoredRecurrentActorCritic
from service.bench.connection import Connection
from service.runtime.arrays import allocate
from service.runtime.load import load_runtime
from tamiyo_client import AsyncVectorPolicyClient, VectorPolicyClient, gumbel_noise, wire

WARM_UP = 20
Floats = NDArray[np.float32]
Step = Callable[[], Awaitable[None]]


def client_loop(url: str, observations: Floats) -> Step:
    client = VectorPolicyClient(url, len(observations), seed=1)

    async def step() -> None:
        client.act(observations)

    return step


def asyncio_loop(url: str, observations: Floats) -> Step:
    client = AsyncVectorPolicyClient(url, len(observations), seed=1)

    async def step() -> None:
        await client.act(observations)

    return step


def bare_loop(url: str, observations: Floats) -> Step:
    """The same bytes, made once, and answers that nobody reads."""
    connection = Connection(f"{url}/act", wire.SAFETENSORS)
    scalars = {"session_id": f"bare-{time.time_ns()}"}
    first, later = (
        wire.request(
            {"observation": observations, "episode_start": np.full(len(observations), starts)},
            scalars,
        )
        for starts in (True, False)
    )
    bodies = [first]

    async def step() -> None:
        response = await connection.post(bodies[0])
        assert response.status == 200, response.content
        bodies[0] = later

    return step


def onnx_loop(artifact: Path, observations: Floats) -> Step:
    """States, noise and the step, by NumPy and ONNX Runtime in this process."""
    manifest = Manifest.read(artifact)
    runtime = load_runtime(artifact, manifest, name="onnx", device="cpu", num_threads=1)
    num = len(observations)
    given, gives = allocate(manifest.inputs, num), allocate(manifest.outputs, num)
    run = runtime.bind(given, gives)
    seeds, steps = np.arange(num, dtype=np.uint64), np.zeros(num, dtype=np.uint64)

    async def step() -> None:
        given["observation"][:] = observations
        given["noise"][:] = gumbel_noise(seeds, steps, manifest.spec.num_choices)
        run()
        given["state_h_in"][:], given["state_c_in"][:] = gives["state_h_out"], gives["state_c_out"]
        np.add(steps, 1, out=steps, casting="unsafe")

    return step


def eager_loop(artifact: Path, observations: Floats) -> Step:
    spec = Manifest.read(artifact).spec
    policy = NaivePolicy(FactoredRecurrentActorCritic(spec).eval()).eval()
    _, mask, noise, h, c, *more = random_inputs(spec, len(observations), torch.device("cpu"))
    states = [h, c]

    async def step() -> None:
        with torch.inference_mode():
            drawn = -torch.log(-torch.log(torch.rand_like(noise).clamp(min=1e-20)))
            shown = torch.from_numpy(observations)
            *decided, states[0], states[1] = policy(shown, mask, drawn, *states, *more)
            for tensor in decided:
                tensor.numpy()

    return step


async def seconds_of(step: Step, seconds: float) -> float:
    """Steps per second."""
    number, began_s = 0, time.perf_counter()
    while time.perf_counter() - began_s < seconds:
        await step()
        number += 1
    return number / (time.perf_counter() - began_s)


def wrk(url: str, script: str, rows: int, dim: int, seconds: float) -> float:
    """Requests per second of one connection."""
    variables = {"ROWS": str(rows), "OBS_DIM": str(dim), "RUN_ID": f"w{time.time_ns()}"}
    done = subprocess.run(
        ["wrk", "-t1", "-c1", f"-d{max(1, round(seconds))}s", "-s", script, url],
        env={**os.environ, "SESSIONS": "1", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"rps=([\d.]+)", done.stdout)
    assert found, done.stdout
    return float(found.group(1))


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.client")
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--wrk", metavar="SCRIPT")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = Manifest.read(options.artifact).spec
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(options.rows, spec.observation_dim)).astype(np.float32)
    async with serving(options.artifact, "--runtime", "onnx") as server:
        loops = {
            "bare connection": bare_loop(server.url, observations),
            "client": client_loop(server.url, observations),
            "client, asyncio": asyncio_loop(server.url, observations),
            "in process, ONNX Runtime": onnx_loop(options.artifact, observations),
            "in process, eager PyTorch": eager_loop(options.artifact, observations),
        }
        rates: dict[str, list[float]] = {}
        for loop in loops.values():
            for _ in range(WARM_UP):
                await loop()
        for _ in range(options.rounds):
            if options.wrk:
                rate = wrk(
                    server.url, options.wrk, options.rows, spec.observation_dim, options.seconds
                )
                rates.setdefault("wrk", []).append(rate)
            for name, loop in loops.items():
                rates.setdefault(name, []).append(await seconds_of(loop, options.seconds))
    of_client = np.array(rates["client"])
    for name, measured in rates.items():
        ratio = np.median(of_client / np.array(measured))
        print(
            f"{name:28s} {options.rows * np.median(measured):9.0f} env steps/s; "
            f"the client {ratio:.2f} of it"
        )


if __name__ == "__main__":
    asyncio.run(main())
