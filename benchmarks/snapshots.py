"""Measures what a snapshot costs: its time and size, and for how long it holds the event loop.

    python -m benchmarks.snapshots --artifact DIR [--rows 100000] [--directory DIR]

Starts as many sessions of one environment in an engine of this process, writes them while the loop
turns, with and without other requests, and a last time as at a server's end; then another engine
goes on from that. Prints what was found as JSON.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from export.manifest import Manifest
from service.engine.block import Answer, Block
from service.engine.engine import Engine
from service.errors import ServiceError
from service.runtime.load import load_runtime
from service.server import _settle_garbage
from service.settings import Settings

ROUND_ROWS = 2048
"""Requests that wait at once."""
NUM_BUSY = 32


class Turns:
    """How long each turn of the loop took, while it is entered."""

    def __init__(self) -> None:
        self.longest_ms = 0.0
        self.number = 0

    async def watch(self) -> None:
        before_s = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now_s = time.perf_counter()
            self.longest_ms = max(self.longest_ms, 1000 * (now_s - before_s))
            self.number += 1
            before_s = now_s


def engine_of(artifact: Path, snapshot: Path, num_rows: int) -> Engine:
    manifest = Manifest.read(artifact)
    runtime = load_runtime(artifact, manifest, name="onnx", device="cpu", num_threads=1)
    settings = Settings(
        artifact=artifact, snapshot=snapshot, max_sessions=num_rows, session_idle_s=1e6
    )
    return Engine(manifest, runtime, settings)


async def answered(engine: Engine, blocks: Sequence[Block]) -> None:
    """Returns when all are."""
    left = len(blocks)
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def settle(answer: Answer | ServiceError) -> None:
        nonlocal left
        if isinstance(answer, ServiceError):
            done.set_exception(answer)
        left -= 1
        if not left and not done.done():
            done.set_result(None)

    for block in blocks:
        engine.submit(block, settle, is_wanted=lambda: True, timeout_s=inf)
    await done


def blocks(artifact: Path, first: int, number: int, step: int) -> list[Block]:
    spec = Manifest.read(artifact).spec
    observation = np.full((1, spec.observation_dim), 0.1, dtype=np.float32)
    mask = np.ones((1, spec.num_choices), dtype=np.bool_)
    return [
        Block(
            (observation, mask),
            session_id=f"environment-{at}",
            run="0",
            step=step,
            starts=step == 0,
        )
        for at in range(first, first + number)
    ]


async def written(engine: Engine, artifact: Path, *, is_busy: bool) -> dict[str, float]:
    """One snapshot while the loop turns, and the longest turn with it and without."""
    assert engine.snapshots is not None
    step = 1

    async def others() -> None:
        nonlocal step
        while True:
            await answered(engine, blocks(artifact, 0, NUM_BUSY, step))
            step += 1

    busy = [asyncio.create_task(others())] if is_busy else []
    longest_ms = []
    for during in (asyncio.sleep(1.0), engine.snapshots.write()):
        turns = Turns()
        watching = asyncio.create_task(turns.watch())
        await during
        watching.cancel()
        longest_ms.append(turns.longest_ms)
    for task in busy:
        task.cancel()
    assert engine.snapshots.last_s is not None
    return {
        "seconds": engine.snapshots.last_s,
        "longest_turn_ms": longest_ms[1],
        "longest_turn_without_ms": longest_ms[0],
    }


async def measured(artifact: Path, snapshot: Path, num_rows: int) -> dict[str, Any]:
    engine = engine_of(artifact, snapshot, num_rows)
    engine.start()
    assert engine.warm_up.done is not None
    assert engine.snapshots is not None
    await engine.warm_up.done
    _settle_garbage()
    for first in range(0, num_rows, ROUND_ROWS):
        number = min(ROUND_ROWS, num_rows - first)
        await answered(engine, blocks(artifact, first, number, 0))
    figures: dict[str, Any] = {"rows": num_rows}
    figures["idle"] = await written(engine, artifact, is_busy=False)
    figures["mib"] = snapshot.stat().st_size / 2**20
    frames_s = []
    frames = engine.snapshots._kept.frames(is_final=False)
    began_s = time.perf_counter()
    for _ in frames:
        frames_s.append(time.perf_counter() - began_s)
        began_s = time.perf_counter()
    figures["frame_ms"] = {f"p{p}": 1000 * float(np.percentile(frames_s, p)) for p in (50, 99, 100)}
    figures["busy"] = await written(engine, artifact, is_busy=True)
    await engine.stop()
    figures["last_s"] = engine.snapshots.last_s
    return figures


def restored(artifact: Path, snapshot: Path, num_rows: int) -> dict[str, float]:
    engine = engine_of(artifact, snapshot, num_rows)
    assert engine.snapshots is not None
    began_s = time.perf_counter()
    found = engine.snapshots.restore()
    restored_s = time.perf_counter() - began_s
    assert found is not None
    began_s = time.perf_counter()
    engine.snapshots.outdate()
    return {
        "sessions": found.num_sessions,
        "restored_s": restored_s,
        "outdated_ms": 1000 * (time.perf_counter() - began_s),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--directory", type=Path, help="where the snapshot is written")
    arguments = parser.parse_args()
    with TemporaryDirectory(dir=arguments.directory) as directory:
        snapshot = Path(directory) / "sessions"
        figures = asyncio.run(measured(arguments.artifact, snapshot, arguments.rows))
        figures |= restored(arguments.artifact, snapshot, arguments.rows)
    json.dump(figures, sys.stdout, indent=2)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
