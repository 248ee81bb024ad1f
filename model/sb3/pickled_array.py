"""NumPy's arrays and scalars out of a passive pickle, in the words of NumPy 1 and 2."""

import numpy as np
from numpy.typing import NDArray

from model.sb3.passive_pickle import StandIn
from model.sb3.plain_array import plain_array

CORES = ("numpy._core.", "numpy.core.")
ORDERS = ("<", ">", "=", "|")


def pickled_array(value: object) -> NDArray[np.float64]:
    """float64, of an array or a scalar of floats or integers; ValueError where it is neither."""
    match _call(value):
        case "multiarray._reconstruct", _, (_, tuple(shape), dtype, is_fortran, content):
            return plain_array(_dtype(dtype), shape, _bytes(content), is_fortran=is_fortran is True)
        case "numeric._frombuffer", (content, dtype, tuple(shape), "C" | "F" as order), _:
            return plain_array(_dtype(dtype), shape, _bytes(content), is_fortran=order == "F")
        case "numeric._frombuffer", (content, dtype, tuple(shape), "K", tuple(axes)), _:
            if sorted(map(str, axes)) != sorted(map(str, range(len(shape)))):
                raise ValueError("an array whose axes are in no order")
            return plain_array(_dtype(dtype), shape, _bytes(content)).transpose(axes)
        case "multiarray.scalar", (dtype, content), _:
            return plain_array(_dtype(dtype), (), _bytes(content))
    raise ValueError("something else than an array of NumPy")


def _call(value: object) -> tuple[str, object, object]:
    """The function below NumPy's core, its arguments, and the state of what it makes."""
    if not isinstance(value, StandIn):
        return "", (), None
    core = next((core for core in CORES if value.module.startswith(core)), "")
    name = f"{value.module.removeprefix(core)}.{value.name}" if core else ""
    return name, value.arguments, value.state


def _dtype(value: object) -> object:
    """NumPy's text of a dtype, byte order first; None of what is none."""
    if not isinstance(value, StandIn) or (value.module, value.name) != ("numpy", "dtype"):
        return None
    match value.arguments, value.state:
        case (str(code), *_), (_, str(order), *_) if order in ORDERS:
            return order + code
        case (str(code), *_), None:
            return code
    return None


def _bytes(value: object) -> bytes:
    """Protocols below 3 write bytes as text that is encoded."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, StandIn) and (value.module, value.name) == ("_codecs", "encode"):
        match value.arguments:
            case str(text), "latin1":
                return text.encode("latin1")
    raise ValueError("an array of something else than floats or integers")
