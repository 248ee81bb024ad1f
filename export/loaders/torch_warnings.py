"""What torch 2.13 says of its own insides as it writes and loads its formats, silenced."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def torch_speaks_of_itself() -> Iterator[None]:
    """TorchScript is deprecated (here it is asked for, and inductor's imports use it), so is a
    class its exporters use, and torchvision is absent.
    """
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning
            )
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        registration.setLevel(level)
