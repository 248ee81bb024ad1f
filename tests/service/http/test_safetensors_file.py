"""Safetensors files: what the package writes is read, and what is read the package reads alike."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from safetensors.numpy import load, save

from service.errors import Malformed
from service.http.safetensors_file import LARGEST_HEADER_BYTES, read_file, write_file

Tensors = dict[str, NDArray[Any]]
TYPES = {
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
    "BOOL": np.bool_,
}
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = text.filter(lambda name: name != "__metadata__")
tensors_of_any_kind = st.dictionaries(
    names,
    st.sampled_from(list(TYPES.values())).flatmap(
        lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    ),
    max_size=4,
)
metadata_of_any_kind = st.dictionaries(text, text, max_size=4)


def file_of(header: Any, data: bytes = b"") -> bytes:
    """A file whose header is JSON text, or what is put into JSON."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + data


def entry(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def header_of(body: bytes) -> bytes:
    return body[8 : 8 + int.from_bytes(body[:8], "little")]


def assert_same(ours: Mapping[str, NDArray[Any]], theirs: Mapping[str, NDArray[Any]]) -> None:
    """Names, dtypes, shapes and bits; NaN is as good as any other value."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].shape == tensor.shape
        assert ours[name].tobytes() == tensor.tobytes()


def assert_read_alike_or_refused(body: bytes) -> None:
    try:
        tensors, metadata = read_file(body)
    except Malformed as error:
        sentence = str(error)
        assert sentence.isprintable()
        assert len(sentence) < 300
    else:
        assert_same(tensors, load(body))
        assert metadata == json.loads(header_of(body)).get("__metadata__", {})


def refusal(body: bytes | bytearray, allowed: Mapping[str, tuple[str, ...]] | None = None) -> str:
    with pytest.raises(Malformed) as caught:
        read_file(body, allowed)
    return str(caught.value)


@given(tensors=tensors_of_any_kind, metadata=metadata_of_any_kind)
def test_what_the_package_writes_is_read(tensors: Tensors, metadata: dict[str, str]) -> None:
    # The package writes metadata without tensors as something that it does not read itself.
    file = read_file(save(tensors, metadata if tensors else None))
    assert_same(file.tensors, tensors)
    assert file.metadata == (metadata if tensors else {})


@given(tensors=tensors_of_any_kind, metadata=metadata_of_any_kind)
def test_what_is_written_the_package_reads(tensors: Tensors, metadata: dict[str, str]) -> None:
    body = write_file(tensors, metadata)
    assert_same(load(body), tensors)
    assert json.loads(header_of(body))["__metadata__"] == metadata


@given(tensors=tensors_of_any_kind, metadata=metadata_of_any_kind)
def test_what_is_written_is_read(tensors: Tensors, metadata: dict[str, str]) -> None:
    file = read_file(write_file(tensors, metadata))
    assert_same(file.tensors, tensors)
    assert file.metadata == metadata


@given(tensors=tensors_of_any_kind, metadata=metadata_of_any_kind)
def test_the_same_content_gives_the_same_bytes(tensors: Tensors, metadata: dict[str, str]) -> None:
    copies = {name: tensor.copy() for name, tensor in tensors.items()}
    assert write_file(copies, dict(metadata)) == write_file(tensors, metadata)


def test_tensors_are_written_in_the_order_given() -> None:
    tensors = {"b": np.array([True]), "a": np.array([1.0]), "c": np.array([2], dtype=np.int64)}
    body = write_file(tensors, {})
    assert list(json.loads(header_of(body))) == ["__metadata__", "b", "a", "c"]
    assert body.endswith(b"".join(tensor.tobytes() for tensor in tensors.values()))


@given(metadata=metadata_of_any_kind)
def test_written_tensors_are_aligned_widest_first(metadata: dict[str, str]) -> None:
    tensors: Tensors = {
        "action": np.arange(6).reshape(3, 2),
        "log_prob": np.ones((3, 2), dtype=np.float32),
        "is_known": np.ones(3, dtype=np.bool_),
    }
    body = write_file(tensors, metadata)
    assert len(header_of(body)) % 8 == 0
    assert all(tensor.flags.aligned for tensor in read_file(body).tensors.values())


def test_a_tensor_that_is_not_contiguous_is_written_as_it_reads() -> None:
    tensors: Tensors = {"x": np.arange(24.0).reshape(4, 6)[::2, ::-3].T}
    assert_same(load(write_file(tensors, {})), tensors)


@pytest.mark.parametrize("dtype", [">f4", "<f2", "<i4", "c8", "O"])
def test_another_dtype_is_not_written(dtype: str) -> None:
    with pytest.raises(KeyError):
        write_file({"x": np.zeros(2, dtype=dtype)}, {})


def test_tensors_are_views_of_the_body() -> None:
    body = bytearray(save({"x": np.zeros(3, dtype=np.float32)}))
    x = read_file(body).tensors["x"]
    body[-4:] = np.float32(7.0).tobytes()
    assert x.tolist() == [0.0, 0.0, 7.0]


@pytest.mark.parametrize("shift", range(8))
@pytest.mark.parametrize("dtype", ["F32", "F64", "I64", "U64"])
def test_a_tensor_that_is_not_aligned_is_read_and_copied_rightly(dtype: str, shift: int) -> None:
    expected: NDArray[Any] = np.array([[1, 2**20 + 1], [3, 2**21 + 1]], dtype=TYPES[dtype])
    header = json.dumps({"x": entry(dtype, [2, 2], 0, expected.nbytes)}).encode()
    header += b" " * ((shift - len(header)) % 8)
    tensor = read_file(file_of(header, expected.tobytes())).tensors["x"]
    assert tensor.flags.aligned == (shift % expected.itemsize == 0)
    target = np.empty_like(expected)
    np.copyto(target, tensor)
    assert target.tolist() == tensor.tolist() == expected.tolist()
    assert np.concatenate([tensor, tensor]).tolist() == [*expected.tolist(), *expected.tolist()]


def test_tensors_may_be_described_in_any_order() -> None:
    header = {"b": entry("BOOL", [1], 4, 5), "empty": entry("F64", [0, 3], 4, 4)}
    header |= {"a": entry("F32", [], 0, 4)}
    file = read_file(file_of(header, np.float32(0.5).tobytes() + b"\1"))
    assert list(file.tensors) == ["a", "empty", "b"]
    assert file.tensors["a"] == 0.5
    assert file.tensors["b"].tolist() == [True]
    assert file.metadata == {}


ESCAPED = {"a": '"', "b": "\\", "c": '\\"', "d": '\\\\"-0"', "-": '"-1"', "e": "\\\\", "é": "\0"}


@pytest.mark.parametrize("is_ascii", [True, False])
def test_metadata_may_hold_whatever_json_escapes(is_ascii: bool) -> None:
    header = json.dumps({"__metadata__": ESCAPED}, ensure_ascii=is_ascii).encode()
    assert read_file(file_of(header)).metadata == ESCAPED


@pytest.mark.parametrize("padding", [b" ", b" " * 9, b"\n", b"\t\r\n "])
def test_the_header_may_be_padded(padding: bytes) -> None:
    assert read_file(file_of(b"{}" + padding)) == ({}, {})


def test_the_largest_header_is_read() -> None:
    header = b"{}".ljust(LARGEST_HEADER_BYTES)
    assert read_file(file_of(header)) == ({}, {})
    assert refusal(file_of(header + b" ")) == "the header has 65537 bytes, more than 65536"


def test_only_what_is_allowed_is_read() -> None:
    body = save({"x": np.zeros((2, 3), dtype=np.float32), "y": np.zeros(2, dtype=np.bool_)})
    allowed = {"x": ("F32", "F64"), "y": ("BOOL",), "z": ("U64",)}
    assert read_file(body, allowed).tensors.keys() == {"x", "y"}
    assert refusal(body, allowed | {"x": ("F64",)}) == "`x.dtype` is F32, not F64"
    assert refusal(body, allowed | {"x": ("F64", "I64")}) == "`x.dtype` is F32, not F64 or I64"
    assert refusal(body, {"x": ("F32",)}) == "`y` is not a tensor that is read here"
    assert refusal(body, {}).endswith("is not a tensor that is read here")


X = entry("F32", [2], 0, 8)
OF_WHAT = "is not an object of `dtype`, `shape` and `data_offsets`"
NO_SIZES = "`x.shape` is not a list of at most 64 sizes"
NO_OFFSETS = "`x.data_offsets` is not a list of two offsets"
NO_MINUS = "a number in the header has a minus; sizes and offsets have none"
OTHER_SIZE = "`x` has offsets that are not its shape's and dtype's"
DAMAGED = [
    # its length
    (b"", "the body has 0 bytes, fewer than a safetensors file's first 8"),
    (bytes(7), "the body has 7 bytes, fewer than a safetensors file's first 8"),
    (b"\2" + bytes(7), "the header has 2 bytes, more than the body after its first 8"),
    (b"\3" + bytes(7) + b"{}", "the header has 3 bytes, more than the body after its first 8"),
    (b"\xff" * 8 + b"{}", "the header has 18446744073709551615 bytes, more than 65536"),
    # its JSON
    (bytes(8), "the header is not a JSON object"),
    (file_of(b"[]"), "the header is not a JSON object"),
    (file_of(b" {}"), "the header is not a JSON object"),
    (file_of(b"\xef\xbb\xbf{}"), "the header is not a JSON object"),
    (file_of("{}".encode("utf-16-le")), "the header is not JSON: key must be a string at line 1"),
    (file_of(b"{}\0"), "the header is not JSON: trailing characters at line 1 column 3"),
    (file_of(b"{}{}"), "the header is not JSON: trailing characters at line 1 column 3"),
    (file_of(b'{"x":NaN'), "the header is not JSON: "),
    (file_of(b'{"\xff":0}'), "the header is not JSON: invalid unicode code point at line 1"),
    (file_of(b'{"\\ud800":0}'), "the header is not JSON: "),
    (file_of(b'{"x":' + b"[" * 60_000), "the header is not JSON: recursion limit exceeded"),
    (file_of(b'{"x":' + b"9" * 60_000 + b"}"), "the header is not JSON: number out of range"),
    # names given twice, plainly and escaped, in each object
    (file_of(b'{"__metadata__":{"a":"","a":""}}'), "the header gives a name twice"),
    (file_of(b'{"__metadata__":{"a":"","\\u0061":""}}'), "the header gives a name twice"),
    (file_of(b'{"__metadata__":{"\\\\":"","\\\\":"\\""}}'), "the header gives a name twice"),
    (file_of(b'{"__metadata__":{},"__metadata__":{}}'), "the header gives a name twice"),
    (
        file_of(b'{"x":0,"x":%b}' % json.dumps(X).encode(), bytes(8)),
        "the header gives a name twice",
    ),
    (
        file_of(b'{"x":{"shape":0,%b}' % json.dumps(X)[1:].encode(), bytes(8)),
        "the header gives a name twice",
    ),
    # metadata
    (file_of({"__metadata__": None}), "`__metadata__` is not an object of strings"),
    (file_of({"__metadata__": "a"}), "`__metadata__` is not an object of strings"),
    (file_of({"__metadata__": []}), "`__metadata__` is not an object of strings"),
    (file_of({"__metadata__": {"a": "b", "c": 1}}), "`__metadata__` is not an object of strings"),
    (file_of({"__metadata__": {"a": ["b"]}}), "`__metadata__` is not an object of strings"),
    # a tensor's members
    (file_of({"x": None}), f"`x` {OF_WHAT}"),
    (file_of({"x": ["F32", [0], [0, 0]]}), f"`x` {OF_WHAT}"),
    (file_of({"x": {}}), f"`x` {OF_WHAT}"),
    (file_of({"x": X | {"y": 0}}, bytes(8)), f"`x` {OF_WHAT}"),
    (file_of({"x": {"dtype": "F32", "shape": [2]}}, bytes(8)), f"`x` {OF_WHAT}"),
    (file_of({"x\n" * 99: None}), "`" + "x\\n" * 40 + f"...` {OF_WHAT}"),
    # dtype
    (
        file_of({"x": entry("F16", [2], 0, 4)}, bytes(4)),
        "`x.dtype` is F16, not F32 or F64 or I64 or U64 or BOOL",
    ),
    (file_of({"x": entry("f32", [2], 0, 8)}, bytes(8)), "`x.dtype` is f32, not F32 or F64"),
    (file_of({"x": entry(None, [2], 0, 8)}, bytes(8)), "`x.dtype` is None, not F32 or F64"),
    (file_of({"x": entry([["F32"]], [2], 0, 8)}, bytes(8)), "`x.dtype` is [['F32']], not F32"),
    (file_of({"x": entry({}, [2], 0, 8)}, bytes(8)), "`x.dtype` is {}, not F32 or F64"),
    (file_of({"x": entry("F" * 900, [2], 0, 8)}, bytes(8)), f"`x.dtype` is {'F' * 80}..., not F32"),
    # shape
    (file_of({"x": entry("F32", None, 0, 8)}, bytes(8)), NO_SIZES),
    (file_of({"x": entry("F32", {"2": 2}, 0, 8)}, bytes(8)), NO_SIZES),
    (file_of({"x": entry("F32", "2", 0, 8)}, bytes(8)), NO_SIZES),
    (file_of({"x": entry("F32", 2, 0, 8)}, bytes(8)), NO_SIZES),
    (file_of({"x": entry("F32", [2, None], 0, 8)}, bytes(8)), NO_SIZES),
    (file_of({"x": entry("F32", [2.0], 0, 8)}, bytes(8)), NO_SIZES),
    (file_of({"x": entry("F32", [True], 0, 4)}, bytes(4)), NO_SIZES),
    (file_of({"x": entry("F32", [[2]], 0, 8)}, bytes(8)), NO_SIZES),
    (file_of({"x": entry("F32", ["2"], 0, 8)}, bytes(8)), NO_SIZES),
    (file_of({"x": entry("BOOL", [1] * 65, 0, 1)}, bytes(1)), NO_SIZES),
    (file_of({"x": entry("F32", [-1, -2], 0, 8)}, bytes(8)), NO_MINUS),
    (file_of(b'{"x":{"dtype":"BOOL","shape":[-0],"data_offsets":[0,0]}}'), NO_MINUS),
    (file_of({"x": entry("F64", [2**61 + 1], 0, 8)}, bytes(8)), OTHER_SIZE),
    (file_of({"x": entry("F64", [2**32, 2**32], 0, 0)}), OTHER_SIZE),
    (file_of({"x": entry("F32", [2**64 + 2], 0, 8)}, bytes(8)), OTHER_SIZE),
    (file_of({"x": entry("F32", [10**999] * 30, 0, 8)}, bytes(8)), OTHER_SIZE),
    (file_of({"x": entry("F32", [0, 2**64], 0, 0)}), "`x` has a shape that no array has"),
    (file_of({"x": entry("F64", [2**60, 0, 8], 0, 0)}), "`x` has a shape that no array has"),
    # offsets
    (file_of({"x": X | {"data_offsets": None}}, bytes(8)), NO_OFFSETS),
    (file_of({"x": X | {"data_offsets": {"0": 8}}}, bytes(8)), NO_OFFSETS),
    (file_of({"x": X | {"data_offsets": [8]}}, bytes(8)), NO_OFFSETS),
    (file_of({"x": X | {"data_offsets": [0, 8, 8]}}, bytes(8)), NO_OFFSETS),
    (file_of({"x": X | {"data_offsets": [0, 8.0]}}, bytes(8)), NO_OFFSETS),
    (file_of({"x": X | {"data_offsets": [False, 8]}}, bytes(8)), NO_OFFSETS),
    (file_of({"x": X | {"data_offsets": [-8, 0]}}, bytes(8)), NO_MINUS),
    (file_of({"x": X | {"data_offsets": [8, 0]}}, bytes(8)), OTHER_SIZE),
    (file_of({"x": X | {"data_offsets": [0, 7]}}, bytes(8)), OTHER_SIZE),
    (file_of({"x": X}, bytes(7)), "`x` ends after the data, which has 7 bytes"),
    (
        file_of({"x": entry("F32", [0], 10**4000, 10**4000)}),
        "`x` ends after the data, which has 0 bytes",
    ),
    # tensors side by side
    (file_of({"x": X}, bytes(9)), "the tensors end at byte 8 of the data, which has 9"),
    (file_of({}, b"\0"), "the tensors end at byte 0 of the data, which has 1"),
    (
        file_of({"x": entry("F32", [1], 4, 8)}, bytes(8)),
        "`x` starts at byte 4 of the data instead of 0; tensors neither overlap nor leave gaps",
    ),
    (
        file_of({"x": X, "y": entry("F32", [2], 4, 12)}, bytes(12)),
        "`y` starts at byte 4 of the data instead of 8; tensors neither overlap nor leave gaps",
    ),
    (
        file_of({"x": X, "y": X}, bytes(8)),
        "`y` starts at byte 0 of the data instead of 8; tensors neither overlap nor leave gaps",
    ),
    (
        file_of({"x": X, "y": entry("F32", [1], 9, 13)}, bytes(13)),
        "`y` starts at byte 9 of the data instead of 8; tensors neither overlap nor leave gaps",
    ),
    (
        file_of({"x": X, "y": entry("F32", [0], 4, 4)}, bytes(8)),
        "`y` starts at byte 4 of the data instead of 8; tensors neither overlap nor leave gaps",
    ),
    # booleans
    (file_of({"x": entry("BOOL", [2, 2], 0, 4)}, b"\0\1\1\2"), "`x[1][1]` is neither 0 nor 1"),
    (file_of({"x": entry("BOOL", [], 0, 1)}, b"\xff"), "`x` is neither 0 nor 1"),
]


@pytest.mark.parametrize(
    ("body", "sentence"), DAMAGED, ids=[sentence[:70] for _, sentence in DAMAGED]
)
def test_a_damaged_file_is_refused_in_a_sentence(body: bytes, sentence: str) -> None:
    said = refusal(body)
    assert said.startswith(sentence)
    assert_read_alike_or_refused(body)
    assert refusal(bytearray(body)) == said


@given(content=st.binary(max_size=200))
def test_arbitrary_headers_are_refused_or_read_as_the_package_does(content: bytes) -> None:
    assert_read_alike_or_refused(file_of(content))
    assert_read_alike_or_refused(content)


ODD = st.sampled_from(
    [*(0, 1, 2, 4, 7, 8, 9, -1, True, None, 1.0, 2**31, 2**63, 2**64, "", "F32", "BOOL", "F8_E4M3")]
)
SIZES = st.sampled_from([0, 1, 2, 3]) | ODD
entries_that_may_lie = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*TYPES, "F16", "U8", "C64"]) | ODD,
        "shape": st.lists(SIZES, max_size=3) | ODD,
        "data_offsets": st.tuples(SIZES, st.sampled_from([0, 4, 8, 16, 24]) | ODD) | ODD,
    },
    optional={"x": ODD},
)


@given(
    header=st.dictionaries(names, entries_that_may_lie | ODD, max_size=3),
    data=st.binary(max_size=24) | st.sampled_from([bytes(8), bytes(16), bytes(24), b"\1" * 8]),
)
@example(header={"x": entry("F32", [2], 0, 8), "y": entry("BOOL", [8], 8, 16)}, data=bytes(16))
@example(header={"x": entry("F32", [0, 2**62], 0, 0)}, data=b"")
def test_headers_that_lie_are_refused_or_read_as_the_package_does(
    header: dict[str, Any], data: bytes
) -> None:
    assert_read_alike_or_refused(file_of(header, data))


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A good file after some bytes were changed, inserted or deleted, mostly in its header."""
    body = bytearray(save(draw(tensors_of_any_kind)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, min(len(body), 300)))
        match draw(st.sampled_from(["flip", "insert", "repeat", "replace", "delete", "truncate"])):
            case "flip" if at < len(body):
                body[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                body[at:at] = draw(st.sampled_from(list(b' "-0129.,:{}[]\\\0\xff'))).to_bytes()
            case "repeat":
                body[at:at] = body[at : at + draw(st.integers(1, 60))]
            case "replace":
                body[at : at + 1] = draw(st.binary(max_size=2))
            case "delete":
                del body[at : at + draw(st.integers(1, 60))]
            case "truncate":
                del body[draw(st.integers(0, len(body))) :]
    if draw(st.booleans()):  # the length is right again, so that what follows it is read
        length = body.rfind(b"}") - 7
        body[:8] = max(length, 0).to_bytes(8, "little")
    return bytes(body)


@given(body=damaged_files())
def test_damaged_files_are_refused_or_read_as_the_package_does(body: bytes) -> None:
    assert_read_alike_or_refused(body)
