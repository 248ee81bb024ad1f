"""A file of keys: one a line, after it its shorter name for the log; `#` begins a comment.

Knows nothing of requests. A key is in no sentence of it: a digest is all that is kept.
"""

import hashlib
import hmac
import logging
import os
import stat
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from service.errors import short

logger = logging.getLogger(__name__)

SHORT = 16
"""Characters, with fewer of which a key can be guessed."""


class KeyFileError(Exception):
    """The file is not to be used; the text says which, which line, and why."""


class Key(NamedTuple):
    digest: bytes
    name: str


class KeyFile:
    """The keys of one file as it was last read. Raises KeyFileError, also where there is none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys = _read(path)
        if not self._keys:
            raise KeyFileError(f"{path}: there is no key in it")

    def reload(self) -> None:
        """Reads it again: without a key it lets nobody in; one that is no good changes nothing.

        Both are logged.
        """
        try:
            self._keys = _read(self._path)
        except KeyFileError as error:
            logger.error("%s; its keys stay as they were", error)
            return
        if not self._keys:
            logger.warning("%s: there is no key in it any more, and it lets nobody in", self._path)

    def name_of(self, digest: bytes) -> str | None:
        """Of the key with this `digest_of`, if it is here; how long that takes says nothing."""
        names = [key.name for key in self._keys if hmac.compare_digest(key.digest, digest)]
        return names[0] if names else None


def digest_of(key: bytes) -> bytes:
    """What is compared in its stead: of one length, whatever a client sends."""
    return hashlib.sha256(key).digest()


def _read(path: Path) -> list[Key]:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise KeyFileError(f"{path}: it is no regular file")
            content = file.read()
    except OSError as error:
        raise KeyFileError(f"{path}: it cannot be read: {error.strerror}") from None
    lines: dict[bytes, int] = {}
    keys = []
    for number, line in enumerate(content.splitlines(), 1):
        words = list(takewhile(lambda word: not word.startswith(b"#"), line.split()))
        if not words:
            continue
        key = _key(path, number, words)
        if key.digest in lines:
            raise _bad(path, number, f"the key of line {lines[key.digest]} stands here again")
        lines[key.digest] = number
        keys.append(key)
    if mode & stat.S_IROTH:
        logger.warning("%s can be read by every user of this machine (chmod o-r)", path)
    if keys:
        logger.info("keys in %s: %d (%s)", path, len(keys), ", ".join(key.name for key in keys))
    return keys


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for somebody who writes to it


def _key(path: Path, number: int, words: list[bytes]) -> Key:
    key, *names = words
    if len(names) > 1:
        raise _bad(path, number, "more than a key and its name, neither of which has spaces")
    if not all(0x21 <= letter <= 0x7E for letter in key):
        raise _bad(path, number, "the key is not of printable ASCII letters")
    if names and len(names[0]) >= len(key):  # or the log would have the key for its name
        raise _bad(path, number, "the key comes first, and its name is shorter")
    name = short(names[0].decode(errors="backslashreplace")) if names else f"line {number}"
    if len(key) < SHORT:
        logger.warning("%s: the key %s is shorter than %d characters", path, name, SHORT)
    return Key(digest_of(key), name)


def _bad(path: Path, number: int, why: str) -> KeyFileError:
    return KeyFileError(f"{path}: line {number}: {why}")
