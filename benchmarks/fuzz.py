"""Fuzzes a server: many connections send what no client should, and one beside them behaves.

    python -m benchmarks.fuzz [--seconds 600] [--seed N] [--artifact DIR ...]
    python -m benchmarks.fuzz --files [--seconds 600] [--seed N]

Starts a server for each artifact (by default two that it exports, small ones of V1 and V2). Every
answer must have a documented status and the one form of errors; a client beside the fuzz must get,
to the bit, the answers it got before; no traceback in the log; memory level from half time on;
descriptors as before; and exit code 0 on SIGTERM. Exit codes: 0 all held; 1 something did not, and
`--failures` holds what was sent, one file for each kind. With `--files` there is no server: the
reader of safetensors files is fuzzed alone, against the `safetensors` package.
"""

import argparse
import asyncio
import json
import re
import socket
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, cast

import uvloop

from benchmarks.mutation import Fuzzer, Stream
from benchmarks.process import Memory, ServerProcess, server_process
from benchmarks.safetensors_files import fuzz_files
from export.manifest import Manifest
from model.spec import PolicySpec
from service.bench.connection import Connection
from service.bench.pool import Pool

NUM_CONNECTIONS = 48
PATIENCE_S = 0.5
ANSWER_S = 30.0
"""Within this, a good request is answered."""
SETTLE_S = 10.0
WITNESS_STEPS = 200
MAX_SESSIONS = 512
NUM_RECENT = 300
DOCUMENTED = {
    *(200, 204, 400, 401, 403, 404, 405, 408, 409, 410, 413, 414, 415, 422, 429, 431, 503, 504)
}
RAISED = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Group)\b.*", re.MULTILINE)
"""The line a traceback ends with."""
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    content: bytes


class Wire(asyncio.Protocol):
    """One connection: sends a stream and keeps every byte that comes back."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.has_ended = False
        self._news = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.received += data
        self._news.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.has_ended = True
        self._news.set()

    async def send(self, stream: Stream) -> None:
        for piece in stream.pieces:
            if self.transport.is_closing():
                break  # the server has ended it, as it may
            self.transport.write(piece)
            await asyncio.sleep(0)
        match stream.ending:
            case "shuts its side" if not self.transport.is_closing():
                self.transport.write_eof()
            case "closes":
                self.transport.close()
            case "resets":
                self.reset()
        patience_s = ANSWER_S if stream.num_answers is not None else PATIENCE_S
        while not self.has_ended:
            self._news.clear()
            try:
                async with asyncio.timeout(patience_s):
                    await self._news.wait()
            except TimeoutError:
                break

    def reset(self) -> None:
        end = self.transport.get_extra_info("socket")
        if end is not None and not self.transport.is_closing():
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()


class Found:
    """What was seen: answers by status, and each kind of failure with the first that showed it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.statuses: Counter[int] = Counter()
        self.failures: Counter[str] = Counter()
        self.num_connections = 0
        self.num_witnessed = 0
        self.recent: deque[Stream] = deque(maxlen=NUM_RECENT)

    def fail(self, kind: str, *streams: Stream, detail: str = "") -> None:
        self.failures[kind] += 1
        if self.failures[kind] > 1:
            return
        print(f"FAILED: {kind} {detail}", flush=True)
        self._directory.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"\W+", "-", kind).strip("-")
        for number, stream in enumerate(streams):
            path = self._directory / f"{name}-{number}.bin"
            path.write_bytes(stream.content)
            if number == 0:
                sizes = [len(piece) for piece in stream.pieces]
                print(f"  sent {path} in pieces of {sizes}; then the client {stream.ending}")

    def check(self, stream: Stream, wire: Wire) -> None:
        try:
            answers = list(parsed(bytes(wire.received), is_whole=wire.has_ended))
        except ValueError as error:
            if stream.ending in ("closes", "resets"):
                return
            self.fail("an answer that is no HTTP", stream, detail=str(error))
            return
        for answer in answers:
            self.statuses[answer.status] += 1
            wrong = fault(answer)
            if wrong:
                self.fail(wrong, stream, detail=repr(answer))
        for answer in answers[: stream.num_good]:
            if answer.status in (400, 405, 413, 415, 422, 431):
                self.fail("a good request refused for its form", stream, detail=repr(answer))
        if stream.num_answers is not None and len(answers) != stream.num_answers:
            detail = f"{len(answers)} answers to {stream.num_answers} requests"
            self.fail("good requests without their answers", stream, detail=detail)


