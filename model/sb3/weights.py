"""`policy.pth`: a state_dict that torch saved, as float32 tensors."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint_file import ZIP, CheckpointError, read_file, short

NAME = "policy.pth"


def load_weights(content: bytes) -> dict[str, Tensor]:
    """The tensors by name, float32, contiguous and finite.

    Raises CheckpointError for what torch did not save as a zip, for what is more than tensors,
    for numbers that are no finite floats, and where more would be unpacked than the file has bytes.
    """
    _check_unpacked_size(content)
    held = read_file(Path(NAME), content)
    if not isinstance(held, Mapping):
        raise CheckpointError(f"{NAME}: holds a {type(held).__name__}, not weights by name")
    for name, value in held.items():
        _check_plain(name, value)
    # Names may share a tensor, as those of an extractor do; and a tensor may be a view of a few
    # numbers as if they were many, which memory would then be of.
    views = {_view(tensor): tensor for tensor in held.values()}
    if sum(view.numel() * view.element_size() for view in views.values()) > len(content):
        raise CheckpointError(f"{NAME}: its tensors have more numbers than the file")
    float32 = {view: tensor.detach().float().contiguous() for view, tensor in views.items()}
    weights = {name: float32[_view(tensor)] for name, tensor in held.items()}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise CheckpointError(f"{NAME}: {short(name)} is not finite")
    return weights


def _check_unpacked_size(content: bytes) -> None:
    if not content.startswith(ZIP):
        raise CheckpointError(f"{NAME}: is not what torch.save writes since version 1.6")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unpacked_bytes = sum(info.file_size for info in archive.infolist())
    except Exception as error:  # whatever the parser trips over in a damaged file
        raise CheckpointError(f"{NAME}: is a damaged or truncated zip") from error
    if unpacked_bytes > len(content):
        raise CheckpointError(f"{NAME}: unpacks to more than its own size")


def _check_plain(name: object, value: object) -> None:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise CheckpointError(
            f"{NAME}: its entry {short(name)} is a {type(value).__name__}, and weights are tensors "
            "by name"
        )
    if value.layout != torch.strided or value.is_meta or value.is_nested or value.is_quantized:
        raise CheckpointError(f"{NAME}: {short(name)} is no plain tensor")
    if not value.is_floating_point():
        raise CheckpointError(f"{NAME}: {short(name)} is of {value.dtype}, and weights are floats")


def _view(tensor: Tensor) -> tuple[object, ...]:
    """What another tensor has too if it is the same one."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
