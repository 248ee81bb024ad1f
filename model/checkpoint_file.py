"""What a file is, by its first bytes: what it holds, or a sentence that says what it is instead.

Knows file formats and nothing of policies. Nothing in a file is ever executed: a pickle is read
with `weights_only=True`, once none of its opcodes asks for more than data.
"""

import codecs
import io
import json
import pickle
import reprlib
import warnings
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load as load_safetensors

from model.numpy_pickles import CONSTRUCTORS
from model.pickle_contents import first_foreign

HEAD_BYTES = 4096
FEWEST_BYTES = 16
LARGEST_SAFETENSORS_HEADER_BYTES = 100_000_000
LONGEST_VALUE = 60
SHOWN_NAMES = 3

ZIP = b"PK\x03\x04"
PICKLE = b"\x80"
MAGIC_BEFORE_TORCH_1_6 = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
PICKLES_BEFORE_TORCH_1_6 = 5
TORCH_PROTOCOL = 2

SIGNATURES = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file; `git lfs pull` fetches it"),
    (b"\x1f\x8b", "is compressed by gzip; unpack it first"),
    (b"BZh", "is compressed by bzip2; unpack it first"),
    (b"\xfd7zXZ\0", "is compressed by xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it first"),
    (b"\x93NUMPY", "is one NumPy array (.npy), not a checkpoint"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, not a checkpoint of torch"),
    (b"GGUF", "is a GGUF file, not a checkpoint of torch"),
)
"""How files of other kinds begin, and what to say of them."""

TRUNCATED = "truncated or no checkpoint"
NOT_RUN = "nothing in it was run"


class CheckpointError(ValueError):
    """The file is not a policy this version can read; the message says why, in one sentence."""


def read_content(path: Path) -> bytes:
    """All of the file; CheckpointError where there is none, or it is none."""
    try:
        with _opened(path) as file:
            return file.read()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def read_file(path: Path, content: bytes | None = None) -> object:
    """What torch.save, safetensors or JSON put into the file, whatever its name; on the CPU.

    `content` is the file's where it has been read already. Raises CheckpointError for a file of any
    other kind, a damaged one, and a pickle that takes more than tensors, NumPy's numbers and
    arrays, and plain containers.
    """
    try:
        with _opened(path) if content is None else io.BytesIO(content) as file:
            return _read(file)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds Python objects beyond tensors and plain containers, or is damaged; "
            f"{NOT_RUN}"
        ) from error
    except Exception as error:  # whatever the parsers trip over in a damaged file
        raise CheckpointError(f"{path}: cannot be read, it is {TRUNCATED}") from error


