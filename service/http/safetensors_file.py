"""One safetensors file in memory: header length, JSON header, the tensors' bytes.

It comes from the network, so the reader takes no more than the `safetensors` package does, and less
where the package is lenient: names given twice, unknown members, booleans that are neither 0 nor 1.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json, to_json

from service.errors import Malformed, short

LENGTH_BYTES = 8
LARGEST_HEADER_BYTES = 65_536
ALIGNMENT_BYTES = 8
METADATA = "__metadata__"
MEMBERS = {"dtype", "shape", "data_offsets"}
STRINGS_A_TENSOR = 5
"""Its name, those of its members, and its dtype."""
MOST_DIMENSIONS = 64
"""NumPy's limit."""
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "BOOL": np.dtype("?"),
    "BF16": np.dtype("<u2"),  # which NumPy has not: its 16 bits
}
ALL_DTYPES = tuple(DTYPES)
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Place = tuple[int, int, str, str, list[int]]
"""A tensor's first byte and the one after its last, its name, dtype and shape."""


class SafetensorsFile(NamedTuple):
    tensors: dict[str, NDArray[Any]]
    metadata: dict[str, str]


def read_file(
    body: bytes | bytearray, allowed: Mapping[str, tuple[str, ...]] | None = None
) -> SafetensorsFile:
    """What the file holds: its tensors in the order of their bytes, as views of `body`.

    `allowed` has the tensors that may be there and the dtypes of each, as DTYPES names them;
    without it, any may. A view is aligned where its client aligned the data; NumPy reads and copies
    the others as well. Raises Malformed where `body` is not exactly one such file.
    https://github.com/huggingface/safetensors#format
    """
    begin = _data_start(body)
    header, num_strings = _parsed(bytes(body[LENGTH_BYTES:begin]))
    num_known_strings = int(METADATA in header)
    metadata = header.pop(METADATA, {})
    if type(metadata) is not dict or not {*map(type, metadata.values())} <= {str}:
        raise Malformed(f"`{METADATA}` is not an object of strings")
    num_bytes = len(body) - begin
    places = [_place(name, entry, allowed, num_bytes) for name, entry in header.items()]
    num_known_strings += 2 * len(metadata) + STRINGS_A_TENSOR * len(places)
    if num_strings != num_known_strings:
        raise Malformed("the header gives a name twice")
    at = 0
    tensors = {}
    for start, end, name, dtype, shape in sorted(places):
        if start != at:
            raise Malformed(
                f"`{short(name)}` starts at byte {start} of the data instead of {at}; tensors "
                "neither overlap nor leave gaps"
            )
        tensors[name] = view(body, name, dtype, shape, begin + start)
        at = end
    if at != num_bytes:
        raise Malformed(f"the tensors end at byte {at} of the data, which has {num_bytes}")
    return SafetensorsFile(tensors, metadata)


def write_file(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """The file of `tensors`, in their order; the same content always gives the same bytes.

    The data starts at a multiple of 8 bytes, so each tensor is aligned where wider ones stand
    before narrower ones. Raises KeyError for a dtype that is not in DTYPES.
    """
    header: dict[str, Any] = {METADATA: metadata}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
        start = end
    text = to_json(header)
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    data = [tensor.tobytes() for tensor in tensors.values()]
    return b"".join((len(text).to_bytes(LENGTH_BYTES, "little"), text, *data))


def _data_start(body: bytes | bytearray) -> int:
    if len(body) < LENGTH_BYTES:
        raise Malformed(f"the body has {len(body)} bytes, fewer than a safetensors file's first 8")
    length = int.from_bytes(body[:LENGTH_BYTES], "little")
    if length > LARGEST_HEADER_BYTES:
        raise Malformed(f"the header has {length} bytes, more than {LARGEST_HEADER_BYTES}")
    if length > len(body) - LENGTH_BYTES:
        raise Malformed(f"the header has {length} bytes, more than the body after its first 8")
    return LENGTH_BYTES + length


def _parsed(text: bytes) -> tuple[dict[str, Any], int]:
    """The header, and how many strings, names among them, its text has."""
    if not text.startswith(b"{"):
        raise Malformed("the header is not a JSON object")
    try:
        header: dict[str, Any] = from_json(text)
    except ValueError as error:
        raise Malformed(f"the header is not JSON: {error}") from error
    # Of two members with one name the parser keeps the last, and it reads -0 as 0: the text tells.
    without_escapes = text.replace(rb"\\", b"").replace(rb"\"", b"")
    outside_strings = without_escapes.split(b'"')[::2]
    if b"-" in b"".join(outside_strings):
        raise Malformed("a number in the header has a minus; sizes and offsets have none")
    return header, len(outside_strings) - 1


def _place(
    name: str, entry: Any, allowed: Mapping[str, tuple[str, ...]] | None, num_bytes: int
) -> Place:
    if type(entry) is not dict or entry.keys() != MEMBERS:
        raise Malformed(f"`{short(name)}` is not an object of `dtype`, `shape` and `data_offsets`")
    dtypes = ALL_DTYPES if allowed is None else allowed.get(name)
    if dtypes is None:
        raise Malformed(f"`{short(name)}` is not a tensor that is read here")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in dtypes:
        known = " or ".join(dtypes)
        raise Malformed(f"`{short(name)}.dtype` is {short(str(dtype))}, not {known}")
    if not _are_whole(shape) or len(shape) > MOST_DIMENSIONS:
        raise Malformed(f"`{short(name)}.shape` is not a list of at most {MOST_DIMENSIONS} sizes")
    if not _are_whole(offsets) or len(offsets) != 2:
        raise Malformed(f"`{short(name)}.data_offsets` is not a list of two offsets")
    start, end = offsets
    if end > num_bytes:
        raise Malformed(f"`{short(name)}` ends after the data, which has {num_bytes} bytes")
    if prod(shape) * DTYPES[dtype].itemsize != end - start:
        raise Malformed(f"`{short(name)}` has offsets that are not its shape's and dtype's")
    return start, end, name, dtype, shape


def _are_whole(values: Any) -> bool:
    return type(values) is list and {*map(type, values)} <= {int}


def view(
    body: bytes | bytearray, name: str, dtype: str, shape: list[int], start: int
) -> NDArray[Any]:
    """A tensor of the body, from byte `start` on, whose bytes are all there. Raises Malformed."""
    try:
        tensor: NDArray[Any] = np.ndarray(shape, DTYPES[dtype], body, start)
    except ValueError as error:  # empty, and its other sizes are beyond any array's
        raise Malformed(f"`{short(name)}` has a shape that no array has") from error
    if dtype == "BOOL" and tensor.view(np.uint8).max(initial=0) > 1:
        where = "".join(f"[{i}]" for i in np.argwhere(tensor.view(np.uint8) > 1)[0])
        raise Malformed(f"`{short(name)}{where}` is neither 0 nor 1")
    return tensor
