"""Runs a TorchScript artifact. Importing this module imports torch."""

import io
import warnings

import numpy as np
import torch
from numpy.typing import NDArray

from service.runtime.protocol import StepArrays


class TorchScriptRuntime:
    """A frozen TorchScript step, from the bytes of its (verified) file.

    `num_threads` is torch's intra-op pool, for the whole process.
    """

    name = "torchscript"

    def __init__(self, content: bytes, *, device: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.device = device
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated")
            self._step = torch.jit.load(  # type: ignore[no-untyped-call]
                io.BytesIO(content), map_location=self.device
            )

    def __call__(
        self,
        observation: NDArray[np.float32],
        action_mask: NDArray[np.bool_],
        noise: NDArray[np.float32],
        h: NDArray[np.float32],
        c: NDArray[np.float32],
    ) -> StepArrays:
        arrays = (observation, action_mask, noise, h, c)
        with torch.inference_mode():
            outputs = self._step(*(torch.from_numpy(array).to(self.device) for array in arrays))
            return StepArrays(*(output.cpu().numpy() for output in outputs))


def cuda_is_available() -> bool:
    return torch.cuda.is_available()
