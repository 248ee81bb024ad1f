"""A format's file as a step of tensors: loaded as the gate and the service load it."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.loaders.load import RUNTIME_OF, load_step
from export.loaders.protocol import RenewableStep
from export.manifest import Array, FormatFile, Manifest, step_inputs, step_outputs
from model.step_spec import StepSpec

TensorStep = Callable[..., tuple[Tensor, ...]]


def load(
    content: bytes, name: str, spec: StepSpec, *, requires: str | None = None
) -> RenewableStep:
    """The runtime `name` on the content of some file."""
    file = FormatFile(
        file=f"policy.{name}",
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        requires=requires,
    )
    return load_step(
        content,
        name=name,
        file=file,
        inputs=step_inputs(spec),
        outputs=step_outputs(spec),
        device="cpu",
        num_threads=torch.get_num_threads(),
    )


def load_from(artifact: Path, format_name: str) -> RenewableStep:
    """The step of an artifact's format, its hash checked first."""
    manifest = Manifest.read(artifact)
    file = manifest.formats[format_name]
    return load(file.read(artifact), RUNTIME_OF[format_name], manifest.spec)


def allocated(arrays: Sequence[Array], num_rows: int) -> dict[str, NDArray[Any]]:
    """Zeros, by name."""
    return {
        array.name: np.zeros(
            [size if isinstance(size, int) else num_rows for size in array.shape],
            dtype=array.dtype,
        )
        for array in arrays
    }


def run_step(step: RenewableStep, spec: StepSpec, *inputs: Tensor) -> tuple[Tensor, ...]:
    """One step, tensors in and out, in the manifest's order."""
    given = {
        array.name: tensor.contiguous().numpy()
        for array, tensor in zip(step_inputs(spec), inputs, strict=True)
    }
    outputs = allocated(step_outputs(spec), len(inputs[0]))
    step.bind(given, outputs)()
    return tuple(torch.from_numpy(array) for array in outputs.values())
