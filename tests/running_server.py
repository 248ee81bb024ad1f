"""`python -m service` as a process of its own: started on a free port, and always ended.

with running_server(artifact) as server:
    httpx.post(f"{server.address}/act", json={"observation": [...]})
"""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


@dataclass
class RunningServer:
    """A server that has said it is ready. `ready_line` is what it said, `address` its base URL."""

    process: "subprocess.Popen[str]"
    ready_line: str
    log_file: Path

    @property
    def address(self) -> str:
        found = re.search(r"http://[^/\s]+", self.ready_line)
        assert found, f"no address in {self.ready_line!r}"
        return found.group()

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.address.removeprefix("http://").rpartition(":")
        return host, int(port)

    def log(self) -> str:
        """Everything it has written to stderr."""
        return self.log_file.read_text()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(STOP_TIMEOUT_S)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.terminate()
        return self.wait()


@contextmanager
def running_server(artifact: Path, *flags: str) -> Iterator[RunningServer]:
    """Serves `artifact`; leaving the context ends the process, by force if it has to."""
    with TemporaryDirectory() as directory:
        log_file = Path(directory) / "stderr"
        with log_file.open("w") as log:
            process = subprocess.Popen(
                service_command("--artifact", str(artifact), "--port", "0", *flags),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=clean_environment(),
            )
        try:
            server = RunningServer(process, _ready_line(process, log_file), log_file)
            yield server
            server.stop()
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def service_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "service", *arguments]


def clean_environment() -> dict[str, str]:
    """This process's environment without the server's settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TAMIYO_")}


def _ready_line(process: "subprocess.Popen[str]", log_file: Path) -> str:
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        lines.put(process.stdout.readline())

    threading.Thread(target=read, daemon=True).start()
    try:
        line = lines.get(timeout=START_TIMEOUT_S)
    except queue.Empty:
        line = ""
    if not line.startswith("ready: "):
        raise RuntimeError(f"the server did not start, it said {line!r}; {log_file.read_text()}")
    return line
