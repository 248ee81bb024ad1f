"""What a server says of `--snapshot` at its start and its end, and with which exit code."""

import json
import re
import resource
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from export.exporter import export_policy
from export.manifest import Manifest
from model.spec import PolicySpec
from service.engine.snapshot_file import Snapshot
from tests.random_inputs import random_policy
from tests.running_server import (
    ROOT,
    RunningServer,
    clean_environment,
    running,
    running_server,
)
from tests.service.test_start_and_stop import GATED

FREE = [*GATED, "free"]
TIMEOUT_S = 60.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state" / "sessions"


@pytest.fixture(scope="module")
def another(spec: PolicySpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of another policy of the same shapes."""
    directory = tmp_path_factory.mktemp("artifacts") / "another"
    policy = random_policy(spec, seed=77)
    export_policy(policy, None, directory, name="another", formats=("torchscript",))
    return directory


def serving(artifact: Path, path: Path, *flags: str) -> AbstractContextManager[RunningServer]:
    """A server with a snapshot there. Its policy is the fake one, of the artifact's name."""
    options = ("--artifact", str(artifact), "--port", "0", "--snapshot", str(path), *flags)
    return running([*FREE, *options])


def refused(artifact: Path, *flags: str) -> str:
    """The one line on stderr of a server that does not start."""
    command = [*FREE, "--artifact", str(artifact), "--port", "0", *flags]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=clean_environment(),
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 2, done
    (line,) = done.stderr.splitlines()
    return line.removeprefix("service: ")


def starts(server: RunningServer, *names: str) -> None:
    for name in names:
        assert act(server, name, episode_start=True).status_code == 200


def act(server: RunningServer, name: str, **fields: object) -> httpx.Response:
    body = {"session_id": name, "observation": [0.5] * 11, **fields}
    return httpx.post(f"{server.address}/act", json=body, timeout=TIMEOUT_S)


def snapshot_of(artifact: Path, path: Path, *names: str) -> bytes:
    """What a server leaves at its end that had these sessions."""
    with serving(artifact, path) as server:
        starts(server, *names)
        assert server.stop() == 0
    return path.read_bytes()


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--snapshot-every-s", "5"], "--snapshot-every-s needs --snapshot"),
        (["--snapshot-required"], "--snapshot-required needs --snapshot"),
        (["--snapshot", "{state}"], "is not a file"),
        (["--snapshot", "{state}/missing/sessions"], "(No such file or directory)"),
        (["--snapshot", "/proc/sessions"], "no snapshot can be written there"),
    ],
)
def test_a_place_for_no_snapshot_is_one_sentence_and_code_2(
    artifact: Path, path: Path, flags: Sequence[str], why: str
) -> None:
    assert why in refused(artifact, *(flag.format(state=path.parent) for flag in flags))
    assert list(path.parent.iterdir()) == []


def test_more_sessions_than_there_is_room_for_are_one_sentence_and_code_2(artifact: Path) -> None:
    line = refused(artifact, "--max-sessions", str(10**12))
    assert line.startswith(f"--max-sessions {10**12} is more than fits here: ")


@pytest.mark.parametrize("required", [[], ["--snapshot-required"]])
def test_where_there_is_none_yet_it_says_so_and_leaves_one(
    artifact: Path, path: Path, required: list[str]
) -> None:
    with serving(artifact, path, *required) as server:
        assert "there is no snapshot yet" in server.log()
        assert not path.exists()
        assert server.stop() == 0
    with Snapshot(path) as snapshot:
        assert snapshot.is_final


def test_it_is_not_final_any_more_once_requests_are_answered(artifact: Path, path: Path) -> None:
    snapshot_of(artifact, path, "a")
    with serving(artifact, path) as server:
        with Snapshot(path) as snapshot:
            assert not snapshot.is_final
        assert act(server, "a").json()["step"] == 1
    with Snapshot(path) as snapshot:
        assert snapshot.is_final


def test_it_is_final_still_until_the_warm_up_has_ended(artifact: Path, path: Path) -> None:
    flags = ["--artifact", str(artifact), "--port", "0", "--snapshot", str(path)]
    content = snapshot_of(artifact, path, "a")
    with running([*GATED, "warm-up", *flags], until="step ") as server:
        server.process.kill()
        server.process.wait()
    assert path.read_bytes() == content
    with running([*GATED, "warm-up", *flags], until="step ") as server:
        server.terminate()
        assert server.wait() == 0
    with Snapshot(path) as snapshot:
        assert snapshot.is_final
    with serving(artifact, path) as server:
        assert act(server, "a").json()["step"] == 1


