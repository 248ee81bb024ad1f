"""Where the policy runs: decided before a runtime is loaded, and without importing torch for it."""

import ctypes
import logging
from typing import Literal

from export.loaders.load import has_torch
from export.manifest import ArtifactError, Device, Manifest
from service.runtime.auto import CANDIDATES
from service.runtime.load import runs_on

logger = logging.getLogger(__name__)

HOW_TO_SEE_ONE = "in a container, `docker run --gpus all` shows it the host's"


def choose_device(wanted: Literal["auto", "cpu", "cuda"], manifest: Manifest, name: str) -> Device:
    """The device for the runtime `name`, or for those `--runtime auto` chooses from.

    "auto" is the GPU where one is visible and one of them can use it, and else the CPU; the log
    says so where that may not be what was meant. Raises ArtifactError where "cuda" is wanted and
    there is no GPU.
    """
    if wanted == "cpu":
        return "cpu"
    num_gpus = count_gpus()
    if wanted == "cuda":
        if num_gpus == 0:
            raise ArtifactError(f"no GPU is visible here, and cuda was asked for; {HOW_TO_SEE_ONE}")
        return "cuda"
    names = CANDIDATES if name == "auto" else [name]
    for_gpus = [name for name in names if runs_on(name, manifest, "cuda")]
    if num_gpus == 0:
        if for_gpus or has_torch():
            logger.info("no GPU is visible here: serving on the CPU; %s", HOW_TO_SEE_ONE)
        return "cpu"
    if not for_gpus:
        logger.warning(
            "a GPU is visible, and nothing installed here runs this artifact's %s on it: serving "
            "on the CPU",
            ", ".join(manifest.formats),
        )
        return "cpu"
    if for_gpus != ["onnx"] and not _torch_sees_a_gpu():
        logger.warning(
            "a GPU is visible, and the torch installed here cannot use it (made for CPUs, or for "
            "a newer driver): serving on the CPU"
        )
        return "cpu"
    return "cuda"


def count_gpus() -> int:
    """CUDA devices the driver shows this process; 0 without a driver. Creates no context.

    https://docs.nvidia.com/cuda/cuda-driver-api, cuInit and cuDeviceGetCount.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _torch_sees_a_gpu() -> bool:
    from export.loaders.machine import torch_sees_a_gpu

    return torch_sees_a_gpu()
