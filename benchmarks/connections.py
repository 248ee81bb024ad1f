"""Measures what other people's connections cost: slow ones, reset ones, and too many.

    python -m benchmarks.connections slow  --artifact DIR [--seconds 20]
    python -m benchmarks.connections reset --artifact DIR [--number 30000]
    python -m benchmarks.connections many  --artifact DIR [--seconds 70]

`slow`: the p99 of 32 clients beside 500 that send a byte a second, half of them in their headers,
half in their bodies, and without them, in turn; then how the 500 end. `reset`: the memory of a
server whose clients each connect, ask once and reset. `many`: a server that may have 128
descriptors and has 300 connections. Each starts a server of its own and prints what was found as
JSON. Linux only.
"""

import argparse
import asyncio
import json
import multiprocessing
import re
import socket
import struct
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.process import ServerProcess, server_process
from benchmarks.serving import Server
from export.manifest import Manifest
from model.spec import PolicySpec
from service.bench.load import new_sessions
from service.bench.pool import Pool

Address = tuple[str, int]

NUM_SLOW = 500
NUM_CLIENTS = 32
ROUNDS = 2
READ_TIMEOUT_S = 30
KEEP_ALIVE_S = 75
MAX_FILES = 128
NUM_MANY = 300
ANSWER_S = 10.0
SEED = 0
SLOW_STARTS = (
    b"POST /act HTTP/1.1\r\nHost: slow\r\nX-Slow: ",
    b"POST /act HTTP/1.1\r\nHost: slow\r\nContent-Type: application/json\r\n"
    b"Content-Length: 2000\r\n\r\n{",
)
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s


async def slow(artifact: Path, seconds: float) -> dict[str, Any]:
    """Rounds without and with the slow ones, then what becomes of them."""
    rounds: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    async with server_process(artifact, "--read-timeout-s", str(READ_TIMEOUT_S)) as server:
        served = Server(server.url, Manifest.read(artifact))
        clients, sessions = served.clients(NUM_CLIENTS), new_sessions(NUM_CLIENTS, SEED)
        await clients.closed(sessions, 3.0)
        for _ in range(ROUNDS):
            for name, its_rounds in rounds.items():
                drip = Drip(server.address, again=True) if name == "with" else None
                load = await clients.closed(sessions, seconds)
                if drip is not None:
                    await drip.end()
                figures = {f"p{p}_ms": float(np.percentile(load.latencies_ms, p)) for p in (50, 99)}
                figures |= {"answers_per_s": load.num_answers / load.elapsed_s}
                figures |= {"errors": load.errors.total()}
                its_rounds.append(figures)
                _note(name, figures)
        drip = Drip(server.address, again=False)
        await asyncio.sleep(READ_TIMEOUT_S + 5.0)
        ended = await drip.end()
    p99_ms = {
        name: float(np.median([figures["p99_ms"] for figures in its_rounds]))
        for name, its_rounds in rounds.items()
    }
    return {
        "slow_connections": NUM_SLOW,
        **rounds,
        "p99_ratio": p99_ms["with"] / p99_ms["without"],
        "slow_ones": ended,
    }


class Drip:
    """A process of slow connections, so that they do not slow the clients that are measured."""

    def __init__(self, address: Address, *, again: bool) -> None:
        self._pipe, its_end = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=drip, args=(its_end, address, again)
        )
        self._process.start()
        self._pipe.recv()  # all of them are connected

    async def end(self) -> dict[str, Any]:
        """How those that the server has ended did end."""
        self._pipe.send(None)
        ended: dict[str, Any] = await asyncio.to_thread(self._pipe.recv)
        await asyncio.to_thread(self._process.join)
        return ended


