"""Which runtime serves an artifact on this machine; `export.loaders` loads it."""

import logging
from collections.abc import Sequence
from pathlib import Path

from export.loaders.load import FORMAT_OF, has_torch, load_step
from export.loaders.protocol import LoadedStep, RenewableStep
from export.manifest import ArtifactError, Device, Manifest
from service.runtime.host import HostRuntime, HostStates
from service.runtime.protocol import Runtime

logger = logging.getLogger(__name__)


def runs_on(name: str, manifest: Manifest, device: Device) -> bool:
    """Whether the artifact has the runtime's format, and what is installed here runs it there."""
    if FORMAT_OF[name] not in manifest.formats:
        return False
    if name == "onnx":
        from export.loaders import onnx

        return onnx.runs_on(device)
    # Machine code is for the device it was made for; the others move.
    return has_torch() and (name != "aoti" or manifest.device == device)


def load_runtime(
    directory: Path, manifest: Manifest, *, name: str, device: Device, num_threads: int
) -> RenewableStep:
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
        return load_step(
            content,
            name=name,
            file=file,
            inputs=manifest.inputs,
            outputs=manifest.outputs,
            device=device,
            num_threads=num_threads,
        )
    except ArtifactError as error:
        raise ArtifactError(f"{directory}: {error}") from error


def keeps_states_there(loaded: LoadedStep) -> bool:
    """Whether states live on the step's device: in torch's formats on a GPU."""
    return loaded.device == "cuda" and loaded.name != "onnx"


def with_states(
    loaded: LoadedStep,
    manifest: Manifest,
    *,
    num_rows: int,
    batch_sizes: Sequence[int],
    tf32: bool = False,
) -> Runtime:
    """The loaded step, and `num_rows` rows of states where it runs best.

    With `tf32` its products may be so, where it can; where not, the log says so.
    """
    if keeps_states_there(loaded):
        from service.runtime.cuda_device import CudaDevice
        from service.runtime.device_runtime import DeviceRuntime

        return DeviceRuntime(
            loaded,
            CudaDevice(tf32=tf32),
            spec=manifest.spec,
            num_rows=num_rows,
            inputs=manifest.inputs,
            outputs=manifest.outputs,
            batch_sizes=batch_sizes,
        )
    if tf32:
        logger.warning("%s on %s has no TF32: products are in float32", loaded.name, loaded.device)
    return HostRuntime(
        loaded,
        HostStates(manifest.spec, num_rows),
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        batch_sizes=batch_sizes,
    )
