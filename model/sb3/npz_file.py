"""The arrays of an .npz, without pickles, and no larger than the file says and may be."""

import io
import re
import zipfile

import numpy as np
from numpy.typing import NDArray

from model.checkpoint_file import CheckpointError
from model.sb3.plain_array import plain_array

MOST_BYTES = 16 * 2**20
"""Of all members, unpacked."""

MOST_MEMBERS = 10_000
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""What NumPy packs with; the others unpack as much as they like at once."""

NPY = b"\x93NUMPY"
VERSION = b"\x01\x00"
LENGTH = slice(8, 10)
BEGIN = 10

HEADER = re.compile(
    rb"\{'descr': '(?P<dtype>[^'\\]{1,9})', 'fortran_order': (?P<is_fortran>True|False), "
    rb"'shape': \((?P<shape>(\d{1,18}, ?)*(\d{1,18})?)\), \} *\n"
)
"""What NumPy writes for an array of one plain dtype."""


def read_npz(content: bytes) -> dict[str, NDArray[np.float64]]:
    """Each array by its name, as float64. Raises CheckpointError, whose message goes on
    from the file's name."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            _check(archive)
            return {
                member.filename.removesuffix(".npy"): _read(archive, member)
                for member in archive.infolist()
            }
    except CheckpointError:
        raise
    except Exception as error:  # whatever zipfile trips over in a damaged archive
        raise CheckpointError("is a damaged .npz") from error


def _check(archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    if {"data", "policy.pth"} <= set(names):
        raise CheckpointError(
            "is a Stable-Baselines3 model; its VecNormalize is in the file that VecNormalize.save "
            "wrote"
        )
    if not all(name.endswith(".npy") for name in names):
        raise CheckpointError("is a zip archive of something else than NumPy's arrays")
    if len(names) > MOST_MEMBERS or len(set(names)) < len(names):
        raise CheckpointError(f"is an .npz of more than {MOST_MEMBERS:,} arrays, or two of a name")
    if sum(member.file_size for member in archive.infolist()) > MOST_BYTES:
        raise CheckpointError(f"is an .npz that unpacks to more than {MOST_BYTES:,} bytes")
    if any(member.compress_type not in METHODS for member in archive.infolist()):
        raise CheckpointError("is an .npz packed in a way that NumPy does not")


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[np.float64]:
    with archive.open(member) as file:
        content = file.read(member.file_size + 1)  # without a number, all that it unpacks to
    try:
        return _array(content)
    except ValueError as error:
        raise CheckpointError(f"is an .npz with {error}") from error


def _array(content: bytes) -> NDArray[np.float64]:
    if not content.startswith(NPY + VERSION):
        raise ValueError("an array of another format than 1.0")
    end = BEGIN + int.from_bytes(content[LENGTH], "little")
    header = HEADER.fullmatch(content[BEGIN:end])
    if header is None:
        raise ValueError("an array of something else than floats or integers")
    shape = [int(length) for length in header["shape"].replace(b",", b" ").split()]
    is_fortran = header["is_fortran"] == b"True"
    return plain_array(
        header["dtype"].decode("latin1"), shape, content[end:], is_fortran=is_fortran
    )