def test_a_damaged_one_stops_the_start_where_it_is_required(artifact: Path, path: Path) -> None:
    content = snapshot_of(artifact, path, "a")
    path.write_bytes(damaged := content[:-1])
    line = refused(artifact, "--snapshot", str(path), "--snapshot-required")
    assert line.startswith(f"{path}: is damaged, it was cut short; ")
    assert path.read_bytes() == damaged
    assert list(path.parent.iterdir()) == [path]


def test_otherwise_it_is_set_aside_when_there_is_a_new_one(artifact: Path, path: Path) -> None:
    path.write_bytes(damaged := snapshot_of(artifact, path, "a")[:-1])
    with serving(artifact, path) as server:
        (warning,) = re.findall(r"^WARNING:.*$", server.log(), re.MULTILINE)
        assert "is damaged" in warning
        assert f"{path}.refused" in warning
        assert act(server, "a").status_code == 404
        assert path.read_bytes() == damaged
        assert list(path.parent.iterdir()) == [path]
        assert server.stop() == 0
    assert path.with_name("sessions.refused").read_bytes() == damaged
    with Snapshot(path) as snapshot:
        assert snapshot.is_final


def test_one_policy_after_another_sets_each_one_s_aside(
    artifact: Path, another: Path, path: Path
) -> None:
    snapshot_of(artifact, path, "a")
    for directory, name in ((another, "sessions.refused"), (artifact, "sessions.refused.2")):
        with serving(directory, path) as server:
            (warning,) = re.findall(r"^WARNING:.*$", server.log(), re.MULTILINE)
            assert warning.endswith(f"the next one moves this to {path.with_name(name)}")
            assert server.stop() == 0
    versions = [Manifest.read(directory).policy_version for directory in (artifact, another)]
    for name, version in zip(("sessions.refused", "sessions.refused.2"), versions, strict=True):
        with Snapshot(path.with_name(name)) as snapshot:
            assert version in str(snapshot[0].record)


def test_another_policy_s_is_refused_and_what_was_missed_meanwhile_is_known_later(
    artifact: Path, another: Path, path: Path
) -> None:
    snapshot_of(artifact, path, "a")
    line = refused(another, "--snapshot", str(path), "--snapshot-required")
    versions = [Manifest.read(directory).policy_version[:19] for directory in (artifact, another)]
    assert "is of another policy" in line
    assert all(version in line for version in versions)
    with Snapshot(path) as snapshot:
        assert snapshot.is_final
    with serving(another, path) as server:
        starts(server, "a")
        server.process.kill()
        server.process.wait()
    with serving(artifact, path) as server:
        assert act(server, "a").status_code == 410


def fill_disk(server: RunningServer, limit_bytes: int) -> None:
    """The system refuses every write of the server beyond so many bytes of a file."""
    limits = limit_bytes, resource.RLIM_INFINITY
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_at_the_end_is_one_line_and_code_1_and_the_older_one_stays(
    artifact: Path, path: Path
) -> None:
    snapshot_of(artifact, path, "a")
    with serving(artifact, path) as server:
        content = path.read_bytes()
        fill_disk(server, 100)
        assert server.stop() == 1
        (error,) = re.findall(r"^ERROR:.*$", server.log(), re.MULTILINE)
        assert error.endswith(
            f"{path}: no snapshot could be written (File too large); sessions that moved since the "
            "last one are lost"
        )
        assert "Traceback" not in server.log()
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_meanwhile_costs_a_line_each_and_nobody_an_answer(
    artifact: Path, path: Path
) -> None:
    with serving(artifact, path, "--snapshot-every-s", "0.02") as server:
        starts(server, "a")
        wait_for(server, "written", 1)
        fill_disk(server, 100)
        failed = wait_for(server, "failed", 3)
        assert act(server, "a").json()["step"] == 1
        fill_disk(server, resource.RLIM_INFINITY)
        wait_for(server, "written", counted(server, "written") + 1)
        errors = re.findall(r"^ERROR:.*; serving goes on$", server.log(), re.MULTILINE)
        assert len(errors) >= failed
        assert "Traceback" not in server.log()
        assert server.stop() == 0
    assert list(path.parent.iterdir()) == [path]


def wait_for(server: RunningServer, result: str, number: float) -> float:
    while (found := counted(server, result)) < number:
        assert server.process.poll() is None
    return found


