"""The file of a snapshot: whole or refused, new or as it was, and nobody else's to read."""

import errno
import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from service.engine.snapshot_file import Draft, Frame, Snapshot, SnapshotError, check_place
from tests.running_server import ROOT

FRAMES = [
    Frame({"kind": "first", "names": ["é", "\ud800", "\n"]}, {"x": np.arange(3.0)}),
    Frame({}, {"flags": np.array([True, False]), "words": np.arange(4, dtype=np.uint16)}),
    Frame({"number": 2**63}, {"seeds": np.array([2**64 - 1], dtype=np.uint64)}),
]
FIRST_LINE = b"tamiyo-snapshot 1\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.snapshot"


Calls = list[tuple[str, int | Path]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the system was asked for, in order, equal ones in a row once.

    Of a file by its number, which it keeps under another name; of a new name by that.
    """
    made: Calls = []

    def observe(name: str) -> None:
        asked = getattr(os, name)

        def observed(of: Any, *more: Any) -> Any:
            call = (name, more[0] if name == "replace" else os.fstat(of).st_ino)
            if made[-1:] != [call]:
                made.append(call)
            return asked(of, *more)

        monkeypatch.setattr(os, name, observed)

    for name in ("write", "pwrite", "fsync", "replace"):
        observe(name)
    return made


def write(path: Path, frames: list[Frame] = FRAMES, *, is_final: bool = True) -> bytes:
    with Draft(path) as draft:
        for frame in frames:
            draft.add(frame)
        draft.publish(is_final=is_final)
    return path.read_bytes()


def num_frames(path: Path) -> int:
    with Snapshot(path) as snapshot:
        return len(snapshot)


def refusal(path: Path, content: bytes) -> str:
    """Why this is not read; the sentence names the file."""
    path.write_bytes(content)
    with pytest.raises(SnapshotError) as refused:
        Snapshot(path)
    found = str(refused.value)
    assert found.startswith(f"{path}: ")
    return found


def borders(content: bytes) -> list[int]:
    """Where frames and what is before and after them begin, as the format says."""
    at = len(FIRST_LINE)
    found = [0, at]
    while length := int.from_bytes(content[at : at + 8], "little"):
        found += [at + 8, at + 8 + length]
        at += 8 + length
    return [*found, at + 8]


@contextmanager
def full_disk(limit_bytes: int) -> Iterator[None]:
    """The system refuses every write beyond so many bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("is_final", [True, False])
def test_what_is_written_is_read(path: Path, is_final: bool) -> None:
    write(path, is_final=is_final)
    with Snapshot(path) as snapshot:
        assert snapshot.is_final is is_final
        read = [snapshot[at] for at in range(len(snapshot))]
        assert snapshot[-1].record == FRAMES[-1].record
    for found, written in zip(read, FRAMES, strict=True):
        assert found.record == written.record
        assert found.arrays.keys() == written.arrays.keys()
        for name, array in written.arrays.items():
            assert found.arrays[name].dtype == array.dtype
            np.testing.assert_array_equal(found.arrays[name], array)


def test_the_file_is_what_the_module_says(path: Path) -> None:
    content = write(path)
    assert content.startswith(FIRST_LINE)
    at, found = len(FIRST_LINE), []
    while length := int.from_bytes(content[at : at + 8], "little"):
        found.append(load(content[at + 8 : at + 8 + length]))
        at += 8 + length
    records = [json.loads(arrays.pop("record").tobytes()) for arrays in found]
    assert records == [frame.record for frame in FRAMES]
    assert [sorted(arrays) for arrays in found] == [sorted(frame.arrays) for frame in FRAMES]
    assert content[at + 8 :] == hashlib.sha256(content[: at + 8] + b"final").digest()


def test_a_snapshot_without_frames_is_read(path: Path) -> None:
    write(path, [])
    assert num_frames(path) == 0


def test_it_is_its_owner_s_alone(path: Path) -> None:
    path.write_text("older, and for all to read")
    path.chmod(0o666)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_cut_at_any_border_is_refused(path: Path) -> None:
    content = write(path)
    for border in borders(content):
        refusal(path, content[:border])
    for border in borders(content)[1:]:
        assert "is damaged, it was cut short" in refusal(path, content[:border])


@given(share=st.floats(0.0, 1.0, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    path = tmp_path_factory.mktemp("cut") / "sessions"
    content = write(path)
    refusal(path, content[: int(share * len(content))])


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_file_with_any_byte_changed_is_refused(path: Path, flip: int) -> None:
    content = write(path)
    for at in range(len(content)):
        refusal(path, content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])


def test_a_file_that_goes_on_after_its_end_is_refused(path: Path) -> None:
    content = write(path)
    assert "it goes on after its end" in refusal(path, content + b"\0")
    assert "it goes on after its end" in refusal(path, content + content)


def test_nothing_is_parsed_of_a_file_that_is_damaged(path: Path) -> None:
    """Not even where its frames are no safetensors files: that would be another sentence."""
    content = FIRST_LINE + (9).to_bytes(8, "little") + b"no frames" + bytes(8) + bytes(32)
    assert "its SHA-256 is not the one at its end" in refusal(path, content)


@pytest.mark.parametrize("schema", [2, 10, 999_999_999])
def test_a_later_release_s_schema_is_refused_by_its_number(path: Path, schema: int) -> None:
    content = write(path).replace(FIRST_LINE, b"tamiyo-snapshot %d\n" % schema, 1)
    assert f"is of schema {schema}, which a later release wrote" in refusal(path, content)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"tamiyo-snapshot", b"tamiyo-snapshot x\n", b"PK\3\4" * 99, bytes(99)]
)
def test_another_file_is_refused_as_no_snapshot(path: Path, content: bytes) -> None:
    assert "is not a snapshot" in refusal(path, content)


