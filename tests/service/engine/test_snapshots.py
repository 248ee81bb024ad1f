"""When snapshots are written, while blocks are answered, and what an end does to half a one."""

import asyncio
import errno
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from model.spec import PolicySpec
from service.engine.kept_sessions import FRAME_ROWS
from service.engine.snapshot_file import Draft, Frame, Snapshot, SnapshotError
from service.engine.snapshots import Snapshots
from tests.service.engine.test_snapshot_file import full_disk
from tests.service.fakes import Bench, run, single

NUM_SESSIONS = 4 * FRAME_ROWS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions"


@pytest.fixture
def large(spec: PolicySpec) -> Bench:
    """Of sessions for several frames."""
    bench = Bench(spec, capacity=NUM_SESSIONS, buckets=(64,))
    names = [f"s{number}" for number in range(NUM_SESSIONS)]
    for at in range(0, NUM_SESSIONS, FRAME_ROWS):
        bench.take(
            *(single(spec, 1.0, n, starts=True, run="p") for n in names[at : at + FRAME_ROWS])
        )
    return bench


def opened() -> "asyncio.Future[None]":
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    done.set_result(None)
    return done


async def until(snapshots: Snapshots, result: str, number: int) -> None:
    while snapshots.by_result[result] < number:
        await asyncio.sleep(0)


def test_one_is_written_so_often_while_sessions_move(large: Bench, path: Path) -> None:
    async def story() -> int:
        snapshots = Snapshots(path, large.kept(), every_s=1e-3)
        snapshots.start(opened())
        batcher, steps = large.batcher(), 0
        while snapshots.by_result["written"] < 3:
            steps += 1
            await asyncio.gather(
                *(
                    large.submit(batcher, single(large.spec, 1.0, f"s{n}", step=steps, run="p"))
                    for n in (0, NUM_SESSIONS - 1)
                )
            )
        await snapshots.stop()
        return steps

    steps = run(story())
    with Snapshot(path) as snapshot:
        assert not snapshot.is_final
        assert len(snapshot) == NUM_SESSIONS // FRAME_ROWS + 1
    after = large.after(path)
    assert len(after.sessions) == NUM_SESSIONS
    for name in ("s0", f"s{NUM_SESSIONS - 1}"):
        session = after.sessions.get(name)
        assert session is not None
        assert 1 <= session.next_step <= steps + 1
        moved = after.step(1.0, name, step=session.next_step, run="p")
        assert moved.value == [moved.step + 1.0]


def test_none_is_written_before_the_server_opens_nor_where_it_never_does(
    large: Bench, path: Path
) -> None:
    async def story() -> None:
        for end in ("cancelled", "failed"):
            snapshots = Snapshots(path, large.kept(), every_s=1e-9)
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            snapshots.start(done)
            for _ in range(20):
                await asyncio.sleep(0)
            if end == "cancelled":
                done.cancel()
            else:
                done.set_exception(RuntimeError("broken"))
            await snapshots.stop()
            assert snapshots.by_result == {"written": 0, "failed": 0}

    run(story())
    assert not path.exists()


def test_an_end_in_the_middle_of_one_discards_it_and_writes_the_last(
    large: Bench, path: Path
) -> None:
    async def story() -> Snapshots:
        snapshots = Snapshots(path, large.kept(), every_s=1e-9)
        snapshots.start(opened())
        while not list(path.parent.iterdir()):
            await asyncio.sleep(0)
        await snapshots.stop()
        assert list(path.parent.iterdir()) == []
        snapshots.write_last()
        return snapshots

    snapshots = run(story())
    assert snapshots.by_result == {"written": 1, "failed": 0}
    assert list(path.parent.iterdir()) == [path]
    with Snapshot(path) as snapshot:
        assert snapshot.is_final


