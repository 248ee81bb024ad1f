"""A batch's arrays side by side in one buffer, row by row: so that one copy moves them all."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.manifest import Array
from service.runtime.arrays import Arrays

ALIGNMENT = 8
"""Bytes: of a row, which any row after it then is, and at least what each number in it needs."""


class Field(NamedTuple):
    """Where an array's part of each row lies: `num_bytes` from `offset` on, as `shape`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class Layout:
    """Places for the arrays, in their order, in rows of `row_bytes` each.

    The widest numbers come first in a row, so that all are aligned and none leaves a gap. An offset
    does not depend on how many rows there are: the first rows of any buffer are one piece of it.
    """

    def __init__(self, arrays: Sequence[Array]) -> None:
        offsets: dict[str, int] = {}
        end = 0
        for array in sorted(arrays, key=_item_bytes, reverse=True):
            offsets[array.name] = end
            end += _item_bytes(array) * prod(_shape(array))
        self.row_bytes = -(-end // ALIGNMENT) * ALIGNMENT
        self.fields = tuple(
            Field(
                array.name,
                array.dtype,
                _shape(array),
                offsets[array.name],
                _item_bytes(array) * prod(_shape(array)),
            )
            for array in arrays
        )

    def views(self, buffer: NDArray[np.uint8]) -> Arrays:
        """What a buffer `[rows, row_bytes]` holds, `[rows, ...]` by name; they share its memory."""
        return {
            field.name: _view(buffer, field).reshape(len(buffer), *field.shape)
            for field in self.fields
        }


def _view(buffer: NDArray[np.uint8], field: Field) -> NDArray[Any]:
    return buffer[:, field.offset : field.offset + field.num_bytes].view(field.dtype)


def _item_bytes(array: Array) -> int:
    return np.dtype(array.dtype).itemsize


def _shape(array: Array) -> tuple[int, ...]:
    """Of one row: the first dimension is the batch's."""
    return tuple(int(size) for size in array.shape[1:])
