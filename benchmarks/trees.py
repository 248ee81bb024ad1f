"""Two versions of the code, at the same time on one core: requests per second of CPU.

    git worktree add --detach /tmp/before HEAD~1
    python -m benchmarks.trees --artifact artifacts/tamiyo-v1 /tmp/before .

One after the other they would meet a machine of another speed; side by side they share each of its
moods. Both run on the first core, their clients on the second, closed loop. Counted is what each
answered for the CPU time it took.
"""

import argparse
import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from export.manifest import Manifest
from service.bench.load import LoadGenerator, new_sessions
from service.bench.pool import Pool
from service.bench.wire import wire_of

SERVERS_CORE, CLIENTS_CORE = 0, 1
ROWS_OF_STATES = 1024
SEED = 5


class Served(NamedTuple):
    url: str
    pid: int

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(tree: Path, artifact: Path) -> Iterator[Served]:
    command = [sys.executable, "-m", "service", "--artifact", str(artifact.resolve())]
    command += ["--port", "0", "--log-level", "warning", "--runtime", "onnx"]
    paths = os.pathsep.join(str(tree.resolve() / part) for part in ("", "client"))
    with subprocess.Popen(
        command,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {SERVERS_CORE}),
    ) as process:
        try:
            assert process.stdout is not None
            ready = next(line for line in process.stdout if line.startswith("ready: "))
            yield Served(ready.split()[3].removesuffix("/act"), process.pid)
        finally:
            process.terminate()


async def measure(servers: list[Served], options: argparse.Namespace) -> list[float]:
    """Of each, requests per second of CPU, all at once."""
    spec = Manifest.read(options.artifact).spec
    wire = wire_of(
        "json" if options.rows is None else "safetensors",
        spec,
        Pool.random(spec, SEED),
        options.rows,
    )
    # As many rows of states as there may be, or some would be lost to others.
    num_sessions = max(ROWS_OF_STATES // (options.rows or 1), options.clients)
    before_s = [server.cpu_s() for server in servers]
    loads = await asyncio.gather(
        *(
            LoadGenerator(server.url, wire, num_connections=options.clients).closed(
                new_sessions(num_sessions, SEED, options.rows), options.seconds
            )
            for server in servers
        )
    )
    assert not any(load.errors for load in loads), [load.errors for load in loads]
    return [
        load.num_answers / (server.cpu_s() - began_s)
        for server, load, began_s in zip(servers, loads, before_s, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trees", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    os.sched_setaffinity(0, {CLIENTS_CORE})
    with ExitStack() as stack:
        servers = [
            stack.enter_context(serving(tree, options.artifact))
            for tree in (options.before, options.after)
        ]
        rounds = [asyncio.run(measure(servers, options)) for _ in range(options.rounds)]
    before, after = np.array(rounds).T
    ratios = after / before
    print(
        f"{options.clients} clients: {np.median(before):.0f} and {np.median(after):.0f} requests "
        f"per CPU second; after / before {np.median(ratios):.3f} "
        f"({ratios.min():.3f} to {ratios.max():.3f} in {options.rounds} rounds)"
    )


if __name__ == "__main__":
    main()