def test_one_that_fails_is_an_error_in_the_log_and_the_next_may_not(
    large: Bench, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        told: list[Exception] = []
        snapshots = Snapshots(path, large.kept(), every_s=1e-3, failed=told.append)
        snapshots.start(opened())
        with full_disk(1000):
            await until(snapshots, "failed", 2)
        await until(snapshots, "written", 1)
        await snapshots.stop()
        assert len(told) == snapshots.by_result["failed"]
        errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
        sentence = f"{path}: no snapshot could be written (File too large); serving goes on"
        assert errors == [sentence] * snapshots.by_result["failed"]

    run(story())
    assert list(path.parent.iterdir()) == [path]


def test_a_last_one_that_fails_says_so(
    large: Bench, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshots = Snapshots(path, large.kept(), every_s=None)
    with full_disk(1000):
        snapshots.write_last()
    assert snapshots.has_failed
    assert "File too large" in caplog.text
    assert list(path.parent.iterdir()) == []


def test_one_that_was_refused_is_replaced_by_none_that_fails(bench: Bench, path: Path) -> None:
    path.write_text("something else")
    snapshots = Snapshots(path, bench.kept(), every_s=None)
    with pytest.raises(SnapshotError):
        snapshots.restore()
    with full_disk(10):
        snapshots.write_last()
    assert path.read_text() == "something else"
    assert list(path.parent.iterdir()) == [path]
    for _ in range(2):
        snapshots.write_last()
        assert snapshots.refused_path.read_text() == "something else"
    with Snapshot(path) as snapshot:
        assert snapshot.is_final


@pytest.mark.parametrize("fails", ["open", "fsync"])
def test_one_that_was_set_aside_stays_where_the_folder_fails_after_that(
    bench: Bench,
    path: Path,
    fails: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path.write_text("something else")
    snapshots = Snapshots(path, bench.kept(), every_s=None)
    with pytest.raises(SnapshotError):
        snapshots.restore()
    with monkeypatch.context() as patched:
        break_folder(patched, fails)
        snapshots.write_last()
    assert snapshots.has_failed
    (told,) = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    if fails == "open":
        assert "no snapshot could be written (Input/output error)" in told
        assert path.read_text() == "something else"
    else:
        assert told == (
            f"{path}: the snapshot is in place, and could not be synced (Input/output error); "
            "a crash of the machine may undo it"
        )
        with Snapshot(path) as snapshot:
            assert snapshot.is_final
    for _ in range(2):
        snapshots.write_last()
        assert snapshots.refused_path.read_text() == "something else"
    assert {file.name for file in path.parent.iterdir()} == {"sessions", "sessions.refused"}


def break_folder(patched: pytest.MonkeyPatch, name: str) -> None:
    """The system refuses to open a folder, or to have it on the disk."""
    asked = getattr(os, name)

    def refused(of: Any, *more: Any) -> Any:
        is_folder = Path(of).is_dir() if name == "open" else stat.S_ISDIR(os.fstat(of).st_mode)
        if is_folder:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return asked(of, *more)

    patched.setattr(os, name, refused)


def test_none_that_was_refused_replaces_another(bench: Bench, path: Path) -> None:
    for content in ("one", "two", "three"):
        path.write_text(content)
        snapshots = Snapshots(path, bench.kept(), every_s=None)
        with pytest.raises(SnapshotError):
            snapshots.restore()
        snapshots.write_last()
        assert snapshots.refused_path.read_text() == content
    kept = {f"{path.name}.refused{end}" for end in ("", ".2", ".3")}
    assert {file.name for file in path.parent.iterdir()} == {path.name, *kept}
    assert path.with_name(f"{path.name}.refused").read_text() == "one"


def test_its_age_is_that_of_what_lies_there(bench: Bench, path: Path) -> None:
    snapshots = Snapshots(path, bench.kept(), every_s=None)
    assert snapshots.restore() is None
    assert 0 <= snapshots.age_s() < 3600
    snapshots.write_last()
    assert snapshots.last_s is not None
    with Snapshot(path) as snapshot:
        frame = snapshot[0]
    with Draft(path) as draft:
        draft.add(Frame({**frame.record, "written_at_s": frame.record["written_at_s"] - 3600}, {}))
        draft.publish(is_final=True)
    snapshots = Snapshots(path, Bench(bench.spec).kept(), every_s=None)
    restored = snapshots.restore()
    assert restored is not None
    assert snapshots.age_s() >= 3600
    snapshots.outdate()


@pytest.mark.parametrize("frames", [[], [Frame({"kind": "cat"}, {})], [Frame({}, {})]])
def test_what_is_whole_and_holds_something_else_is_refused_in_a_sentence(
    bench: Bench, path: Path, frames: list[Frame]
) -> None:
    with Draft(path) as draft:
        for frame in frames:
            draft.add(frame)
        draft.publish(is_final=True)
    snapshots = Snapshots(path, bench.kept(), every_s=None)
    with pytest.raises(SnapshotError, match="is whole, and holds something else than a snapshot"):
        snapshots.restore()
    snapshots.outdate()


def test_where_the_clock_was_set_back_its_age_is_0(bench: Bench, path: Path) -> None:
    bench.write(path)
    with Snapshot(path) as snapshot:
        frame = snapshot[-1]
    with Draft(path) as draft:
        draft.add(Frame({**frame.record, "written_at_s": frame.record["written_at_s"] + 3600}, {}))
        draft.publish(is_final=True)
    snapshots = Snapshots(path, Bench(bench.spec).kept(), every_s=None)
    assert snapshots.restore() is not None
    assert snapshots.age_s() == 0.0
    snapshots.outdate()
