"""Measures a served artifact as it grows, where it is asked too much, and over time.

    python -m benchmarks.serving growth   --artifact DIR [--plots docs/plots]
    python -m benchmarks.serving overload --artifact DIR
    python -m benchmarks.serving soak     --artifact DIR

Each starts a server of its own, drives it with `service.bench`'s clients on the same machine, steps
every trajectory again on the artifact, and prints what was found as JSON; `--plots` takes
matplotlib (`pip install -e '.[plots]'`).
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpcore
import numpy as np
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from export.manifest import Manifest
from service.bench.load import Load, LoadGenerator, Session, end_sessions, new_sessions
from service.bench.pool import Pool
from service.bench.replay import replay
from service.bench.wire import wire_of
from service.runtime.load import load_runtime

CLIENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LIVE_SESSIONS = (10, 100, 1_000, 10_000, 100_000)
ENVS = 64
ROWS = 64
"""Of each vector in the soak."""
VECTOR_CLIENTS = 4
VECTORS_PER_S = 25.0
WIRE = ("json", "safetensors")
"""Of single environments and of vectors."""
MAX_WAITING = 256
SEED = 0


class Server:
    """`python -m service` on a free port, and what its `/metrics` say."""

    def __init__(self, url: str, manifest: Manifest) -> None:
        self.url = url
        self._spec = manifest.spec
        self._pool = Pool.random(manifest.spec, SEED)

    def clients(
        self, num_envs: int, patience_s: float = 60.0, num_rows: int | None = None
    ) -> LoadGenerator:
        """Of single environments in JSON, or of vectors of `num_rows` in safetensors."""
        wire = wire_of(WIRE[num_rows is not None], self._spec, self._pool, num_rows)
        return LoadGenerator(self.url, wire, num_connections=num_envs, patience_s=patience_s)

    async def metrics(self) -> dict[str, float]:
        async with httpcore.AsyncConnectionPool() as http:
            response = await http.request("GET", f"{self.url}/metrics")
        families = text_string_to_metric_families(response.content.decode())
        return {
            " ".join([sample.name, *sample.labels.values()]): sample.value
            for family in families
            for sample in family.samples
        }

    async def resident_mib(self) -> float:
        return (await self.metrics())["process_resident_memory_bytes"] / 2**20


@asynccontextmanager
async def serving(artifact: Path, *options: str) -> AsyncIterator[Server]:
    command = [sys.executable, "-m", "service", "--artifact", str(artifact), "--port", "0"]
    command += ["--log-level", "warning", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            ready = next((line for line in lines if line.startswith("ready: ")), None)
            if ready is None:
                raise SystemExit("the server did not start")
            yield Server(ready.split()[3].removesuffix("/act"), Manifest.read(artifact))
        finally:
            process.terminate()


async def growth(artifact: Path) -> dict[str, Any]:
    """Closed loop: from 1 client to 1024, then 64 clients over 10 to 100,000 live sessions."""
    by_clients, by_sessions = [], []
    async with serving(artifact) as server:
        for num_clients in CLIENTS:
            clients, sessions = server.clients(num_clients), new_sessions(num_clients, SEED)
            await clients.closed(sessions, 1.0)
            load = await clients.closed(sessions, 4.0)
            by_clients.append({"clients": num_clients, **_figures(load)})
            _note(by_clients[-1])
            await end_sessions(server.url, sessions)
    async with serving(artifact, "--max-sessions", str(max(LIVE_SESSIONS))) as server:
        empty_mib = await server.resident_mib()
        clients = server.clients(ENVS)
        sessions = []
        for number in LIVE_SESSIONS:
            sessions += new_sessions(number - len(sessions), SEED + len(sessions))
            while new := [session for session in sessions if not session.answers]:
                await clients.closed(new, min(5.0, len(new) / 3000))
            load = await clients.closed(sessions, 5.0)
            metrics = await server.metrics()
            assert metrics["tamiyo_sessions"] == number
            grown_mib = metrics["process_resident_memory_bytes"] / 2**20 - empty_mib
            figures = {"sessions": number, **_figures(load), "grown_mib": grown_mib}
            by_sessions.append(figures)
            _note(figures)
    return {"by_clients": by_clients, "by_sessions": by_sessions}


async def overload(artifact: Path, seconds: float) -> dict[str, Any]:
    """As many clients as may wait; four times as many, first patient, then not; then as before."""
    async with serving(artifact, "--max-waiting", str(MAX_WAITING)) as server:
        sessions = new_sessions(4 * MAX_WAITING, SEED)
        within, patient = server.clients(MAX_WAITING), server.clients(len(sessions))
        impatient = server.clients(len(sessions), patience_s=0.05)
        await within.closed(sessions[:MAX_WAITING], 2.0)
        before = await within.closed(sessions[:MAX_WAITING], 15.0)
        resident_mib = [await server.resident_mib()]
        sampling = asyncio.create_task(_sample(server.resident_mib, resident_mib))
        loads = {
            "before": before,
            "beyond": await patient.closed(sessions, seconds),
            "beyond, ignoring Retry-After": await impatient.closed(sessions, seconds / 3),
        }
        sampling.cancel()
        loads["after"] = await within.closed(sessions, 15.0)
        resident_mib.append(await server.resident_mib())
    return {
        **{name: _figures(load) for name, load in loads.items()},
        "resident_mib": resident_mib,
        **_checked(artifact, sessions),
    }


async def soak(artifact: Path, seconds: float) -> dict[str, Any]:
    """Open loop at half of the peak, and vectors of `ROWS` beside.

    Sessions start all the time, half are ended, half expire.
    """
    slice_s = 20.0
    rounds = round(seconds / slice_s)
    everything: list[Session] = []
    vectors: list[Session] = []
    errors: Counter[str] = Counter()
    latencies_ms: list[float] = []
    vector_latencies_ms: list[float] = []
    samples: list[dict[str, float]] = []
    async with serving(artifact, "--session-idle-s", "30") as server:
        clients = server.clients(ENVS)
        vector_clients = server.clients(VECTOR_CLIENTS, num_rows=ROWS)
        warm = new_sessions(ENVS, SEED)
        await clients.closed(warm, 3.0)
        peak = await clients.closed(warm, 10.0)
        peak_per_s = peak.num_answers / peak.elapsed_s
        everything += warm
        await asyncio.sleep(1.0)
        idle = await server.metrics()
        for round_ in range(rounds):
            sessions = new_sessions(4 * ENVS, SEED + len(everything))
            of_vectors = new_sessions(2 * VECTOR_CLIENTS, SEED + len(vectors), ROWS)
            load, vector_load = await asyncio.gather(
                clients.open(sessions, slice_s, 0.5 * peak_per_s),
                vector_clients.open(of_vectors, slice_s, VECTORS_PER_S),
            )
            everything += sessions
            vectors += of_vectors
            errors += load.errors + vector_load.errors
            latencies_ms += load.latencies_ms
            vector_latencies_ms += vector_load.latencies_ms
            await end_sessions(server.url, sessions[::2] + of_vectors[::2])
            samples.append(await server.metrics())
            _note({"round": round_, "resident_mib": _mib(samples[-1]), **_figures(load)})
        await asyncio.sleep(31.0)
        end = await server.metrics()
    kept = ("process_open_fds", "tamiyo_tasks", "tamiyo_sessions", "tamiyo_waiting")
    events = {
        name.partition(" ")[2]: value
        for name, value in end.items()
        if name.startswith("tamiyo_session_events_total")
    }
    return {
        "peak_per_s": peak_per_s,
        "answers": len(latencies_ms),
        "latency_ms": _percentiles(latencies_ms),
        "vector_answers": len(vector_latencies_ms),
        "vector_latency_ms": _percentiles(vector_latencies_ms),
        "errors": dict(errors),
        "resident_mib": [_mib(sample) for sample in samples],
        "idle_before": {name: idle[name] for name in kept},
        "idle_after": {name: end[name] for name in kept},
        "session_events": events,
        **_checked(artifact, everything),
        "vectors": _checked(artifact, vectors, ROWS),
    }


async def _sample(read: Callable[[], Coroutine[Any, Any, float]], into: list[float]) -> None:
    while True:
        await asyncio.sleep(2.0)
        into.append(await read())


def _mib(metrics: dict[str, float]) -> float:
    return metrics["process_resident_memory_bytes"] / 2**20


def _figures(load: Load) -> dict[str, Any]:
    return {
        "answers_per_s": load.num_answers / load.elapsed_s,
        "latency_ms": _percentiles(load.latencies_ms),
        "errors": dict(load.errors),
    }


def _percentiles(latencies_ms: list[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(latencies_ms, p)) for p in (50, 99)}


def _checked(
    artifact: Path, sessions: list[Session], num_rows: int | None = None
) -> dict[str, Any]:
    manifest = Manifest.read(artifact)
    runtime = load_runtime(artifact, manifest, name="onnx", device="cpu", num_threads=1)
    pool = Pool.random(manifest.spec, SEED)
    wire = wire_of(WIRE[num_rows is not None], manifest.spec, pool, num_rows)
    return {"differences": replay(sessions, pool, wire, runtime, manifest.spec)._asdict()}


def _note(figures: dict[str, Any]) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {json.dumps(figures)}\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("growth", "overload", "soak"))
    parser.add_argument("--artifact", type=Path, required=True, help="one with ONNX")
    parser.add_argument("--seconds", type=float, help="of overload (60) or soak (600)")
    parser.add_argument("--plots", type=Path, help="growth: the directory for its plots")
    options = parser.parse_args()
    if options.what == "growth":
        found = uvloop.run(growth(options.artifact))
        if options.plots:
            from benchmarks.plots import plot_growth

            plot_growth(found, options.plots)
    elif options.what == "overload":
        found = uvloop.run(overload(options.artifact, options.seconds or 60.0))
    else:
        found = uvloop.run(soak(options.artifact, options.seconds or 600.0))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
