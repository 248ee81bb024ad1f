"""Where an artifact goes: it appears complete or not at all, and replaces nothing else."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from export.manifest import MANIFEST_FILE


@contextmanager
def staged(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A directory to write into, which becomes `output` once the block ends well.

    Whatever goes wrong, an interrupt included, an older `output` stays as it was and nothing else
    is left. Raises FileExistsError where `output` exists, unless it is an artifact and `overwrite`
    is set; it is asked again at the end.
    """
    _check_replaceable(output, overwrite)
    with _parent_made(output):
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            yield staging
            _publish(staging, output, overwrite)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


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


def _is_artifact(directory: Path) -> bool:
    """Whether it holds an artifact's manifest, of whatever version, or nothing at all."""
    try:
        if not any(directory.iterdir()):
            return True
        manifest = json.loads((directory / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.keys() >= {"schema_version", "formats"}


def _publish(staging: Path, output: Path, overwrite: bool) -> None:
    """Puts the finished directory in place; an older one is gone only once the new one stands."""
    _check_replaceable(output, overwrite)
    staging.chmod(0o755)  # mkdtemp's are the owner's alone
    for file in staging.iterdir():
        file.chmod(0o644)
    if not output.exists():
        staging.rename(output)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    older = retired / output.name
    try:
        output.rename(older)
        staging.rename(output)
    except BaseException:  # an interrupt too must not cost the older artifact
        if older.exists() and not output.exists():
            older.rename(output)
        retired.rmdir()  # refuses while it still holds something
        raise
    shutil.rmtree(retired)
