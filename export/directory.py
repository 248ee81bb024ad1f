"""Where an artifact goes: it appears complete or not at all, and nothing else is lost for it.

Beside the output, an export has a hidden directory of its own, its workshop: `new` in it is what
is being written, `older` what it replaces, until what was not the artifact's has been put back.
Whoever writes holds a lock on the workshop, which the system takes from a process that is killed:
the next export to the same output finishes what such a one has left.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from export.manifest import MANIFEST_FILE, SIGNATURE_FILE

NEW, OLDER, SCRAP = "new", "older", "scrap"
RANDOM_BYTES = 8
"""Of a workshop's name: nobody else's directory is called so."""


@contextmanager
def staged(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A directory to write into, which becomes `output` once the block ends well.

    Whatever goes wrong, an older `output` stays as it was and nothing else is left; for an
    interrupt to do no harm between two steps of this, it takes `stopping.deferred` around it.
    Raises FileExistsError where `output` exists, unless it is an artifact and `overwrite` is set;
    it is asked again at the end. What lies in an older `output` and is no part of it is in the new
    one as well, and FileExistsError where that has a file of the same name.
    """
    output = check_output(output, overwrite=overwrite)
    with staging_beside(output) as staging:
        yield staging
        _publish(staging, output, overwrite)


@contextmanager
def staging_beside(output: Path) -> Iterator[Path]:
    """An empty directory on the file system of `output`, for the block to take out of it what it
    has written there: what still lies in it goes with it.
    """
    with _parent_made(output), _workshop(output) as workshop:
        staging = workshop / NEW
        staging.mkdir()
        yield staging


def check_output(output: Path, *, overwrite: bool) -> Path:
    """Where `output` leads, once it is known that an artifact can be written there.

    What an export that was killed left there is put in order first. Raises FileExistsError where
    `output` is a link to nothing, or exists and is not to be replaced.
    """
    if output.is_symlink() and not output.exists():
        raise FileExistsError(f"{output} is a link to {os.readlink(output)}, which does not exist")
    if output.is_symlink() or not output.name:  # `.` has neither a name nor a directory around it
        output = output.resolve()
    finish_abandoned(output)
    _check_replaceable(output, overwrite)
    return output


def _check_replaceable(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists already; --overwrite replaces it")
    if not _is_artifact(output):
        raise FileExistsError(f"{output} is not an artifact, so it is not overwritten")


@contextmanager
def _parent_made(output: Path) -> Iterator[None]:
    """What had to be made of the directories above goes again where the block does not end well."""
    missing = [parent for parent in output.parents if not parent.exists()]
    try:
        _make_parent(output)
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # never made, or somebody else's by now
                parent.rmdir()
        raise


def _make_parent(output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # exists, as a file
        reason = os.strerror(errno.ENOTDIR)
        raise NotADirectoryError(errno.ENOTDIR, reason, str(output.parent)) from error


@contextmanager
def _workshop(output: Path) -> Iterator[Path]:
    """A directory beside `output`, locked, that goes again: but for what would be lost with it."""
    workshop = output.parent / f"{_workshops(output)}{secrets.token_hex(RANDOM_BYTES)}"
    workshop.mkdir(mode=0o700)
    lock = os.open(workshop, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: what is abandoned there stays
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield workshop
    finally:
        _close(workshop, output)
        os.close(lock)


def _workshops(output: Path) -> str:
    """How their names begin."""
    return f".{output.name}.export-"


def finish_abandoned(output: Path) -> None:
    """Puts in order what was beside `output` when whoever wrote there was killed."""
    try:
        beside = list(output.parent.iterdir())
    except OSError:
        return
    for workshop in beside:
        drawn = workshop.name.removeprefix(_workshops(output))
        if not re.fullmatch(f"[0-9a-f]{{{2 * RANDOM_BYTES}}}", drawn):
            continue
        with suppress(OSError):  # somebody is at work there, or has locked it away
            lock = os.open(workshop, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _close(workshop, output)
            finally:
                os.close(lock)


def _close(workshop: Path, output: Path) -> None:
    """Removes a workshop, wherever its work ended.

    An older output that nothing has replaced goes back, and so does what was no part of it.
    """
    older = workshop / OLDER
    if older.exists() and not output.exists():
        older.rename(output)
    if older.exists():
        for path in foreign(older):
            if not os.path.lexists(output / path.name):
                path.rename(output / path.name)
        if not foreign(older):
            older.rename(workshop / SCRAP)  # all of it, even once its manifest has gone
    for name in (NEW, SCRAP):
        shutil.rmtree(workshop / name, ignore_errors=True)
    with suppress(OSError):  # it still holds something
        workshop.rmdir()


def foreign(directory: Path) -> list[Path]:
    """What lies in an artifact's directory and its manifest, of whatever version, lists not."""
    manifest = _manifest(directory)
    files = [manifest.get("weights"), *_values(manifest.get("formats"))]
    files += _values(manifest.get("reports"))
    listed = [file.get("file") for file in files if isinstance(file, dict)]
    listed += [MANIFEST_FILE, SIGNATURE_FILE]
    return sorted(
        path for path in directory.iterdir() if path.name not in listed or path.is_dir()
    )  # fmt: skip


def _values(of: object) -> list[object]:
    return list(of.values()) if isinstance(of, dict) else of if isinstance(of, list) else []


def _is_artifact(directory: Path) -> bool:
    """Whether it holds an artifact's manifest, of whatever version, or nothing at all."""
    try:
        if not any(directory.iterdir()):
            return True
    except OSError:
        return False
    return _manifest(directory).keys() >= {"schema_version", "formats"}


def _manifest(directory: Path) -> dict[str, object]:
    """Without a look at what its version says it has to hold; nothing where there is none."""
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _publish(staging: Path, output: Path, overwrite: bool) -> None:
    """Puts the finished directory in place; an older one is gone only once the new one stands."""
    _check_replaceable(output, overwrite)
    staging.chmod(0o755)
    for file in staging.iterdir():
        file.chmod(0o644)
    if not output.exists():
        staging.rename(output)
        return
    kept = {path.name for path in foreign(output)} & {path.name for path in staging.iterdir()}
    if kept:
        raise FileExistsError(
            f"{output} holds {', '.join(sorted(kept))}, which is no part of the artifact there and "
            "would be of the new one; move it away"
        )
    output.rename(staging.with_name(OLDER))
    staging.rename(output)
