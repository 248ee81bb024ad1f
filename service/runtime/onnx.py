"""Runs an ONNX artifact in onnxruntime. Torch is not imported, nor needed."""

import os
from collections.abc import Callable
from functools import partial

# From 1.29 on it reports each process, session and model to its maker over the network, and leaves
# an identifier in the user's cache, unless this stands in the environment before the import
# (microsoft/onnxruntime#27379, #29843).
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

from service.runtime.protocol import StepInputs, StepOutputs

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
        self._outputs = [output.name for output in self._session.get_outputs()]

    def bind(self, inputs: StepInputs, outputs: StepOutputs) -> Callable[[], None]:
        if self.device != "cpu":  # a binding would copy to the device once, when it is made
            return partial(self._run_on_device, inputs, outputs)
        binding = self._session.io_binding()
        for name, array in inputs.by_name().items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in zip(self._outputs, outputs.arrays(), strict=True):
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        # The binding knows addresses; the call keeps the arrays at them alive.
        return partial(self._run_bound, binding, inputs, outputs)

    def _run_bound(
        self, binding: onnxruntime.IOBinding, inputs: StepInputs, outputs: StepOutputs
    ) -> None:
        self._session.run_with_iobinding(binding)

    def _run_on_device(self, inputs: StepInputs, outputs: StepOutputs) -> None:
        given = self._session.run(self._outputs, inputs.by_name())
        for array, result in zip(outputs.arrays(), given, strict=True):
            array[...] = result


def cuda_is_available() -> bool:
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
