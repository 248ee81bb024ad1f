"""Runs an ONNX artifact in onnxruntime. Torch is not imported, nor needed."""

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from service.runtime.protocol import StepArrays

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    # TF32, which this provider has on by default, keeps 10 bits of a float32's 23.
    "cuda": ("CUDAExecutionProvider", {"use_tf32": 0}),
}


class OnnxRuntime:
    """An onnxruntime session on the step's graph, from the bytes of its (verified) file."""

    name = "onnx"

    def __init__(self, content: bytes, *, device: str, num_threads: int) -> None:
        self.device = device
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        # Waiting threads would spin on the cores that the event loop and the clients need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            content, options, providers=[PROVIDERS[device]]
        )

    def __call__(
        self,
        observation: NDArray[np.float32],
        action_mask: NDArray[np.bool_],
        noise: NDArray[np.float32],
        h: NDArray[np.float32],
        c: NDArray[np.float32],
    ) -> StepArrays:
        feed = {
            "observation": observation,
            "action_mask": action_mask,
            "noise": noise,
            "state_h_in": h,
            "state_c_in": c,
        }
        return StepArrays(*self._session.run(None, feed))


def cuda_is_available() -> bool:
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
