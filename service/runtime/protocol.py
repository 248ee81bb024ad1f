"""The seam between the engine and whatever runs the exported step."""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class StepArrays(NamedTuple):
    """The step's outputs: `[B, heads]` int64, float32, then `[B]`, twice `[B, layers, hidden]`."""

    action: NDArray[np.int64]
    log_prob: NDArray[np.float32]
    value: NDArray[np.float32]
    h: NDArray[np.float32]
    c: NDArray[np.float32]


class Runtime(Protocol):
    """One exported step, ready to run on host arrays as `export.manifest` names them.

    `name` is its format's, `device` where it runs. The inputs may be reused by the caller after the
    call, so no output may share their memory.
    """

    name: str
    device: str

    def __call__(
        self,
        observation: NDArray[np.float32],
        action_mask: NDArray[np.bool_],
        noise: NDArray[np.float32],
        h: NDArray[np.float32],
        c: NDArray[np.float32],
    ) -> StepArrays: ...
