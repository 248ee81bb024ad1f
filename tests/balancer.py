"""HAProxy with the project's own configuration in front of servers: started, and always ended.

with balanced(server.host_and_port, other.host_and_port) as balancer:
    httpx.post(f"{balancer.address}/act", ...)
"""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest

from tests.connection import Address
from tests.running_server import (
    ROOT,
    START_TIMEOUT_S,
    STOP_TIMEOUT_S,
    clean_environment,
)

HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
needs_haproxy = pytest.mark.skipif(not HAPROXY, reason="no HAProxy here")
CONFIG = ROOT / "deploy" / "haproxy.cfg"


@dataclass
class Balancer:
    """Where it listens."""

    host: str
    port: int
    metrics_port: int

    @property
    def host_and_port(self) -> Address:
        return self.host, self.port

    @property
    def address(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def metrics_address(self) -> str:
        return f"http://{self.host}:{self.metrics_port}"

    def wait_until(self, state: str, *numbers: int) -> None:
        """Returns when the ring has these servers UP, each found ready once, or has them DOWN."""
        for number in numbers:
            of_it = f'{{proxy="sessions",server="{number}",state='
            wanted = {f'haproxy_server_status{of_it}"{state}"}} 1'}
            if state == "UP":
                wanted.add(f'haproxy_server_check_status{of_it}"L7OK"}} 1')
            end_s = time.monotonic() + START_TIMEOUT_S
            while not wanted <= set(self.metrics().splitlines()):
                assert time.monotonic() < end_s, f"{number} is not {state}"
                time.sleep(0.05)

    def metrics(self) -> str:
        return httpx.get(f"{self.metrics_address}/metrics", timeout=STOP_TIMEOUT_S).text


@contextmanager
def balanced(
    *places: Address, returns_within_s: int = 20, nameserver: Address | None = None
) -> Iterator[Balancer]:
    """Serves what answers at these places, the first with the id 1; names are the nameserver's."""
    assert HAPROXY is not None
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory()))
        # Whoever connects from now on waits until HAProxy accepts.
        clients, metrics = (
            stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
            for _ in range(2)
        )
        replicas = directory / "replicas.cfg"
        replicas.write_text(server_lists(places))
        given = {
            "BIND": f"fd@{clients.fileno()}",
            "METRICS_BIND": f"fd@{metrics.fileno()}",
            "RETURNS_WITHIN_S": str(returns_within_s),
        }
        if nameserver is not None:
            given["NAMESERVER"] = "{}:{}".format(*nameserver)
        log = directory / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [HAPROXY, "-db", "-f", str(CONFIG), "-f", str(replicas)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=clean_environment() | given,
                pass_fds=(clients.fileno(), metrics.fileno()),
            )
        stack.callback(end, process)
        host, port = clients.getsockname()
        yield Balancer(host, port, metrics.getsockname()[1])
        assert process.poll() is None, log.read_text()


def server_lists(places: tuple[Address, ...]) -> str:
    """As deploy/replicas.cfg has them."""
    return "\n".join(
        f"backend {name} from {name}\n"
        + "".join(
            f"  server {number} {host}:{port} id {number}\n"
            for number, (host, port) in enumerate(places, 1)
        )
        for name in ("sessions", "stateless")
    )


def end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    finally:
        process.kill()