def test_where_there_is_nothing_it_says_so(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Snapshot(path)


def test_a_directory_is_refused(path: Path) -> None:
    path.mkdir()
    with pytest.raises(SnapshotError, match=r"cannot be opened \(Is a directory\)"):
        Snapshot(path)


def test_a_final_one_can_be_marked_as_not_final_and_is_the_same_otherwise(path: Path) -> None:
    final, number = write(path), path.stat().st_ino
    with Snapshot(path) as snapshot:
        snapshot.mark_not_final()
        assert not snapshot.is_final
        assert snapshot[0].record == FRAMES[0].record
    with Snapshot(path) as marked:
        assert not marked.is_final
    assert path.stat().st_ino == number
    assert path.read_bytes()[:-32] == final[:-32]
    assert path.read_bytes() == write(path, is_final=False)


def test_a_mark_that_is_half_written_is_refused(path: Path) -> None:
    final, other = write(path), write(path, is_final=False)
    assert "SHA-256" in refusal(path, other[:-16] + final[-16:])


def test_marking_one_that_was_replaced_meanwhile_does_not_harm_the_other(path: Path) -> None:
    write(path)
    with Snapshot(path) as snapshot:
        write(path, FRAMES[:1])
        snapshot.mark_not_final()
    with Snapshot(path) as other:
        assert other.is_final


@pytest.mark.parametrize("limit_bytes", [0, 5, 30, 400])
def test_a_disk_that_fills_leaves_the_older_one_and_nothing_else(
    path: Path, limit_bytes: int
) -> None:
    content = write(path)
    with full_disk(limit_bytes), pytest.raises(OSError, match="File too large") as full:
        write(path, FRAMES * 3)
    assert full.value.errno == errno.EFBIG
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == content


def test_one_that_is_discarded_leaves_the_older_one_and_nothing_else(path: Path) -> None:
    content = write(path)
    with Draft(path) as draft:
        draft.add(FRAMES[0])
        assert len(list(path.parent.iterdir())) == 2
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == content


def test_an_older_one_can_be_set_aside(path: Path) -> None:
    aside = path.with_name("aside")
    content = write(path)
    with Draft(path) as draft:
        draft.publish(is_final=True, set_aside=aside)
    assert aside.read_bytes() == content
    assert num_frames(path) == 0


def test_it_is_on_the_disk_before_it_has_its_name_and_so_is_the_name_at_the_end(
    path: Path, calls: Calls
) -> None:
    """Or a machine that loses its power may have the name of a file with nothing in it."""
    write(path)
    file, folder = path.stat().st_ino, path.parent.stat().st_ino
    assert calls == [("write", file), ("fsync", file), ("replace", path), ("fsync", folder)]


def test_so_is_that_of_an_older_one_which_is_set_aside(path: Path, calls: Calls) -> None:
    aside = path.with_name("aside")
    write(path)
    calls.clear()
    with Draft(path) as draft:
        draft.publish(is_final=True, set_aside=aside)
    file, folder = path.stat().st_ino, path.parent.stat().st_ino
    names = [("replace", aside), ("replace", path)]
    assert calls == [("write", file), ("fsync", file), *names, ("fsync", folder)]


def test_a_mark_is_on_the_disk_before_anybody_moves_on(path: Path, calls: Calls) -> None:
    write(path)
    with Snapshot(path) as snapshot:
        calls.clear()
        snapshot.mark_not_final()
        file = path.stat().st_ino
        assert calls == [("pwrite", file), ("fsync", file)]


KILLED = """
import os, sys
from pathlib import Path
from service.engine.snapshot_file import Draft, Frame
draft = Draft(Path(sys.argv[1]))
draft.add(Frame({}, {}))
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_writer_left_goes_with_the_next(path: Path) -> None:
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, timeout=60)
        assert killed.returncode == -9
        (left,) = path.parent.iterdir()
        assert left.name.startswith(".sessions.snapshot.draft-")
    write(path)
    assert list(path.parent.iterdir()) == [path]


def test_a_draft_that_somebody_else_writes_and_files_of_other_names_stay(path: Path) -> None:
    others = [path.with_name(name) for name in (".other.draft-" + "0" * 16, path.name + ".bak")]
    for other in others:
        other.touch()
    with Draft(path) as draft:
        write(path)
        draft.publish(is_final=True)
    assert num_frames(path) == 0
    assert sorted(path.parent.iterdir()) == sorted([path, *others])


def test_a_place_that_can_be_written_to_is_left_as_it_was(path: Path) -> None:
    assert check_place(path) == path
    assert list(path.parent.iterdir()) == []
    content = write(path)
    assert check_place(path) == path
    assert path.read_bytes() == content


def test_a_link_s_file_is_replaced_and_not_the_link(path: Path) -> None:
    (path.parent / "there").mkdir()
    target = path.parent / "there" / "sessions"
    path.symlink_to(target)
    place = check_place(path)
    write(place)
    assert place == target
    assert path.is_symlink()
    assert num_frames(path) == len(FRAMES)


def test_a_place_that_cannot_be_written_to_is_one_sentence(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "pipe")
    (path / "circle").symlink_to("circle")
    for place, why in (
        (path, "is not a file"),
        (path / "pipe", "is not a file"),
        (path / "missing" / "sessions", r"can be written there \(No such file or directory\)"),
        (path / "pipe" / "sessions", r"can be written there \(Not a directory\)"),
        (path / "circle", "can be written there"),
        (Path("/proc/sessions"), "can be written there"),
    ):
        with pytest.raises(SnapshotError, match=why) as refused:
            check_place(place)
        assert str(refused.value).startswith(f"{place}: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_is_read_only_is_one_sentence(path: Path) -> None:
    path.parent.chmod(0o500)
    with pytest.raises(SnapshotError, match=r"\(Permission denied\)"):
        check_place(path)
