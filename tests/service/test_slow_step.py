"""What clients may do while a step takes its time: a real server, real sockets, a gated step."""

import http.client
import json
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from model.spec import PolicySpec
from tests.running_server import RunningServer, running

TIMEOUT_S = 20.0
SHORT_MS = 10.0


class GatedServer:
    """A server whose steps each wait to be let go."""

    def __init__(self, server: RunningServer, spec: PolicySpec) -> None:
        self.server = server
        self._spec = spec
        self._clients = ExitStack()

    def step_begins(self) -> int:
        """Waits for one; the size of its batch."""
        return int(self.server.output.wait_for("step ").split()[1])

    def let_it_go(self, word: str = "") -> None:
        stdin = self.server.process.stdin
        assert stdin is not None
        stdin.write(f"{word}\n")
        stdin.flush()

    def let_all_go(self) -> None:
        assert self.server.process.stdin is not None
        self.server.process.stdin.close()

    def connect(self) -> "Client":
        client = Client(socket.create_connection(self.server.host_and_port, TIMEOUT_S), self._spec)
        self._clients.callback(client.close)
        return client

    def close(self) -> None:
        self.let_all_go()
        self._clients.close()


class Client:
    def __init__(self, connection: socket.socket, spec: PolicySpec) -> None:
        self._socket = connection
        self._spec = spec

    def act(self, **fields: Any) -> "Client":
        """Sends a request; whoever wants its answer waits for it."""
        self._socket.sendall(self._request(**fields))
        return self

    def begin_to_act(self) -> None:
        self._socket.sendall(self._request().partition(b"{")[0])

    def finish_acting(self) -> "Client":
        self._socket.sendall(b"{" + self._request().partition(b"{")[2])
        return self

    def _request(self, **fields: Any) -> bytes:
        body = json.dumps({"observation": [1.0] * self._spec.observation_dim, **fields}).encode()
        head = (
            "POST /act HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def answer(self) -> tuple[int, Any]:
        status, _, body = self.whole_answer()
        return status, body

    def whole_answer(self) -> tuple[int, Message, Any]:
        with self._socket.makefile("rb") as stream:
            status = int(stream.readline().split()[1])
            headers = http.client.parse_headers(stream)
            return status, headers, json.loads(stream.read(int(headers["content-length"])))

    def close(self) -> None:
        self._socket.close()

    def half_close(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()


@contextmanager
def gated(
    artifact: Path,
    spec: PolicySpec,
    *flags: str,
    mode: str = "gated",
    program: str = "tests.service.gated_server",
) -> Iterator[GatedServer]:
    command = [sys.executable, "-m", program, mode]
    with running([*command, "--artifact", str(artifact), "--port", "0", *flags]) as server:
        slow = GatedServer(server, spec)
        try:
            yield slow
        finally:
            slow.close()


@pytest.fixture
def server(artifact: Path, spec: PolicySpec) -> Iterator[GatedServer]:
    with gated(artifact, spec) as slow:
        yield slow


def longer_than(milliseconds: float) -> None:
    """The time that a deadline takes to pass; more of it would do no harm."""
    time.sleep(3 * milliseconds / 1000)


def test_the_time_the_model_is_busy_counts_against_a_deadline(server: GatedServer) -> None:
    first, late, patient = server.connect(), server.connect(), server.connect()
    first.act()
    server.step_begins()
    late.act(timeout_ms=SHORT_MS, session_id="late", episode_start=True)
    patient.act()
    longer_than(SHORT_MS)
    server.let_it_go()
    assert first.answer()[0] == 200
    status, error = late.answer()
    assert (status, error["error_type"]) == (504, "deadline_exceeded")
    assert server.step_begins() == 1
    server.let_it_go()
    assert patient.answer()[0] == 200
    assert late.act(session_id="late").answer()[0] == 404, "its session has not moved"


def test_so_it_does_for_one_whose_connection_was_not_accepted_yet(server: GatedServer) -> None:
    first = server.connect().act()
    server.step_begins()
    late = server.connect().act(timeout_ms=SHORT_MS)
    longer_than(SHORT_MS)
    server.let_it_go()
    assert first.answer()[0] == 200
    assert late.answer()[0] == 504


def test_a_deadline_is_nobody_s_matter_while_the_model_is_free(server: GatedServer) -> None:
    client = server.connect()
    for _ in range(3):
        longer_than(SHORT_MS)
        client.act(timeout_ms=1000)
        server.step_begins()
        server.let_it_go()
        assert client.answer()[0] == 200


def test_who_is_out_of_time_hears_it_before_those_ahead_have_run(
    artifact: Path, spec: PolicySpec
) -> None:
    with gated(artifact, spec, "--max-batch-size", "1", "--max-waiting", "3") as server:
        first, *others, late = [server.connect() for _ in range(4)]
        first.act()
        server.step_begins()
        for other in others:
            other.act()
        late.act(timeout_ms=SHORT_MS)
        longer_than(SHORT_MS)
        server.let_it_go()
        assert late.answer()[0] == 504
        server.step_begins()  # that of one of the others, which holds the loop
        late.act()  # there is room for it again
        for _ in range(2):
            server.let_it_go()
            server.step_begins()
        server.let_it_go()
        assert [client.answer()[0] for client in (first, *others, late)] == [200] * 4


def test_what_arrives_during_a_step_is_not_late_by_it(artifact: Path, spec: PolicySpec) -> None:
    with gated(artifact, spec, "--read-timeout-s", "1") as server:
        first, halting = server.connect(), server.connect()
        halting.begin_to_act()
        assert first.act(session_id="a").answer()[0] == 404  # the half is read by now
        first.act()
        server.step_begins()
        halting.finish_acting()
        longer_than(500)  # the time of that half is up, and the timer is due
        server.let_it_go()
        assert first.answer()[0] == 200
        server.step_begins()
        server.let_it_go()
        assert halting.answer()[0] == 200


LEAVING: dict[str, Callable[[Client], None]] = {
    "closes": Client.close,
    "closes one way": Client.half_close,
    "resets": Client.reset,
}


@pytest.mark.parametrize("is_accepted", [True, False])
@pytest.mark.parametrize("how", LEAVING)
def test_a_client_that_leaves_during_a_step_costs_none(
    server: GatedServer, how: str, is_accepted: bool
) -> None:
    first, other = server.connect(), server.connect()
    if is_accepted:
        leaving = server.connect()
        assert leaving.act(session_id="a").answer()[0] == 404
    first.act()
    server.step_begins()
    if not is_accepted:
        leaving = server.connect()
    leaving.act(session_id="a", episode_start=True)
    LEAVING[how](leaving)
    longer_than(SHORT_MS)  # so long a step is one that a client may be tired of
    server.let_it_go()
    assert first.answer()[0] == 200
    other.act(session_id="a")  # a step for it would mean that the session has begun
    assert other.answer()[0] == 404


def test_a_client_that_leaves_while_it_waits_its_turn_costs_no_step(server: GatedServer) -> None:
    first, second, leaving = [server.connect() for _ in range(3)]
    first.act()
    server.step_begins()
    leaving.act()
    second.act()
    leaving.reset()
    longer_than(SHORT_MS)
    server.let_it_go()
    assert server.step_begins() == 1
    server.let_it_go()
    assert [client.answer()[0] for client in (first, second)] == [200] * 2


def test_a_client_that_closes_one_way_and_waits_is_answered_while_the_model_is_free(
    artifact: Path, spec: PolicySpec
) -> None:
    """Where its step is a short one, which holds the loop."""
    with gated(artifact, spec, mode="held") as server:
        client = server.connect().act()
        client.half_close()
        server.step_begins()
        server.let_it_go()
        assert client.answer()[0] == 200


def test_sigterm_during_a_step_answers_it_and_those_that_came_meanwhile(
    server: GatedServer,
) -> None:
    first, second, third = [server.connect() for _ in range(3)]
    assert second.act(session_id="a").answer()[0] == 404  # their connections are accepted
    assert third.act(session_id="a").answer()[0] == 404
    first.act()
    server.step_begins()
    second.act()
    third.act()
    while server.server.counted("tamiyo_waiting") < 2:  # or their connections are idle ones
        pass
    server.server.terminate()
    server.let_all_go()
    assert [client.answer()[0] for client in (first, second, third)] == [200] * 3
    assert server.server.wait() == 0


def test_a_full_server_refuses_before_the_body_and_says_when_to_come_again(
    artifact: Path, spec: PolicySpec
) -> None:
    with gated(artifact, spec, "--max-batch-size", "2", "--max-waiting", "1") as server:
        first, waiting, refused = [server.connect() for _ in range(3)]
        first.act()
        server.step_begins()
        waiting.act()
        refused.begin_to_act()
        server.let_all_go()
        status, headers, error = refused.whole_answer()
        assert (status, error["error_type"]) == (429, "overloaded")
        assert int(headers["retry-after"]) >= 1
        assert [client.answer()[0] for client in (first, waiting)] == [200] * 2
        assert refused.finish_acting().act().answer()[0] == 200, "its connection goes on"
