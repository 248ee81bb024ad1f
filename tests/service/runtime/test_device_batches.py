"""A device's batches: two under way, what crosses its bus, what is captured, and what fails."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from export.loaders.torch_step import TorchStep
from export.manifest import ArtifactError, step_inputs, step_outputs
from service.runtime.cpu_device import CpuDevice
from tests.service.fakes import TIMEOUT_S
from tests.service.runtime.sums import Sums
from tests.service.runtime.test_device_runtime import NUM_ROWS, SIZES, Counting, on_device
from tests.specs import TINY_V1


class Gated(CpuDevice):
    """Its work waits to be let go, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.lets_go = threading.Semaphore(0)

    def submit(self, work: Callable[[], None]) -> Future[None]:
        def wait_and_work() -> None:
            assert self.lets_go.acquire(timeout=TIMEOUT_S)
            work()

        return super().submit(wait_and_work)


class Slow:
    """Sums on a gated device; the first state of row r is 100 + r."""

    def __init__(self) -> None:
        self.device = Gated()
        self.failures: list[Exception] = []
        self.runtime = on_device(Sums(TINY_V1, self.failures).step(), TINY_V1, self.device)
        self.done: SimpleQueue[int] = SimpleQueue()
        self.runtime.when_done = lambda: self.done.put(threading.get_ident())
        rows = np.arange(NUM_ROWS, dtype=np.intp)
        of_rows = 100 + np.arange(NUM_ROWS, dtype=np.float32)[:, None, None]
        shapes = [(NUM_ROWS, *state.shape) for state in TINY_V1.states]
        self.runtime.write(rows, tuple([np.broadcast_to(of_rows, s).copy() for s in shapes]))

    def launch(self, read: list[int], write: list[int], xs: list[float]) -> None:
        self.runtime.inputs["observation"][: len(xs), 0] = xs
        self.runtime.launch(np.array(read, dtype=np.intp), np.array(write, dtype=np.intp))

    def let_go(self) -> int:
        """One piece of work; the thread that told its end."""
        self.device.lets_go.release()
        return self.done.get(timeout=TIMEOUT_S)

    def values(self) -> list[float]:
        values: list[float] = self.runtime.collect().arrays["value"].tolist()
        return values

    def h(self, *rows: int) -> list[float]:
        state = self.runtime.read(np.array(rows, dtype=np.intp))
        of_rows: list[float] = state[0][:, 0, 0].tolist()
        return of_rows


@pytest.fixture
def slow() -> Iterator[Slow]:
    slow = Slow()
    yield slow
    slow.device.lets_go.release(100)


def test_a_launch_returns_while_the_device_works_and_another_thread_tells_its_end(
    slow: Slow,
) -> None:
    assert slow.runtime.is_idle()
    slow.launch([0, 1], [2, 3], [10, 20])
    slow.launch([4], [5], [30])
    assert not slow.runtime.is_done()
    assert slow.done.empty()
    assert slow.h(2, 3, 5) == [102, 103, 105]
    assert slow.let_go() != threading.get_ident()
    assert slow.runtime.is_done()
    assert not slow.runtime.is_idle()
    assert slow.values() == [110, 121]
    assert slow.h(2, 3, 5) == [110, 121, 105]
    assert not slow.runtime.is_done()
    slow.let_go()
    assert slow.runtime.is_idle()
    assert slow.values() == [134]
    assert slow.h(0, 1, 2, 3, 4, 5) == [100, 101, 110, 121, 104, 134]


def test_what_is_written_for_the_next_batch_is_not_read_by_the_one_under_way(slow: Slow) -> None:
    slow.launch([0, 1], [2, 3], [10, 20])
    slow.runtime.inputs["observation"][:] = 1000.0
    slow.let_go()
    assert slow.values() == [110, 121]


def test_what_steps_gave_is_kept_however_many_follow(slow: Slow) -> None:
    given = []
    for number in range(6):
        slow.launch([0, 2], [1, 3], [number, np.nan if number < 2 else 0])
        slow.let_go()
        given.append(slow.runtime.collect())
    assert [of.arrays["value"].tolist()[0] for of in given] == [100 + number for number in range(6)]
    assert [of.is_finite is None for of in given] == [False] * 2 + [True] * 4
    for of in given:
        assert of.is_finite is None or of.is_finite.tolist() == [True, False]


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_every_row_that_is_not_finite_is_named(slow: Slow, number: float) -> None:
    slow.launch([0, 1, 2], [3, 4, 5], [1.0, number, 1.0])
    slow.let_go()
    is_finite = slow.runtime.collect().is_finite
    assert is_finite is not None
    assert is_finite.tolist() == [True, False, True]
    slow.launch([0], [3], [1.0])
    slow.let_go()
    assert slow.runtime.collect().is_finite is None


def test_states_are_read_and_written_beside_the_batch_under_way(slow: Slow) -> None:
    slow.launch([0], [1], [10])
    rows = np.array([7, 9], dtype=np.intp)
    slow.runtime.write(rows, slow.runtime.read(np.array([5, 6], dtype=np.intp)))
    assert slow.h(7, 9) == [105, 106]
    slow.let_go()
    assert slow.values() == [110]


def test_a_step_that_fails_is_raised_where_it_is_collected_and_its_lane_is_free(
    slow: Slow,
) -> None:
    slow.failures.append(RuntimeError("out of memory"))
    slow.launch([0], [1], [10])
    slow.launch([2], [3], [10])
    slow.let_go()
    assert slow.runtime.is_done()
    with pytest.raises(RuntimeError, match="out of memory"):
        slow.runtime.collect()
    slow.failures.clear()
    slow.let_go()
    assert slow.values() == [112]
    assert slow.h(1, 3) == [101, 112]
    for number in range(4):
        slow.launch([0], [1], [number])
        slow.let_go()
        assert slow.values() == [100 + number]


