"""The zip that Stable-Baselines3's `model.save()` writes: its members, read within bounds.

Knows the archive and nothing of what its members say.
"""

import io
import re
import zipfile
from typing import NamedTuple

from model.checkpoint_file import ZIP, CheckpointError, short

DATA = "data"
WEIGHTS = "policy.pth"
VERSION = "_stable_baselines3_version"

LARGEST_DATA_BYTES = 64 * 2**20
LARGEST_WEIGHTS_BYTES = 2 * 2**30
LARGEST_VERSION_BYTES = 64
LARGEST_RATIO = 20
"""Of weights unpacked to the whole file: trained numbers hardly compress."""
CHUNK_BYTES = 2**20

DAMAGED = "is a damaged or truncated zip"

FIRST_MEMBER = re.compile(re.escape(ZIP) + rb".{22}\x04\x00..data", re.DOTALL)
"""How the file begins: with `data`, stored or deflated."""
OUTSIDE = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)")
PLAIN_VERSION = re.compile(r"[\w.+-]{1,40}")
OF_THE_TRAINER = (b"stable_baselines3", b"sb3_contrib")


class SB3Members(NamedTuple):
    """What is read of the zip; `version` is the trainer's own, where it says one."""

    data: bytes
    weights: bytes
    version: str | None


def is_sb3_zip(content: bytes) -> bool:
    """Whether Stable-Baselines3 wrote it, be it damaged or only a policy's; never raises."""
    if FIRST_MEMBER.match(content):
        return True
    if not content.startswith(ZIP):
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return WEIGHTS in archive.namelist() or _is_of_policy_save(archive)
    except Exception:  # whatever the parser trips over: no zip, as far as can be told
        return False


def read_members(content: bytes) -> SB3Members:
    """The members that a policy is read from.

    Raises CheckpointError for what is no such zip, is damaged or encrypted, unpacks to more than
    its bounds or names a member twice or outside of itself.
    """
    if not content.startswith(b"PK"):
        raise CheckpointError("is no zip, and model.save() of Stable-Baselines3 writes one")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return _read(archive, len(content))
    except CheckpointError:
        raise
    except Exception as error:  # whatever the parser trips over in a damaged file
        raise CheckpointError(DAMAGED) from error


def _read(archive: zipfile.ZipFile, size_bytes: int) -> SB3Members:
    if min((info.header_offset for info in archive.infolist()), default=0):
        # Cut behind the weights, it ends as they do: as another zip, with this one before it.
        raise CheckpointError(DAMAGED)
    _check_names(archive.namelist())
    members = {info.filename: info for info in archive.infolist()}
    if not {DATA, WEIGHTS} & members.keys() and _is_of_policy_save(archive):
        raise CheckpointError(
            "is what policy.save() writes, which takes running a pickle to read; save the whole "
            "model with model.save()"
        )
    for name in (DATA, WEIGHTS):
        if name not in members:
            raise CheckpointError(
                f"holds no {name!r}, and model.save() of Stable-Baselines3 writes one"
            )
    most_bytes = min(LARGEST_WEIGHTS_BYTES, LARGEST_RATIO * size_bytes)
    data = _member(archive, members[DATA], LARGEST_DATA_BYTES)
    weights = _member(archive, members[WEIGHTS], most_bytes)
    if VERSION not in members:
        return SB3Members(data, weights, None)
    version = _member(archive, members[VERSION], LARGEST_VERSION_BYTES)
    text = version.decode("utf-8", errors="replace").strip()
    return SB3Members(data, weights, text if PLAIN_VERSION.fullmatch(text) else None)


def _check_names(listed: list[str]) -> None:
    seen: set[str] = set()
    for name in listed:
        if OUTSIDE.search(name):
            raise CheckpointError(f"holds a member named {short(name)}, which is outside of it")
        if name.casefold() in seen:
            raise CheckpointError(f"holds two members named {short(name)}")
        seen.add(name.casefold())


def _is_of_policy_save(archive: zipfile.ZipFile) -> bool:
    """Whether torch wrote it, and its pickle asks for classes of the trainer."""
    for info in archive.infolist():
        if info.filename.endswith("/data.pkl"):
            pickled = _member(archive, info, LARGEST_DATA_BYTES)
            return any(name in pickled for name in OF_THE_TRAINER)
    return False


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most_bytes: int) -> bytes:
    """All of it, in pieces: the decompressor itself goes on beyond the size that is declared."""
    name = short(info.filename)
    if info.flag_bits & 1:
        raise CheckpointError(f"its member {name} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(f"its member {name} is compressed otherwise than by deflate")
    if info.file_size > most_bytes:
        raise CheckpointError(
            f"its member {name} unpacks to {info.file_size} bytes, and {most_bytes} are read"
        )
    with archive.open(info) as member:
        return b"".join(iter(lambda: member.read(CHUNK_BYTES), b""))
