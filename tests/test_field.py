"""What real clients really send: a running server answers or refuses each, and serves the next.

Raw sockets against one process. Whatever a client did, the plain request after it is answered byte
for byte as the first one was.
"""

import asyncio
import json
import re
import select
import socket
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import httpx
import pytest

from export.exporter import export_policy
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.running_server import RunningServer, running_server
from tests.traffic import Episodes, client_of, play, run

TIMEOUT_S = 30.0
NUM_OBSERVATIONS = 11
MANY_BYTES = 100_000_000
FLAT_BYTES = 16 * 2**20
Json = dict[str, Any]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Json:
        answer: Json = json.loads(self.content)
        return answer


class Connection:
    """A client that sends exactly the bytes it is told to."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = socket.create_connection(address, TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        self._socket.close()

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self._socket.sendall(piece)

    def end(self) -> None:
        """Sends no more, and goes on reading."""
        self._socket.shutdown(socket.SHUT_WR)

    def has_answer(self) -> bool:
        """Whether one has begun to arrive."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def answer(self, *, has_content: bool = True) -> Answer:
        line = self._stream.readline()
        assert re.match(rb"HTTP/1\.[01] \d{3} ", line), f"no answer but {line!r}"
        headers = {}
        while field := self._stream.readline().strip():
            name, _, value = field.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        length = int(headers.get("content-length", 0)) if has_content else 0
        return Answer(int(line.split()[1]), headers, self._stream.read(length))

    def is_over(self) -> bool:
        """Whether the server has ended it; waits for that, or for a byte that is too many."""
        try:
            return self._stream.read(1) == b""
        except ConnectionResetError:
            return True


def body(**fields: Any) -> bytes:
    observation = [0.5] * NUM_OBSERVATIONS
    return json.dumps({"observation": observation, "seed": 3} | fields).encode()


def first_value(number: bytes) -> bytes:
    """A body whose first observed value is written so."""
    return b'{"seed": 3, "observation": [' + number + b", 0" * (NUM_OBSERVATIONS - 1) + b"]}"


def request(
    *fields: str, target: str = "/act", method: str = "POST", version: str = "1.1"
) -> bytes:
    lines = [f"{method} {target} HTTP/{version}", "Host: test", "Content-Type: application/json"]
    return "\r\n".join([*lines, *fields, "", ""]).encode()


def post(content: bytes, *fields: str, **line: str) -> bytes:
    return request(f"Content-Length: {len(content)}", *fields, **line) + content


