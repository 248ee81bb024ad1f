"""What the tests here run on: the GPU where there is one, and in rehearsal the CPU as a device."""

import warnings

import pytest
import torch

from export.manifest import Device
from service.runtime.cpu_device import CpuDevice
from service.runtime.cuda_device import CudaDevice

with warnings.catch_warnings():  # of a driver that is too old, say: then there is no GPU for us
    warnings.simplefilter("ignore")
    HAS_GPU = torch.cuda.is_available()

DEVICE: Device = "cuda" if HAS_GPU else "cpu"

needs_cuda = pytest.mark.skipif(not HAS_GPU, reason="CUDA only")


def new_device() -> CudaDevice | CpuDevice:
    return CudaDevice() if HAS_GPU else CpuDevice()
