"""The file formats of an exported step: how each is written, and how it is loaded back.

A new format is one pair of functions and one row in FORMATS.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from export.step import PolicyStep, StepOutput

StepInput = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
LoadedStep = Callable[..., StepOutput]


class Format(NamedTuple):
    """`write` puts the step into a file; `load` makes it callable from the file's bytes."""

    file: str
    write: Callable[[PolicyStep, StepInput, Path], None]
    load: Callable[[bytes, torch.device], LoadedStep]


def write_torchscript(step: PolicyStep, example: StepInput, path: Path) -> None:
    """Traces and freezes the step. The example's batch is 2 or more, so that it stays dynamic."""
    with _torchscript_is_asked_for():
        traced = torch.jit.trace(step, example)  # type: ignore[no-untyped-call]
        torch.jit.save(torch.jit.freeze(traced), str(path))


def load_torchscript(content: bytes, device: torch.device) -> LoadedStep:
    with _torchscript_is_asked_for():
        loaded: LoadedStep = torch.jit.load(  # type: ignore[no-untyped-call]
            io.BytesIO(content), map_location=device
        )
    return loaded


@contextmanager
def _torchscript_is_asked_for() -> Iterator[None]:
    """Silences torch's notice that TorchScript is deprecated, and nothing else."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        yield


FORMATS = {
    "torchscript": Format("policy.ts", write_torchscript, load_torchscript),
}
