"""What this machine has for machine code. Importing this module imports torch."""

import platform

import torch

from export.manifest import Device


def machine_capability(device: Device) -> str:
    """All the CPU has, or the GPU's compute capability, in the words of `FormatFile.requires`."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"
    names = (name for name, has in torch.cpu.get_capabilities().items() if has is True)
    return " ".join([platform.machine(), *sorted(names)])


def torch_sees_a_gpu() -> bool:
    return torch.cuda.is_available()
