"""How big the image is, how soon it answers, and how much memory it takes: idle and under load.

python -m benchmarks.image

`IMAGE` and `ENGINE` in the environment name the image (tamiyo-serve:cpu) and the container engine
(docker). The load is `service.bench` with 64 clients, each answer compared with the artifact's own.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from prometheus_client.parser import text_string_to_metric_families

ENGINE = os.environ.get("ENGINE", "docker")
IMAGE = os.environ.get("IMAGE", "tamiyo-serve:cpu")
FLAGS = ["--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
STARTS = 5
START_TIMEOUT_S = 60.0
CLIENTS = 64
LOAD_S = 10.0


def engine(*arguments: str) -> str:
    return subprocess.run([ENGINE, *arguments], capture_output=True, text=True, check=True).stdout


@contextmanager
def running() -> Iterator[tuple[str, str, float]]:
    """A container's id and address, and the seconds from the command to its first ready answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    started_s = time.perf_counter()
    environment = f"--env=TAMIYO_PORT={port}"
    container = engine("run", "-d", "--network", "host", *FLAGS, environment, IMAGE).strip()
    try:
        while not _is_ready(address):
            if time.perf_counter() > started_s + START_TIMEOUT_S:
                raise SystemExit(f"{IMAGE} is not ready after {START_TIMEOUT_S:.0f} s")
            time.sleep(0.01)
        yield container, address, time.perf_counter() - started_s
    finally:
        engine("rm", "--force", container)


def _is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def resident_mib(address: str) -> float:
    for family in text_string_to_metric_families(httpx.get(f"{address}/metrics").text):
        if family.name == "process_resident_memory_bytes":
            return family.samples[0].value / 2**20
    raise SystemExit("the service does not say how much memory it has")


def under_load(address: str, artifact: Path) -> tuple[dict[str, float], float]:
    """The load's figures, and the most memory seen during it."""
    command = [sys.executable, "-m", "service.bench", "--url", address, "--json"]
    command += ["--envs", str(CLIENTS), "--seconds", str(LOAD_S), "--artifact", str(artifact)]
    most_mib = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as bench:
        while bench.poll() is None:
            most_mib = max(most_mib, resident_mib(address))
            time.sleep(0.5)
        assert bench.stdout is not None
        figures: dict[str, float] = json.load(bench.stdout)
    if bench.returncode != 0:
        raise SystemExit(f"answers failed or differ: {figures}")
    return figures, most_mib


def main() -> None:
    (image,) = json.loads(engine("image", "inspect", IMAGE))
    seconds = []
    for _ in range(STARTS):
        with running() as (_, _, ready_s):
            seconds.append(ready_s)
    with running() as (container, address, _), TemporaryDirectory() as directory:
        idle_mib = resident_mib(address)
        artifact = Path(directory) / "artifact"
        engine("cp", f"{container}:/artifacts", str(artifact))
        figures, most_mib = under_load(address, artifact)
    print(f"{IMAGE}: {image['Size'] / 1e6:.0f} MB")
    print(
        f"from `run` to ready: {statistics.median(seconds):.2f} s "
        f"({min(seconds):.2f} to {max(seconds):.2f}, {STARTS} starts)"
    )
    print(f"resident memory: {idle_mib:.0f} MiB idle, {most_mib:.0f} MiB with {CLIENTS} clients")
    print(
        f"{CLIENTS} clients: {figures['answers']} answers, {figures['answers_per_s']:.0f} per "
        f"second, no error, each bit for bit the artifact's own"
    )


if __name__ == "__main__":
    main()
