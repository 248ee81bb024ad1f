"""NumPy's scalars and arrays out of a pickle, as data: numbers, text and arrays of them.

These stand in for the constructors a pickle names: NumPy's own believe what a pickle says of a
dtype's fields, and read any memory for it.
"""

import re
from collections.abc import Callable
from typing import Any, Self

import numpy as np

PLAIN_DTYPE = re.compile(r"[biufcSU]\d{1,6}")
"""Booleans, integers, floats, complex numbers and text; no objects, fields or dates."""

ORDERS = ("<", ">", "=", "|")


def is_plain_dtype(code: object) -> bool:
    return isinstance(code, str) and PLAIN_DTYPE.fullmatch(code) is not None


class NumpyDtype:
    """What a pickle says of a dtype: its code, and its byte order when it is built."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if not is_plain_dtype(code):
            raise ValueError(f"{code!r} is not the dtype of plain numbers or text")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ORDERS:
            raise ValueError(f"{order!r} is no byte order")
        self.dtype = self.dtype.newbyteorder(order)


class NumpyArray(np.ndarray[Any, Any]):
    """An array of a plain dtype, in this machine's byte order; empty until it is built.

    NumPy itself holds the shape against the bytes.
    """

    def __new__(cls, *_: object) -> Self:
        return super().__new__(cls, 0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, stored, is_fortran, content = state
        if not isinstance(stored, NumpyDtype) or not isinstance(content, bytes):
            raise ValueError("an array of something else than plain numbers or text")
        checked: Any = (1, tuple(shape), stored.dtype, bool(is_fortran), content)
        super().__setstate__(checked)


def scalar(stored: NumpyDtype, content: bytes) -> object:
    """The Python number or text."""
    return np.frombuffer(content, stored.dtype, count=1)[0].item()


def no_bytes() -> bytes:
    """What an array without numbers is of."""
    return b""


CONSTRUCTORS: list[tuple[Callable[..., object], str]] = [
    (no_bytes, "builtins.bytes"),
    (NumpyDtype, "numpy.dtype"),
    (NumpyArray, "numpy.ndarray"),
    *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((NumpyArray, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]
"""For `torch.serialization.safe_globals`: what to call for each name that NumPy 1 or 2 writes."""

NUMPY_NAMES = frozenset(name for _, name in CONSTRUCTORS)
