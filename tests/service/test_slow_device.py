"""What clients meet while a device takes its time: a real server, and a gated device."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from model.spec import PolicySpec
from tests.running_server import ROOT, clean_environment
from tests.service.test_slow_step import GatedServer, gated

FLAGS = ("--device", "cpu", "--runtime", "torchscript", "--max-batch-size", "16")


@pytest.fixture
def server(artifact: Path, spec: PolicySpec) -> Iterator[GatedServer]:
    with gated(artifact, spec, *FLAGS, program="tests.service.device_server") as slow:
        yield slow


def wait_for(server: GatedServer, num_waiting: int) -> None:
    while server.server.counted("tamiyo_waiting") != num_waiting:
        pass


def test_health_is_told_while_the_device_works_and_the_next_batch_fills(
    server: GatedServer,
) -> None:
    """Nothing waits for the step: it ends only once all of this was answered."""
    first = server.connect().act()
    assert server.step_begins() == 1
    others = [server.connect().act() for _ in range(13)]
    wait_for(server, 13)
    with httpx.Client(base_url=server.server.address) as http:
        for _ in range(20):
            assert http.get("/healthz").status_code == 200
    server.let_it_go()
    assert first.answer()[0] == 200
    assert server.step_begins() == 13
    server.let_it_go()
    assert [client.answer()[0] for client in others] == [200] * 13


def test_enough_rows_are_launched_behind_the_batch_that_the_device_works_on(
    server: GatedServer,
) -> None:
    first = server.connect().act()
    assert server.step_begins() == 1
    others = [server.connect().act() for _ in range(16)]
    wait_for(server, 0)  # they are on their way, and the device has not moved
    more = [server.connect().act() for _ in range(5)]
    wait_for(server, 5)
    server.let_it_go()
    assert first.answer()[0] == 200
    assert server.step_begins() == 16
    server.let_it_go()
    assert [client.answer()[0] for client in others] == [200] * 16
    assert server.step_begins() == 5
    server.let_it_go()
    assert [client.answer()[0] for client in more] == [200] * 5


def test_sigterm_while_the_device_works_answers_what_waits(server: GatedServer) -> None:
    first, second = server.connect(), server.connect()
    assert second.act(session_id="a").answer()[0] == 404  # its connection is accepted
    first.act()
    server.step_begins()
    second.act()
    wait_for(server, 1)
    server.server.terminate()
    server.let_all_go()
    assert [client.answer()[0] for client in (first, second)] == [200] * 2
    assert server.server.wait() == 0
    assert "the interpreter's end" in server.server.log()


def test_a_server_that_loses_its_device_refuses_all_and_ends(server: GatedServer) -> None:
    """Or whoever restarts servers would not know, and clients meet errors for good."""
    clients = [server.connect() for _ in range(3)]
    clients[0].act(session_id="a", episode_start=True)
    assert server.step_begins() == 1
    for client in clients[1:]:
        client.act()
    wait_for(server, 2)
    server.let_it_go("lost")
    server.let_all_go()
    for client in clients:
        status, body = client.answer()
        assert (status, body["error_type"]) == (503, "draining")
    assert server.server.wait() == 1
    log = server.server.log()
    assert "DeviceLost: an illegal memory access was encountered" in log
    assert "the device is lost to this process, which ends: another one may have it" in log
    assert "the interpreter's end" not in log, "where a GPU's libraries may crash"


@pytest.mark.parametrize("mode", ["broken", "lost"])
def test_a_warm_up_that_fails_ends_the_server_and_a_lost_device_at_once(
    mode: str, artifact: Path
) -> None:
    command = [sys.executable, "-m", "tests.service.device_server", mode, *FLAGS]
    done = subprocess.run(
        [*command, "--artifact", str(artifact), "--port", "0"],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "the policy failed while warming up" in done.stdout
    assert ("the interpreter's end" in done.stdout) == (mode == "broken")
