"""What is said to CUDA, in which order, to a stand-in for it; `tests/gpu` says it to a GPU."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import NamedTuple
from weakref import ref

import pytest
import torch

from service.runtime.cuda_device import CudaDevice, float32_products
from service.runtime.protocol import DeviceLost
from tests.service.fakes import TIMEOUT_S


class StandIn:
    """Of `torch.cuda`: notes what it is told, each with the stream that was current."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.current: object = "the default stream"
        self.num_streams = 0
        self.graphs: list[ref[object]] = []
        self.fault: Exception | None = None
        """What the GPU meets: whatever is asked of it from then on fails with it."""

    def notes(self, what: str) -> None:
        self.said.append(f"{what} on {self.current}")
        if self.fault is not None:
            raise self.fault

    @contextmanager
    def stream(self, stream: "Stream") -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def new_stream(self) -> "Stream":
        self.num_streams += 1
        return Stream(self, self.num_streams)


class Stream(NamedTuple):
    cuda: StandIn
    number: int

    def __str__(self) -> str:
        return f"stream {self.number}"

    def synchronize(self) -> None:
        self.cuda.notes(f"{self} ended")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()

    class Graph:
        def __init__(self) -> None:
            stand_in.graphs.append(ref(self))

        def capture_begin(self, *, pool: str, capture_error_mode: str) -> None:
            stand_in.notes(f"capture in {pool}, {capture_error_mode}")

        def capture_end(self) -> None:
            stand_in.notes("captured")

        def replay(self) -> None:
            stand_in.notes("replay")

    class Event:
        def __init__(self, *, blocking: bool) -> None:
            self.is_blocking = blocking

        def record(self) -> None:
            stand_in.notes(f"event, blocking: {self.is_blocking}")

        def synchronize(self) -> None:
            assert threading.current_thread() is not threading.main_thread()
            stand_in.notes("waited for")

    for name, of_ours in {
        "Stream": stand_in.new_stream,
        "stream": stand_in.stream,
        "current_device": lambda: 0,
        "current_stream": lambda: Stream(stand_in, 0),
        "graph_pool_handle": partial(next, map("pool {}".format, count(1))),
        "CUDAGraph": Graph,
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, of_ours)
    return stand_in


def test_work_is_submitted_to_one_stream_and_another_thread_waits_for_its_end(
    cuda: StandIn,
) -> None:
    device = CudaDevice()
    for number in range(2):
        device.submit(partial(cuda.notes, f"work {number}")).result(TIMEOUT_S)
    assert [line.replace("the default stream", "none") for line in cuda.said] == [
        "work 0 on stream 1",
        "event, blocking: True on stream 1",
        "waited for on none",
        "work 1 on stream 1",
        "event, blocking: True on stream 1",
        "waited for on none",
    ]


def test_what_work_began_before_it_failed_is_waited_for_and_its_error_is_told(
    cuda: StandIn,
) -> None:
    def fails() -> None:
        cuda.notes("half of it")
        raise ValueError("not the manifest's")

    device = CudaDevice()
    with pytest.raises(ValueError, match="not the manifest's"):
        device.submit(fails).result(TIMEOUT_S)
    assert [line.partition(" on ")[0] for line in cuda.said] == [
        "half of it",
        "event, blocking: True",
        "waited for",
        "stream 1 ended",
    ]
    assert cuda.current == "the default stream"
    device.submit(lambda: cuda.notes("the next")).result(TIMEOUT_S)


def test_a_fault_that_stays_is_a_lost_device_and_says_what_went_wrong_first(cuda: StandIn) -> None:
    def fails() -> None:
        raise ValueError("not the manifest's")

    device = CudaDevice()
    cuda.fault = RuntimeError("an illegal memory access\nSearch for it in the manual")
    sentence = "the GPU is lost to this process: an illegal memory access"
    for work, first in (
        (lambda: cuda.notes("work"), cuda.fault),
        (lambda: None, cuda.fault),
        (fails, "not the manifest's"),
    ):
        with pytest.raises(DeviceLost) as caught:
            device.submit(work).result(TIMEOUT_S)
        assert str(caught.value) == sentence
        assert str(caught.value.__cause__) == str(first)


def test_what_a_thread_itself_began_is_waited_for_and_a_lost_device_says_so(cuda: StandIn) -> None:
    device = CudaDevice()
    device.settle()
    assert cuda.said == ["stream 0 ended on the default stream"]
    cuda.fault = RuntimeError("an illegal memory access\nSearch for it in the manual")
    with pytest.raises(DeviceLost, match=r"lost to this process: an illegal memory access$"):
        device.settle()


def test_captures_are_on_a_stream_of_their_own_from_one_pool_and_replayed_on_the_other(
    cuda: StandIn,
) -> None:
    device = CudaDevice()
    with device.as_served():
        replays = [device.capture(partial(cuda.notes, f"step {n}")) for n in range(2)]
    device.submit(replays[0]).result(TIMEOUT_S)
    of_captures = [
        line
        for n in range(2)
        for line in (
            "capture in pool 1, thread_local on stream 2",
            f"step {n} on stream 2",
            "captured on stream 2",
        )
    ]
    assert cuda.said[:7] == [*of_captures, "replay on stream 1"]


@pytest.mark.parametrize("is_broken_off", [False, True])
def test_a_capture_that_fails_ends_and_says_why(cuda: StandIn, is_broken_off: bool) -> None:
    """CUDA's own word on a capture that was broken off is that it was. Its pool is of no use any
    more: torch takes it to be captured to still, or to be gone (CachingHostAllocator.h).
    """

    def fails() -> None:
        cuda.fault = RuntimeError("capture was invalidated") if is_broken_off else None
        raise ValueError("no such operation while capturing")

    device = CudaDevice()
    with device.as_served(), pytest.raises(ValueError, match="no such operation"):
        device.capture(fails)
    assert cuda.said[-1] == "captured on stream 2"
    assert cuda.current == "the default stream"
    cuda.fault = None
    with device.as_served():
        for _ in range(2):
            device.capture(lambda: None)
    assert cuda.said[-4:] == 2 * [
        "capture in pool 2, thread_local on stream 2",
        "captured on stream 2",
    ]
    gc.collect()
    assert cuda.graphs[0]() is not None, "torch may ask it about its pool still"


def test_one_thread_at_a_time_captures(cuda: StandIn) -> None:
    """Or the one would end the other's precision."""
    device = CudaDevice(tf32=True)
    is_inside = threading.Event()

    def capture() -> None:
        with device.as_served():
            is_inside.set()

    other = threading.Thread(target=capture)
    with device.as_served():
        other.start()
        assert not is_inside.wait(0.2)
        assert torch.get_float32_matmul_precision() == "high"
    other.join(TIMEOUT_S)
    assert is_inside.is_set()


@pytest.mark.parametrize(("tf32", "precision"), [(True, "high"), (False, "highest")])
def test_products_are_in_tf32_where_asked_for_and_only_there(tf32: bool, precision: str) -> None:
    def capture() -> None:
        with float32_products(tf32=tf32):
            assert torch.get_float32_matmul_precision() == precision
            raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        capture()
    assert torch.get_float32_matmul_precision() == "highest"
