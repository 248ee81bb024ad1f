"""The arrays that a format's file takes and gives, compared with those of the manifest."""

import json
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Literal, NamedTuple, Self

from export.manifest import Array, ArtifactError

Shape = tuple[int | str | None, ...]


class FileArray(NamedTuple):
    """An array as a file has it; None is what the file does not say of it.

    Dimensions are sizes; a free one is whatever the file calls it, or None.
    """

    name: str | None = None
    dtype: str | None = None
    shape: Shape | None = None

    @classmethod
    def read(cls, text: str) -> list[Self]:
        """Arrays that `write` wrote."""
        return [cls(name, dtype, tuple(shape)) for name, dtype, shape in json.loads(text)]


def write(arrays: Iterable[FileArray]) -> str:
    """Arrays, in order, as text that fits in a file's metadata."""
    return json.dumps([tuple(array) for array in arrays])


def check_arrays(
    kind: Literal["input", "output"], got: Sequence[FileArray], expected: Sequence[Array]
) -> None:
    """Raises ArtifactError, naming the first that differs, where a file's arrays are not these.

    Compared are number and order, names, dtypes and shapes, as far as the file says them. A free
    dimension is free in both, by whatever name.
    """
    for index, (have, want) in enumerate(zip_longest(got, expected)):
        if have is None:
            raise ArtifactError(f"{kind} {index} is missing, expected {want.name!r}")
        if want is None:
            named = "" if have.name is None else f" {have.name!r}"
            raise ArtifactError(f"{kind} {index}{named} is one too many, expected {len(expected)}")
        if have.name not in (None, want.name):
            raise ArtifactError(f"{kind} {index} is {have.name!r}, expected {want.name!r}")
    for have, want in zip(got, expected, strict=True):
        if have.dtype not in (None, want.dtype) or not _fits(have.shape, want.shape):
            raise ArtifactError(
                f"{kind} {want.name!r} is {_described(have.dtype, have.shape)}, expected "
                f"{_described(want.dtype, want.shape)}"
            )


def _fits(have: Shape | None, want: Shape) -> bool:
    return have is None or [_size(n) for n in have] == [_size(n) for n in want]


def _size(dimension: int | str | None) -> int | None:
    """None is free."""
    return dimension if isinstance(dimension, int) else None


def _described(dtype: str | None, shape: Shape | None) -> str:
    sizes = (
        ""
        if shape is None
        else f" [{', '.join('free' if size is None else str(size) for size in shape)}]"
    )
    return f"{dtype or 'an array'}{sizes}"
