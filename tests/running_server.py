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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0


@dataclass
class RunningServer:
    """A server that has said it is ready. `ready_line` is what it said, `address` its base URL."""

    process: "subprocess.Popen[str]"
    output: "_Output"
    ready_line: str

    @property
    def address(self) -> str:
        found = re.search(r"http://[^/\s]+", self.ready_line)
        assert found, f"no address in {self.ready_line!r}"
        return found.group()

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.address.removeprefix("http://").rpartition(":")
        return host, int(port)

    def counted(self, sample: str) -> float:
        """What its `/metrics` say of that; 0 where they say nothing yet."""
        text = httpx.get(f"{self.address}/metrics", timeout=STOP_TIMEOUT_S).text
        found = re.search(rf"^{re.escape(sample)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def log(self) -> str:
        """Everything it has written so far."""
        return "".join(self.output.lines)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Its exit code, once it has ended and its log is whole."""
        code = self.process.wait(STOP_TIMEOUT_S)
        self.output.join(STOP_TIMEOUT_S)
        return code

    def stop(self) -> int:
        if self.process.poll() is None:
            self.terminate()
        return self.wait()


class _Output(threading.Thread):
    """Reads what a process writes until its end, so that it never waits for a reader."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(daemon=True)
        self.stream = stream
        self.lines: list[str] = []
        self._unseen: queue.Queue[str] = queue.Queue()
        self.start()

    def run(self) -> None:
        with self.stream:
            for line in self.stream:
                self.lines.append(line)
                self._unseen.put(line)
        self._unseen.put("")

    def wait_for(self, text: str) -> str:
        """The next line with this in it; those before it are not looked at again."""
        while True:
            try:
                line = self._unseen.get(timeout=START_TIMEOUT_S)
            except queue.Empty:
                line = ""
            if not line:
                raise RuntimeError(f"no {text!r} in what it said: {''.join(self.lines)}")
            if text in line:
                return line


@contextmanager
def running_server(artifact: Path, *flags: str) -> Iterator[RunningServer]:
    """Serves `artifact`; leaving the context ends the process, by force if it has to."""
    with running(service_command("--artifact", str(artifact), "--port", "0", *flags)) as server:
        yield server


@contextmanager
def running(command: Sequence[str], *, until: str = "ready: ") -> Iterator[RunningServer]:
    """The server that `command` runs, in a process of its own or in a container's.

    It has said a line with `until` in it; nothing has been written to its stdin.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=clean_environment(),
    )
    assert process.stdout is not None
    output = _Output(process.stdout)
    try:
        server = RunningServer(process, output, output.wait_for(until))
        yield server
        server.stop()
    finally:
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
        output.join(STOP_TIMEOUT_S)


def service_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "service", *arguments]


def clean_environment() -> dict[str, str]:
    """This process's environment without the server's settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TAMIYO_")}