def short(value: object) -> str:
    """A value out of a file, as far as a sentence needs it."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = shown.maxlong = LONGEST_VALUE
    return " ".join(shown.repr(value).split())


def names(keys: list[str]) -> str:
    """The first of them, for a sentence."""
    listed = ", ".join(short(key) for key in keys[:SHOWN_NAMES])
    return f"{listed} and others" if len(keys) > SHOWN_NAMES else listed


def _opened(path: Path) -> BinaryIO:
    try:
        if path.is_dir():
            raise CheckpointError("is a directory, not a file")
        if path.exists() and not path.is_file():
            raise CheckpointError("is no regular file")
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError("there is no such file") from None
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})") from error


def _read(file: BinaryIO) -> object:
    head = file.read(HEAD_BYTES)
    file.seek(0)
    for signature, sentence in SIGNATURES:
        if head.startswith(signature):
            raise CheckpointError(sentence)
    if head.startswith(ZIP):
        return _read_zip(file)
    if head.startswith(PICKLE):
        return _read_before_torch_1_6(file, head)
    if _is_safetensors(head):
        return load_safetensors(file.read())
    text = _as_text(head)
    if text is not None:
        return _read_text(file, text)
    if head[257:262] == b"ustar":
        raise CheckpointError("is a tar archive; unpack it first")
    if head[:1] == b"\x08" and head[1:2] > b"\x02" and head[2:3] in (b"\x12", b"\x3a", b"\x42"):
        raise CheckpointError("is an ONNX model, not a checkpoint of torch")
    raise CheckpointError(f"cannot be read, it is {TRUNCATED}")


def _is_safetensors(head: bytes) -> bool:
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and length <= LARGEST_SAFETENSORS_HEADER_BYTES


def _as_text(head: bytes) -> str | None:
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return None
    return text if all(char.isprintable() or char.isspace() for char in text) else None


def _read_text(file: BinaryIO, text: str) -> object:
    begin = text.lstrip()
    if begin.startswith(("{", "[")):
        try:
            return json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise CheckpointError("cannot be read as JSON") from error
    if begin.startswith("<"):
        kind = "an HTML page" if "<html" in begin.lower() else "a page of HTML or XML"
        raise CheckpointError(f"is {kind}, which a download may give instead of the file")
    if len(text) < FEWEST_BYTES:
        raise CheckpointError(f"is {len(text)} bytes long, it is {TRUNCATED}")
    first_line = begin.partition("\n")[0]
    raise CheckpointError(f"is text, not a checkpoint; it begins with {short(first_line)}")


def _read_zip(file: BinaryIO) -> object:
    with zipfile.ZipFile(file) as archive:
        pickled = _torch_pickle(archive)
        size_bytes = file.seek(0, io.SEEK_END)
        if pickled.file_size > size_bytes:
            raise CheckpointError("holds a pickle that unpacks to more than the file's own size")
        pickled.CRC = None  # type: ignore[assignment]  # torch can be told not to write them
        content = archive.read(pickled)
    _check_pickle(io.BytesIO(content), content[:2])
    return _load(file)


def _torch_pickle(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The member that describes a checkpoint; CheckpointError says what the archive is instead."""
    members = {name.partition("/")[2]: name for name in archive.namelist() if "/" in name}
    plain = archive.namelist()
    if len({name.casefold() for name in plain}) < len(plain):
        # Torch finds members whatever their case: it could read another one than is checked here.
        raise CheckpointError("holds two members of one name, and is damaged or meant to deceive")
    if "constants.pkl" in members:
        raise CheckpointError(
            "is a TorchScript archive, which holds code; save the module's state_dict() instead"
        )
    if "archive_format" in {*members, *plain} or "serialized_exported_program.json" in plain:
        raise CheckpointError(
            "is an archive of torch.export (.pt2), which holds a graph; save the module's "
            "state_dict() instead"
        )
    if "data.pkl" in members:
        return archive.getinfo(members["data.pkl"])
    if {"data", "policy.pth"} <= set(plain):
        raise CheckpointError("is a Stable-Baselines3 model, not a checkpoint of Tamiyo")
    if plain and all(name.endswith(".npy") for name in plain):
        raise CheckpointError(
            "is a NumPy archive (.npz), not a checkpoint; save it with torch.save"
        )
    raise CheckpointError(f"is a zip archive of {names(plain) or 'nothing'}, not a checkpoint")


def _read_before_torch_1_6(file: BinaryIO, head: bytes) -> object:
    if MAGIC_BEFORE_TORCH_1_6 not in head[:32]:
        raise CheckpointError(f"is a pickle that torch.save did not write; {NOT_RUN}")
    for _ in range(PICKLES_BEFORE_TORCH_1_6):
        _check_pickle(file, head[:2])
    return _load(file)


def _check_pickle(stream: BinaryIO, begin: bytes) -> None:
    protocol = begin[1] if begin[:1] == PICKLE else 0
    if protocol > TORCH_PROTOCOL:
        raise CheckpointError(
            f"is pickled in protocol {protocol}, and torch.save's own, {TORCH_PROTOCOL}, can be "
            f"read; {NOT_RUN}"
        )
    try:
        foreign = first_foreign(stream)
    except Exception as error:  # whatever opcodes in disorder make of its stack
        raise CheckpointError(f"holds a damaged pickle; {NOT_RUN}") from error
    if foreign is None:
        return
    what = f"its entry {short(foreign.entry)} is" if foreign.entry else "is"
    maker = short(foreign.maker)[1:-1]
    if foreign.is_module:
        raise CheckpointError(
            f"{what} a whole module, of class {maker}; save its state_dict() instead; {NOT_RUN}"
        )
    raise CheckpointError(
        f"{what} made by {maker}, and only tensors, NumPy's numbers and arrays, and plain "
        f"containers are read; {NOT_RUN}"
    )


def _load(file: BinaryIO) -> object:
    file.seek(0)
    with warnings.catch_warnings(), torch.serialization.safe_globals([*CONSTRUCTORS]):
        warnings.simplefilter("ignore")  # torch's advice on how to load what is refused here
        return torch.load(file, map_location="cpu", weights_only=True)
