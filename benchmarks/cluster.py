"""Two services behind HAProxy against one service alone, in turn in one run.

    python -m benchmarks.cluster --artifact artifacts/tamiyo-v1

`deploy/cluster.sh` runs the two, each on a core of its own; `python -m service` the one. Clients,
closed loop, are processes of their own on the same machine. Printed, as JSON: of each load the
medians of its rounds, the ratio within each round, and what HAProxy's and the services' own CPU
time is for a request, from /proc.
"""

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import uvloop

from benchmarks.trees import Served
from export.manifest import Manifest
from service.bench.load import LoadGenerator, new_sessions
from service.bench.pool import Pool
from service.bench.wire import wire_of

ROOT = Path(__file__).resolve().parents[1]
REPLICAS = 2
ROWS = 64
SEED = 0


class Clients(NamedTuple):
    """So many at once, of one environment each in JSON, or of `rows` in safetensors."""

    number: int
    rows: int | None

    def __str__(self) -> str:
        what = "clients" if self.rows is None else f"vectors of {self.rows}"
        return f"{self.number} {what}"


LOADS = (Clients(64, None), Clients(256, None), Clients(2, ROWS), Clients(4, ROWS))


class Subject(NamedTuple):
    """Where clients go, and whose CPU time their requests take."""

    url: str
    services: list[Served]
    balancer: Served | None


class Seen(NamedTuple):
    """By the clients of one process."""

    latencies_ms: list[float]
    errors: Counter[str]
    elapsed_s: float


@contextmanager
def alone(artifact: Path) -> Iterator[Subject]:
    command = [sys.executable, "-m", "service", "--artifact", str(artifact)]
    command += ["--port", "0", "--num-threads", "1", "--log-level", "warning"]
    with started(command, {}) as (process, lines):
        url = url_of(lines[-1])
        yield Subject(url, [Served(url, process.pid)], None)


@contextmanager
def cluster(artifact: Path) -> Iterator[Subject]:
    with socket.create_server(("127.0.0.1", 0)) as unused:  # and those after it, hopefully
        port = unused.getsockname()[1]
    settings = {
        "PORT": str(port),
        "METRICS_BIND": f"127.0.0.1:{port + REPLICAS + 1}",
        "REPLICAS": str(REPLICAS),
        "PYTHON": sys.executable,
    }
    command = [str(ROOT / "deploy" / "cluster.sh"), "--artifact", str(artifact)]
    with started(command, settings) as (_, lines):
        said = "".join(lines)
        pids = [int(pid) for pid in re.findall(r"^replica \d+ is process (\d+)", said, re.M)]
        (balancer,) = re.findall(r"^HAProxy is process (\d+)", said, re.M)
        url = url_of(lines[-1])
        yield Subject(url, [Served(url, pid) for pid in pids], Served(url, int(balancer)))


@contextmanager
def started(
    command: list[str], settings: dict[str, str]
) -> Iterator[tuple["subprocess.Popen[str]", list[str]]]:
    """What it has said until it was ready."""
    with subprocess.Popen(
        command, env=os.environ | settings, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            lines: list[str] = []
            while not (lines and lines[-1].startswith("ready: ")):
                line = process.stdout.readline()
                if not line:
                    raise SystemExit(f"{command[0]} did not start")
                lines.append(line)
            yield process, lines
        finally:
            process.terminate()


def url_of(ready_line: str) -> str:
    return ready_line.split()[3].removesuffix("/act")


def seen(artifact: Path, url: str, clients: Clients, seconds: float) -> Seen:
    """What one process of clients sees of it."""
    spec = Manifest.read(artifact).spec
    form = "json" if clients.rows is None else "safetensors"
    wire = wire_of(form, spec, Pool.random(spec, SEED), clients.rows)
    generator = LoadGenerator(url, wire, num_connections=clients.number)
    sessions = new_sessions(clients.number, SEED, clients.rows)
    load = uvloop.run(generator.closed(sessions, seconds))
    return Seen(load.latencies_ms, load.errors, load.elapsed_s)


async def measure(
    executor: Executor, subject: Subject, clients: Clients, options: argparse.Namespace
) -> dict[str, Any]:
    processes = min(options.processes, clients.number)
    share = clients._replace(number=clients.number // processes)
    cpu_s = [each.cpu_s() for each in (*subject.services, *filter(None, [subject.balancer]))]
    loop = asyncio.get_running_loop()
    of_each = await asyncio.gather(
        *(
            loop.run_in_executor(
                executor, seen, options.artifact, subject.url, share, options.seconds
            )
            for _ in range(processes)
        )
    )
    after_s = [each.cpu_s() for each in (*subject.services, *filter(None, [subject.balancer]))]
    spent_us = [(after - before) * 1e6 for before, after in zip(cpu_s, after_s, strict=True)]
    latencies_ms = np.concatenate([each.latencies_ms for each in of_each])
    number = len(latencies_ms)
    return {
        "answers_per_s": sum(len(each.latencies_ms) / each.elapsed_s for each in of_each),
        "p50_ms": float(np.percentile(latencies_ms, 50)),
        "p99_ms": float(np.percentile(latencies_ms, 99)),
        "services_us_per_request": sum(spent_us[: len(subject.services)]) / number,
        "haproxy_us_per_request": sum(spent_us[len(subject.services) :]) / number,
        "errors": dict(sum((each.errors for each in of_each), Counter())),
    }


def summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds, of each subject and of the ratio between them."""
    figures: dict[str, Any] = {}
    for name in rounds[0]:
        of_it = [each[name] for each in rounds]
        figures[name] = {
            figure: statistics.median(each[figure] for each in of_it)
            for figure in of_it[0]
            if figure != "errors"
        }
        figures[name]["errors"] = sum(sum(each["errors"].values()) for each in of_it)
    for figure in ("answers_per_s", "p99_ms"):
        ratios = [each["cluster"][figure] / each["alone"][figure] for each in rounds]
        figures[f"{figure}, cluster / alone"] = [round(ratio, 3) for ratio in sorted(ratios)]
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load and round (4)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2, help="of clients (2)")
    options = parser.parse_args()
    options.artifact = options.artifact.resolve()
    with ExitStack() as stack:
        subjects = {
            "alone": stack.enter_context(alone(options.artifact)),
            "cluster": stack.enter_context(cluster(options.artifact)),
        }
        # Not forked: these have sockets and threads of their own.
        context = get_context("spawn")
        executor = stack.enter_context(ProcessPoolExecutor(options.processes, mp_context=context))
        found = {}
        for clients in LOADS:
            rounds = [
                {
                    name: asyncio.run(measure(executor, subject, clients, options))
                    for name, subject in subjects.items()
                }
                for _ in range(options.rounds)
            ]
            found[str(clients)] = summary(rounds)
            sys.stderr.write(f"{clients}: {json.dumps(found[str(clients)])}\n")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
