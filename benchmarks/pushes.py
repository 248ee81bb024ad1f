"""New weights under load: how long they take to serve, and what their neighbours notice.

`python -m benchmarks.pushes --artifact DIR` has clients act, in turn without pushes and with one a
second, and prints the latencies of both and their ratio, what each push took from its last byte to
the swap, and whether every answer is, bit for bit, that of the version it names: each trajectory is
stepped again, alone, with those weights. `--rows N` has vectors of N act, in safetensors.
TorchScript's last bits depend on the batch, with or without pushes.
"""

import argparse
import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import httpcore
import numpy as np
import torch

from benchmarks.process import server_process
from export.loaders.protocol import LoadedStep
from export.manifest import Manifest
from export.parameters import sha256
from export.push import copied, push_body
from export.weights import pack, pack_weights
from model.policy import FactoredRecurrentActorCritic
from service.bench.load import LoadGenerator, Session, new_sessions
from service.bench.pool import Pool
from service.bench.replay import replay
from service.bench.wire import wire_of
from service.runtime.load import load_runtime

NUM_VERSIONS = 4
SEED = 5


class Weights(NamedTuple):
    """A push as it is sent, and what serves once it is taken."""

    version: str
    body: bytes
    loaded: LoadedStep


def pushable(artifact: Path, manifest: Manifest, runtime: str) -> list[Weights]:
    """Policies of one spec that differ in every weight."""
    step = load_runtime(artifact, manifest, name=runtime, device="cpu", num_threads=1)
    made = []
    for seed in range(NUM_VERSIONS):
        torch.manual_seed(seed)
        policy = FactoredRecurrentActorCritic(manifest.spec)
        weights = pack_weights(policy, None)
        parameters = pack(weights, manifest.spec, manifest.precision)
        body = push_body(copied(policy, None), manifest.spec, manifest.precision)
        version = f"sha256:{sha256(parameters)}"
        made.append(Weights(version, body, step.with_parameters(parameters)))
    return made


class Pusher:
    """Sends a push every `every_s`, until it is stopped."""

    def __init__(self, url: str, weights: list[Weights], every_s: float) -> None:
        self._url = f"{url}/policy/weights"
        self._weights = weights
        self._every_s = every_s
        self._number = 0
        self.results: Counter[int] = Counter()
        self.seconds: list[float] = []

    async def run(self, seconds: float) -> None:
        ends_s = time.perf_counter() + seconds
        async with httpcore.AsyncConnectionPool(max_connections=1) as http:
            while time.perf_counter() < ends_s - self._every_s / 2:
                began_s = time.perf_counter()
                body = self._weights[self._number % len(self._weights)].body
                self._number += 1
                headers = {"Content-Type": "application/vnd.safetensors"}
                answer = await http.request("PUT", self._url, headers=headers, content=body)
                self.results[answer.status] += 1
                assert answer.status == 200, answer.content
                self.seconds.append(time.perf_counter() - began_s)
                await asyncio.sleep(max(0.0, began_s + self._every_s - time.perf_counter()))


async def swap_seconds(url: str) -> tuple[float, float]:
    """How many pushes there were, and their seconds from the last byte to the swap."""
    async with httpcore.AsyncConnectionPool(max_connections=1) as http:
        text = (await http.request("GET", f"{url}/metrics")).content.decode()
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    names = ("tamiyo_weights_swap_seconds_count", "tamiyo_weights_swap_seconds_sum")
    count, total = (float(found[name]) for name in names)
    return count, total


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pushes", description=__doc__)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--runtime", default="onnx")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int, help="of each client; single environments without")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--every-s", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    manifest = Manifest.read(options.artifact)
    if manifest.has_normalizer:
        raise SystemExit("an artifact without a normaliser is taken; the preset's, say")
    weights = pushable(options.artifact, manifest, options.runtime)
    pool = Pool.random(manifest.spec, SEED)
    kind = "json" if options.rows is None else "safetensors"
    wire = wire_of(kind, manifest.spec, pool, options.rows)
    own = load_runtime(
        options.artifact, manifest, name=options.runtime, device="cpu", num_threads=1
    )
    loaded = {manifest.policy_version: own} | {w.version: w.loaded for w in weights}
    percentiles: dict[bool, list[list[float]]] = {False: [], True: []}
    sessions: list[Session] = []
    async with server_process(options.artifact, "--runtime", options.runtime) as server:
        clients = LoadGenerator(server.url, wire, num_connections=options.clients)
        pusher = Pusher(server.url, weights, options.every_s)
        await clients.closed(new_sessions(options.clients, SEED, options.rows), 2.0)
        for _ in range(options.rounds):
            for is_pushed in (False, True):
                some = new_sessions(options.clients, SEED, options.rows)
                acting = clients.closed(some, options.seconds)
                if is_pushed:
                    load, _ = await asyncio.gather(acting, pusher.run(options.seconds))
                    sessions += some
                else:
                    load = await acting
                assert not load.errors, load.errors
                percentiles[is_pushed].append(list(np.percentile(load.latencies_ms, (50, 99))))
        count, total_s = await swap_seconds(server.url)
    without, with_pushes = (np.array(percentiles[is_pushed]) for is_pushed in (False, True))
    for name, measured in (("without pushes", without), ("with pushes", with_pushes)):
        p50_ms, p99_ms = np.median(measured, axis=0)
        print(f"{name:15s} p50 {p50_ms:6.2f} ms, p99 {p99_ms:6.2f} ms")
    p50, p99 = np.median(with_pushes / without, axis=0)
    print(f"with / without  p50 {p50:.2f}, p99 {p99:.2f} (medians of {options.rounds} rounds)")
    slowest_ms = 1000 * max(pusher.seconds)
    print(
        f"{count:.0f} pushes, {1000 * total_s / count:.1f} ms from the last byte to the swap; sent "
        f"and answered in {1000 * np.median(pusher.seconds):.1f} ms, at most {slowest_ms:.1f} ms"
    )
    versions = {wire.version(content) for session in sessions for content in session.answers}
    differences = replay(sessions, pool, wire, loaded, manifest.spec)
    print(
        f"{differences.answers} answers of {len(versions)} versions under pushes, of which "
        f"{differences.differing} differ from those of the version that they name: "
        f"{differences.other_actions} in an action, by {differences.largest:.1e} at most"
    )


if __name__ == "__main__":
    asyncio.run(main())
