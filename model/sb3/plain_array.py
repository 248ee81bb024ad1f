"""An array out of bytes that a file says are numbers of some dtype, in some shape."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PLAIN_DTYPE = re.compile(r"[<>=|]?(f[248]|[iu][1248])")
MOST_AXES = 32
MOST_NUMBERS = 2**22


def plain_array(
    dtype: object, shape: Sequence[Any], content: bytes, *, is_fortran: bool = False
) -> NDArray[np.float64]:
    """float64, row by row; `dtype` is NumPy's text of it, '<f4'.

    Raises ValueError for anything but floats and integers, and where the bytes are not the shape's.
    """
    if not isinstance(dtype, str) or not PLAIN_DTYPE.fullmatch(dtype):
        raise ValueError("an array of something else than floats or integers")
    if not all(type(length) is int and length >= 0 for length in shape) or len(shape) > MOST_AXES:
        raise ValueError("an array of no shape")
    if 0 in shape:
        raise ValueError("an array without numbers")
    stored = np.dtype(dtype)
    if math.prod(shape) * stored.itemsize != len(content):
        raise ValueError("an array whose shape does not fit its bytes")
    if math.prod(shape) > MOST_NUMBERS:
        raise ValueError(f"an array of more than {MOST_NUMBERS:,} numbers")
    order: Any = "F" if is_fortran else "C"
    array = np.frombuffer(content, stored).reshape(tuple(shape), order=order)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return np.ascontiguousarray(array, np.float64).reshape(tuple(shape))
