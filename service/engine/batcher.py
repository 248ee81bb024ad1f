"""Concurrent submissions -> batches -> one call back for each.

The next batch is whatever waits when the model is free: a lone item never waits, and while a batch
runs the next one gathers by itself. There is no timer. Knows nothing of HTTP or of arrays.

A batch holds the event loop, and what arrives meanwhile is read only afterwards. So in the turns of
the loop that follow a batch, an item counts as having waited since that batch began; and if it was
a long one, the item's own batch forms one turn later than it could: by then the loop has read, too,
whether its client hung up.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from math import inf
from typing import Generic, NamedTuple, TypeVar

from service.errors import DeadlineExceeded, Disconnected, Draining, Overloaded, ServiceError

Item = TypeVar("Item")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

PACE_WEIGHT = 0.1
"""Of the latest batch, in the pace that a `Retry-After` is told from."""
TURNS_BEHIND = 3
"""Turns of the loop after a batch in which it reads what arrived while the batch ran: a new
connection is accepted in one and read in the next. An idle loop goes through them in microseconds.
"""
LONG_BATCH_S = 0.005
"""After a shorter one the turn would cost all more than a row costs that nobody waits for: 4 % of
the answers with 32 clients."""


class _Waiting(NamedTuple, Generic[Item, Result]):
    item: Item
    key: Hashable
    deadline_s: float
    read_in_turn: int
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_batch = run_batch
        self._clock = clock
        self._max_batch_size = max_batch_size
        self._max_waiting = max_waiting
        self._waiting: deque[_Waiting[Item, Result]] = deque()  # of each key, only the first
        self._behind: dict[Hashable, deque[_Waiting[Item, Result]]] = {}  # the others, by key
        self._num_waiting = 0
        self._first_deadline_s = inf  # of all that wait, or earlier
        self._turn = 0
        self._turns_behind = 0
        self._looks_again = False
        self._batch_began_s = 0.0
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
        timeout_s: float = inf,
    ) -> None:
        """Has `settle` called once, later, with the item's result or the error in its stead.

        That is DeadlineExceeded where `timeout_s` passes before the item's batch forms, and
        Disconnected where `is_wanted` says no by then: such items do not run. Raises Overloaded
        where `max_waiting` items wait already, with the time it takes to work them off, and
        Draining after `drain`; then nothing is called.
        """
        self.check_room()
        arrived_s = self._batch_began_s if self._turns_behind else self._clock()
        deadline_s = arrived_s + timeout_s
        if deadline_s < self._first_deadline_s:
            self._first_deadline_s = deadline_s
        waiting: _Waiting[Item, Result] = _Waiting(
            item, key, deadline_s, self._turn, is_wanted, settle
        )
        if key is None or key not in self._behind:
            self._waiting.append(waiting)
            if key is not None:
                self._behind[key] = deque()
        else:
            self._behind[key].append(waiting)
        self._num_waiting += 1
        self._drained.clear()
        self._schedule(asyncio.get_running_loop())

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
            loop.call_soon(self._run_turn, loop)

    def _run_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_scheduled = False
        self._turn += 1
        now_s = self._clock()
        if now_s >= self._first_deadline_s:
            self._expire(now_s)
        batch = self._take()
        if batch:
            self._batch_began_s = now_s
            self._turns_behind = TURNS_BEHIND
            results = self._results(batch)
            for waiting in reversed(batch):
                self._release(waiting.key)
            for waiting, result in zip(batch, results, strict=True):
                _settle(waiting, result)
            self._measure(len(batch))
            self._looks_again = self._clock() - now_s >= LONG_BATCH_S
        elif self._turns_behind:
            self._turns_behind -= 1
            self._looks_again = self._looks_again and self._turns_behind > 0
        if not self._waiting:
            self._drained.set()
        if self._waiting or self._turns_behind:
            self._schedule(loop)

    def _measure(self, num_items: int) -> None:
        """Keeps the pace of full work: from one batch to the next, whatever else takes time."""
        now_s = self._clock()
        if self._busy_since_s is not None:
            seconds = (now_s - self._busy_since_s) / num_items
            known = self._seconds_per_item or seconds
            self._seconds_per_item = known + PACE_WEIGHT * (seconds - known)
        self._busy_since_s = now_s if self._waiting else None

    def _expire(self, now_s: float) -> None:
        """Settles all whose time is up, wherever they wait: they are in nobody's way any more."""
        everybody = [*self._waiting, *chain.from_iterable(self._behind.values())]
        expired = [waiting for waiting in everybody if waiting.deadline_s <= now_s]
        in_time = [waiting.deadline_s for waiting in everybody if waiting.deadline_s > now_s]
        self._first_deadline_s = min(in_time, default=inf)
        if not expired:
            return
        first_of_key = [waiting for waiting in self._waiting if waiting.deadline_s <= now_s]
        self._waiting = deque(waiting for waiting in self._waiting if waiting.deadline_s > now_s)
        for key, behind in self._behind.items():
            self._behind[key] = deque(waiting for waiting in behind if waiting.deadline_s > now_s)
        for waiting in reversed(first_of_key):
            self._release(waiting.key)
        self._num_waiting -= len(expired)
        for waiting in expired:
            error = DeadlineExceeded("the time allowed passed before the model was free")
            _settle(waiting, error)

    def _take(self) -> list[_Waiting[Item, Result]]:
        batch: list[_Waiting[Item, Result]] = []
        while self._waiting and len(batch) < self._max_batch_size:
            waiting = self._waiting[0]
            if self._looks_again and waiting.read_in_turn == self._turn - 1:
                break  # its client may have hung up since, which the loop reads in this turn
            self._waiting.popleft()
            self._num_waiting -= 1
            if waiting.is_wanted():
                batch.append(waiting)
            else:
                self._release(waiting.key)
                _settle(waiting, Disconnected("the client hung up"))
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