def chunked(content: bytes, size: int, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    pieces = [content[at : at + size] for at in range(0, len(content), size)]
    chunks = [b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces]
    head = request("Transfer-Encoding: chunked")
    return b"".join([head, *chunks, b"0\r\n", trailer, b"\r\n"])


@pytest.fixture(scope="module")
def artifact(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    assert policy.observation_dim == NUM_OBSERVATIONS
    output = tmp_path_factory.mktemp("field") / "tiny"
    export_policy(policy, None, output, name="tiny", formats=("onnx",), max_batch_size=64)
    return output


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[RunningServer]:
    with running_server(artifact) as server:
        yield server
        assert server.stop() == 0
        assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def plain(server: RunningServer) -> bytes:
    """The answer to the plain request, the first this server has had."""
    with Connection(server.host_and_port) as connection:
        connection.send(post(body()))
        answer = connection.answer()
    assert answer.status == 200
    return answer.content


@pytest.fixture
def connection(server: RunningServer, plain: bytes) -> Iterator[Connection]:
    with Connection(server.host_and_port) as connection:
        yield connection


def assert_the_next_is_served(
    server: RunningServer, connection: Connection, answer: Answer, plain: bytes
) -> None:
    """On the same connection, unless the server has said that it ends there, and then it does."""
    if answer.headers.get("connection", "").lower() == "close":
        assert connection.is_over()
        with Connection(server.host_and_port) as another:
            another.send(post(body()))
            assert another.answer().content == plain
    else:
        connection.send(post(body()))
        assert connection.answer().content == plain


PLAIN = post(body())
HOWEVER_WRITTEN: dict[str, list[bytes]] = {
    "at once": [PLAIN],
    "byte by byte": [PLAIN[at : at + 1] for at in range(len(PLAIN))],
    "its head and its body": [PLAIN.removesuffix(body()), body()],
    "after empty lines": [b"\r\n\r\n", PLAIN],
    "of absolute form": [post(body(), target="http://test/act")],
    "of absolute form, for another host": [post(body(), target="http://other:99/act")],
    "with a letter escaped": [post(body(), target="/%61ct")],
    "with a query": [post(body(), target="/act?trace=1&x=%2F")],
    "in one chunk": [chunked(body(), 10_000)],
    "in chunks of a byte": [chunked(body(), 1)],
    "in chunks with extensions and a trailer": [
        chunked(body(), 50, b";name=value", b"X-Checksum: 7\r\n")
    ],
    "with names in other letters": [PLAIN.replace(b"Content-", b"cONTENT-")],
    "with a charset": [PLAIN.replace(b"/json", b"/json; charset=utf-8")],
    "with a hundred headers": [post(body(), *(f"X-Trace-{n}: {n}" for n in range(100)))],
    "with spaces about": [post(b"\r\n\t " + body().replace(b" ", b"\n\n") + b" \r\n")],
    "with escapes": [post(body().replace(b"observation", b"\\u006fbs\\u0065rvation"))],
    "with whole numbers of a half": [post(body().replace(b"0.5", b"5e-1"))],
}


@pytest.mark.parametrize("pieces", HOWEVER_WRITTEN.values(), ids=HOWEVER_WRITTEN)
def test_a_good_request_is_answered_however_it_is_written(
    server: RunningServer, connection: Connection, plain: bytes, pieces: list[bytes]
) -> None:
    connection.send(*pieces)
    answer = connection.answer()
    assert (answer.status, answer.content) == (200, plain)
    assert_the_next_is_served(server, connection, answer, plain)


@pytest.mark.parametrize("fields", [(), ("Connection: keep-alive",)], ids=["", "keep-alive"])
def test_http_1_0_is_answered_and_its_end_is_the_connection_s(
    server: RunningServer, connection: Connection, plain: bytes, fields: tuple[str, ...]
) -> None:
    """Or the client that asked to keep the connection is told that it may."""
    connection.send(post(body(), *fields, version="1.0"))
    answer = connection.answer()
    assert (answer.status, answer.content) == (200, plain)
    if fields and answer.headers.get("connection", "").lower() == "keep-alive":
        assert_the_next_is_served(server, connection, answer, plain)
    else:
        assert connection.is_over()


def test_pipelined_requests_are_answered_in_their_order(
    connection: Connection, plain: bytes
) -> None:
    alive = request(target="/healthz", method="GET")
    connection.send(alive + PLAIN + post(b"{") + alive + chunked(body(), 20) + PLAIN)
    got = [connection.answer() for _ in range(6)]
    assert [answer.status for answer in got] == [200, 200, 400, 200, 200, 200]
    assert [answer.content == plain for answer in got] == [False, True, False, False, True, True]


def test_a_client_that_shuts_its_side_once_it_is_answered_reads_the_answer(
    connection: Connection, plain: bytes
) -> None:
    """Before that it looks like one that hung up, and whether the answer is first is a race."""
    connection.send(PLAIN)
    while not connection.has_answer():
        pass
    connection.end()
    answer = connection.answer()
    assert (answer.status, answer.content) == (200, plain)
    assert connection.is_over()


@pytest.mark.parametrize("kept", [10, -10], ids=["in its head", "in its body"])
def test_a_client_that_shuts_its_side_too_soon_is_let_go(
    server: RunningServer, connection: Connection, plain: bytes, kept: int
) -> None:
    connection.send(PLAIN[:kept])
    connection.end()
    while not connection.is_over():
        pass  # it may be told what was wrong
    with Connection(server.host_and_port) as another:
        another.send(PLAIN)
        assert another.answer().content == plain


def test_a_client_that_expects_100_is_told_to_go_on(connection: Connection, plain: bytes) -> None:
    for _ in range(2):
        connection.send(request(f"Content-Length: {len(body())}", "Expect: 100-continue"))
        assert connection.answer().status == 100
        connection.send(body())
        answer = connection.answer()
        assert (answer.status, answer.content) == (200, plain)


def test_a_client_that_expects_100_for_too_much_is_refused_before_it_sends_it(
    connection: Connection,
) -> None:
    connection.send(request(f"Content-Length: {MANY_BYTES}", "Expect: 100-continue"))
    assert connection.answer().status == 413


NO_HTTP: dict[str, bytes] = {
    "a TLS hello": bytes.fromhex("1603010200010001fc0303") + bytes(500),
    "an HTTP/2 hello": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "an SSH hello": b"SSH-2.0-OpenSSH_9.2p1\r\n",
    "zeros": bytes(1000),
    "chunks and a length": chunked(body(), 20).replace(b"Host:", b"Content-Length: 9\r\nHost:"),
    "two lengths": post(body(), "Content-Length: 7"),
    "a negative length": PLAIN.replace(b"Length: ", b"Length: -"),
    "a length with a sign": PLAIN.replace(b"Length: ", b"Length: +"),
    "a length with a letter": PLAIN.replace(b"Length: ", b"Length: 0x"),
    "no length": PLAIN.replace(b"Length: ", b"Length: none "),
    "a length beyond 2^64": request(f"Content-Length: {2**70}"),
    "a chunk without a size": request("Transfer-Encoding: chunked") + b"\r\n{}\r\n0\r\n\r\n",
    "a chunk of negative size": request("Transfer-Encoding: chunked") + b"-2\r\n{}\r\n0\r\n\r\n",
    "a chunk of more than there is": request("Transfer-Encoding: chunked") + b"f" * 17 + b"\r\n{}",
    "a chunk that is longer": request("Transfer-Encoding: chunked") + b"1\r\n{}\r\n0\r\n\r\n",
    "another transfer encoding": request("Transfer-Encoding: gzip") + body(),
    "a header without a colon": request("Content-Length") + body(),
    "a space in a name": request("Content Length: 2") + b"{}",
    "a NUL in a header": post(body(), "X-Name: a\0b"),
    "a line feed alone": PLAIN.replace(b"\r\n", b"\n"),
}


@pytest.mark.parametrize("content", NO_HTTP.values(), ids=NO_HTTP)
def test_what_is_no_http_is_400_and_ends_the_connection(
    server: RunningServer, connection: Connection, plain: bytes, content: bytes
) -> None:
    connection.send(content)
    assert connection.answer().status in {400, 413, 415}
    assert connection.is_over()
    with Connection(server.host_and_port) as another:
        another.send(PLAIN)
        assert another.answer().content == plain


ANOTHER_PLACE: dict[str, tuple[bytes, int]] = {
    "//act": (post(body(), target="//act"), 404),
    "/act/": (post(body(), target="/act/"), 404),
    "/./act": (post(body(), target="/./act"), 404),
    "/x/../act": (post(body(), target="/x/../act"), 404),
    "/ACT": (post(body(), target="/ACT"), 404),
    "/act%00": (post(body(), target="/act%00"), 404),
    "/act%2F": (post(body(), target="/act%2F"), 404),
    "GET /act": (request(target="/act", method="GET"), 405),
    "OPTIONS /act": (request(target="/act", method="OPTIONS"), 405),
    "TRACE /act": (request(target="/act", method="TRACE"), 405),
    "POST /healthz": (post(body(), target="/healthz"), 405),
}


@pytest.mark.parametrize(("content", "status"), ANOTHER_PLACE.values(), ids=ANOTHER_PLACE)
def test_another_path_or_method_is_refused_in_the_one_form(
    server: RunningServer, connection: Connection, plain: bytes, content: bytes, status: int
) -> None:
    connection.send(content)
    answer = connection.answer()
    assert answer.status == status
    assert answer.json.keys() == {"error", "error_type"}
    if status == 405:
        assert answer.headers["allow"]
    assert_the_next_is_served(server, connection, answer, plain)


@pytest.mark.parametrize(
    ("target", "statuses"), [("/act", {405}), ("/nowhere", {404, 405}), ("/healthz", {200, 405})]
)
def test_an_answer_to_head_has_no_content(
    server: RunningServer,
    connection: Connection,
    plain: bytes,
    target: str,
    statuses: set[int],
) -> None:
    connection.send(request(target=target, method="HEAD"))
    answer = connection.answer(has_content=False)
    assert answer.status in statuses
    assert_the_next_is_served(server, connection, answer, plain)


REFUSED_BODIES: dict[str, tuple[bytes, int]] = {
    "a byte-order mark": (b"\xef\xbb\xbf" + body(), 400),
    "UTF-16": (body().decode().encode("utf-16"), 400),
    "UTF-16 without a mark": (body().decode().encode("utf-16-le"), 400),
    "UTF-32": (body().decode().encode("utf-32"), 400),
    "latin-1": (body(session_id="~").replace(b"~", b"\xe9"), 400),
    **{
        f"{number} for a number": (first_value(number.encode()), 422)
        for number in ("NaN", "Infinity", "-Infinity", "1e39", "-1e39", "1e400", "9" * 400)
    },
    **{
        f"{number} for a number": (first_value(number.encode()), 400)
        for number in ("null", '"1"', "true", "[[1]]", "{}", "nan", ".5", "1.", "+1", "0x1")
    },
    "a row for a number": (first_value(b"[1]"), 422),  # a vector's, and too short a one
    "numbers in rows": (body(observation=[[0.5]] * NUM_OBSERVATIONS), 422),
    "100,000 brackets": (b"[" * 100_000, 400),
    "100,000 brackets for a number": (first_value(b"[" * 100_000), 400),
    "100,000 brackets and their ends": (first_value(b"[" * 100_000 + b"]" * 100_000), 400),
    "15,000 braces": (b'{"observation":' * 15_000, 400),
    "half a surrogate pair": (body(session_id="\ud800", episode_start=True), 400),
    "its other half": (body(session_id="\udc00", episode_start=True), 400),
    "half a pair in UTF-8": (body(session_id="~").replace(b"~", b"\xed\xa0\x80"), 400),
    "NUL as it is": (body(session_id="~").replace(b"~", b"\0"), 400),
    "no name": (body(session_id="", episode_start=True), 400),
    "100 kB of a name": (body(session_id="x" * 100_000, episode_start=True), 400),
    "100 kB of an unknown field": (body(**{"x" * 100_000: 1}), 400),
    **{
        f"{name} {number[:25]}": (body(**{name: "~"}).replace(b'"~"', number.encode()), 400)
        for name in ("seed", "step")
        for number in (str(2**64), "-1", "1e3", "1.0", '"1"', "NaN", "true", "1" + "0" * 5000)
    },
    "a step an unknown session cannot be at": (body(session_id="nobody", step=2**64 - 1), 410),
    "a start of another step": (body(session_id="x", episode_start=True, step=2**64 - 1), 422),
    "no time": (body(timeout_ms=0), 400),
    "no number of time": (body(timeout_ms=float("nan")), 400),
}


@pytest.mark.parametrize(("content", "status"), REFUSED_BODIES.values(), ids=REFUSED_BODIES)
def test_a_body_that_is_no_request_is_refused_in_a_sentence(
    server: RunningServer, connection: Connection, plain: bytes, content: bytes, status: int
) -> None:
    connection.send(post(content))
    answer = connection.answer()
    assert answer.status == status
    assert answer.json.keys() == {"error", "error_type"}
    assert len(answer.content) < 1000
    assert_the_next_is_served(server, connection, answer, plain)


@pytest.mark.parametrize(
    "fields",
    [{"seed": 2**64 - 1}, {"seed": 0}, {"step": 2**64 - 1}, {"step": 0}, {"timeout_ms": 1e300}],
    ids=str,
)
def test_the_largest_and_smallest_numbers_are_taken(connection: Connection, fields: Json) -> None:
    connection.send(post(body(**fields)))
    answer = connection.answer()
    assert answer.status == 200
    assert answer.json["step"] == fields.get("step", 0)


def test_a_session_s_step_beyond_its_next_is_a_conflict(connection: Connection) -> None:
    connection.send(post(body(session_id="far", episode_start=True)))
    assert connection.answer().status == 200
    connection.send(post(body(session_id="far", step=2**64 - 1)))
    answer = connection.answer()
    assert (answer.status, answer.json["error_type"]) == (409, "step_conflict")


NAMES = [
    *("\0", "a\0b", "\x7f", "\ufeff", "\u202e", " ", "a", " a", "a ", "A", "%61", "../a", "?"),
    *(unicodedata.normalize(form, "é") for form in ("NFC", "NFD")),
    *("\U0001f642", "\U0001f642" * 256, "x" * 256, "x" * 255, "\ufb01", "fi", "\\", '"', "/"),
    *("\n", "x\n", "x\ny", "\r"),
]
"""No two are the same, whatever they look like."""


def test_every_name_is_a_session_of_its_own(connection: Connection) -> None:
    def turn(name: str, step: int, seed: int) -> Json:
        start = {"episode_start": True, "seed": seed} if step == 0 else {"seed": seed}
        connection.send(post(body(session_id=name, step=step, **start)))
        answer = connection.answer()
        assert answer.status == 200, f"{name!r}: {answer}"
        assert answer.json["session_id"] == name
        return answer.json | {"session_id": None}

    alone = [[turn(f"alone {seed}", step, seed) for step in range(3)] for seed in range(len(NAMES))]
    together = [[turn(name, step, seed) for seed, name in enumerate(NAMES)] for step in range(3)]
    assert list(zip(*together, strict=True)) == [tuple(steps) for steps in alone]
    for name in NAMES:
        connection.send(request(target=f"/sessions/{quote(name, safe='')}", method="DELETE"))
        assert connection.answer().status == 204, repr(name)


def peak_bytes(server: RunningServer) -> int:
    """The most memory the server ever had resident."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found.group(1)) * 1024


@pytest.mark.parametrize("in_chunks", [True, False], ids=["in chunks", "with a length"])
def test_a_hundred_megabytes_are_413_and_are_not_kept(
    server: RunningServer, connection: Connection, plain: bytes, in_chunks: bool
) -> None:
    before = peak_bytes(server)
    piece = b" " * 100_000
    head = "Transfer-Encoding: chunked" if in_chunks else f"Content-Length: {MANY_BYTES}"
    connection.send(request(head))
    with suppress(BrokenPipeError, ConnectionResetError):  # it may be told to stop sending so
        for _ in range(MANY_BYTES // len(piece)):
            if connection.has_answer():
                break  # which is lost on who goes on sending for too long
            connection.send(b"%x\r\n%b\r\n" % (len(piece), piece) if in_chunks else piece)
    answer = connection.answer()
    assert (answer.status, answer.json["error_type"]) == (413, "too_large")
    assert peak_bytes(server) - before < FLAT_BYTES
    with Connection(server.host_and_port) as another:
        another.send(PLAIN)
        assert another.answer().content == plain


def test_health_is_answered_while_sixteen_clients_are_busy(
    server: RunningServer, spec: PolicySpec
) -> None:
    episodes = Episodes.random(spec, 7, num_environments=16)

    async def ask() -> int:
        async with client_of(server) as client, asyncio.TaskGroup() as tasks:
            busy = [tasks.create_task(play(client, episodes, env, "busy")) for env in range(16)]
            num_answers = 0
            while not any(task.done() for task in busy):
                response = await client.get("/healthz")
                assert (response.status_code, response.json()) == (200, {"alive": True})
                num_answers += 1
        return num_answers

    assert run(ask()) > 0


def test_sigterm_ends_idle_connections_and_the_process(artifact: Path) -> None:
    with running_server(artifact) as server:
        silent = [Connection(server.host_and_port) for _ in range(5)]
        kept = [Connection(server.host_and_port) for _ in range(20)]
        for connection in kept:
            connection.send(PLAIN)
            assert connection.answer().status == 200
        server.terminate()
        assert all(connection.is_over() for connection in silent + kept)
        assert server.wait() == 0
        assert "Traceback" not in server.log()
        for connection in silent + kept:
            with connection:
                pass


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_server_on_every_ipv6_address_answers_ipv4_too(artifact: Path) -> None:
    with running_server(artifact, "--host", "::") as server:
        port = httpx.URL(server.address).port
        for host in ("[::1]", "127.0.0.1"):
            response = httpx.get(f"http://{host}:{port}/readyz", timeout=TIMEOUT_S)
            assert (response.status_code, response.json()) == (200, {"ready": True})
