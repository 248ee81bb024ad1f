"""The file of a snapshot: frames of arrays, that appear whole or not at all.

    tamiyo-snapshot 1\\n
    frames: each its length, 8 bytes, little-endian, and so many bytes of a safetensors file
    a length of 0
    the SHA-256 of all before it and of one word, that says whether the snapshot is final

Knows nothing of what is in a frame. Nothing is parsed before the whole is known to be undamaged.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

SCHEMA = 1
FIRST_LINE = re.compile(rb"tamiyo-snapshot (\d{1,9})\n")
LONGEST_FIRST_LINE = 32
LENGTH_BYTES = 8
DIGEST_BYTES = 32
PIECE_BYTES = 1 << 20
RANDOM_BYTES = 8
"""Of a draft's name: nobody else's file is called so."""
WORDS = {True: b"final", False: b"not final"}
RECORD = "record"


class SnapshotError(Exception):
    """The snapshot cannot be gone on from, or none can be written there; the message says why."""


class NotSynced(OSError):
    """The snapshot is in its place, and a crash of the machine may bring back what was there."""


class Frame(NamedTuple):
    """A part of a snapshot: arrays by name, and `record`, of what JSON has."""

    record: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]


class Draft:
    """A snapshot that is being written, in a hidden file beside `path`.

    It takes the place of an older one once it is published; until then, and where it is discarded,
    that one stays as it was. Drafts that a killed process has left go first. Raises OSError.
    """

    def __init__(self, path: Path) -> None:
        _remove_abandoned(path)
        self._path = path
        self._draft = path.with_name(f"{_drafts(path)}{secrets.token_hex(RANDOM_BYTES)}")
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        self._descriptor: int | None = os.open(self._draft, flags, 0o600)
        with suppress(OSError):  # a file system without locks: what is abandoned there stays
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._digest = hashlib.sha256()
        self.has_set_aside = False
        """Whether an older one has its other name, also where publishing then failed."""
        try:
            self._write(b"tamiyo-snapshot %d\n" % SCHEMA)
        except BaseException:
            self.discard()
            raise

    def add(self, frame: Frame) -> None:
        """Writes one more frame."""
        record = np.frombuffer(json.dumps(frame.record).encode(), dtype=np.uint8)
        content = save({RECORD: record, **frame.arrays})
        self._write(_length(len(content)))
        self._write(content)

    def publish(self, *, is_final: bool, set_aside: Path | None = None) -> None:
        """Puts it in place; an older one is replaced, or becomes `set_aside`.

        Raises OSError, of which NotSynced means that it is in place.
        """
        assert self._descriptor is not None
        self._write(_length(0))
        self._digest.update(WORDS[is_final])
        self._write(self._digest.digest())
        os.fsync(self._descriptor)
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if set_aside is not None:
                with suppress(FileNotFoundError):
                    os.replace(self._path, set_aside)
                self.has_set_aside = True
            os.replace(self._draft, self._path)
            try:
                os.fsync(directory)
            except OSError as error:
                raise NotSynced(error.errno, error.strerror) from error
        finally:
            os.close(directory)

    def discard(self) -> None:
        """Ends it: what was not published is gone."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            with suppress(FileNotFoundError):
                self._draft.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def _write(self, content: bytes) -> None:
        assert self._descriptor is not None
        self._digest.update(content)
        left = memoryview(content)
        while left:
            left = left[os.write(self._descriptor, left) :]


