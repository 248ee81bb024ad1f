"""The GPU: all that is said to CUDA. Importing this module imports torch."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Lock

import torch
from torch import Tensor

from export.loaders.load import first_line
from service.runtime.protocol import DeviceLost


class CudaDevice:
    """A `Device` on the GPU that is current where it is made.

    All submitted work is on one stream, so that no two pieces of it run at once: they share the
    memory that graphs were captured with, and the workspaces of CUDA's libraries.
    """

    def __init__(self, *, tf32: bool = False) -> None:
        self._tf32 = tf32
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        # Torch has no types for what makes streams and events.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # One for good: captures share memory only where they are on one stream.
        self._capturing = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []
        self._one_capture = Lock()
        self._waiting = ThreadPoolExecutor(1, "device")

    def host_buffer(self, num_rows: int, row_bytes: int) -> Tensor:
        # Page-locked, or copies would be neither one piece nor beside the caller.
        return torch.zeros((num_rows, row_bytes), dtype=torch.uint8, pin_memory=True)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Others go on serving: what they ask of CUDA is none of its business. `torch.cuda.graph`
        # would wait for them, and give back the memory that torch holds free.
        try:
            with torch.cuda.stream(self._capturing):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    run()
                except BaseException:
                    with suppress(RuntimeError):  # of a capture that was broken off
                        graph.capture_end()
                    raise
                graph.capture_end()
        except BaseException:
            # Torch takes the pool to be captured to still, and asks this graph about it.
            self._failed.append(graph)
            self._pool = torch.cuda.graph_pool_handle()
            raise
        return graph.replay

    @contextmanager
    def as_served(self) -> Iterator[None]:
        with self._one_capture, float32_products(tf32=self._tf32):
            yield

    def submit(self, work: Callable[[], None]) -> Future[None]:
        failure: Exception | None = None
        ended: torch.cuda.Event | None = None
        try:
            with torch.cuda.stream(self._stream):
                try:
                    work()
                except Exception as error:  # what was begun is waited for all the same
                    failure = error
                # Who waits for a blocking one sleeps: the loop and its clients need the core.
                ended = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                ended.record()
        except Exception as error:  # as after any fault that the GPU keeps
            failure = failure or error
        return self._waiting.submit(self._wait, ended, failure)

    def _wait(self, ended: torch.cuda.Event | None, failure: Exception | None) -> None:
        """Raises what went wrong first, and DeviceLost where everything will from now on."""
        try:
            if ended is not None:
                ended.synchronize()  # without the interpreter's lock; raises what the GPU met
        except Exception as error:
            failure = failure or error
        if failure is not None:
            _settle(self._stream, failure)
            raise failure

    def settle(self) -> None:
        _settle(torch.cuda.current_stream())


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """In it, torch's products on a GPU may be in TF32: 10 of float32's 23 bits. For all threads.

    After it they are not: a probe of new weights is held to what float32 gives.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def _settle(stream: torch.cuda.Stream, first: Exception | None = None) -> None:
    """Waits for it. Raises DeviceLost, because of what went wrong first, where that is in vain:
    CUDA tells some faults at every call, to a process's end.
    """
    try:
        stream.synchronize()
    except Exception as error:
        sentence = f"the GPU is lost to this process: {first_line(error)}"
        raise DeviceLost(sentence) from first or error
