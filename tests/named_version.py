"""A version's name by the documented words alone: nothing here is `export.parameters`'s."""

import hashlib
import sys
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

WORDS = {"<f4": "float32", "<u2": "bfloat16"}


def version_of(parameters: Mapping[str, NDArray[Any]]) -> str:
    """Name, dtype and sizes on a line, then the numbers, little-endian, row after row; by name."""
    assert sys.byteorder == "little"
    content = bytearray()
    for name, array in sorted(parameters.items()):
        words = [name, WORDS[array.dtype.str], *(f"{size}" for size in array.shape)]
        content += (" ".join(words) + "\n").encode("utf-8")
        content += b"".join(number.tobytes() for number in array.flat)
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
