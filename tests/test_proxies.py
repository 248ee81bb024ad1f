"""Behind nginx and HAProxy, where they are installed: sessions, prefixes, chunks and hashing.

The proxies listen on Unix sockets, so that they need no port; the servers behind are real ones.
"""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from export.exporter import export_policy
from model.policy import FactoredRecurrentActorCritic
from tests.balancer import HAPROXY, needs_haproxy
from tests.running_server import STOP_TIMEOUT_S, RunningServer, running_server

START_TIMEOUT_S = 30.0
TIMEOUT_S = 30.0
NUM_STEPS = 3
NUM_SESSIONS = 24
TOO_MANY_BYTES = 300_000
Json = dict[str, Any]
Configure = Callable[[Path, str, list[RunningServer]], list[str]]

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def nginx(directory: Path, how: str, servers: list[RunningServer]) -> list[str]:
    """Writes a configuration; returns the command that runs it."""
    assert NGINX is not None
    places = {
        "as installed": "location / { proxy_pass http://act; }",
        "kept alive": """
            location / {
                proxy_pass http://act;
                proxy_http_version 1.1;
                proxy_set_header Connection "";
                proxy_set_header Host $host;
                proxy_set_header X-Real-IP $remote_addr;
                proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
                proxy_set_header X-Forwarded-Proto $scheme;
            }""",
        "not buffered": """
            location / {
                proxy_pass http://act;
                proxy_http_version 1.1;
                proxy_request_buffering off;
                proxy_buffering off;
            }""",
        "hashed": "location / { proxy_pass http://act; }",
        "prefix stripped": "location /tamiyo/ { proxy_pass http://act/; }",
        "prefix kept": "location /tamiyo/ { proxy_pass http://act; }",
    }
    temporary = "\n".join(
        f"{name}_temp_path {directory / name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    upstreams = "\n".join("server {}:{};".format(*server.host_and_port) for server in servers)
    config = directory / "nginx.conf"
    config.write_text(f"""
        daemon off;
        master_process off;
        pid {directory / "pid"};
        error_log stderr warn;
        events {{ worker_connections 256; }}
        http {{
            access_log off;
            {temporary}
            upstream act {{
                {"hash $http_x_session_id consistent;" if how == "hashed" else ""}
                {upstreams}
                keepalive 16;
            }}
            server {{
                listen unix:{directory / "socket"};
                {places[how]}
            }}
        }}
    """)
    return [NGINX, "-e", "stderr", "-p", str(directory), "-c", str(config)]


def haproxy(directory: Path, how: str, servers: list[RunningServer]) -> list[str]:
    """Writes a configuration; returns the command that runs it."""
    assert HAPROXY is not None
    extra = {
        "as installed": "",
        "kept alive": "option forwardfor\n http-reuse always",
        "not buffered": "no option http-buffer-request",
        "hashed": "balance hdr(X-Session-Id)\n hash-type consistent",
        "prefix stripped": "http-request replace-path /tamiyo(/.*) \\1",
        "prefix kept": "",
    }
    upstreams = "\n".join(
        " server act-{} {}:{} check".format(number, *server.host_and_port)
        for number, server in enumerate(servers)
    )
    config = directory / "haproxy.cfg"
    config.write_text(f"""
global
 maxconn 256
defaults
 mode http
 timeout connect 5s
 timeout client 75s
 timeout server 75s
frontend clients
 bind unix@{directory / "socket"}
 default_backend act
backend act
 option httpchk GET /readyz
 {extra[how]}
{upstreams}
""")
    return [HAPROXY, "-db", "-f", str(config)]


PROXIES = [
    pytest.param(nginx, id="nginx", marks=pytest.mark.skipif(not NGINX, reason="no nginx here")),
    pytest.param(haproxy, id="HAProxy", marks=needs_haproxy),
]


@contextmanager
def behind(
    configure: Configure, how: str, directory: Path, *servers: RunningServer
) -> Iterator[httpx.Client]:
    """A client of the proxy, once the proxy answers for its servers."""
    socket_file = directory / "socket"
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            configure(directory, how, list(servers)), stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_for(socket_file, process, directory / "log")
        transport = httpx.HTTPTransport(uds=str(socket_file))
        with httpx.Client(
            transport=transport, base_url="http://proxy", timeout=TIMEOUT_S
        ) as client:
            yield client
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        finally:
            process.kill()


def wait_for(socket_file: Path, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Returns when somebody listens there."""
    end_s = time.monotonic() + START_TIMEOUT_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end_s, log.read_text()
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(socket_file))
            except OSError:
                time.sleep(0.01)
            else:
                return


@pytest.fixture(scope="module")
def artifact(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("proxies") / "tiny"
    export_policy(policy, None, output, name="tiny", formats=("onnx",), max_batch_size=64)
    return output


@pytest.fixture(scope="module")
def servers(artifact: Path) -> Iterator[list[RunningServer]]:
    with ExitStack() as stack:
        servers = [stack.enter_context(running_server(artifact)) for _ in range(2)]
        yield servers
        for server in servers:
            assert server.stop() == 0
            assert "Traceback" not in server.log()


@pytest.fixture
def dimension(policy: FactoredRecurrentActorCritic) -> int:
    return policy.observation_dim


def step(session_id: str, step: int, dimension: int) -> Json:
    return {
        "session_id": session_id,
        "episode": "0",
        "episode_start": step == 0,
        "step": step,
        "seed": 5,
        "observation": [0.1 * step] * dimension,
    }


def play(
    client: httpx.Client,
    session_id: str,
    dimension: int,
    *,
    path: str = "/act",
    chunked: bool = False,
) -> list[bytes]:
    """The answers to a session's first steps, each sent again once, as after a lost answer."""
    answers = []
    for at in range(NUM_STEPS):
        content = json.dumps(step(session_id, at, dimension)).encode()
        for is_retry in (False, True):
            sent = (content[i : i + 20] for i in range(0, len(content), 20)) if chunked else content
            headers = {"Content-Type": "application/json", "X-Session-Id": session_id}
            response = client.post(path, content=sent, headers=headers)
            assert response.status_code == 200, response.text
            assert response.headers.get("Replayed") == ("true" if is_retry else None)
        answers.append(response.content)
    return answers


@pytest.mark.parametrize("chunked", [False, True], ids=["", "in chunks"])
@pytest.mark.parametrize("how", ["as installed", "kept alive", "not buffered"])
@pytest.mark.parametrize("proxy", PROXIES)
def test_a_session_is_answered_through_a_proxy_as_without(
    servers: list[RunningServer],
    dimension: int,
    tmp_path: Path,
    proxy: Configure,
    how: str,
    chunked: bool,
) -> None:
    server = servers[0]
    with httpx.Client(base_url=server.address, timeout=TIMEOUT_S) as direct:
        expected = play(direct, tmp_path.name, dimension)
        assert direct.delete(f"/sessions/{tmp_path.name}").status_code == 204
        with behind(proxy, how, tmp_path, server) as client:
            assert play(client, tmp_path.name, dimension, chunked=chunked) == expected
            assert client.get("/healthz").json() == {"alive": True}
            refused = client.post(
                "/act", content=b"{", headers={"Content-Type": "application/json"}
            )
            assert (refused.status_code, refused.json()["error_type"]) == (400, "malformed")


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_body_too_large_is_refused_through_a_proxy_and_the_next_request_is_served(
    servers: list[RunningServer], dimension: int, tmp_path: Path, proxy: Configure
) -> None:
    headers = {"Content-Type": "application/json"}
    with behind(proxy, "kept alive", tmp_path, servers[0]) as client:
        for _ in range(3):
            refused = client.post("/act", content=b" " * TOO_MANY_BYTES, headers=headers)
            assert (refused.status_code, refused.json()["error_type"]) == (413, "too_large")
            assert client.post("/act", json={"observation": [0.0] * dimension}).status_code == 200


@pytest.mark.parametrize("proxy", PROXIES)
def test_hashing_the_session_s_name_keeps_it_where_its_state_is(
    servers: list[RunningServer], dimension: int, tmp_path: Path, proxy: Configure
) -> None:
    before = [server.counted("tamiyo_sessions") for server in servers]
    with behind(proxy, "hashed", tmp_path, *servers) as client:
        names = [f"{tmp_path.name}-{number}" for number in range(NUM_SESSIONS)]
        for name in names:
            play(client, name, dimension)
    after = [server.counted("tamiyo_sessions") for server in servers]
    shares = [now - was for now, was in zip(after, before, strict=True)]
    assert sum(shares) == NUM_SESSIONS
    assert min(shares) > 0


@pytest.fixture(scope="module")
def prefixed(artifact: Path) -> Iterator[RunningServer]:
    with running_server(artifact, "--root-path", "/tamiyo") as server:
        yield server
        assert server.stop() == 0
        assert "Traceback" not in server.log()


@pytest.mark.parametrize("how", ["prefix stripped", "prefix kept"])
@pytest.mark.parametrize("proxy", PROXIES)
def test_the_documentation_works_below_a_prefix(
    prefixed: RunningServer, dimension: int, tmp_path: Path, proxy: Configure, how: str
) -> None:
    with behind(proxy, how, tmp_path, prefixed) as client:
        page = client.get("/tamiyo/docs")
        assert page.status_code == 200
        document = re.search(r"url: '([^']+)'", page.text)
        assert document
        openapi = client.get(document.group(1)).json()
        (server,) = openapi["servers"]
        path = httpx.URL(client.base_url).join(server["url"]).path.rstrip("/")
        assert path == "/tamiyo"
        assert "/act" in openapi["paths"]
        play(client, tmp_path.name, dimension, path=f"{path}/act")
        assert client.get(f"{path}/healthz").json() == {"alive": True}
        assert client.delete(f"{path}/sessions/{tmp_path.name}").status_code == 204
        assert client.delete(f"{path}/sessions/{tmp_path.name}").status_code == 404
