"""Publishing: an artifact is there, whole, or is not, whatever comes between any two steps."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from export.directory import check_output, staged
from export.stopping import ENDS, Stopped, deferred, stoppable
from tests.export.stopped_exports import NEW, OLD, OWN, export_new, tree, write

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 200


def placed(files: dict[str, str]) -> dict[str, str]:
    return {f"made/tiny/{name}": content for name, content in files.items()}


NOTHING: dict[str, str] = {}
OLDER, NEWER = placed(OLD | OWN), placed(NEW | OWN)


def stopped_at_each_step(root: Path, number: int) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.export.stopped_exports", str(root), str(int(number))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    ends: list[Any] = json.loads(done.stdout)
    assert len(ends) > 100
    return ends


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_before_any_step_leaves_the_older_artifact_or_the_new_one_and_no_more(
    number: int, tmp_path: Path
) -> None:
    ends = stopped_at_each_step(tmp_path, number)
    assert {end["code"] for end in ends} == {128 + number}
    for end in ends:
        assert end["left"] in ([OLDER, NEWER] if end["exists"] else [NOTHING, placed(NEW)])
    for expected in (OLDER, NEWER, NOTHING, placed(NEW)):
        assert any(end["left"] == expected for end in ends)


def test_what_a_killed_export_leaves_the_next_one_puts_in_order(tmp_path: Path) -> None:
    ends = stopped_at_each_step(tmp_path, signal.SIGKILL)
    assert {end["code"] for end in ends} == {-signal.SIGKILL}
    hidden = [name for end in ends for name in end["left"] if "/.tiny." in name]
    assert hidden
    for end in ends:
        fresh = [NOTHING, {"made": ""}, placed(NEW)]
        assert end["then"] in ([OLDER, NEWER] if end["exists"] else fresh)
        assert end["again"] == (NEWER if end["exists"] else placed(NEW))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "made" / "tiny"


def test_what_is_not_the_artifacts_own_is_in_the_new_one_too(output: Path, tmp_path: Path) -> None:
    write(output, OLD | OWN)
    (output / "link").symlink_to("nowhere")
    export_new(output)
    assert (output / "link").is_symlink()
    (output / "link").unlink()
    assert tree(tmp_path) == NEWER


@pytest.mark.parametrize("name", ["policy.pt2", "policy.pt2/inside"])
def test_a_file_of_ones_own_that_has_a_new_files_name_is_not_written_over(
    name: str, output: Path, tmp_path: Path
) -> None:
    write(output, OLD | {name: "precious"})
    before = tree(tmp_path)
    with pytest.raises(
        FileExistsError, match=r"holds policy.pt2, which is no part of the artifact"
    ):
        export_new(output)
    assert tree(tmp_path) == before


def test_a_directory_of_ones_own_with_an_older_files_name_is_kept(
    output: Path, tmp_path: Path
) -> None:
    """Its manifest speaks of a file."""
    write(output, {"manifest.json": OLD["manifest.json"], "policy.onnx/thesis.tex": "precious"})
    export_new(output)
    assert tree(tmp_path) == placed(NEW | {"policy.onnx/thesis.tex": "precious"})


def test_a_link_to_an_artifact_goes_on_leading_to_one(output: Path, tmp_path: Path) -> None:
    write(output, OLD | OWN)
    (tmp_path / "latest").symlink_to("made/tiny")
    export_new(tmp_path / "latest")
    (tmp_path / "latest").unlink()
    assert tree(tmp_path) == NEWER


@pytest.mark.parametrize("target", ["nowhere", "latest"])
def test_a_link_to_nothing_is_refused_before_there_is_anything_to_write(
    target: str, tmp_path: Path
) -> None:
    (tmp_path / "latest").symlink_to(target)
    with (
        pytest.raises(FileExistsError, match=f"latest is a link to {target}, which does not exist"),
        staged(tmp_path / "latest", overwrite=True),
    ):
        pytest.fail("it began")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_appears_in_the_meantime_is_not_written_over(
    overwrite: bool, output: Path, tmp_path: Path
) -> None:
    """An artifact where none was to be replaced, and what is none in any case."""
    appeared = {"thesis.tex": "precious"} if overwrite else OLD

    def export_meanwhile() -> None:
        with staged(output, overwrite=overwrite) as staging:
            write(staging, NEW)
            write(output, appeared)

    with pytest.raises(FileExistsError):
        export_meanwhile()
    assert tree(tmp_path) == placed(appeared)


def test_the_workshop_of_an_export_under_way_is_left_to_it(output: Path, tmp_path: Path) -> None:
    write(output, OLD)
    with staged(output, overwrite=True) as slow:
        write(slow, NEW)
        export_new(output)
        assert tree(slow) == NEW
    assert tree(tmp_path) == placed(NEW)


def test_hidden_neighbours_of_ones_own_are_no_workshops(output: Path, tmp_path: Path) -> None:
    neighbours = {"made/.tiny.backup/policy.onnx": "precious", "made/.tiny.export": "precious"}
    write(tmp_path, neighbours)
    export_new(output)
    assert tree(tmp_path) == placed(NEW) | neighbours


@pytest.fixture
def received() -> Iterator[list[int]]:
    """The signals that come, as a program's own handler gets them."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


def test_signals_wait_for_the_end_of_the_block_or_a_part_that_heeds_them(
    received: list[int],
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with deferred() as heeded:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == []
        with heeded():
            assert len(received) == 1
            os.kill(os.getpid(), signal.SIGTERM)
            assert len(received) == 2
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(received) == 2
    assert len(received) == 3
    assert signal.getsignal(signal.SIGTERM) == handler


def test_signals_that_waited_come_in_the_order_they_came_in() -> None:
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number)) for number in ENDS
    }
    try:
        for order in (list(ENDS), list(ENDS)[::-1]):
            came.clear()
            with deferred():
                for number in order:
                    os.kill(os.getpid(), number)
            assert came == order
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_beside_the_main_thread_signals_are_left_as_they_are() -> None:
    """Where Python sets no handlers: who exports in a thread of their own can."""
    went: list[bool] = []

    def export() -> None:
        with deferred() as heeded, heeded():
            went.append(True)

    handlers = {number: signal.getsignal(number) for number in ENDS}
    thread = threading.Thread(target=export)
    thread.start()
    thread.join()
    assert went == [True]
    assert {number: signal.getsignal(number) for number in ENDS} == handlers


def fail_while_a_signal_waits() -> None:
    with deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError(28, "No space left on device")


def test_a_signal_that_waits_is_raised_after_the_blocks_own_error() -> None:
    with stoppable(), pytest.raises(Stopped) as stopped:
        fail_while_a_signal_waits()
    assert isinstance(stopped.value.__context__, OSError)
    assert stopped.value.code == 143


def test_nothing_but_an_artifacts_own_files_is_removed(output: Path, tmp_path: Path) -> None:
    """A manifest may list what it likes: only what lies in the directory itself is of it."""
    files = {"a": {"file": "../precious"}, "b": {"file": ["policy.pt2"]}, "c": "policy.pt2"}
    write(output, {"manifest.json": json.dumps({"schema_version": 9, "formats": files})})
    write(tmp_path / "made", {"precious": "precious"})
    export_new(output)
    assert tree(tmp_path) == placed(NEW) | {"made/precious": "precious"}


def test_a_directory_that_is_only_called_like_a_workshop_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / ".artifact.export-notes" / "new" / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    check_output(tmp_path / "artifact", overwrite=False)
    assert mine.read_text() == "precious"


def test_the_working_directory_is_known_by_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_output(Path(), overwrite=True) == tmp_path.resolve()
