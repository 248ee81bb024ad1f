"""The container engine and the image under test, as the environment names them.

`IMAGE` is the image's name. `ENGINE` is a command that takes docker's words: `docker`, `podman`, or
a script around one of them.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from tests.running_server import RunningServer, running

TIMEOUT_S = 120.0
ENGINE = os.environ.get("ENGINE", "docker")
IMAGE = os.environ.get("IMAGE", "tamiyo-serve:cpu")

# As little as a host can give it.
HARDENED = ["--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges"]


def engine(*arguments: str) -> str:
    """What the engine prints."""
    done = subprocess.run(
        [ENGINE, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    return done.stdout


def inspect_image() -> dict[str, Any]:
    """The image's configuration; podman keeps the health check beside it, docker in it."""
    (image,) = json.loads(engine("image", "inspect", IMAGE))
    config: dict[str, Any] = image["Config"]
    return {"Healthcheck": image.get("Healthcheck")} | config


def run_command(name: str, flags: Sequence[str], arguments: Sequence[str]) -> list[str]:
    return [
        ENGINE,
        "run",
        "--name",
        name,
        "--network",
        "host",
        *HARDENED,
        *flags,
        IMAGE,
        *arguments,
    ]


@contextmanager
def running_container(*flags: str) -> Iterator[RunningServer]:
    """A hardened container with these flags, on a free port of the loopback interface."""
    name = f"tamiyo-{uuid4().hex}"
    try:
        with running(run_command(name, ["--env", "TAMIYO_PORT=0", *flags], [])) as server:
            yield server
    finally:
        subprocess.run([ENGINE, "rm", "--force", name], capture_output=True, timeout=TIMEOUT_S)


def refused_start(*flags: str, arguments: Sequence[str] = ()) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a container that does not start."""
    name = f"tamiyo-{uuid4().hex}"
    try:
        done = subprocess.run(
            run_command(name, flags, arguments), capture_output=True, text=True, timeout=TIMEOUT_S
        )
        return done.returncode, done.stdout, done.stderr
    finally:
        subprocess.run([ENGINE, "rm", "--force", name], capture_output=True, timeout=TIMEOUT_S)
