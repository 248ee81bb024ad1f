"""Each example runs as its first lines say, against a real server."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.running_server import ROOT, RunningServer

TIMEOUT_S = 120


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_gymnasiums_loop_in_every_mode(server: RunningServer) -> None:
    printed = run(sys.executable, "examples/gymnasium_loop.py", "--url", server.address)
    episodes = dict(re.findall(r"(\w+): mean reward -\d+\.\d+, (\d+) episodes", printed))
    assert list(episodes) == ["NextStep", "SameStep", "Disabled"]
    assert all(int(number) > 16 for number in episodes.values())


@pytest.mark.skipif(
    find_spec("stable_baselines3") is None, reason="stable_baselines3 is in the extra `heavy`"
)
def test_stable_baselines3s_evaluation(server: RunningServer) -> None:
    printed = run(sys.executable, "examples/sb3_evaluate.py", "--url", server.address)
    assert re.fullmatch(r"20 episodes: -\d+\.\d+ \+- \d+\.\d+\n", printed)


def test_curl(server: RunningServer) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    first, second, third, again = run("sh", "examples/curl.sh", URL=server.address).splitlines()
    assert third == again
    assert [re.findall(r'"step":(\d)', line) for line in (first, second, third)] == [
        ["0"],
        ["1"],
        ["2"],
    ]


def test_node(server: RunningServer) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node here")
    printed = run(node, "examples/node.mjs", server.address)
    assert [line.split()[0] for line in printed.splitlines()] == ["0", "1", "2", "3", "4"]