def parsed(received: bytes, *, is_whole: bool) -> Iterator[Answer]:
    """The answers in `received`; where it is not the whole, the last may be cut off.

    Raises ValueError where something else is among them.
    """
    at = 0
    while at < len(received):
        end = received.find(b"\r\n\r\n", at)
        if end < 0:
            if is_whole:
                raise ValueError(f"{received[at : at + 200]!r}")
            return
        status_line, *lines = received[at:end].decode("latin-1").split("\r\n")
        if not re.fullmatch(r"HTTP/1\.1 \d{3} [\w \-']+", status_line):
            raise ValueError(f"{status_line[:200]!r}")
        headers = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or name.lower() in headers:
                raise ValueError(f"{line!r} among the headers")
            headers[name.lower()] = value.strip()
        status = int(status_line[9:12])
        at = end + 4
        if status == 100:
            continue
        if status != 204 and "content-length" not in headers:
            raise ValueError(f"{status_line} has no length")
        length = int(headers.get("content-length", 0))
        if at + length > len(received):
            if is_whole:
                raise ValueError(f"{status_line} is cut off")
            return
        yield Answer(status, headers, received[at : at + length])
        at += length


def fault(answer: Answer) -> str:
    """What is wrong with an answer, in a few words; nothing, as a rule."""
    if answer.status not in DOCUMENTED:
        return f"status {answer.status}"
    if answer.status < 300:
        return ""
    if answer.headers.get("content-type") != "application/json":
        return f"a {answer.status} that is not JSON"
    try:
        error = json.loads(answer.content)
        is_right = error.keys() == {"error", "error_type"} and all(
            isinstance(text, str) and text and "\n" not in text for text in error.values()
        )
    except (ValueError, AttributeError):
        is_right = False
    return "" if is_right else f"a {answer.status} of another form"


class Witness:
    """A client that behaves: it plays one session again and again, and must be answered alike."""

    def __init__(self, url: str, spec: PolicySpec, name: str) -> None:
        self._connection = Connection(f"{url}/act")
        self._bodies = Pool.random(spec, 1).bodies(spec)
        self._name = name.encode()
        self._rounds = count()
        self.answers: list[bytes] = []

    async def play(self) -> list[bytes]:
        """Every answer of one more round. Raises OSError and ValueError where there is none."""
        answers = []
        round_ = next(self._rounds)
        for step in range(WITNESS_STEPS):
            body = (
                b'{"session_id":"%b","episode":"%d","episode_start":%b,"seed":5,"step":%d,%b}'
                % (
                    self._name,
                    round_,
                    b"true" if step == 0 else b"false",
                    step,
                    self._bodies[step % len(self._bodies)],
                )
            )
            async with asyncio.timeout(ANSWER_S):
                response = await self._connection.post(body)
            if response.status != 200:
                raise ValueError(f"step {step}: {response}")
            answers.append(response.content)
        return answers

    async def watch(self, expected: list[bytes], found: Found, end_s: float) -> None:
        while time.monotonic() < end_s:
            try:
                answers = await self.play()
            except (OSError, ValueError) as error:
                found.fail("the witness was refused", *found.recent, detail=str(error))
                self._connection.close()
                continue
            found.num_witnessed += len(answers)
            if answers != expected:
                found.fail("the witness got another answer", *found.recent)

    def close(self) -> None:
        self._connection.close()


async def fuzz(server: ServerProcess, fuzzer: Fuzzer, found: Found, end_s: float) -> None:
    """Streams on one connection after another."""
    loop = asyncio.get_running_loop()
    while time.monotonic() < end_s:
        stream = fuzzer.stream()
        found.recent.append(stream)
        try:
            _, wire = await loop.create_connection(Wire, *server.address)
        except OSError as error:
            found.fail("a connection was refused", *found.recent, detail=str(error))
            if not server.is_running():
                return
            continue
        await wire.send(stream)
        wire.reset()
        found.num_connections += 1
        found.check(stream, wire)


async def sample_mib(server: ServerProcess, into: list[float]) -> None:
    while server.is_running():
        into.append(server.resident_mib())
        await asyncio.sleep(0.5)


