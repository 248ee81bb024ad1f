"""Which runtime serves an artifact on this machine."""

import importlib.util
from pathlib import Path

from export.manifest import ArtifactError, Device, FormatFile, Manifest
from service.runtime.protocol import Runtime

FORMAT_OF = {
    "onnx": "onnx",
    "torchscript": "torchscript",
    "aoti": "aoti",
    "eager": "pt2",
    "compile": "pt2",
}
"""Each runtime, and the artifact's format it runs."""


def runs_on(name: str, manifest: Manifest, device: Device) -> bool:
    """Whether the artifact has the runtime's format, and what is installed here runs it there."""
    if FORMAT_OF[name] not in manifest.formats:
        return False
    if name == "onnx":
        from service.runtime.onnx import cuda_is_available

        return device == "cpu" or cuda_is_available()
    # Machine code is for the device it was made for; the others move.
    return has_torch() and (name != "aoti" or manifest.device == device)


def load_runtime(
    directory: Path, manifest: Manifest, *, name: str, device: Device, num_threads: int
) -> Runtime:
    """The named runtime on the artifact's file of its format, after its SHA-256 was checked.

    Raises ArtifactError where the artifact has no such format, a file is not what was exported or
    not for this machine, or torch or the device is missing.
    """
    format_name = FORMAT_OF[name]
    file = manifest.formats.get(format_name)
    if file is None:
        raise ArtifactError(
            f"{directory}: has no format {format_name!r}, only {', '.join(manifest.formats)}; "
            f"export it again with `--formats {format_name}`"
        )
    content = file.read(directory)
    try:
        if name == "onnx":
            return _onnx_runtime(directory, content, device, num_threads)
        return _torch_runtime(name, directory, file, content, device, num_threads)
    except ArtifactError:
        raise
    except Exception as error:  # whatever the format's own loader raises
        sentence = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArtifactError(f"{directory / file.file}: cannot be loaded: {sentence}") from error


def _onnx_runtime(directory: Path, content: bytes, device: Device, num_threads: int) -> Runtime:
    from service.runtime.onnx import OnnxRuntime, cuda_is_available

    if device == "cuda" and not cuda_is_available():
        raise _no_cuda(directory)
    return OnnxRuntime(content, device=device, num_threads=num_threads)


def _torch_runtime(
    name: str, directory: Path, file: FormatFile, content: bytes, device: Device, num_threads: int
) -> Runtime:
    if not has_torch():
        raise ArtifactError(
            f"{directory}: {name} needs torch, which is not installed; "
            "`pip install 'tamiyo-serve[torch]'` brings it"
        )
    from service.runtime.torch_formats import TorchRuntime, cuda_is_available, machine_capability

    if device == "cuda" and not cuda_is_available():
        raise _no_cuda(directory)
    missing = file.missing_on(machine_capability(device))
    if missing:
        raise ArtifactError(
            f"{directory / file.file}: holds machine code that needs {', '.join(missing)}, which "
            "this machine has not; export it here, or use another runtime"
        )
    return TorchRuntime(name, content, device=device, num_threads=num_threads)


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _no_cuda(directory: Path) -> ArtifactError:
    return ArtifactError(
        f"{directory}: the runtime installed here finds no CUDA device, and cuda was asked for"
    )
