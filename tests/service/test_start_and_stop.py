"""Signals in every phase of a server's life, and what is left behind at its end: real processes."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from export.exporter import export_policy
from export.manifest import Source
from model.policy import FactoredRecurrentActorCritic
from tests.running_server import ROOT, RunningServer, clean_environment, running, service_command

GATED = [sys.executable, "-m", "tests.service.gated_server"]
EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}
STOP_TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def two_formats(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An artifact for which `auto` has to measure."""
    directory = tmp_path_factory.mktemp("artifacts") / "two"
    source = Source(kind="preset", name="two", seed=0)
    formats = ("torchscript", "onnx")
    export_policy(policy, None, directory, name="two", source=source, formats=formats)
    return directory


def flags(artifact: Path, *more: str) -> list[str]:
    return ["--artifact", str(artifact), "--port", "0", *more]


def children_of(process: "subprocess.Popen[str]") -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(number) for number in listed.split()]


def status_of(server: RunningServer, path: str) -> int:
    """One whole exchange on a connection of its own, as soon as the server listens."""
    while True:
        try:
            client = socket.create_connection(server.host_and_port, STOP_TIMEOUT_S)
            break
        except ConnectionRefusedError:
            assert server.process.poll() is None
    with client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        return int(client.recv(12).split()[1])


def measures(process: int) -> bool:
    """Whether it is past its birth, as a copy of its parent, and has NumPy."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_text()
        return (
            "service.runtime.auto" in command
            and "numpy" in Path(f"/proc/{process}/maps").read_text()
        )
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", EXIT_CODES)
@pytest.mark.parametrize("module", ["asyncio.base_events", "pydantic.main", "starlette.routing"])
def test_a_signal_while_modules_are_imported_ends_the_process_in_good_order(
    artifact: Path, module: str, number: signal.Signals
) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "service", *flags(artifact)]
    with running(command, until=f" {module}\n") as server:
        server.process.send_signal(number)
        assert server.wait() == EXIT_CODES[number]
        assert "Traceback" not in server.log()


@pytest.mark.parametrize("number", EXIT_CODES)
def test_a_signal_while_auto_measures_ends_it_and_what_it_measures(
    two_formats: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        service_command(*flags(two_formats, "--runtime", "auto", "--device", "cpu")),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=clean_environment(),
    )
    try:
        children: list[int] = []
        while not any(map(measures, children)):
            assert process.poll() is None
            children = children_of(process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=STOP_TIMEOUT_S)
        assert process.returncode == EXIT_CODES[number]
        assert "Traceback" not in output
        for child in children:
            with pytest.raises(ProcessLookupError):
                os.kill(child, 0)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("line", ["batches up to", "Started server process", "running on"])
@pytest.mark.parametrize("attempt", range(3))
def test_sigterm_between_the_first_line_and_the_last_of_a_start_is_heeded(
    artifact: Path, line: str, attempt: int
) -> None:
    with running(service_command(*flags(artifact)), until=line) as server:
        server.terminate()
        assert server.wait() == 0


def test_a_signal_whose_exception_was_lost_is_heeded_once_the_server_runs(artifact: Path) -> None:
    with running([*GATED, "asked", *flags(artifact)], until="Started server process") as server:
        assert server.wait() == 0
        assert "Shutting down" in server.log()


def test_a_server_takes_all_descriptors_it_may_have(artifact: Path) -> None:
    limited = ["sh", "-c", 'ulimit -Sn 256 && ulimit -Hn 512 && exec "$0" "$@"']
    with running([*limited, *service_command(*flags(artifact))]) as server:
        limits = Path(f"/proc/{server.process.pid}/limits").read_text()
        assert re.search(r"^Max open files +512 +512 ", limits, re.MULTILINE)
        metrics = httpx.get(f"{server.address}/metrics", timeout=STOP_TIMEOUT_S).text
        (limit,) = re.findall(r"^tamiyo_connections_limit (\S+)$", metrics, re.MULTILINE)
        assert 256 < float(limit) < 512


def test_sigterm_during_the_warm_up_waits_for_no_step(artifact: Path) -> None:
    """Its first step would take for ever."""
    with running([*GATED, "warm-up", *flags(artifact)], until="step ") as server:
        server.terminate()
        assert server.wait() == 0
        assert "ready: " not in server.log()
        assert "Traceback" not in server.log()


def test_a_server_that_is_warming_up_says_so_to_who_asks(artifact: Path) -> None:
    with running([*GATED, "warm-up", *flags(artifact)], until="running on") as server:
        server.output.wait_for("step ")
        for path, status in (("/healthz", 200), ("/readyz", 503)):
            assert status_of(server, path) == status
        server.terminate()
        assert server.wait() == 0


def test_a_policy_that_fails_while_warming_up_ends_the_server_with_1(artifact: Path) -> None:
    with running([*GATED, "broken", *flags(artifact)], until="running on") as server:
        assert server.wait() == 1
        assert "the policy failed while warming up" in server.log()


def test_a_second_sigterm_changes_nothing(artifact: Path) -> None:
    with running([*GATED, "gated", *flags(artifact)]) as server:
        server.terminate()
        server.output.wait_for("Shutting down")
        server.terminate()
        assert server.wait() == 0


def test_the_garbage_of_the_start_is_settled_before_the_first_request(artifact: Path) -> None:
    with running([*GATED, "gated", *flags(artifact)]) as server:
        assert server.process.stdin is not None
        with socket.create_connection(server.host_and_port, STOP_TIMEOUT_S) as client:
            body = b'{"observation": [%b]}' % b",".join([b"0"] * 11)
            client.sendall(
                b"POST /act HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            assert server.output.wait_for("step ").split()[2] == "settled"
            server.process.stdin.close()
            assert client.recv(12).split()[1] == b"200"


HALF_REQUESTS = {
    "half a body": b"POST /act HTTP/1.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: 9\r\n\r\n{",
    "half a body elsewhere": b"DELETE /sessions/a HTTP/1.1\r\nContent-Length: 9\r\n\r\n{",
    "half a head": b"POST /act HTTP/1.1\r\nContent-Ty",
    "half a line": b"POST /a",
}


@pytest.mark.parametrize("what", HALF_REQUESTS)
def test_what_has_half_arrived_at_the_end_is_told_that_the_server_drains(
    draining: RunningServer, what: str
) -> None:
    with socket.create_connection(draining.host_and_port, STOP_TIMEOUT_S) as client:
        client.sendall(HALF_REQUESTS[what])
        status_of(draining, "/healthz")  # which is read after that
        draining.terminate()
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'"error_type":"draining"' in answer
    assert draining.wait() == 0
    assert "Traceback" not in draining.log()


def test_a_client_that_does_not_read_its_answers_keeps_no_server_alive(
    draining: RunningServer,
) -> None:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(draining.host_and_port)
        client.setblocking(False)
        refused_in_a_row = 0
        while refused_in_a_row < 3:
            try:
                client.send(b"GET /openapi.json HTTP/1.1\r\nHost: test\r\n\r\n" * 100)
                refused_in_a_row = 0
            except BlockingIOError:
                refused_in_a_row += 1
                status_of(draining, "/healthz")
        draining.terminate()
        assert draining.wait() == 0


@pytest.fixture
def draining(artifact: Path) -> Iterator[RunningServer]:
    with running(service_command(*flags(artifact, "--drain-s", "1"))) as server:
        yield server
