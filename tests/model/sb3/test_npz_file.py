"""An .npz as arrays of numbers, no larger than it says, and a sentence for all else."""

import io
import pickle
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.checkpoint_file import CheckpointError
from model.sb3.npz_file import MOST_BYTES, read_npz

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 120
GROWTH_BYTES = 400 * 2**20

ARRAYS: dict[str, Any] = {
    "f4": np.arange(6, dtype="<f4").reshape(2, 3),
    "big": np.arange(6, dtype=">f8"),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "u1": np.arange(3, dtype=np.uint8),
    "i8": np.array([-1, 2]),
    "scalar": np.float64(3),
    "one": np.ones((1, 1, 1), np.float16),
}


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: Any, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), version)
    return buffer.getvalue()


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return buffer.getvalue()


def with_header(header: str, content: bytes = b"") -> bytes:
    encoded = header.encode("latin1") + b"\n"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(encoded)) + encoded + content
    return archive({"mean.npy": npy})


def header(dtype: str = "<f8", shape: str = "(1,)") -> str:
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"


def refusal(content: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_npz(content)
    return str(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_as_numpy_reads_them(save: Any) -> None:
    buffer = io.BytesIO()
    save(buffer, **ARRAYS)
    read = read_npz(buffer.getvalue())
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert read[name].dtype == np.float64
        assert read[name].shape == array.shape
        assert np.array_equal(read[name], array)


def test_an_archive_of_nothing_has_no_arrays() -> None:
    assert read_npz(archive({})) == {}


NOT_NUMBERS = "is an .npz with an array of something else than floats or integers"
MISFIT = "is an .npz with an array whose shape does not fit its bytes"
MANY = "is an .npz of more than 10,000 arrays, or two of a name"
LARGE = "is an .npz that unpacks to more than 16,777,216 bytes"


def two_of_a_name() -> bytes:
    content = archive({"a.npy": npy(1.0), "b.npy": npy(2.0)})
    return content.replace(b"b.npy", b"a.npy")


def encrypted() -> bytes:
    content = bytearray(archive({"a.npy": npy(1.0)}))
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (npz(mean=np.array([None])), NOT_NUMBERS),
        (npz(mean=np.array(["a"])), NOT_NUMBERS),
        (npz(mean=np.array([True])), NOT_NUMBERS),
        (npz(mean=np.zeros(2, [("x", "f4")])), NOT_NUMBERS),
        (npz(mean=np.array([1j])), NOT_NUMBERS),
        (with_header("{'descr': __import__('os').system('touch ran'), }"), NOT_NUMBERS),
        (with_header(header("<f16"), b"\0" * 16), NOT_NUMBERS),
        (with_header(header(), b"\0" * 7), MISFIT),
        (with_header(header(), b"\0" * 9), MISFIT),
        (with_header(header(shape="(999999999999, 999999999999)"), b"\0" * 8), MISFIT),
        (npz(mean=np.zeros(0)), "is an .npz with an array without numbers"),
        (
            with_header(header(shape=f"({'1, ' * 40})"), b"\0" * 8),
            "is an .npz with an array of no shape",
        ),
        (
            npz(mean=np.zeros(2**22 + 1, np.uint8)),
            "is an .npz with an array of more than 4,194,304 numbers",
        ),
        (
            archive({"a.npy": npy(np.ones(2), (2, 0))}),
            "is an .npz with an array of another format than 1.0",
        ),
        (archive({"a.npy": b""}), "is an .npz with an array of another format than 1.0"),
        (
            archive({"data": b"", "policy.pth": b""}),
            "is a Stable-Baselines3 model; its VecNormalize is in the file that "
            "VecNormalize.save wrote",
        ),
        (
            archive({"x/data.pkl": pickle.dumps(1)}),
            "is a zip archive of something else than NumPy's arrays",
        ),
        (archive({f"{index}.npy": b"" for index in range(10_001)}), MANY),
        (two_of_a_name(), MANY),
        (archive({"a.npy": b"\0" * (MOST_BYTES + 1)}, zipfile.ZIP_DEFLATED), LARGE),
        (
            archive({"a.npy": npy(1.0)}, zipfile.ZIP_BZIP2),
            "is an .npz packed in a way that NumPy does not",
        ),
        (encrypted(), "is a damaged .npz"),
        (b"PK\x03\x04", "is a damaged .npz"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_read_is_a_sentence(content: bytes, said: str) -> None:
    assert refusal(content) == said


def test_a_damaged_archive_is_read_or_a_sentence() -> None:
    content, chance = npz(mean=np.arange(6.0), var=np.ones(6)), random.Random(0)
    for length in range(len(content)):
        assert refusal(content[:length]) == "is a damaged .npz"
    refused = set()
    for _ in range(3000):
        damaged = bytearray(content)
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            read_npz(bytes(damaged))
        except CheckpointError as error:
            refused.add(str(error))
    assert all(sentence.startswith("is a") for sentence in refused)
    assert len(refused) > 3


def test_a_member_that_unpacks_to_more_than_it_says_takes_no_more_memory(tmp_path: Path) -> None:
    packing = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = b"\0" * 2**20
    packed = b"".join(packing.compress(zeros) for _ in range(1024)) + packing.flush()
    stored = archive({"a.npy": packed})
    begin, directory = stored.index(b"PK\x03\x04"), stored.index(b"PK\x01\x02")
    lying = bytearray(stored)
    for method, size in ((begin + 8, begin + 22), (directory + 10, directory + 24)):
        lying[method : method + 2] = struct.pack("<H", zipfile.ZIP_DEFLATED)
        lying[size : size + 4] = struct.pack("<I", 1000)
    (tmp_path / "bomb.npz").write_bytes(lying)
    code = (
        "import resource, sys; from pathlib import Path; import model.checkpoint_file\n"
        "from model.sb3.npz_file import CheckpointError, read_npz\n"
        "size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        f"limit = size + {GROWTH_BYTES}\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try: read_npz(Path(sys.argv[1]).read_bytes())\n"
        "except CheckpointError as error: print(error, repr(error.__cause__))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bomb.npz")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert "is a" in done.stdout
    assert "MemoryError" not in done.stdout
