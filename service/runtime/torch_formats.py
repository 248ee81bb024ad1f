"""Runs the artifact's torch formats. Importing this module imports torch.

`torchscript` and `aoti` run their files; `eager` and `compile` run the graph of the `pt2` file, one
operation at a time or through torch.compile, which takes a C++ compiler here.
"""

import io
import platform
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from service.runtime.protocol import StepInputs, StepOutputs

Step = Callable[..., Any]


class TorchRuntime:
    """A step of one of torch's formats, from the bytes of its (verified) file.

    `num_threads` is torch's intra-op pool, for the whole process.
    """

    def __init__(self, name: str, content: bytes, *, device: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.name = name
        self.device = device
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            self._step = LOADERS[name](content, device)

    def bind(self, inputs: StepInputs, outputs: StepOutputs) -> Callable[[], None]:
        given = [torch.from_numpy(array) for array in inputs.by_name().values()]
        wanted = [torch.from_numpy(array) for array in outputs.arrays()]

        def run() -> None:
            with torch.inference_mode():
                results = self._step(*(tensor.to(self.device) for tensor in given))
                for tensor, result in zip(wanted, results, strict=True):
                    tensor.copy_(result)

        return run


def _load_torchscript(content: bytes, device: str) -> Step:
    step: Step = torch.jit.load(  # type: ignore[no-untyped-call]
        io.BytesIO(content), map_location=device
    )
    return step


def _load_aoti(content: bytes, device: str) -> Step:
    # Takes a second to import, and a writable temporary directory, which no other format needs.
    import torch._inductor

    # The loader unpacks from a path; what it opens is what was hashed, in a directory of our own.
    with tempfile.TemporaryDirectory(prefix="tamiyo-aoti-") as directory:
        package = Path(directory) / "policy.pt2"
        package.write_bytes(content)
        step: Step = torch._inductor.aoti_load_package(str(package))
    return step


def _load_eager(content: bytes, device: str) -> Step:
    program = torch.export.load(io.BytesIO(content))
    step: Step = move_to_device_pass(program, device).module()
    return step


def _load_compiled(content: bytes, device: str) -> Step:
    step: Step = torch.compile(_load_eager(content, device), dynamic=True)
    return step


LOADERS: dict[str, Callable[[bytes, str], Step]] = {
    "torchscript": _load_torchscript,
    "aoti": _load_aoti,
    "eager": _load_eager,
    "compile": _load_compiled,
}


def cuda_is_available() -> bool:
    return torch.cuda.is_available()


def machine_capability(device: str) -> str:
    """What machine code finds here, in the words of the manifest's `requires`."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"
    names = (name for name, has in torch.cpu.get_capabilities().items() if has is True)
    return " ".join([platform.machine(), *sorted(names)])
