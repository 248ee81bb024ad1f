"""Concurrent submissions -> batches -> one call back for each.

The next batch is whatever waits when the model is free: a lone item never waits, and while a batch
runs the next one gathers by itself. There is no timer. Knows nothing of HTTP or of arrays.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

from service.errors import DeadlineExceeded, Disconnected, Draining, Overloaded, ServiceError

Item = TypeVar("Item")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

PACE_WEIGHT = 0.1
"""Of the latest batch, in the pace that a `Retry-After` is told from."""


class _Waiting(NamedTuple, Generic[Item, Result]):
    item: Item
    key: Hashable
    deadline_s: float
    is_wanted: Callable[[], bool]
    settle: Callable[[Result | ServiceError], None]


class Batcher(Generic[Item, Result]):
    """Runs `run_batch` on the event loop, with at most `max_batch_size` items at a time.

    `run_batch` returns a result or an error for each item, in order. Two items with the same key
    (None is no key) never share a batch and run in the order they came.
    """

    def __init__(
        self,
        run_batch: Callable[[list[Item]], Sequence[Result | ServiceError]],
        *,
        max_batch_size: int,
        max_waiting: int,
    ) -> None:
        self._run_batch = run_batch
        self._max_batch_size = max_batch_size
        self._max_waiting = max_waiting
        self._waiting: deque[_Waiting[Item, Result]] = deque()  # of each key, only the first
        self._behind: dict[Hashable, deque[_Waiting[Item, Result]]] = {}  # the others, by key
        self._num_waiting = 0
        self._seconds_per_item = 0.0  # of late, while there was always more to do
        self._busy_since_s: float | None = None
        self._is_scheduled = False
        self._is_closed = False
        self._drained: asyncio.Event = asyncio.Event()
        self._drained.set()

    def submit(
        self,
        item: Item,
        settle: Callable[[Result | ServiceError], None],
        *,
        is_wanted: Callable[[], bool],
        key: Hashable = None,
        timeout_s: float = float("inf"),
    ) -> None:
        """Has `settle` called once, later, with the item's result or the error in its stead.

        That is DeadlineExceeded where `timeout_s` passes before the item's batch forms, and
        Disconnected where `is_wanted` says no by then: such items do not run. Raises Overloaded
        where `max_waiting` items wait already, with the time it takes to work them off, and
        Draining after `drain`; then nothing is called.
        """
        self.check_room()
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        waiting: _Waiting[Item, Result] = _Waiting(item, key, deadline_s, is_wanted, settle)
        if key is None or key not in self._behind:
            self._waiting.append(waiting)
            if key is not None:
                self._behind[key] = deque()
        else:
            self._behind[key].append(waiting)
        self._num_waiting += 1
        self._schedule(loop)

    def check_room(self) -> None:
        """Raises what `submit` would, before there is an item to submit."""
        if self._is_closed:
            raise Draining("the server is shutting down")
        if self._num_waiting >= self._max_waiting:
            raise Overloaded(
                f"{self._num_waiting} requests wait already; back off and retry",
                retry_after_s=self._num_waiting * self._seconds_per_item,
            )

    def __len__(self) -> int:
        """How many items wait."""
        return self._num_waiting

    async def drain(self) -> None:
        """Takes no new items and returns once every waiting one has its result."""
        self._is_closed = True
        await self._drained.wait()

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        # Called back after all I/O that is ready now: what arrived together rides together.
        if not self._is_scheduled:
            self._is_scheduled = True
            self._drained.clear()
            loop.call_soon(self._run_next, loop)

    def _run_next(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_scheduled = False
        batch = self._take(loop.time())
        if batch:
            results = self._results(batch)
            for waiting in reversed(batch):
                self._release(waiting.key)
            for waiting, result in zip(batch, results, strict=True):
                _settle(waiting, result)
            self._measure(len(batch))
        if self._waiting:
            self._schedule(loop)
        else:
            self._drained.set()

    def _measure(self, num_items: int) -> None:
        """Keeps the pace of full work: from one batch to the next, whatever else takes time."""
        now_s = time.monotonic()
        if self._busy_since_s is not None:
            seconds = (now_s - self._busy_since_s) / num_items
            known = self._seconds_per_item or seconds
            self._seconds_per_item = known + PACE_WEIGHT * (seconds - known)
        self._busy_since_s = now_s if self._waiting else None

    def _take(self, now_s: float) -> list[_Waiting[Item, Result]]:
        batch: list[_Waiting[Item, Result]] = []
        while self._waiting and len(batch) < self._max_batch_size:
            waiting = self._waiting.popleft()
            self._num_waiting -= 1
            if not waiting.is_wanted():
                self._release(waiting.key)
                _settle(waiting, Disconnected("the client hung up"))
            elif waiting.deadline_s <= now_s:
                self._release(waiting.key)
                _settle(
                    waiting,
                    DeadlineExceeded("the time allowed passed before the model was free"),
                )
            else:
                batch.append(waiting)
        return batch

    def _release(self, key: Hashable) -> None:
        """The key's first item is through: the next one takes its place at the front."""
        if key is None:
            return
        behind = self._behind[key]
        if behind:
            self._waiting.appendleft(behind.popleft())
        else:
            del self._behind[key]

    def _results(self, batch: list[_Waiting[Item, Result]]) -> Sequence[Result | ServiceError]:
        try:
            results = self._run_batch([waiting.item for waiting in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for a batch of {len(batch)}")
        except Exception:
            logger.exception("a batch of %d failed", len(batch))
            return [ServiceError("internal error") for _ in batch]
        return results


def _settle(waiting: _Waiting[Item, Result], result: Result | ServiceError) -> None:
    try:
        waiting.settle(result)
    except Exception:  # a bug of ours in one answer is not to cost the others theirs
        logger.exception("an answer could not be given")
