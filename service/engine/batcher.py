"""Blocks that wait -> batches of rows -> one call back for each block.

The next batch is whatever waits when the model is free: a lone block never waits, and while a batch
runs the next one gathers by itself. There is no timer. Knows nothing of HTTP or of arrays.

A short batch runs on the event loop, and what arrives meanwhile is read afterwards; a long one runs
beside it, and its end is told by `wake`. One that has enough rows is launched before that end, so
that the model goes on at once.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import chain
from math import inf
from typing import NamedTuple, Protocol

from service.engine.block import Answer, Block
from service.engine.sessions import Turn
from service.engine.stepper import Part
from service.errors import DeadlineExceeded, Disconnected, Draining, Overloaded, ServiceError
from service.runtime.protocol import MOST_UNDER_WAY, DeviceLost

logger = logging.getLogger(__name__)

PACE_WEIGHT = 0.1
"""Of the latest batch, in the pace that a `Retry-After` is told from."""
ENOUGH_ROWS = 64
"""A batch of more costs each row hardly less: so many need not wait for company."""


class Steps(Protocol):
    """What takes the turns of blocks, batch after batch; `service.engine.stepper` says how.

    `hold` is told of a block that waits from now on, `release` that it waits no more. `look_ahead`
    does what the next batches will need, while nobody waits for the event loop. A batch
    `is_followed` where enough rows for another wait already.
    """

    def hold(self, block: Block) -> None: ...

    def release(self, block: Block) -> None: ...

    def admit(self, block: Block) -> Turn | Answer: ...

    def launch(self, parts: Sequence[Part], *, is_followed: bool) -> None: ...

    def is_done(self) -> bool: ...

    def collect(self) -> Sequence[Answer | ServiceError | None]: ...

    def look_ahead(self) -> None: ...

    def abandon(self, turn: Turn) -> None: ...


@dataclass(slots=True, eq=False)
class _Waiting:
    block: Block
    settle: Callable[[Answer | ServiceError], None]
    is_wanted: Callable[[], bool]
    number: int
    deadline_s: float
    turn: Turn | None = None
    num_run: int = 0

    def __lt__(self, other: "_Waiting") -> bool:
        return self.number < other.number


class _Batch(NamedTuple):
    blocks: list[_Waiting]
    num_rows: int


class Batcher:
    """Has `steps` run, with at most `max_batch_size` rows at a time. On the event loop.

    Blocks run in the order they came, two of one session never in one batch. One that is larger
    than a batch runs in several, which may have room for others.
    """

    def __init__(
        self,
        steps: Steps,
        *,
        max_batch_size: int,
        max_waiting: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps = steps
        self._clock = clock
        self._max_batch_size = max_batch_size
        self._enough_rows = min(ENOUGH_ROWS, max_batch_size)
        self._max_waiting = max_waiting
        # Of each session only the first block is among those that may run: in order of arrival, or,
        # once those before it were through, in the heap.
        self._waiting: deque[_Waiting] = deque()
        self._late: list[_Waiting] = []
        self._behind: dict[str, deque[_Waiting] | None] = {}
        self._partial: _Waiting | None = None  # its rows so far have run, or run now
        self._under_way: deque[_Batch] = deque()
        self._to_settle: deque[tuple[_Waiting, Answer | ServiceError]] = deque()
        self._num_rows = 0  # that wait
        self._num_behind = 0  # of them, whose session has another block before
        self._num_submitted = 0
        self._first_deadline_s = inf  # of all that wait, or earlier
        self._seconds_per_row = 0.0  # of late, while there was always more to do
        self._busy_since_s: float | None = None
        self._change: Callable[[], None] | None = None
        self._is_scheduled = False
        self._is_closed = False
        self.device_lost = asyncio.Event()
        """Set for good where nothing will run any more: what comes is refused from then on."""
        self._is_halted = False
        self._drained: asyncio.Event = asyncio.Event()
        self._drained.set()

    def submit(
        self,
        block: Block,
        settle: Callable[[Answer | ServiceError], None],
        *,
        is_wanted: Callable[[], bool],
        timeout_s: float = inf,
    ) -> None:
        """Has `settle` called once, later, with the block's answer or the error in its stead.

        That is DeadlineExceeded where `timeout_s` passes before the block's first batch is
        launched, which may be a step before it runs, and Disconnected where `is_wanted` says no by
        then: such blocks do not run. Raises Overloaded where it makes more than `max_waiting` rows
        wait, with the time it takes to work them off, and Draining after `drain`; then nothing is
        called.
        """
        self.check_room(block.num_rows)
        deadline_s = self._clock() + timeout_s
        if deadline_s < self._first_deadline_s:
            self._first_deadline_s = deadline_s
        self._num_submitted += 1
        waiting = _Waiting(block, settle, is_wanted, self._num_submitted, deadline_s)
        session_id = block.session_id
        if session_id is None or session_id not in self._behind:
            self._waiting.append(waiting)
            if session_id is not None:
                self._behind[session_id] = None
        else:
            behind = self._behind[session_id] or deque()
            behind.append(waiting)
            self._num_behind += block.num_rows
            self._behind[session_id] = behind
        self._steps.hold(block)
        self._num_rows += block.num_rows
        self._drained.clear()
        self._schedule()

    def check_room(self, num_rows: int = 1) -> None:
        """Raises what `submit` would for so many rows, before there is a block to submit."""
        if self._is_closed:
            raise Draining("the server is shutting down")
        if self._num_rows and self._num_rows + num_rows > self._max_waiting:
            raise Overloaded(
                f"{self._num_rows} of {self._max_waiting} rows wait already; back off and retry",
                retry_after_s=self._num_rows * self._seconds_per_row,
            )

    def __len__(self) -> int:
        """How many rows wait."""
        return self._num_rows

    def between(self, change: Callable[[], None]) -> None:
        """Has `change` called once, now or soon: no batch is under way then, no block half run.

        One at a time. What waits goes on waiting meanwhile, for a batch or two.
        """
        assert self._change is None
        self._change = change
        self._make_change()

    def _make_change(self) -> None:
        is_free = not self._under_way and self._partial is None and not self._is_halted
        if self._change is not None and is_free:
            change, self._change = self._change, None
            change()

    def wake(self) -> None:
        """A batch that was under way is done, and may have been collected already."""
        if self._under_way:
            self._run_turn()

    async def drain(self) -> None:
        """Takes no new blocks and returns once every waiting one has its answer."""
        self._is_closed = True
        await self._drained.wait()

    def halt(self) -> None:
        """Runs and answers nothing any more: what waits or is under way has not moved anything."""
        self._is_halted = True

    def _schedule(self) -> None:
        # Called back after all I/O that is ready now: what arrived together rides together.
        if not self._is_scheduled and self._may_launch():
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._run_turn)

    def _run_turn(self) -> None:
        self._is_scheduled = False
        if self._is_halted:
            return
        now_s = self._clock()
        if now_s >= self._first_deadline_s:
            self._expire(now_s)
        self._collect()
        self._make_change()
        while self._may_launch() and self._launch():
            pass
        # Only now, where the model has more to do: it is not to wait until answers are written.
        self._collect()
        self._make_change()
        self._settle()
        if not self._under_way:
            if self._num_rows:
                self._schedule()
            else:
                self._drained.set()
        if self._under_way or not self._num_rows:
            self._steps.look_ahead()

    def _may_launch(self) -> bool:
        if not self._under_way:
            return self._num_rows > 0
        return (
            len(self._under_way) < MOST_UNDER_WAY
            and self._num_ready() >= self._enough_rows
            and self._partial is None  # a part under way may fail, and its block with it
            and self._change is None
            and not self._steps.is_done()
        )

    def _num_ready(self) -> int:
        """How many rows might run now."""
        return self._num_rows - self._num_behind

    def _launch(self) -> bool:
        """Forms the next batch of what waits, if anything may run, and launches it."""
        parts: list[Part] = []
        blocks: list[_Waiting] = []
        room = self._max_batch_size
        waiting = self._partial or self._next(room)
        while waiting is not None:
            assert waiting.turn is not None
            stop = min(waiting.block.num_rows, waiting.num_run + room)
            parts.append(Part(waiting.turn, waiting.num_run, stop))
            blocks.append(waiting)
            room -= stop - waiting.num_run
            self._num_rows -= stop - waiting.num_run
            waiting.num_run = stop
            self._partial = waiting if stop < waiting.block.num_rows else None
            waiting = None if self._change is not None else self._next(room)
        if not parts:
            return False
        try:
            if self.device_lost.is_set():  # what waits is refused as what ran is
                raise DeviceLost("it was before")
            self._steps.launch(parts, is_followed=self._num_ready() >= self._enough_rows)
        except Exception as error:  # of the runtime, whatever it is: the server goes on
            self._fail(blocks, error)
        else:
            self._under_way.append(_Batch(blocks, self._max_batch_size - room))
        return True

    def _next(self, room: int) -> _Waiting | None:
        """The next block to ride along, admitted; what needs no model is settled on the way.

        One that a batch of its own has room for waits for that one.
        """
        while room and (self._waiting or self._late):
            is_late = not self._waiting or (self._late and self._late[0] < self._waiting[0])
            waiting = self._late[0] if is_late else self._waiting[0]
            if room < waiting.block.num_rows <= self._max_batch_size:
                return None
            if is_late:
                heappop(self._late)
            else:
                self._waiting.popleft()
            result: Answer | ServiceError
            try:
                if not waiting.is_wanted():
                    raise Disconnected("the client hung up")
                admitted = self._steps.admit(waiting.block)
            except ServiceError as error:
                result = error
            except Exception as error:  # a bug of ours in one block is not to cost others theirs
                logger.exception("a block could not be admitted")
                result = self.refusal(error)
            else:
                if isinstance(admitted, Turn):
                    waiting.turn = admitted
                    return waiting
                result = admitted
            self._num_rows -= waiting.block.num_rows
            self._release(waiting)
            self._tell(waiting, result)
        return None

    def _collect(self) -> None:
        """Has those whose batches are done settled next."""
        while self._under_way and self._steps.is_done():
            blocks, num_rows = self._under_way.popleft()
            try:
                results = list(zip(blocks, self._steps.collect(), strict=True))
            except Exception as error:  # of the runtime, as above
                self._fail(blocks, error)
                continue
            for waiting, result in results:
                if result is not None:
                    self._release(waiting)
                    self._to_settle.append((waiting, result))
            self._measure(num_rows)

    def _fail(self, blocks: Sequence[_Waiting], error: Exception) -> None:
        """Nothing of the batch has moved: all its blocks are refused."""
        logger.error("a batch of %d failed", len(blocks), exc_info=error)
        for waiting in blocks:
            assert waiting.turn is not None
            self._num_rows -= waiting.block.num_rows - waiting.num_run
            self._steps.abandon(waiting.turn)
            self._release(waiting)
            self._tell(waiting, self.refusal(error))
            if waiting is self._partial:
                self._partial = None
        self._busy_since_s = None  # no pace

    def refusal(self, error: Exception) -> ServiceError:
        """What is told of an error that nobody expected; a lost device is the end of all."""
        if not isinstance(error, DeviceLost):
            return ServiceError("internal error")
        self._is_closed = True
        self.device_lost.set()
        return Draining("the server lost its device, and is shutting down")

    def _release(self, waiting: _Waiting) -> None:
        """A session's first block is through: its next may run, in the place it came in."""
        session_id = waiting.block.session_id
        if session_id is None:
            return
        behind = self._behind[session_id]
        if behind:
            late = behind.popleft()
            self._num_behind -= late.block.num_rows
            heappush(self._late, late)
        else:
            del self._behind[session_id]

    def _measure(self, num_rows: int) -> None:
        """Keeps the pace of full work: from one batch to the next, whatever else takes time."""
        now_s = self._clock()
        if self._busy_since_s is not None:
            seconds = (now_s - self._busy_since_s) / num_rows
            known = self._seconds_per_row or seconds
            self._seconds_per_row = known + PACE_WEIGHT * (seconds - known)
        self._busy_since_s = now_s if self._num_rows or self._under_way else None

    def _expire(self, now_s: float) -> None:
        """Settles all whose time is up, wherever they wait: they are in nobody's way any more."""
        behind_others = chain.from_iterable(behind or () for behind in self._behind.values())
        everybody = [*self._waiting, *self._late, *behind_others]
        expired = [waiting for waiting in everybody if waiting.deadline_s <= now_s]
        in_time = [waiting.deadline_s for waiting in everybody if waiting.deadline_s > now_s]
        self._first_deadline_s = min(in_time, default=inf)
        if not expired:
            return
        of_first = [w for w in (*self._waiting, *self._late) if w.deadline_s <= now_s]
        self._waiting = deque(w for w in self._waiting if w.deadline_s > now_s)
        self._late = [w for w in self._late if w.deadline_s > now_s]
        heapify(self._late)
        self._num_behind = 0
        for session_id, behind in self._behind.items():
            if behind:
                in_time_behind = deque(w for w in behind if w.deadline_s > now_s)
                self._behind[session_id] = in_time_behind
                self._num_behind += sum(w.block.num_rows for w in in_time_behind)
        for waiting in of_first:
            self._release(waiting)
        for waiting in expired:
            self._num_rows -= waiting.block.num_rows
            error = DeadlineExceeded("the time allowed passed before the model was free")
            self._tell(waiting, error)

    def _tell(self, waiting: _Waiting, result: Answer | ServiceError) -> None:
        """Settles the block, after those that are through already."""
        self._to_settle.append((waiting, result))
        self._settle()

    def _settle(self) -> None:
        while self._to_settle:
            waiting, result = self._to_settle.popleft()
            self._steps.release(waiting.block)
            try:
                waiting.settle(result)
            except Exception:  # a bug of ours in one answer is not to cost the others theirs
                logger.exception("an answer could not be given")
