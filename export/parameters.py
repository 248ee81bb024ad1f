"""The packed parameters of a step: what a learner pushes, and what names a policy's version.

Torch-free. By name, every array that the step multiplies, adds or looks up and that depends on the
policy's weights; `export.tamiyo_step` packs them. NumPy has no bfloat16: such a one is its 16 bits.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.manifest import Parameter

Parameters = Mapping[str, NDArray[Any]]

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
VALUE_SCALE = "value_scale"
"""The parameter that the value is multiplied by, where a policy's network has units of its own."""
BFLOAT16_EXPONENT = np.uint16(0x7F80)
"""All ones in infinities and NaN."""


class Difference(NamedTuple):
    """What is wrong with the parameter of this name, as the end of a sentence about it."""

    name: str
    what: str


def described(parameters: Parameters) -> tuple[Parameter, ...]:
    """Names, dtypes and shapes, as a manifest has them."""
    return tuple(
        Parameter(name=name, dtype=NAMES[array.dtype], shape=array.shape)
        for name, array in parameters.items()
    )


def sha256(parameters: Parameters) -> str:
    """The hash that names the version: of each parameter, by name, what it is and its bytes.

    A line of UTF-8 with name, dtype and sizes, apart by spaces, and the numbers, little-endian, the
    last dimension first. A parameter's place among the others is of no account.
    """
    digest = hashlib.sha256()
    for parameter in sorted(described(parameters), key=lambda parameter: parameter.name):
        sizes = " ".join(map(str, parameter.shape))
        digest.update(f"{parameter.name} {parameter.dtype} {sizes}\n".encode())
        digest.update(np.ascontiguousarray(parameters[parameter.name]).data)
    return digest.hexdigest()


def first_difference(parameters: Parameters, expected: Sequence[Parameter]) -> Difference | None:
    """Of parameters that are not those expected, or not numbers, the first; None where all are."""
    by_name = {parameter.name: parameter for parameter in expected}
    for name in parameters:
        if name not in by_name:
            return Difference(name, "is none of this policy's parameters")
    for name, parameter in by_name.items():
        array = parameters.get(name)
        if array is None:
            return Difference(name, "is missing")
        if NAMES.get(array.dtype) != parameter.dtype:
            got = NAMES.get(array.dtype, str(array.dtype))
            return Difference(name, f"is {got}, expected {parameter.dtype}")
        if array.shape != parameter.shape:
            return Difference(name, f"is {list(array.shape)}, expected {list(parameter.shape)}")
        is_finite = _is_finite(array)
        if not is_finite.all():
            where = "".join(f"[{index}]" for index in np.argwhere(~is_finite)[0])
            return Difference(f"{name}{where}", "is NaN or infinite")
    return None


def value_unit(parameters: Parameters) -> float:
    """What one unit of the network's own value is worth in returns."""
    scale = parameters.get(VALUE_SCALE)
    return 1.0 if scale is None else float(np.abs(scale).max())


def _is_finite(array: NDArray[Any]) -> NDArray[np.bool_]:
    is_bfloat16 = array.dtype == DTYPES["bfloat16"]
    finite: NDArray[np.bool_] = (
        (array & BFLOAT16_EXPONENT) != BFLOAT16_EXPONENT if is_bfloat16 else np.isfinite(array)
    )
    return finite
