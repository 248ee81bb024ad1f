"""The state of the process that judging takes: set for a while, and given back as it was."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import backends

FULL_PRECISION = "ieee"
INHERITED = "none"
_LOCK = threading.RLock()

T = TypeVar("T")


@contextmanager
def plain_process(num_threads: int = 1) -> Iterator[None]:
    """Inside, torch computes as it does in a fresh process, whatever the caller has set.

    Products are in full precision, autocast and inference mode are off, the default dtype is
    float32 and the default device the CPU; no gradient is recorded, and torch's pool has
    `num_threads` (the gate's many small products are slower with more). One thread at a time is
    inside, or the one would be given back what the other has set; others wait.
    """
    with _LOCK:
        yield from _plain(num_threads)


def _plain(num_threads: int) -> Iterator[None]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(_full_precision())
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(num_threads)
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":  # costs every call some microseconds
            stack.enter_context(torch.device("cpu"))
        for device_type in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """Of matrix products, the only ones there are."""
    # Torch's own types know no more of them than their names.
    mkldnn: Any = backends.mkldnn
    cudnn: Any = backends.cudnn
    # The inner ones inherit from those before them: each says its own once these say nothing.
    outer: tuple[Any, ...] = (backends, mkldnn, cudnn)
    inner: tuple[Any, ...] = (mkldnn.matmul, backends.cuda.matmul)
    products = _asked(torch.get_float32_matmul_precision)
    own: list[tuple[Any, str]] = []
    try:
        for place in (*outer, *inner):
            own.append((place, place.fp32_precision))
            place.fp32_precision = INHERITED
        for place in inner:
            place.fp32_precision = FULL_PRECISION
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        for place, precision in reversed(own):
            place.fp32_precision = precision


def _asked(older_switch: Callable[[], T]) -> T | None:
    """What one of torch's older switches says; None where the newer contradict it: it raises."""
    try:
        return older_switch()
    except RuntimeError:
        return None
