"""Which runtime serves an artifact on this machine."""

import importlib.util
from pathlib import Path

from export.manifest import ArtifactError, Manifest
from service.runtime.protocol import Runtime


def load_runtime(
    directory: Path, manifest: Manifest, *, name: str, device: str, num_threads: int
) -> Runtime:
    """The named runtime on the artifact's file of that format, after its SHA-256 was checked.

    `auto` is TorchScript, the one format so far. Raises ArtifactError where the artifact has no
    such format, a file is not what was exported, or torch or the device is missing. Torch is
    imported only once it is needed.
    """
    if name == "auto":
        name = "onnx" if "onnx" in manifest.formats else "torchscript"
    file = manifest.formats.get(name)
    if file is None:
        raise ArtifactError(
            f"{directory}: has no format {name!r}, only {', '.join(manifest.formats)}; export "
            f"it again with `--formats {name}`"
        )
    if device == "auto":
        device = manifest.device
    content = file.read(directory)
    if name == "onnx":
        from service.runtime.onnx import OnnxRuntime

        return OnnxRuntime(content, device=device, num_threads=num_threads)
    if importlib.util.find_spec("torch") is None:
        raise ArtifactError(
            f"{directory}: {name} needs torch, which is not installed; "
            "`pip install 'tamiyo-serve[torch]'` brings it"
        )
    from service.runtime.torchscript import TorchScriptRuntime, cuda_is_available

    if device == "cuda" and not cuda_is_available():
        raise ArtifactError(
            f"{directory}: no CUDA device is visible on this machine; it was asked for"
        )
    return TorchScriptRuntime(content, device=device, num_threads=num_threads)
