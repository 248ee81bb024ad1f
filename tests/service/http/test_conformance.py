"""A running server does what its `/openapi.json` says, and `HEAD` wherever `GET`, over sockets.

The one with V2's policy takes a key.
"""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from export.exporter import export_policy
from model.spec import PolicySpec
from tests.random_inputs import random_policy
from tests.running_server import ROOT, RunningServer, clean_environment, running_server

SCHEMATHESIS_TIMEOUT_S = 240.0
SOCKET_TIMEOUT_S = 20.0
KEY = "schemathesis-has-one"
NUM_EXAMPLES = 25
"""Of each route in the search; the cases that cover the document come on top."""
GET_PATHS = ("/", "/healthz", "/readyz", "/policy", "/metrics", "/openapi.json", "/docs", "/redoc")


@pytest.fixture(scope="module")
def v1_server(artifact: Path) -> Iterator[RunningServer]:
    with running_server(artifact) as server:
        yield server
        assert server.stop() == 0


@pytest.fixture(scope="module")
def v2_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    spec = PolicySpec.tamiyo_v2(num_slots=2, observation_dim=7, feature_dim=12, hidden_dim=16)
    directory = tmp_path_factory.mktemp("v2") / "tiny"
    export_policy(
        random_policy(spec), None, directory, name="tiny-v2", formats=("onnx",), max_batch_size=4
    )
    keys = directory / "act.keys"
    keys.write_text(KEY)
    with running_server(directory, "--act-keys", str(keys)) as server:
        yield server
        assert server.stop() == 0


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_schemathesis_finds_nothing(
    version: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """All its checks; what they cannot know of is in schemathesis_hooks, each with its reason."""
    server: RunningServer = request.getfixturevalue(f"{version}_server")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.address}/openapi.json"]
    if version == "v2":
        command += ["--header", f"Authorization: Bearer {KEY}"]
    checks = ["--checks", "all", "--continue-on-failure", "--no-color"]
    search = ["--generation-deterministic", "--max-examples", str(NUM_EXAMPLES)]
    done = subprocess.run(
        [*command, *checks, *search],
        cwd=tmp_path,
        env=clean_environment()
        | {"PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.service.schemathesis_hooks"},
        capture_output=True,
        text=True,
        timeout=SCHEMATHESIS_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Selected: 16/16" in done.stdout, done.stdout
    assert "Tested: 16" in done.stdout, done.stdout
    counts = results(server)
    assert counts["ok"] > NUM_EXAMPLES, "or the search hardly got past the checks"
    assert counts["malformed"] > NUM_EXAMPLES
    assert counts["internal"] == 0
    assert "Traceback" not in server.log()


def results(server: RunningServer) -> dict[str, float]:
    """How many requests to `POST /act` ended how."""
    text = httpx.get(f"{server.address}/metrics").text
    return {
        sample.labels["result"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "tamiyo_act_requests_total"
    }


@pytest.mark.parametrize("path", [*GET_PATHS, "/nope", "/act", "/sessions/a"])
def test_head_is_get_without_the_body(v1_server: RunningServer, path: str) -> None:
    got, head = (exchange(v1_server, method, path) for method in ("GET", "HEAD"))
    status, headers, body = got
    assert head[0] == status == (200 if path in GET_PATHS else 404 if path == "/nope" else 405)
    assert len(body) == int(headers["content-length"]) > 0
    assert head[2] == b""
    if path == "/metrics":  # which has other numbers each time
        assert int(head[1].pop("content-length")) > 0
        del headers["content-length"]
    assert head[1] == headers


def test_a_connection_goes_on_after_head(v1_server: RunningServer) -> None:
    """A length without a body must not be waited for."""
    with httpx.Client(base_url=v1_server.address, timeout=SOCKET_TIMEOUT_S) as client:
        for _ in range(3):
            assert client.head("/policy").status_code == 200
            assert client.get("/healthz").json() == {"alive": True}


def exchange(server: RunningServer, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
    """The whole answer on a connection of its own: status, headers but the date, and body."""
    with socket.create_connection(server.host_and_port, SOCKET_TIMEOUT_S) as connection:
        connection.sendall(
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    status_line, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (of.partition(": ") for of in lines)}
    del headers["date"]
    return int(status_line.split()[1]), headers, body