def test_a_step_that_gives_something_else_moves_no_state(slow: Slow) -> None:
    spec = TINY_V1

    def wrong(*given: Tensor) -> list[Tensor]:
        return [result[..., :1] for result in Sums(spec, [])(*given)]

    runtime = on_device(TorchStep("w", wrong, step_inputs(spec), step_outputs(spec)), spec)
    runtime.launch(np.array([0], dtype=np.intp), np.array([1], dtype=np.intp))
    with pytest.raises(ArtifactError, match=r"output 'action' is int64 \[1, 1\], expected"):
        runtime.collect()
    assert not any(array.any() for array in runtime.read(np.array([1], dtype=np.intp)))


def test_a_warm_up_that_fails_says_so_and_one_that_is_not_wanted_ends() -> None:
    failures: list[Exception] = [RuntimeError("no kernel")]
    counting = Counting()
    runtime = on_device(Sums(TINY_V1, failures).step(), TINY_V1, counting)
    with pytest.raises(RuntimeError, match="no kernel"):
        runtime.warm_up()
    failures.clear()
    runtime.warm_up(is_wanted=lambda: counting.num_captured < 2)
    assert counting.num_captured == 2
    runtime.warm_up()
    assert counting.num_captured == 2 + len(SIZES)


class Captures(CpuDevice):
    """Keeps what was captured, in order, and knows whether products are as they are served."""

    def __init__(self) -> None:
        super().__init__()
        self.is_as_served = False
        self.captured: list[Callable[[], None]] = []

    @contextmanager
    def as_served(self) -> Iterator[None]:
        before, self.is_as_served = self.is_as_served, True
        yield
        self.is_as_served = before

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        assert self.is_as_served
        self.captured.append(run)
        return run


class Watched(NamedTuple):
    """Sums, and for each call its rows and whether it was as precise as it is to be served."""

    sums: Sums
    device: Captures
    calls: list[tuple[int, bool]]

    def step(self) -> TorchStep:
        spec = self.sums.spec
        return TorchStep("w", self.__call__, step_inputs(spec), step_outputs(spec))

    def __call__(self, *given: Tensor) -> list[Tensor]:
        self.calls.append((len(given[0]), self.device.is_as_served))
        return self.sums(*given)


def test_the_largest_batch_is_run_and_captured_first_and_all_as_they_are_to_be_served() -> None:
    """Others find room then in the memory that it took; and products are as they will be."""
    device = Captures()
    watched, another = [Watched(Sums(TINY_V1, []), device, []) for _ in range(2)]
    runtime = on_device(watched.step(), TINY_V1, device)
    for ready, calls in (
        (runtime.warm_up, watched.calls),
        (partial(runtime.prepare, another.step()), another.calls),
    ):
        assert calls == []
        ready()
        assert calls == [(size, True) for size in (8, 4, 2, 1) for _ in range(3)]
        for captured in device.captured[-len(SIZES) :]:
            captured()
        assert calls[-len(SIZES) :] == [(size, False) for size in (8, 4, 2, 1)]


class Copied(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the copies from host buffers and to them: `"there"` or `"back"`, and how many bytes."""

    def __init__(self, buffers: list[Tensor], copies: list[tuple[str, int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at = {buffer.untyped_storage().data_ptr() for buffer in buffers}
        self.copies = copies

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            to, of = args[:2]
            for which, tensor in (("there", of), ("back", to)):
                if tensor.untyped_storage().data_ptr() in self.at:
                    self.copies.append((which, tensor.nbytes))
        return func(*args, **(kwargs or {}))


class Bus(CpuDevice):
    """Sees what crosses it: all copies between its host buffers and other memory."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []
        self.copies: list[tuple[str, int]] = []

    def host_buffer(self, num_rows: int, row_bytes: int) -> Tensor:
        self.buffers.append(super().host_buffer(num_rows, row_bytes))
        return self.buffers[-1]

    def submit(self, work: Callable[[], None]) -> Future[None]:
        def watched() -> None:
            with Copied(self.buffers, self.copies):
                work()

        return super().submit(watched)


@pytest.mark.parametrize(("num", "size"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8)])
def test_a_batch_is_one_copy_there_and_one_back_of_no_more_rows_than_it_is_padded_to(
    num: int, size: int
) -> None:
    bus = Bus()
    runtime = on_device(Sums(TINY_V1, []).step(), TINY_V1, bus)
    rows = np.arange(num, dtype=np.intp)
    for _ in range(3):
        runtime.launch(rows, rows + 10)
        runtime.collect()
    brought, given = [buffer.shape[1] for buffer in bus.buffers[:2]]
    assert bus.copies == [("there", size * brought), ("back", size * given)] * 3


def test_padding_reads_zeros_and_writes_where_nobody_reads(slow: Slow) -> None:
    slow.launch([0, 1, 2, 3, 4], [10, 11, 12, 13, 14], [1e30] * 5)  # of eight
    slow.let_go()
    slow.values()
    slow.launch([5, 6, 7], [20, 21, 22], [1, 2, 3])  # of four: the last is as it was before
    slow.let_go()
    assert slow.values() == [106, 108, 110]
    assert slow.h(*range(10)) == [100 + row for row in range(10)]
    assert slow.h(*range(23, NUM_ROWS), NUM_ROWS) == [
        *(100 + row for row in range(23, NUM_ROWS)),
        0,
    ]