def counted(server: RunningServer, result: str) -> float:
    return metric(server, f'tamiyo_snapshots_total{{result="{result}"}}') or 0.0


def metric(server: RunningServer, name: str) -> float | None:
    text = httpx.get(f"{server.address}/metrics", timeout=TIMEOUT_S).text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return None if found is None else float(found[1])


def test_metrics_tell_of_snapshots_and_of_who_was_restored(artifact: Path, path: Path) -> None:
    with serving(artifact, path) as server:
        assert metric(server, "tamiyo_snapshot_age_seconds") is None
        assert metric(server, "tamiyo_snapshot_seconds") is None
        starts(server, "a", "b")
    with serving(artifact, path, "--snapshot-every-s", "3600") as server:
        age_s = metric(server, "tamiyo_snapshot_age_seconds")
        assert age_s is not None
        assert 0 < age_s < TIMEOUT_S
        assert metric(server, "tamiyo_sessions") == 2
        for event, number in (("restored", 2), ("started", 0), ("lost", 0)):
            assert metric(server, f'tamiyo_session_events_total{{event="{event}"}}') == number
        assert counted(server, "written") == counted(server, "failed") == 0


def test_where_none_was_written_yet_its_age_is_the_server_s(artifact: Path, path: Path) -> None:
    for content in (None, b"something else"):
        if content is not None:
            path.write_bytes(content)
        with serving(artifact, path, "--snapshot-every-s", "3600") as server:
            age_s = metric(server, "tamiyo_snapshot_age_seconds")
            assert age_s is not None
            later_s = metric(server, "tamiyo_snapshot_age_seconds")
            assert later_s is not None
            assert 0 < age_s < later_s < TIMEOUT_S
            server.process.kill()
            server.process.wait()


def test_without_the_option_nothing_is_written_or_told(artifact: Path) -> None:
    with running_server(artifact) as server:
        assert "tamiyo_snapshot" not in httpx.get(f"{server.address}/metrics").text
        assert "snapshot" not in server.log()


def test_what_a_killed_writer_left_is_gone_after_the_next_start(artifact: Path, path: Path) -> None:
    left = path.with_name(f".{path.name}.draft-{'0' * 16}")
    left.write_bytes(b"half of one")
    with serving(artifact, path):
        assert list(path.parent.iterdir()) == []


def test_a_drain_that_runs_out_of_time_still_leaves_a_last_one_and_answers_nobody_after(
    artifact: Path, path: Path
) -> None:
    """A step is under way, and ends once the snapshot is written: its session has not moved."""
    flags = ["--artifact", str(artifact), "--port", "0", "--drain-s", "1", "--snapshot", str(path)]
    with running([*GATED, "gated", *flags]) as server, connected(server) as client:
        goes_on(server)
        starts(server, "a")
        body = json.dumps({"session_id": "a", "observation": [0.5] * 11, "step": 1}).encode()
        client.sendall(
            b"POST /act HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        for _ in range(2):
            server.output.wait_for("step ")
        server.terminate()
        server.output.wait_for(f"{path}: written in")
        goes_on(server)
        assert server.wait() == 0
        assert client.recv(4096) == b""
    with serving(artifact, path) as server:
        answered = act(server, "a", step=1)
        assert answered.json()["step"] == 1
        assert "replayed" not in answered.headers


def connected(server: RunningServer) -> socket.socket:
    return socket.create_connection(server.host_and_port, TIMEOUT_S)


def goes_on(server: RunningServer) -> None:
    """The step that waits, or the next, waits no more."""
    assert server.process.stdin is not None
    server.process.stdin.write("\n")
    server.process.stdin.flush()


def test_an_end_at_once_says_that_there_is_no_last_one(artifact: Path, path: Path) -> None:
    """Who presses Ctrl-C twice does not want to wait for it."""
    flags = ["--artifact", str(artifact), "--port", "0", "--snapshot", str(path)]
    with running([*GATED, "gated", *flags]) as server, connected(server) as client:
        body = json.dumps({"observation": [0.5] * 11}).encode()
        client.sendall(
            b"POST /act HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        server.output.wait_for("step ")
        server.process.send_signal(signal.SIGINT)
        server.output.wait_for("Shutting down")
        server.process.send_signal(signal.SIGINT)
        server.output.wait_for("made to end at once, no last snapshot was written")
        goes_on(server)
        assert server.wait() == 1
    assert not path.exists()
