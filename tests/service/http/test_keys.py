"""Which key opens what, by both ways to `POST /act`; a server that reads its keys again."""

import http.client
import json
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from fastapi import Depends
from safetensors.numpy import save

from model.spec import PolicySpec
from service.http.codec import JSON, SAFETENSORS
from service.http.keys import Keys
from service.server import main
from tests.running_server import RunningServer, running, running_server, service_command
from tests.service.conftest import MakeClient
from tests.service.fakes import AppClient
from tests.service.http.bodies import body, error_of
from tests.service.http.test_connection import Server, scenario

ACT, OTHER_ACT, ADMIN, UNKNOWN = (f"{word}-{'x' * 20}" for word in ("act", "other", "admin", "un"))
TIMEOUT_S = 30.0

Headers = list[tuple[str, str | bytes]]
Ask = Callable[..., httpx.Response]
"""Method, path and httpx's options."""


class Files(NamedTuple):
    act: Path
    admin: Path

    @classmethod
    def write(cls, directory: Path) -> "Files":
        files = cls(directory / "act.keys", directory / "admin.keys")
        for file, content in zip(files, (f"{ACT} alice\n{OTHER_ACT}\n", ADMIN), strict=True):
            file.touch(0o600)
            file.write_text(content)
        return files

    def flags(self) -> list[str]:
        return ["--act-keys", str(self.act), "--admin-keys", str(self.admin)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files.write(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def server(artifact: Path, files: Files) -> Iterator[RunningServer]:
    """Whatever the tests send it, no key of theirs is in what it says."""
    with running_server(artifact, *files.flags(), "--log-level", "debug") as server:
        yield server
        httpx.post(f"{server.address}/act", headers={"Authorization": f"Bearer {UNKNOWN}"})
        said = httpx.get(f"{server.address}/metrics").text
        assert 'result="unauthorized"' in said
        assert server.stop() == 0
        said += server.log()
        assert f"keys in {files.act}: 2 (alice, line 2)" in said
        assert not [key for key in (ACT, OTHER_ACT, ADMIN, UNKNOWN) if key in said]
        assert "Traceback" not in said


@pytest.fixture
def keyed(make_client: MakeClient, files: Files) -> AppClient:
    return make_client(act_keys=files.act, admin_keys=files.admin)


@pytest.fixture(params=["connection", "asgi"])
def ask(request: pytest.FixtureRequest) -> Iterator[Ask]:
    """Asks a process over sockets, or the application without any."""
    if request.param == "asgi":
        keyed: AppClient = request.getfixturevalue("keyed")
        yield keyed.request
    else:
        server: RunningServer = request.getfixturevalue("server")
        with httpx.Client(base_url=server.address, timeout=TIMEOUT_S) as client:
            yield client.request


def bearer(key: str) -> Headers:
    return [("Authorization", f"Bearer {key}")]


def act(ask: Ask, spec: PolicySpec, headers: Headers, content_type: str = JSON) -> httpx.Response:
    content: str | bytes = json.dumps(body(spec))
    if content_type == SAFETENSORS:
        content = save({"observation": np.zeros((2, spec.observation_dim), np.float32)})
    headers = [*headers, ("Content-Type", content_type)]
    return ask("POST", "/act", headers=headers, content=content)


NO_KEY: dict[str, Headers] = {
    "no header": [],
    "an empty one": [("Authorization", "")],
    "a scheme without a key": [("Authorization", "Bearer")],
    "a key without a scheme": [("Authorization", ACT)],
    "an empty one before a good one": [("Authorization", ""), *bearer(ACT)],
    "another scheme": [("Authorization", f"Basic {ACT}")],
    "another header": [("X-API-Key", ACT)],
}
WRONG_KEYS: dict[str, Headers] = {
    "unknown": bearer(UNKNOWN),
    "none after the scheme": [("Authorization", "Bearer ,")],
    "the beginning of one": bearer(ACT[:-1]),
    "more than one": bearer(f"{ACT}x"),
    "of another case": bearer(ACT.upper()),
    "with its name": bearer(f"{ACT} alice"),
    "its name": bearer("alice"),
    "two in a header": bearer(f"{ACT}, {OTHER_ACT}"),
    "two headers": bearer(ACT) + bearer(OTHER_ACT),
    "a header twice": bearer(ACT) * 2,
    "a good header and another": [*bearer(ACT), ("Authorization", f"Basic {ACT}")],
    "no ASCII": [("Authorization", b"Bearer \xff\xfe" + ACT.encode())],
    "UTF-8": [("Authorization", f"Bearer {ACT}\N{SNOWMAN}".encode())],
    "very long": bearer(ACT * 1000),
}
RIGHT_KEYS: dict[str, Headers] = {
    "an act key": bearer(ACT),
    "another one": bearer(OTHER_ACT),
    "an admin key": bearer(ADMIN),
    "a scheme in lower case": [("Authorization", f"bearer {ACT}")],
    "a scheme in capitals": [("AUTHORIZATION", f"BEARER {ACT}")],
    "more spaces": [("Authorization", f"Bearer   {ACT}")],
}


@pytest.mark.parametrize("content_type", [JSON, SAFETENSORS])
@pytest.mark.parametrize("headers", RIGHT_KEYS.values(), ids=RIGHT_KEYS)
def test_with_a_key_the_policy_acts(
    ask: Ask, spec: PolicySpec, headers: Headers, content_type: str
) -> None:
    answer = act(ask, spec, headers, content_type)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, content_type)


@pytest.mark.parametrize("content_type", [JSON, SAFETENSORS])
@pytest.mark.parametrize("headers", NO_KEY.values(), ids=NO_KEY)
def test_without_a_key_it_does_not_and_says_how_to_show_one(
    ask: Ask, spec: PolicySpec, headers: Headers, content_type: str
) -> None:
    for answer in (
        act(ask, spec, headers, content_type),
        ask("DELETE", "/sessions/x", headers=headers),
    ):
        sentence = error_of(answer, 401, "unauthorized")
        assert "send `Authorization: Bearer KEY`" in sentence
        assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("headers", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_every_wrong_key_is_told_the_same(ask: Ask, spec: PolicySpec, headers: Headers) -> None:
    for answer in (act(ask, spec, headers), ask("DELETE", "/sessions/x", headers=headers)):
        sentence = error_of(answer, 401, "unauthorized")
        assert sentence == "the key is not one of this server's"
        assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_who_ends_a_session_needs_a_key(ask: Ask) -> None:
    error_of(ask("DELETE", "/sessions/x"), 401, "unauthorized")
    error_of(ask("DELETE", "/sessions/x", headers=bearer(ACT)), 404, "unknown_session")
    error_of(ask("DELETE", "/sessions/x", headers=bearer(ADMIN)), 404, "unknown_session")


@pytest.mark.parametrize(
    "path", ["/", "/healthz", "/readyz", "/policy", "/metrics", "/docs", "/openapi.json"]
)
def test_what_changes_nothing_is_open(ask: Ask, path: str) -> None:
    for headers in (NO_KEY["no header"], WRONG_KEYS["unknown"]):
        assert ask("GET", path, headers=headers).status_code == 200


OTHERWISE_REFUSED: dict[str, tuple[int, Headers, bytes]] = {
    "another type": (415, [("Content-Type", "text/plain")], b""),
    "another encoding": (415, [("Content-Type", JSON), ("Content-Encoding", "gzip")], b""),
    "two sessions": (
        400,
        [("Content-Type", JSON), ("X-Session-Id", "a"), ("X-Session-Id", "b")],
        b"",
    ),
    "too much": (413, [("Content-Type", JSON)], b" " * 300_000),
    "no JSON": (400, [("Content-Type", JSON)], b"{"),
    "no observation": (422, [("Content-Type", JSON)], b'{"observation": [1]}'),
    "no session": (404, [("Content-Type", JSON)], b'{"session_id": "x", "observation": %b}'),
}


@pytest.mark.parametrize("what", OTHERWISE_REFUSED)
def test_who_has_no_key_learns_nothing_else(ask: Ask, spec: PolicySpec, what: str) -> None:
    status, headers, content = OTHERWISE_REFUSED[what]
    content = content.replace(b"%b", json.dumps([0.0] * spec.observation_dim).encode())
    refused = ask("POST", "/act", headers=headers, content=content)
    error_of(refused, 401, "unauthorized")
    known = ask("POST", "/act", headers=headers + bearer(ACT), content=content)
    assert known.status_code == status


def test_nor_whether_the_server_is_ready(
    make_client: MakeClient, files: Files, spec: PolicySpec
) -> None:
    cold = make_client(act_keys=files.act, is_warm=False)
    error_of(act(cold.request, spec, []), 401, "unauthorized")
    error_of(act(cold.request, spec, bearer(ACT)), 503, "not_ready")


def test_a_body_nobody_will_read_is_not_asked_for(server: RunningServer) -> None:
    head = b"POST /act HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(server.host_and_port, TIMEOUT_S) as client:
        client.sendall(head)
        answer = client.recv(4096)
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"\r\nconnection: close\r\n" in answer, (
            "the next request would be taken for the body"
        )


def test_without_files_nothing_needs_a_key_and_any_is_passed_over(
    make_client: MakeClient, spec: PolicySpec
) -> None:
    client = make_client()
    for headers in (NO_KEY["no header"], *WRONG_KEYS.values()):
        assert act(client.request, spec, headers).status_code == 200
        assert client.request("DELETE", "/sessions/x", headers=headers).status_code == 404


def test_admin_keys_alone_leave_acting_open(
    make_client: MakeClient, files: Files, spec: PolicySpec
) -> None:
    client = make_client(admin_keys=files.admin)
    for headers in (NO_KEY["no header"], bearer(UNKNOWN), bearer(ADMIN)):
        assert act(client.request, spec, headers).status_code == 200


# What changes the policy


def add_route(client: AppClient) -> None:
    """`PUT /test`, for administrators."""

    whose = Depends(client.served.keys.may_administer)

    @client.app.put("/test")
    async def changed(by: str = whose) -> str:
        return by


def administer(client: AppClient, headers: Headers, host: str | None) -> httpx.Response:
    """Asks for that route from an address or from none."""
    add_route(client)
    peer: Any = None if host is None else (host, 40_000)
    options: Any = {"headers": headers}

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(client.app, client=peer)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.put("/test", **options)

    return client.run(ask())


def test_an_admin_key_opens_what_changes_the_policy_from_anywhere_and_is_named(
    keyed: AppClient,
) -> None:
    for host in ("10.0.0.7", "127.0.0.1", None):
        answer = administer(keyed, [*bearer(ADMIN), ("X-Forwarded-For", "10.0.0.8")], host)
        assert (answer.status_code, answer.json()) == (200, "the key line 1")


@pytest.mark.parametrize("route", ["PUT /policy/weights", "POST /policy/rollback"])
def test_the_routes_that_change_the_policy_take_an_admin_key(keyed: AppClient, route: str) -> None:
    method, path = route.split()
    for headers, status in (([], 401), (bearer("wrong"), 401), (bearer(ACT), 403)):
        assert keyed.request(method, path, headers=headers).status_code == status
    assert keyed.request(method, path, headers=bearer(ADMIN)).status_code in (409, 415)
    assert keyed.get("/policy/versions").status_code == 200


@pytest.mark.parametrize("host", ["10.0.0.7", "127.0.0.1"])
def test_nothing_else_does_where_there_are_admin_keys(keyed: AppClient, host: str) -> None:
    sentence = error_of(administer(keyed, bearer(ACT), host), 403, "forbidden")
    assert "--admin-keys" in sentence
    for headers in (*NO_KEY.values(), *WRONG_KEYS.values()):
        answer = administer(keyed, headers, host)
        error_of(answer, 401, "unauthorized")
        assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.255.0.9", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("headers", [[], bearer(ACT)], ids=["no key", "an act key"])
def test_without_admin_keys_this_machine_may_change_the_policy(
    make_client: MakeClient, files: Files, host: str, headers: Headers
) -> None:
    assert administer(make_client(act_keys=files.act), headers, host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("10.0.0.7", "172.17.0.1", "0.0.0.0", "128.0.0.1", "::", "::ffff:10.0.0.7"),
        *("fe80::1%eth0", "localhost", "", None),
    ],
)
def test_without_admin_keys_no_other_may_and_is_told_what_to_set(
    client: AppClient, host: str | None
) -> None:
    for headers in (NO_KEY["no header"], bearer(ADMIN)):
        assert "--admin-keys FILE" in error_of(administer(client, headers, host), 403, "forbidden")


@pytest.mark.parametrize(
    "header",
    [
        *("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via", "Origin", "oRIGIN"),
        *("X-Forwarded-Proto", "x-forwarded-client-cert", "X-Envoy-External-Address"),
        *("Sec-Fetch-Site", "CF-Connecting-IP", "True-Client-IP", "X-Client-IP"),
        *("X-Cluster-Client-IP", "Fastly-Client-IP", "X-Original-Forwarded-For"),
    ],
)
@pytest.mark.parametrize("value", ["127.0.0.1", "null", ""])
def test_without_admin_keys_no_proxy_or_browser_may(
    client: AppClient, header: str, value: str
) -> None:
    answer = administer(client, [(header, value)], "127.0.0.1")
    assert "--admin-keys FILE" in error_of(answer, 403, "forbidden")


@pytest.mark.parametrize("header", ["X-Forwarded", "Sec-Fetch-Mode", "Sec-GPC", "X-Not-Via"])
def test_another_header_is_no_proxy_s(client: AppClient, header: str) -> None:
    assert administer(client, [(header, "1")], "127.0.0.1").status_code == 200


def test_where_a_request_comes_from_is_read_off_its_connection(client: AppClient) -> None:
    add_route(client)

    async def play(server: Server) -> list[int]:
        async with server.connect() as connection:
            connection.send(b"PUT /test HTTP/1.1\r\nHost: test\r\n\r\n")
            connection.send(b"PUT /test HTTP/1.1\r\nHost: test\r\nVIA: 1.1 proxy\r\n\r\n")
            return [(await connection.answer()).status for _ in range(2)]

    assert scenario(client, play) == [200, 403]


# Reading again


@pytest.fixture
def own_files(tmp_path: Path) -> Files:
    return Files.write(tmp_path)


def act_on(connection: http.client.HTTPConnection, key: str, spec: PolicySpec) -> int:
    """The status on this connection, which is not opened again."""
    headers = {"Content-Type": JSON, "Authorization": f"Bearer {key}"}
    connection.request("POST", "/act", json.dumps(body(spec)), headers)
    connection.auto_open = 0
    answer = connection.getresponse()
    answer.read()
    return answer.status


def test_sighup_gives_and_takes_keys_on_open_connections(
    artifact: Path, own_files: Files, spec: PolicySpec
) -> None:
    with running_server(artifact, *own_files.flags()) as server:
        connection = http.client.HTTPConnection(*server.host_and_port, timeout=TIMEOUT_S)

        def reload(until: str) -> None:
            server.process.send_signal(signal.SIGHUP)
            server.output.wait_for(until)

        def statuses() -> list[int]:
            return [act_on(connection, key, spec) for key in (ACT, OTHER_ACT, UNKNOWN, ADMIN)]

        assert statuses() == [200, 200, 401, 200]
        own_files.act.write_text(f"{OTHER_ACT} bob\n{UNKNOWN} carol\n")
        assert statuses() == [200, 200, 401, 200], "nobody has asked for it"
        reload(f"keys in {own_files.act}: 2 (bob, carol)")
        assert statuses() == [401, 200, 200, 200]
        own_files.act.write_text(f"{ACT}\n{ACT}\n")
        own_files.admin.write_text(f"{'y' * 20} dave\n")
        reload(f"keys in {own_files.admin}: 1 (dave)")
        assert "line 2: the key of line 1 stands here again; its keys stay" in server.log()
        assert statuses() == [401, 200, 200, 401], "the good file counts"
        connection.close()
        assert server.stop() == 0
        assert not [key for key in (ACT, OTHER_ACT, ADMIN, UNKNOWN) if key in server.log()]


def test_sighup_without_files_is_no_end(artifact: Path) -> None:
    with running_server(artifact) as server:
        server.process.send_signal(signal.SIGHUP)
        server.output.wait_for("there are no files of keys to read again")
        assert httpx.get(f"{server.address}/readyz").status_code == 200
        assert server.stop() == 0


@pytest.mark.parametrize("moment", [" pydantic.main\n", "Started server process"])
def test_sighup_before_the_server_is_ready_is_no_end(
    artifact: Path, own_files: Files, moment: str
) -> None:
    flags = ["-m", "service", "--artifact", str(artifact), "--port", "0", *own_files.flags()]
    with running([sys.executable, "-X", "importtime", *flags], until=moment) as server:
        server.process.send_signal(signal.SIGHUP)
        server.output.wait_for("ready: ")
        assert server.stop() == 0


# The start


def test_a_bad_file_stops_the_start_with_one_line(artifact: Path, own_files: Files) -> None:
    own_files.admin.write_text(f"{ADMIN} a\n{ADMIN} b\n")
    command = service_command("--artifact", str(artifact), "--port", "0", *own_files.flags())
    with running(command, until="service: ") as server:
        assert server.wait() == 2
        (line,) = [line for line in server.log().splitlines() if line.startswith("service: ")]
    assert line == (f"service: {own_files.admin}: line 2: the key of line 1 stands here again")
    assert ADMIN not in server.log()


@pytest.fixture
def start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, artifact: Path
) -> Iterator[Callable[..., list[str]]]:
    """The warnings of a start that ends as no snapshot can be written where it is told to."""
    handler = signal.getsignal(signal.SIGHUP)

    def warnings(*flags: str) -> list[str]:
        caplog.clear()
        of_all = [
            "--artifact",
            str(artifact),
            "--runtime",
            "torchscript",
            "--snapshot",
            "/proc/none",
        ]
        monkeypatch.setattr(sys, "argv", ["service", *of_all, *flags])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    yield warnings
    signal.signal(signal.SIGHUP, handler)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org"])
def test_a_server_that_anybody_reaches_warns_once_that_anybody_may_act(
    start: Callable[..., list[str]], files: Files, host: str
) -> None:
    (closed,) = start("--host", host)
    assert f"whoever reaches {host} may act" in closed
    assert "closed to them" in closed
    (keyed,) = start("--host", host, "--admin-keys", str(files.admin))
    assert "take an admin key" in keyed
    assert start("--host", host, "--act-keys", str(files.act)) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_a_server_of_this_machine_warns_of_nothing(
    start: Callable[..., list[str]], host: str
) -> None:
    assert start("--host", host) == []


def test_there_need_not_be_any_keys() -> None:
    keys = Keys()
    keys.reload()
    keys.check_act(None)