def drip(pipe: Pipe, address: Address, again: bool) -> None:
    """Slow connections until something comes through the pipe; `again`: ended ones come back."""
    statuses: Counter[str] = Counter()
    open_s: list[float] = []

    async def one(number: int, connected: asyncio.Semaphore) -> None:
        while True:
            reader, writer = await asyncio.open_connection(*address)
            start_s = time.monotonic()
            connected.release()
            writer.write(SLOW_STARTS[number % 2])
            reading = asyncio.create_task(reader.read())
            while not reading.done():
                writer.write(b"x" if number % 2 == 0 else b" ")
                await asyncio.wait([reading], timeout=1.0)
            answer = b"" if reading.exception() else reading.result()
            found = re.match(rb"HTTP/1\.1 (\d+)", answer)
            statuses[found.group(1).decode() if found else "no answer"] += 1
            open_s.append(time.monotonic() - start_s)
            writer.close()
            if not again:
                return

    async def all_of_them() -> None:
        connected = asyncio.Semaphore(0)
        tasks = [asyncio.create_task(one(number, connected)) for number in range(NUM_SLOW)]
        for _ in tasks:
            await connected.acquire()
        pipe.send(None)
        await asyncio.to_thread(pipe.recv)
        num_open = sum(not task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        pipe.send(
            {
                "ended_by_the_server": len(open_s),
                "still_open": num_open,
                "answers": dict(statuses),
                "longest_open_s": max(open_s, default=None),
            }
        )

    asyncio.run(all_of_them())


async def reset(artifact: Path, number: int) -> dict[str, Any]:
    """One connection after another: a request, its answer, a reset."""
    async with server_process(artifact, "--keep-alive-s", str(KEEP_ALIVE_S)) as server:
        request = act_request(Manifest.read(artifact).spec)
        with socket.create_connection(server.address) as kept:
            for _ in range(2000):  # so that what a server keeps of any request is there
                ask(kept, request)
        await asyncio.sleep(1.0)
        before = await seen(server)
        start_s = time.monotonic()
        for _ in range(number):
            with socket.create_connection(server.address) as connection:
                ask(connection, request)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        elapsed_s = time.monotonic() - start_s
        after = await seen(server)
    return {
        "connections": number,
        "per_s": number / elapsed_s,
        "keep_alive_s": KEEP_ALIVE_S,
        "before": before,
        "after": after,
        "grown_mib": after["resident_mib"] - before["resident_mib"],
    }


async def many(artifact: Path, seconds: float) -> dict[str, Any]:
    """More connections than descriptors, for a while; then none, and then a new one."""
    async with server_process(artifact, max_files=MAX_FILES) as server:
        request = act_request(Manifest.read(artifact).spec)
        first = socket.create_connection(server.address, ANSWER_S)
        ask(first, request)
        num_lines = server.log().count("\n")
        others = [socket.create_connection(server.address, ANSWER_S) for _ in range(NUM_MANY)]
        cpu_s = server.cpu_s()
        for _ in range(round(seconds)):
            ask(first, request)  # who is in is served
            await asyncio.sleep(1.0)
        cpu_s = server.cpu_s() - cpu_s
        num_descriptors = server.num_descriptors()
        served = 0
        for other in others:
            other.settimeout(0.2)
            try:
                ask(other, request)
                served += 1
            except OSError:
                break
        for other in others:
            other.close()
        logged = server.log().splitlines()[num_lines:]
        with socket.create_connection(server.address, ANSWER_S) as after:
            ask(after, request)
        return {
            "connections": NUM_MANY + 1,
            "max_files": MAX_FILES,
            "seconds": seconds,
            "descriptors": num_descriptors,
            "served_of_the_others": served,
            "processor_share": cpu_s / seconds,
            "lines_logged": len(logged),
            "the_first_of_them": logged[0] if logged else None,
            "a_new_client_afterwards": "served",
            "exit_code": await server.stop(),
        }


def act_request(spec: PolicySpec) -> bytes:
    body = b"{%b}" % Pool.random(spec, SEED).bodies(spec)[0]
    head = "POST /act HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(body)}\r\n\r\n".encode() + body


def ask(connection: socket.socket, request: bytes) -> None:
    """Sends it and reads its answer, which must be a good one. Raises OSError where none comes."""
    connection.sendall(request)
    received = b""
    while b"\r\n\r\n" not in received:
        received += _some(connection)
    head, _, content = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    if not head.startswith(b"HTTP/1.1 200 ") or length is None:
        raise ConnectionError(f"not answered: {head!r}")
    while len(content) < int(length.group(1)):
        content += _some(connection)


def _some(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    if not data:
        raise ConnectionError("the connection was closed before the answer")
    return data


async def seen(server: ServerProcess) -> dict[str, Any]:
    """The server's memory and descriptors, and what its metrics say of connections."""
    resident_mib, num_descriptors = server.resident_mib(), server.num_descriptors()
    reader, writer = await asyncio.open_connection(*server.address)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    gauges = dict(re.findall(r"^(tamiyo_\w*connections\w*(?:\{.*\})?) (\S+)$", text, re.MULTILINE))
    return {"resident_mib": resident_mib, "descriptors": num_descriptors, "gauges": gauges}


def _note(what: str, figures: dict[str, Any]) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {what} {json.dumps(figures)}\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("slow", "reset", "many"))
    parser.add_argument("--artifact", type=Path, required=True, help="one with ONNX")
    parser.add_argument("--seconds", type=float, help="of a round of slow (20), or of many (70)")
    parser.add_argument("--number", type=int, default=30_000, help="of reset (%(default)s)")
    options = parser.parse_args()
    if options.what == "slow":
        found = uvloop.run(slow(options.artifact, options.seconds or 20.0))
    elif options.what == "reset":
        found = uvloop.run(reset(options.artifact, options.number))
    else:
        found = uvloop.run(many(options.artifact, options.seconds or 70.0))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
