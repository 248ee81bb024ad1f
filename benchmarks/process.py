"""`python -m service` as the system sees it: its log, its memory, its descriptors and its end."""

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from urllib.parse import urlsplit

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
LEVEL_MIB = 8.0
READY = re.compile(r"^ready: .*?(http://[^/\s]+)/act", re.MULTILINE)


def resident_mib(process_id: int) -> float:
    status = Path(f"/proc/{process_id}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found.group(1)) / 1024


class Memory(NamedTuple):
    """Resident memory over a run: at first, the most in each half, and at last."""

    start_mib: float
    first_half_mib: float
    second_half_mib: float
    end_mib: float

    @classmethod
    def of(cls, samples_mib: list[float]) -> "Memory":
        half = len(samples_mib) // 2
        first, second = samples_mib[: half + 1], samples_mib[half:]
        return cls(first[0], max(first), max(second), second[-1])

    @property
    def is_level(self) -> bool:
        return self.second_half_mib - self.first_half_mib <= LEVEL_MIB

    def __str__(self) -> str:
        return (
            f"resident MiB: start {self.start_mib:.1f}, first half {self.first_half_mib:.1f}, "
            f"end {self.end_mib:.1f}"
        )


class ServerProcess:
    """A server that is ready. Reads `/proc`, so Linux only."""

    def __init__(self, process: "subprocess.Popen[bytes]", log_file: Path, url: str) -> None:
        self.url = url
        self._process = process
        self._log_file = log_file

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 80

    def log(self) -> str:
        """Everything it has written so far."""
        return self._log_file.read_text(errors="replace")

    def is_running(self) -> bool:
        return self._process.poll() is None

    def resident_mib(self) -> float:
        return resident_mib(self._process.pid)

    def num_descriptors(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self._process.pid}/fd").iterdir())

    def cpu_s(self) -> float:
        """Processor time it has used, in user and kernel mode."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100.0  # Linux's clock ticks

    async def stop(self) -> int | None:
        """Its exit code after SIGTERM, or None where it had to be killed."""
        if self.is_running():
            self._process.send_signal(signal.SIGTERM)
        try:
            return await asyncio.to_thread(self._process.wait, STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return None


@asynccontextmanager
async def server_process(
    artifact: Path, *options: str, max_files: int | None = None
) -> AsyncIterator[ServerProcess]:
    """Serves `artifact` on a free port; `max_files` is its hard limit of descriptors.

    Leaving the context ends the process, by force if it has to.
    """
    command = [sys.executable, "-m", "service", "--artifact", str(artifact), "--port", "0"]
    command += options
    if max_files is not None:
        command = ["sh", "-c", f'ulimit -n {max_files} && exec "$0" "$@"', *command]
    with TemporaryDirectory() as directory:
        log_file = Path(directory) / "log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while not (ready := READY.search(log_file.read_text())):
                    if process.poll() is not None:
                        raise SystemExit(f"the server did not start:\n{log_file.read_text()}")
                    await asyncio.sleep(0.05)
            yield ServerProcess(process, log_file, ready.group(1))
        finally:
            process.kill()
            process.wait()