async def fuzz_artifact(artifact: Path, seconds: float, seed: int, failures: Path) -> bool:
    """Whether everything held."""
    manifest = Manifest.read(artifact)
    spec = manifest.spec
    found = Found(failures / manifest.name)
    options = ("--log-level", "warning", "--max-sessions", str(MAX_SESSIONS))
    async with server_process(artifact, *options) as server:
        num_descriptors = server.num_descriptors()
        witnesses = [Witness(server.url, spec, f"witness-{n}") for n in range(2)]
        expected = [await witness.play() for witness in witnesses]
        resident_mib: list[float] = []
        sampling = asyncio.create_task(sample_mib(server, resident_mib))
        fuzzers = [Fuzzer(spec, f"{seed}-{n}") for n in range(NUM_CONNECTIONS)]
        start_s = time.monotonic()
        end_s = start_s + seconds
        await asyncio.gather(
            *(fuzz(server, fuzzer, found, end_s) for fuzzer in fuzzers),
            *(w.watch(e, found, end_s) for w, e in zip(witnesses, expected, strict=True)),
        )
        elapsed_s = time.monotonic() - start_s
        sampling.cancel()
        for witness in witnesses:
            witness.close()
        if not server.is_running():
            found.fail("the server died", *found.recent, detail=server.log()[-2000:])
        else:
            left = await descriptors_left(server, num_descriptors)
            if left:
                found.fail("descriptors that stay open", detail=f"{left} more than before")
        if await server.stop() != 0:
            found.fail("an exit code other than 0 on SIGTERM", detail=server.log()[-2000:])
        log = server.log()
        if "Traceback" in log:
            last_lines = Counter(re.sub("0x[0-9a-f]+", "0x", line) for line in RAISED.findall(log))
            detail = f"{last_lines}, the first:\n{log[log.index('Traceback') :][:2000]}"
            found.fail("a traceback in the log", *found.recent, detail=detail)
        num_lines = log.count("\n")
    memory = Memory.of(resident_mib)
    if not memory.is_level:
        found.fail("memory that grows", detail=str(memory))
    num_answers = sum(found.statuses.values())
    rate = num_answers / elapsed_s
    print(f"{manifest.name}: {found.num_connections:,} connections in {elapsed_s:.0f} s")
    print(f"  {num_answers:,} answers, {rate:,.0f} a second")
    print("  " + ", ".join(f"{status}: {n:,}" for status, n in sorted(found.statuses.items())))
    print(f"  {memory}")
    print(
        f"  witnesses' steps, each as before: {found.num_witnessed:,}; lines logged: {num_lines:,}"
    )
    for kind, number in found.failures.items():
        print(f"  FAILED: {kind}, {number} times")
    return not found.failures


async def descriptors_left(server: ServerProcess, before: int) -> int:
    """How many more than before there are, once the server had time to see every end."""
    for _ in range(round(SETTLE_S / 0.1)):
        if server.num_descriptors() <= before:
            return 0
        await asyncio.sleep(0.1)
    return server.num_descriptors() - before


def export_small_ones(directory: Path) -> list[Path]:
    """An artifact of V1 and one of V2, small enough that the server does little but read."""
    import torch

    from export.exporter import export_policy
    from model.policy import FactoredRecurrentActorCritic

    torch.set_num_threads(1)
    size = {"num_slots": 2, "feature_dim": 12, "hidden_dim": 16, "num_layers": 1}
    specs = {
        "fuzzed-v1": PolicySpec.tamiyo_v1(observation_dim=11, **size),
        "fuzzed-v2": PolicySpec.tamiyo_v2(observation_dim=7, **size),
    }
    for name, spec in specs.items():
        torch.manual_seed(0)
        policy = FactoredRecurrentActorCritic(spec)
        export_policy(
            policy, None, directory / name, name=name, formats=("onnx",), max_batch_size=64
        )
    return [directory / name for name in specs]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="in all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is sent (%(default)s)")
    parser.add_argument("--artifact", type=Path, action="append", help="one with ONNX; repeatable")
    parser.add_argument(
        "--failures", type=Path, default=Path("fuzz-failures"), help="a directory (%(default)s)"
    )
    parser.add_argument(
        "--files", action="store_true", help="the reader of safetensors files, and no server"
    )
    options = parser.parse_args()
    if options.files:
        has_held = fuzz_files(options.seconds, options.seed, options.failures)
        print("everything held" if has_held else "something did not hold")
        return 0 if has_held else 1
    with TemporaryDirectory() as directory:
        artifacts = options.artifact or export_small_ones(Path(directory))
        seconds = options.seconds / len(artifacts)
        have_held = [
            uvloop.run(fuzz_artifact(artifact, seconds, options.seed, options.failures))
            for artifact in artifacts
        ]
    print("everything held" if all(have_held) else "something did not hold")
    return 0 if all(have_held) else 1


if __name__ == "__main__":
    sys.exit(main())