class Snapshot:
    """The snapshot at `path`, found to be whole: a sequence of frames, each read when asked for.

    Raises SnapshotError where it is none, damaged or of another schema, FileNotFoundError where
    there is nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # To write, too: it is to be marked once it is not final any more.
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CLOEXEC), "r+b")
        except FileNotFoundError:
            raise
        except OSError as error:
            raise SnapshotError(f"{path}: cannot be opened ({error.strerror})") from error
        self._frames: list[tuple[int, int]] = []
        try:
            self._check_schema()
            self._find_frames()
            self.is_final = self._check_digest()
        except OSError as error:
            self.close()
            raise SnapshotError(f"{path}: cannot be read ({error.strerror})") from error
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, at: int) -> Frame:
        start, length = self._frames[at]
        self._file.seek(start)
        arrays = load(self._file.read(length))
        return Frame(json.loads(arrays.pop(RECORD).tobytes()), arrays)

    def mark_not_final(self) -> None:
        """From now on it is one that sessions may have moved on from. Raises OSError."""
        if self.is_final:
            os.pwrite(self._file.fileno(), self._digests[False], self._size - DIGEST_BYTES)
            os.fsync(self._file.fileno())
            self.is_final = False

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_schema(self) -> None:
        found = FIRST_LINE.fullmatch(self._file.readline(LONGEST_FIRST_LINE))
        if not found:
            raise SnapshotError(f"{self.path}: is not a snapshot")
        if int(found[1]) != SCHEMA:
            raise SnapshotError(
                f"{self.path}: is of schema {int(found[1])}, which a later release wrote; this "
                f"one reads schema {SCHEMA}"
            )

    def _find_frames(self) -> None:
        self._size = os.fstat(self._file.fileno()).st_size
        end = self._size - DIGEST_BYTES
        at = self._file.tell()
        while at + LENGTH_BYTES <= end:
            self._file.seek(at)
            length = int.from_bytes(self._file.read(LENGTH_BYTES), "little")
            at += LENGTH_BYTES
            if not length:
                if at != end:
                    raise self._damaged("it goes on after its end")
                return
            self._frames.append((at, length))
            at += length
        raise self._damaged("it was cut short")

    def _check_digest(self) -> bool:
        """Whether the snapshot is final."""
        digest = hashlib.sha256()
        self._file.seek(0)
        left = self._size - DIGEST_BYTES
        while left:
            piece = self._file.read(min(left, PIECE_BYTES))
            if not piece:
                raise self._damaged("it was cut short")
            digest.update(piece)
            left -= len(piece)
        self._digests = {}
        for is_final, word in WORDS.items():
            ended = digest.copy()
            ended.update(word)
            self._digests[is_final] = ended.digest()
        found = self._file.read(DIGEST_BYTES)
        for is_final, expected in self._digests.items():
            if found == expected:
                return is_final
        raise self._damaged("its SHA-256 is not the one at its end")

    def _damaged(self, how: str) -> SnapshotError:
        return SnapshotError(f"{self.path}: is damaged, {how}")


def check_place(path: Path) -> Path:
    """Where `path` leads, once it is known that a snapshot can be written there.

    Raises SnapshotError.
    """
    try:
        path = path.resolve()  # what a link leads to is replaced, and not the link
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise SnapshotError(f"{path}: is not a file; a snapshot needs a name of its own")
        Draft(path).discard()
    except (OSError, RuntimeError) as error:  # links in a circle are the latter, until Python 3.13
        reason = getattr(error, "strerror", None) or error
        raise SnapshotError(f"{path}: no snapshot can be written there ({reason})") from error
    return path


def _length(num_bytes: int) -> bytes:
    return num_bytes.to_bytes(LENGTH_BYTES, "little")


def _drafts(path: Path) -> str:
    """How their names begin."""
    return f".{path.name}.draft-"


def _remove_abandoned(path: Path) -> None:
    """Removes what a process that was killed has left; who still writes holds a lock."""
    for beside in path.parent.iterdir():
        drawn = beside.name.removeprefix(_drafts(path))
        if not re.fullmatch(f"[0-9a-f]{{{2 * RANDOM_BYTES}}}", drawn):
            continue
        with suppress(OSError):  # somebody writes it, or has removed it by now
            descriptor = os.open(beside, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                beside.unlink()
            finally:
                os.close(descriptor)
