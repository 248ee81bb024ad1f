"""Loads ONNX into onnxruntime. Torch is not imported, nor needed."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

# From 1.29 on it reports each process, session and model to its maker over the network, and leaves
# an identifier in the user's cache, unless this stands in the environment before the import
# (microsoft/onnxruntime#27379, #29843).
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime
from numpy.typing import NDArray

from export.loaders.arrays import FileArray, check_arrays
from export.manifest import Array, ArtifactError, Device
from export.parameters import Parameters

Arrays = Mapping[str, NDArray[Any]]

PROVIDERS: dict[Device, tuple[str, dict[str, int]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    # TF32, which this provider has on by default, keeps 10 bits of a float32's 23.
    "cuda": ("CUDAExecutionProvider", {"use_tf32": 0}),
}
DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool"}


class OnnxStep:
    """An onnxruntime session on the step's graph, from the bytes of its (verified) file.

    Raises ArtifactError where the graph's inputs and outputs are not those given, and where
    onnxruntime does not run it on `device`.
    """

    name = "onnx"

    def __init__(
        self,
        content: bytes,
        *,
        inputs: Sequence[Array],
        outputs: Sequence[Array],
        device: Device,
        num_threads: int,
        parameters: Parameters | None = None,
    ) -> None:
        self.device: str = device
        provider, _ = PROVIDERS[device]
        if not runs_on(device):
            raise ArtifactError(f"the onnxruntime installed here has no {provider}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        # Waiting threads would spin on the cores that the event loop and the clients need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # The session reads their memory as long as it lives.
        self._values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array)
            for name, array in (parameters or {}).items()
        }
        for name, value in self._values.items():
            options.add_initializer(name, value)
        session = onnxruntime.InferenceSession(content, options, providers=[PROVIDERS[device]])
        # A provider that finds no device, or not its libraries, leaves the graph to the CPU.
        if session.get_providers()[0] != provider:
            raise ArtifactError(f"onnxruntime finds no device for its {provider}")
        check_arrays("input", _described(session.get_inputs()), inputs)
        check_arrays("output", _described(session.get_outputs()), outputs)
        self._session = session
        self._inputs = [array.name for array in inputs]
        self._outputs = [array.name for array in outputs]
        self._with_parameters = partial(
            OnnxStep,
            content,
            inputs=inputs,
            outputs=outputs,
            device=device,
            num_threads=num_threads,
        )

    def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
        if self.device != "cpu":  # a binding would copy to the device once, when it is made
            feed = {name: inputs[name] for name in self._inputs}
            wanted = [outputs[name] for name in self._outputs]
            return partial(self._run_on_device, feed, wanted)
        binding = self._session.io_binding()
        for names, arrays, bind in (
            (self._inputs, inputs, binding.bind_input),
            (self._outputs, outputs, binding.bind_output),
        ):
            for name in names:
                array = arrays[name]
                assert array.flags.c_contiguous, name
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        # The binding knows addresses; the call keeps the arrays at them alive.
        return partial(self._run_bound, binding, inputs, outputs)

    def with_parameters(self, parameters: Parameters) -> "OnnxStep":
        return self._with_parameters(parameters=parameters)

    def _run_bound(self, binding: onnxruntime.IOBinding, inputs: Arrays, outputs: Arrays) -> None:
        self._session.run_with_iobinding(binding)

    def _run_on_device(self, feed: dict[str, NDArray[Any]], wanted: list[NDArray[Any]]) -> None:
        given = self._session.run(self._outputs, feed)
        for array, result in zip(wanted, given, strict=True):
            array[...] = result


def runs_on(device: Device) -> bool:
    """Whether the onnxruntime installed here is one for the device."""
    return PROVIDERS[device][0] in onnxruntime.get_available_providers()


def _described(arrays: Sequence[onnxruntime.NodeArg]) -> list[FileArray]:
    return [
        FileArray(array.name, DTYPES.get(array.type, array.type), tuple(array.shape))
        for array in arrays
    ]
