"""The one way from a format's bytes to a step that runs. With ONNX no torch is imported."""

import importlib.util
from collections.abc import Sequence

from export.loaders.protocol import RenewableStep
from export.manifest import Array, ArtifactError, Device, FormatFile

FORMAT_OF = {
    "onnx": "onnx",
    "torchscript": "torchscript",
    "aoti": "aoti",
    "eager": "pt2",
    "compile": "pt2",
}
"""Each runtime, and the artifact's format it runs."""

RUNTIME_OF = {"onnx": "onnx", "torchscript": "torchscript", "aoti": "aoti", "pt2": "eager"}
"""Each format, and the runtime that takes its file as it is."""


def load_step(
    content: bytes,
    *,
    name: str,
    file: FormatFile,
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    device: Device,
    num_threads: int,
) -> RenewableStep:
    """The runtime `name` on a file's content, which the caller has hashed.

    Raises ArtifactError, naming the file, where it holds machine code for another machine, cannot
    be loaded, takes or gives other arrays than `inputs` and `outputs`, or where torch or the
    device is missing.
    """
    try:
        if name != "onnx":
            _check_torch(name, file, device)
        return _load(content, name, inputs, outputs, device, num_threads)
    except ArtifactError as error:
        raise ArtifactError(f"{file.file}: {error}") from error
    except Exception as error:  # whatever the format's own loader raises
        raise ArtifactError(f"{file.file}: cannot be loaded: {first_line(error)}") from error


def _load(
    content: bytes,
    name: str,
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    device: Device,
    num_threads: int,
) -> RenewableStep:
    if name == "onnx":
        from export.loaders.onnx import OnnxStep

        return OnnxStep(
            content, inputs=inputs, outputs=outputs, device=device, num_threads=num_threads
        )
    from export.loaders.torch_formats import load_torch_step

    return load_torch_step(
        name, content, inputs=inputs, outputs=outputs, device=device, num_threads=num_threads
    )


def _check_torch(name: str, file: FormatFile, device: Device) -> None:
    if not has_torch():
        raise ArtifactError(
            f"{name} needs torch, which is not installed; "
            "`pip install 'tamiyo-serve[torch]'` brings it"
        )
    from export.loaders.machine import machine_capability, torch_sees_a_gpu

    if device == "cuda" and not torch_sees_a_gpu():
        raise ArtifactError("the torch installed here finds no CUDA device")
    missing = file.missing_on(machine_capability(device))
    if missing:
        raise ArtifactError(
            f"holds machine code that needs {', '.join(missing)}, which this machine has not; "
            "export it here, or use another format"
        )


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def first_line(error: Exception) -> str:
    """What a foreign library says first of its failure."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
