import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.batcher import Batcher
from service.engine.block import Answer, Batch, Block
from service.engine.sessions import Turn
from service.engine.stepper import Part
from service.errors import (
    DeadlineExceeded,
    Disconnected,
    Draining,
    Invalid,
    Overloaded,
    ServiceError,
    UnknownSession,
)
from service.runtime.protocol import DeviceLost
from tests.service.fakes import FakeClock, run, submitted

Told = list[int] | type[BaseException]


class Doubling:
    """Steps that double their rows' numbers, and keep which rode together.

    `admitting` and `stepping` are called with a block's, or a batch's, numbers: what they raise
    goes wrong. A batch takes `turns` turns of the loop once the one before it is collected, or,
    with `inf`, until `end`. `num_collected` were, when each batch was launched.
    """

    def __init__(self, *, turns: float = 0) -> None:
        self.batches: list[list[int]] = []
        self.num_collected: list[int] = []
        self.followed: list[bool] = []
        self.looked_ahead_at: list[int] = []
        self.abandoned: list[list[int]] = []
        self.admitting: Callable[[list[int]], Answer | None] = lambda numbers: None
        self.stepping: Callable[[list[int]], object] = lambda numbers: None
        self.collecting: Callable[[list[Any]], list[Any]] = lambda results: results
        self.held: Counter[int] = Counter()
        self.turns = turns
        self._under_way: deque[Sequence[Part]] = deque()
        self._num_done = 0

    def batcher(
        self, *, max_batch_size: int = 8, max_waiting: int = 100, clock: FakeClock | None = None
    ) -> Batcher:
        self._batcher = Batcher(
            self,
            max_batch_size=max_batch_size,
            max_waiting=max_waiting,
            clock=clock or FakeClock(),
        )
        return self._batcher

    def hold(self, block: Block) -> None:
        self.held.update(numbers_of(block))

    def release(self, block: Block) -> None:
        self.held.subtract(numbers_of(block))

    def admit(self, block: Block) -> Turn | Answer:
        answer = self.admitting(numbers_of(block))
        rows = np.arange(block.num_rows)
        turn = Turn(
            block,
            session=None,
            begins=False,
            step=0,
            seed=0,
            read_rows=rows,
            write_rows=rows,
        )
        return turn if answer is None else answer

    def launch(self, parts: Sequence[Part], *, is_followed: bool) -> None:
        self.followed.append(is_followed)
        numbers = [n for turn, start, stop in parts for n in numbers_of(turn.block)[start:stop]]
        self.num_collected.append(len(self.batches) - len(self._under_way))
        self.batches.append(numbers)
        self.stepping(numbers)
        self._under_way.append(parts)
        if len(self._under_way) == 1:
            self._work(self.turns)

    def _work(self, turns: float) -> None:
        if turns == 0:
            self._num_done += 1
        elif turns == 1:
            asyncio.get_running_loop().call_soon(self.end)
        elif turns < inf:
            asyncio.get_running_loop().call_soon(self._work, turns - 1)

    def end(self) -> None:
        """The first batch under way is done."""
        self._num_done += 1
        self._batcher.wake()

    def is_done(self) -> bool:
        return self._num_done > 0

    def collect(self) -> Sequence[Answer | ServiceError | None]:
        parts = self._under_way.popleft()
        self._num_done -= 1
        if self._under_way:
            self._work(self.turns)
        return self.collecting(
            [
                doubled(turn.block) if stop == turn.block.num_rows else None
                for turn, _, stop in parts
            ]
        )

    def look_ahead(self) -> None:
        self.looked_ahead_at.append(len(self.batches))

    def abandon(self, turn: Turn) -> None:
        self.abandoned.append(numbers_of(turn.block))


def block(*numbers: int, session_id: str | None = None) -> Block:
    return Block((np.array(numbers),), is_vector=len(numbers) > 1, session_id=session_id)


def numbers_of(block: Block) -> list[int]:
    numbers: list[int] = block.given[0].tolist()
    return numbers


def doubled(block: Block) -> Answer:
    return Answer(Batch({"value": 2 * block.given[0]}), 0, block.num_rows, 0, "")


async def told(futures: Sequence["asyncio.Future[Answer]"]) -> list[Told]:
    """Each block's doubled numbers, or its error's type."""
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    return [
        type(outcome) if isinstance(outcome, BaseException) else outcome.array("value").tolist()
        for outcome in outcomes
    ]


def test_a_lone_block_runs_in_the_loop_s_next_turn() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        future = submitted(doubling.batcher(), block(21))
        assert not future.done()
        await asyncio.sleep(0)
        assert await told([future]) == [[42]]
        assert doubling.batches == [[21]]

    run(scenario())


def test_blocks_submitted_together_share_a_batch_in_order() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        blocks = [block(0), block(1, 2), block(3), block(4, 5, 6)]
        answers = await told([submitted(batcher, one) for one in blocks])
        assert answers == [[0], [2, 4], [6], [8, 10, 12]]
        assert doubling.batches == [[0, 1, 2, 3, 4, 5, 6]]

    run(scenario())


def test_blocks_of_nobody_share_a_batch_with_each_other_and_with_sessions_blocks() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        sessions = [None, "a", None, "b"]
        await told([submitted(batcher, block(n, session_id=s)) for n, s in enumerate(sessions)])
        assert doubling.batches == [[0, 1, 2, 3]]

    run(scenario())


def test_a_batch_is_never_larger_than_the_largest_batch_size() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher(max_batch_size=3)
        answers = await told([submitted(batcher, block(n)) for n in range(7)])
        assert answers == [[2 * n] for n in range(7)]
        assert doubling.batches == [[0, 1, 2], [3, 4, 5], [6]]

    run(scenario())


def test_blocks_of_one_session_never_share_a_batch_and_keep_their_order() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        await told([submitted(batcher, block(n, session_id=s)) for n, s in enumerate("aababc")])
        assert doubling.batches == [[0, 2, 5], [1, 4], [3]]

    run(scenario())


def test_a_session_s_next_block_runs_in_the_place_it_came_in() -> None:
    """It is not put before those of other sessions that came first."""

    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher(max_batch_size=2)
        sessions = ["a", "b", "c", None, "a", "b", "c", "a"]
        await told([submitted(batcher, block(n, session_id=s)) for n, s in enumerate(sessions)])
        assert doubling.batches == [[0, 1], [2, 3], [4, 5], [6, 7]]

    run(scenario())


def test_those_that_waited_for_their_sessions_keep_their_order_among_themselves() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher(max_batch_size=3)
        futures = [submitted(batcher, block(n, session_id=s)) for n, s in enumerate("abcba")]
        assert await told(futures) == [[0], [2], [4], [6], [8]]
        assert doubling.batches == [[0, 1, 2], [3, 4]]

    run(scenario())


def test_a_block_larger_than_a_batch_runs_in_several_and_has_one_answer() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher(max_batch_size=3)
        blocks = [block(0), block(*range(1, 9), session_id="a"), block(9), block(10)]
        answers = await told([submitted(batcher, one) for one in blocks])
        assert answers == [[0], [2 * n for n in range(1, 9)], [18], [20]]
        assert doubling.batches == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]

    run(scenario())


def test_the_last_part_of_a_block_leaves_room_for_others() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher(max_batch_size=4)
        blocks = [block(*range(6)), block(6), block(*range(7, 13)), block(13)]
        await told([submitted(batcher, one) for one in blocks])
        assert doubling.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13]]

    run(scenario())


def test_a_block_that_fits_a_batch_waits_for_one_with_room_for_all_of_it() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher(max_batch_size=4)
        blocks = [block(0, 1), block(2, 3, 4), block(5), block(6)]
        await told([submitted(batcher, one) for one in blocks])
        assert doubling.batches == [[0, 1], [2, 3, 4, 5], [6]]

    run(scenario())


def test_a_session_s_next_block_waits_for_all_parts_of_the_one_before() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher(max_batch_size=4)
        blocks = [block(*range(6), session_id="a"), block(6, session_id="a"), block(7)]
        await told([submitted(batcher, one) for one in blocks])
        assert doubling.batches == [[0, 1, 2, 3], [4, 5, 7], [6]]

    run(scenario())


def test_a_full_queue_refuses_more_rows_and_takes_some_again_later() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher(max_waiting=4)
        waiting = [submitted(batcher, block(0, 1)), submitted(batcher, block(2))]
        assert len(batcher) == 3
        with pytest.raises(Overloaded, match="3 of 4 rows wait already"):
            submitted(batcher, block(3, 4))
        waiting.append(submitted(batcher, block(3)))
        with pytest.raises(Overloaded, match="4 of 4 rows wait already"):
            batcher.check_room()
        assert await told(waiting) == [[0, 2], [4], [6]]
        assert len(batcher) == 0
        assert await told([submitted(batcher, block(3, 4))]) == [[6, 8]]
        assert doubling.batches == [[0, 1, 2, 3], [3, 4]]

    run(scenario())


def test_a_block_larger_than_the_queue_is_taken_where_nothing_waits() -> None:
    async def scenario() -> None:
        batcher = Doubling().batcher(max_waiting=2)
        assert await told([submitted(batcher, block(1, 2, 3))]) == [[2, 4, 6]]

    run(scenario())


def test_rows_of_a_block_wait_no_more_once_their_batch_runs() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher(max_batch_size=3)
        waiting: list[int] = []
        doubling.stepping = lambda numbers: waiting.append(len(batcher))
        await told([submitted(batcher, block(*range(7))), submitted(batcher, block(7, 8, 9))])
        assert waiting == [7, 4, 3, 0]

    run(scenario())


@pytest.mark.parametrize("timeout_s", [0.0, -1.0])
def test_a_block_whose_time_is_up_is_never_run(timeout_s: float) -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        late, other = (
            submitted(batcher, block(1), timeout_s=timeout_s),
            submitted(batcher, block(2)),
        )
        assert await told([late, other]) == [DeadlineExceeded, [4]]
        assert doubling.batches == [[2]]

    run(scenario())


def test_a_deadline_ends_at_its_very_moment() -> None:
    async def scenario() -> None:
        clock = FakeClock()
        batcher = Doubling().batcher(clock=clock)
        ends_now = submitted(batcher, block(1), timeout_s=0.5)
        ends_later = submitted(batcher, block(2), timeout_s=0.75)
        clock.now_s += 0.5
        assert await told([ends_now, ends_later]) == [DeadlineExceeded, [4]]

    run(scenario())


def taking(clock: FakeClock, seconds: float) -> Callable[[list[int]], None]:
    """What makes a batch take so long."""

    def step(numbers: list[int]) -> None:
        clock.now_s += seconds

    return step


def test_a_block_that_began_in_time_goes_on_to_its_end() -> None:
    async def scenario() -> None:
        clock, doubling = FakeClock(), Doubling()
        doubling.stepping = taking(clock, 1.0)
        batcher = doubling.batcher(max_batch_size=2, clock=clock)
        future = submitted(batcher, block(*range(6)), timeout_s=0.5)
        late = submitted(batcher, block(6), timeout_s=0.5)
        assert await told([future, late]) == [[0, 2, 4, 6, 8, 10], DeadlineExceeded]
        assert doubling.batches == [[0, 1], [2, 3], [4, 5]]

    run(scenario())


def test_whose_time_is_up_is_told_at_the_next_batch_wherever_it_waits() -> None:
    """Ahead in the queue, behind others, or behind another one of its session."""

    async def scenario() -> None:
        clock, doubling = FakeClock(), Doubling()
        doubling.stepping = taking(clock, 1.0)
        batcher = doubling.batcher(max_batch_size=1, clock=clock)
        heard: list[tuple[int, int]] = []

        def hear(number: int, future: "asyncio.Future[Answer]") -> None:
            assert isinstance(future.exception(), DeadlineExceeded)
            heard.append((number, len(doubling.batches)))

        in_time = [submitted(batcher, block(n, session_id=s)) for n, s in enumerate("abc")]
        for number, session_id in ((3, "a"), (4, "b"), (5, None), (6, None)):
            late = submitted(batcher, block(number, session_id=session_id), timeout_s=0.5)
            late.add_done_callback(partial(hear, number))
        assert len(batcher) == 7
        assert await told(in_time) == [[0], [2], [4]]
        assert doubling.batches == [[0], [1], [2]]
        assert sorted(heard) == [(number, 2) for number in (3, 4, 5, 6)]
        assert len(batcher) == 0
        assert await told([submitted(batcher, block(7, session_id="b"))]) == [[14]]

    run(scenario())


def test_those_whose_time_is_up_later_are_told_later() -> None:
    async def scenario() -> None:
        clock, doubling = FakeClock(), Doubling()
        doubling.stepping = taking(clock, 1.0)
        batcher = doubling.batcher(max_batch_size=1, clock=clock)
        patient = [submitted(batcher, block(n)) for n in range(4)]
        late = [submitted(batcher, block(9), timeout_s=timeout_s) for timeout_s in (0.5, 1.5, 2.5)]
        assert await told(late) == [DeadlineExceeded] * 3
        assert await told(patient) == [[0], [2], [4], [6]]

    run(scenario())


def test_those_behind_others_whose_time_is_up_keep_their_order() -> None:
    async def scenario() -> None:
        clock, doubling = FakeClock(), Doubling()
        batcher = doubling.batcher(max_batch_size=1, clock=clock)
        late = [
            submitted(batcher, block(n, session_id=s), timeout_s=0.5) for n, s in enumerate("ab")
        ]
        behind = [submitted(batcher, block(n + 2, session_id=s)) for n, s in enumerate("ab")]
        clock.now_s += 1.0
        assert await told(behind) == [[4], [6]]
        assert await told(late) == [DeadlineExceeded] * 2
        assert doubling.batches == [[2], [3]]

    run(scenario())


def test_a_late_block_does_not_hold_up_its_session() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        late = submitted(batcher, block(1, session_id="a"), timeout_s=0.0)
        in_time = submitted(batcher, block(2, session_id="a"))
        assert await told([late, in_time]) == [DeadlineExceeded, [4]]
        assert doubling.batches == [[2]]

    run(scenario())


def test_a_block_nobody_wants_any_more_is_not_run_and_does_not_hold_up_its_session() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        gone = submitted(batcher, block(1, session_id="a"), is_wanted=lambda: False)
        awaited = submitted(batcher, block(2, session_id="a"), is_wanted=lambda: True)
        assert await told([gone, awaited]) == [Disconnected, [4]]
        assert doubling.batches == [[2]]
        assert len(batcher) == 0

    run(scenario())


def test_a_question_that_fails_is_its_own_block_s_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Whether a block is wanted: nobody waits for ever, and its session goes on."""

    def fail() -> bool:
        raise ZeroDivisionError("secret")

    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        first = submitted(batcher, block(1))
        broken = submitted(batcher, block(2, session_id="a"), is_wanted=fail)
        others = [submitted(batcher, block(3, session_id="a")), submitted(batcher, block(4))]
        assert await told([first, broken, *others]) == [[2], ServiceError, [6], [8]]
        await batcher.drain()
        assert len(batcher) == 0

    run(scenario())
    assert "secret" in caplog.text


def test_a_cancelled_block_is_not_run() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        given_up, other = (submitted(batcher, block(n, session_id="a")) for n in (1, 2))
        given_up.cancel()
        assert await told([other]) == [[4]]
        assert doubling.batches == [[2]]

    run(scenario())


def test_a_batch_of_cancelled_blocks_only_is_not_run_at_all() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        for future in [submitted(batcher, block(n)) for n in range(3)]:
            future.cancel()
        await batcher.drain()
        assert doubling.batches == []

    run(scenario())


def test_a_block_cancelled_while_its_batch_runs_harms_nobody() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher(max_batch_size=3)
        blocks = [block(0), block(*range(1, 6)), block(6)]
        futures = [submitted(batcher, one) for one in blocks]

        def cancel_two(numbers: list[int]) -> None:
            futures[0].cancel()
            futures[1].cancel()

        doubling.stepping = cancel_two
        assert await told(futures[2:]) == [[12]]
        assert futures[0].cancelled()
        assert futures[1].cancelled()
        assert doubling.batches == [[0, 1, 2], [3, 4, 5], [6]]

    run(scenario())


def failing_at(number: int) -> Callable[[list[int]], None]:
    """A batch with this number fails."""

    def step(numbers: list[int]) -> None:
        if number in numbers:
            raise ZeroDivisionError("secret")

    return step


def test_a_batch_that_raises_fails_its_own_blocks_with_a_fixed_text_and_no_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        doubling = Doubling()
        doubling.stepping = failing_at(1)
        batcher = doubling.batcher(max_batch_size=2)
        futures = [submitted(batcher, block(n, session_id=str(n))) for n in range(4)]
        assert await told(futures) == [ServiceError, ServiceError, [4], [6]]
        assert futures[0].exception() is not futures[1].exception()
        assert str(futures[0].exception()) == "internal error"
        assert doubling.abandoned == [[0], [1]]
        assert await told([submitted(batcher, block(5, session_id="1"))]) == [[10]]

    with caplog.at_level(logging.ERROR):
        run(scenario())
    assert "secret" in caplog.text


@pytest.mark.parametrize("number", [0, 4, 6])
def test_a_block_of_which_one_part_fails_is_refused_and_runs_no_further(
    number: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        doubling = Doubling()
        doubling.stepping = failing_at(number)
        batcher = doubling.batcher(max_batch_size=3)
        large, behind, other = [
            submitted(batcher, one)
            for one in (block(*range(7), session_id="a"), block(7, session_id="a"), block(8))
        ]
        shared = number == 6
        assert await told([large, behind, other]) == [
            ServiceError,
            [14],
            ServiceError if shared else [16],
        ]
        assert doubling.abandoned == [list(range(7)), *([[8]] if shared else [])]
        assert (
            doubling.batches[: number // 3 + 1] == [[0, 1, 2], [3, 4, 5], [6, 8]][: number // 3 + 1]
        )
        assert sum(map(len, doubling.batches[number // 3 + 1 :])) == (1 if shared else 2)
        assert len(batcher) == 0
        await batcher.drain()

    run(scenario())
    assert "a batch of" in caplog.text


def test_what_needs_no_model_is_told_before_the_batch_runs_whatever_becomes_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        doubling = Doubling()
        replay, unknown, fails = block(1, session_id="a"), block(2, session_id="b"), block(3)

        def admitting(numbers: list[int]) -> Answer | None:
            if numbers == [2]:
                raise UnknownSession("b")
            return doubled(replay) if numbers == [1] else None

        doubling.admitting, doubling.stepping = admitting, failing_at(3)
        batcher = doubling.batcher()
        futures = [submitted(batcher, one) for one in (replay, fails, unknown)]
        assert await told(futures) == [[2], ServiceError, UnknownSession]
        assert doubling.batches == [[3]]
        assert doubling.abandoned == [[3]]

    run(scenario())


def test_what_needs_no_model_takes_no_room_in_a_batch() -> None:
    async def scenario() -> None:
        doubling = Doubling()

        def refuse_odd(numbers: list[int]) -> None:
            if numbers[0] % 2:
                raise Invalid("odd")

        doubling.admitting = refuse_odd
        batcher = doubling.batcher(max_batch_size=2)
        answers = await told([submitted(batcher, block(n)) for n in range(6)])
        assert answers == [[0], Invalid, [4], Invalid, [8], Invalid]
        assert doubling.batches == [[0, 2], [4]]

    run(scenario())


def test_a_block_that_cannot_be_admitted_costs_the_others_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        doubling = Doubling()

        def fail(numbers: list[int]) -> None:
            if numbers == [1]:
                raise ZeroDivisionError("secret")

        doubling.admitting = fail
        batcher = doubling.batcher()
        futures = [submitted(batcher, block(n, session_id="a")) for n in range(3)]
        assert await told(futures) == [[0], ServiceError, [4]]
        assert str(futures[1].exception()) == "internal error"

    run(scenario())
    assert "secret" in caplog.text


@pytest.mark.parametrize("num_results", [0, 1, 3])
def test_a_wrong_number_of_results_fails_the_batch(
    num_results: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        doubling = Doubling()
        doubling.collecting = lambda results: [results[0]] * num_results
        batcher = doubling.batcher()
        answers = await told([submitted(batcher, block(n)) for n in range(2)])
        assert answers == [ServiceError, ServiceError]
        assert doubling.abandoned == [[0], [1]]

    run(scenario())
    assert "a batch of 2 failed" in caplog.text


def test_once_the_device_is_lost_all_that_waits_is_refused_and_nothing_more_is_taken() -> None:
    async def scenario() -> None:
        doubling = Doubling()

        def fail(numbers: list[int]) -> None:
            raise DeviceLost("an illegal memory access was encountered")

        doubling.stepping = fail
        batcher = doubling.batcher(max_batch_size=2)
        futures = [
            submitted(batcher, block(n, session_id="a" if n < 2 else None)) for n in range(5)
        ]
        assert not batcher.device_lost.is_set()
        assert await told(futures) == [Draining] * 5
        assert batcher.device_lost.is_set()
        with pytest.raises(Draining):
            batcher.check_room(0)
        with pytest.raises(Draining):
            submitted(batcher, block(5))
        await batcher.drain()

    run(scenario())


def test_a_device_that_is_lost_to_a_block_s_own_state_is_lost_to_all() -> None:
    """A stateless one brings its state there before there is a batch."""

    async def scenario() -> None:
        doubling = Doubling()

        def fail(numbers: list[int]) -> None:
            raise DeviceLost("an illegal memory access was encountered")

        doubling.admitting = fail
        batcher = doubling.batcher()
        assert await told([submitted(batcher, block(n)) for n in range(2)]) == [Draining] * 2
        assert batcher.device_lost.is_set()
        with pytest.raises(Draining):
            batcher.check_room(0)

    run(scenario())


def test_what_waits_is_not_run_once_something_else_has_lost_the_device() -> None:
    """As new weights of which nobody knows how many are there."""

    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher(max_batch_size=2)
        sessions = ("a", "a", None, None)
        futures = [submitted(batcher, block(n, session_id=s)) for n, s in enumerate(sessions)]
        assert isinstance(batcher.refusal(DeviceLost("in part")), Draining)
        assert await told(futures) == [Draining] * 4
        assert doubling.batches == []
        await batcher.drain()

    run(scenario())


def test_an_error_among_the_results_is_its_block_s_alone() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        doubling.collecting = lambda results: [
            Invalid("odd") if at % 2 else result for at, result in enumerate(results)
        ]
        batcher = doubling.batcher()
        answers = await told([submitted(batcher, block(n)) for n in range(4)])
        assert answers == [[0], Invalid, [4], Invalid]

    run(scenario())


def test_blocks_that_arrive_while_a_batch_runs_form_the_next_one() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        futures: list[asyncio.Future[Answer]] = []

        def submit_two_more(numbers: list[int]) -> None:
            if numbers == [0]:
                futures.extend([submitted(batcher, block(1)), submitted(batcher, block(2))])

        doubling.stepping = submit_two_more
        assert await told([submitted(batcher, block(0))]) == [[0]]
        assert await told(futures) == [[2], [4]]
        assert doubling.batches == [[0], [1, 2]]

    run(scenario())


def test_a_batch_of_enough_rows_is_launched_before_the_one_under_way_is_done() -> None:
    async def scenario() -> None:
        doubling = Doubling(turns=inf)
        batcher = doubling.batcher(max_batch_size=4)
        first = submitted(batcher, block(1, session_id="a"))
        await asyncio.sleep(0)
        few = [submitted(batcher, block(n)) for n in (2, 3)]
        await asyncio.sleep(0)
        assert doubling.batches == [[1]]
        more = [submitted(batcher, block(n)) for n in (4, 5, 6)]
        await asyncio.sleep(0)
        assert doubling.batches == [[1], [2, 3, 4, 5]]
        more += [submitted(batcher, block(n)) for n in range(7, 11)]
        await asyncio.sleep(0)
        assert len(doubling.batches) == 2  # never more than two
        doubling.end()
        assert doubling.batches == [[1], [2, 3, 4, 5], [6, 7, 8, 9]]
        assert (first.done(), few[0].done()) == (True, False)
        for _ in range(3):
            doubling.end()
        assert await told([first, *few, *more]) == [[2 * n] for n in range(1, 11)]

    run(scenario())


def test_a_batch_is_followed_where_enough_rows_for_another_wait_and_may_run() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher(max_batch_size=2)
        futures = [submitted(batcher, block(n)) for n in range(5)]
        await told(futures)
        assert doubling.followed == [True, False, False]
        doubling.followed.clear()
        await told([submitted(batcher, block(n, session_id=s)) for n, s in enumerate("abab")])
        assert doubling.followed == [False, False]

    run(scenario())


def test_sixty_four_rows_are_enough_for_a_batch_of_any_size() -> None:
    async def scenario() -> None:
        doubling = Doubling(turns=inf)
        batcher = doubling.batcher(max_batch_size=256, max_waiting=1000)
        futures = [submitted(batcher, block(0))]
        await asyncio.sleep(0)
        futures.append(submitted(batcher, block(*range(63))))
        await asyncio.sleep(0)
        assert len(doubling.batches) == 1
        futures.append(submitted(batcher, block(63)))
        await asyncio.sleep(0)
        assert doubling.batches[1:] == [list(range(64))]
        for _ in range(2):
            doubling.end()
        await told(futures)

    run(scenario())


def test_rows_behind_others_of_their_session_are_not_enough() -> None:
    async def scenario() -> None:
        clock, doubling = FakeClock(), Doubling(turns=inf)
        batcher = doubling.batcher(max_batch_size=3, clock=clock)
        futures = [submitted(batcher, block(0, session_id="a"))]
        await asyncio.sleep(0)
        behind = submitted(batcher, block(1, session_id="a"))
        late = submitted(batcher, block(2), timeout_s=0.5)
        futures.append(submitted(batcher, block(3)))
        await asyncio.sleep(0)
        assert len(doubling.batches) == 1
        clock.now_s += 1.0
        futures.append(submitted(batcher, block(4)))
        await asyncio.sleep(0)
        assert isinstance(late.exception(), DeadlineExceeded)
        assert len(doubling.batches) == 1
        doubling.end()
        assert doubling.batches == [[0], [1, 3, 4]]
        futures += [submitted(batcher, block(5)) for _ in range(3)]
        await asyncio.sleep(0)
        assert doubling.batches == [[0], [1, 3, 4], [5, 5, 5]]
        for _ in range(2):
            doubling.end()
        assert await told([behind]) == [[2]]
        await told(futures)

    run(scenario())


def test_what_needs_no_model_is_told_after_those_that_came_before() -> None:
    async def scenario() -> None:
        doubling = Doubling(turns=inf)
        batcher = doubling.batcher()
        doubling.admitting = lambda numbers: doubled(block(9)) if numbers == [9] else None
        order: list[int] = []

        def note(number: int, future: "asyncio.Future[Answer]") -> None:
            order.append(number)

        futures = []
        for number in (1, 9):
            futures.append(submitted(batcher, block(number, session_id="a")))
            futures[-1].add_done_callback(partial(note, number))
            await asyncio.sleep(0)
        doubling.end()
        await told(futures)
        assert order == [1, 9]

    run(scenario())


def test_the_pace_is_known_where_none_waits_but_two_batches_are_under_way() -> None:
    async def scenario() -> None:
        clock, doubling = FakeClock(), Doubling(turns=inf)
        batcher = doubling.batcher(max_batch_size=2, max_waiting=2, clock=clock)
        futures = []
        for number in range(2):
            futures.append(submitted(batcher, block(number, number)))
            await asyncio.sleep(0)
        for _ in range(2):
            clock.now_s += 10.0
            doubling.end()
        for number in range(3):
            futures.append(submitted(batcher, block(number, number)))
            await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            submitted(batcher, block(3))
        assert caught.value.headers["Retry-After"] == "10"
        for _ in range(3):
            doubling.end()
        await told(futures)

    run(scenario())


def test_a_batch_that_fails_says_nothing_about_the_pace(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        clock, doubling = FakeClock(), Doubling(turns=inf)
        batcher = doubling.batcher(max_batch_size=2, max_waiting=12, clock=clock)
        futures = [submitted(batcher, block(n, n)) for n in range(6)]
        await asyncio.sleep(0)
        for is_failing in (False, True, False, False):
            clock.now_s += 10.0
            doubling.collecting = failing_collect if is_failing else lambda results: results
            doubling.end()
        futures += [submitted(batcher, block(n, n)) for n in range(4)]
        with pytest.raises(Overloaded) as caught:
            submitted(batcher, block(*range(5)))
        assert caught.value.headers["Retry-After"] == "40"  # for 8 rows, 5 s each
        for _ in range(6):
            doubling.end()
        await told(futures)

    run(scenario())


def test_a_late_word_of_a_batch_does_not_part_those_that_arrive_together() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        futures = [submitted(batcher, block(1))]
        batcher.wake()
        futures.append(submitted(batcher, block(2)))
        await told(futures)
        assert doubling.batches == [[1, 2]]

    run(scenario())


def test_nothing_is_launched_beside_a_block_of_which_more_is_to_come() -> None:
    """Its part may fail, and its rows are then given to others."""

    async def scenario() -> None:
        doubling = Doubling(turns=inf)
        batcher = doubling.batcher(max_batch_size=2)
        large = submitted(batcher, block(*range(4)))
        others = submitted(batcher, block(4, 5))
        await asyncio.sleep(0)
        assert doubling.batches == [[0, 1]]
        doubling.end()
        assert doubling.batches == [[0, 1], [2, 3], [4, 5]]
        for _ in range(2):
            doubling.end()
        assert await told([large, others]) == [[0, 2, 4, 6], [8, 10]]

    run(scenario())


def test_a_batch_that_fails_leaves_the_large_block_behind_it_to_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        doubling = Doubling(turns=inf)
        batcher = doubling.batcher(max_batch_size=2)
        failing = submitted(batcher, block(0))
        await asyncio.sleep(0)
        large = submitted(batcher, block(*range(1, 6)))
        await asyncio.sleep(0)
        assert doubling.batches == [[0], [1, 2]]
        doubling.collecting = failing_collect
        doubling.end()
        doubling.collecting = lambda results: results
        for _ in range(3):
            doubling.end()
        assert await told([failing, large]) == [ServiceError, [2, 4, 6, 8, 10]]
        assert doubling.batches == [[0], [1, 2], [3, 4], [5]]

    run(scenario())


def failing_collect(results: list[Any]) -> list[Any]:
    raise RuntimeError("broken")


def test_the_model_goes_on_before_answers_are_written() -> None:
    async def scenario() -> None:
        doubling = Doubling(turns=inf)
        batcher = doubling.batcher()
        num_launched: list[int] = []
        first, second = submitted(batcher, block(1)), None
        batcher.submit(
            block(2),
            lambda answer: num_launched.append(len(doubling.batches)),
            is_wanted=lambda: True,
        )
        await asyncio.sleep(0)
        second = submitted(batcher, block(3))
        doubling.end()
        assert num_launched == [2]
        doubling.end()
        assert await told([first, second]) == [[2], [6]]

    run(scenario())


def test_a_session_s_next_block_never_runs_beside_the_one_before() -> None:
    async def scenario() -> None:
        doubling = Doubling(turns=inf)
        batcher = doubling.batcher(max_batch_size=2)
        futures = [submitted(batcher, block(n, session_id="a")) for n in range(4)]
        for number in range(4):
            await asyncio.sleep(0)
            assert doubling.batches[number:] == [[number]]
            doubling.end()
        assert await told(futures) == [[0], [2], [4], [6]]

    run(scenario())


def test_it_looks_ahead_while_a_batch_runs_or_nobody_waits_and_not_before_others_run() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher(max_batch_size=1)
        await told([submitted(batcher, block(n)) for n in range(3)])
        assert doubling.looked_ahead_at == [3]
        beside = Doubling(turns=inf)
        batcher = beside.batcher(max_batch_size=1)
        futures = [submitted(batcher, block(n)) for n in range(3)]
        await asyncio.sleep(0)
        assert beside.looked_ahead_at == [2]
        for _ in range(3):
            beside.end()
        await told(futures)
        assert beside.looked_ahead_at == [2, 3, 3, 3]

    run(scenario())


def test_drain_answers_everybody_and_then_refuses() -> None:
    async def scenario() -> None:
        doubling = Doubling(turns=2)
        batcher = doubling.batcher(max_batch_size=2)
        futures = [submitted(batcher, block(n, session_id="same")) for n in range(4)]
        futures.append(submitted(batcher, block(4, 5, 6)))
        drained = asyncio.ensure_future(batcher.drain())
        await asyncio.sleep(0)
        for refused in (partial(submitted, batcher, block(99)), batcher.check_room):
            with pytest.raises(Draining):
                refused()
        await drained
        assert all(future.done() for future in futures)
        assert await told(futures) == [[0], [2], [4], [6], [8, 10, 12]]
        with pytest.raises(Draining):
            submitted(batcher, block(99))

    run(scenario())


def test_drain_returns_at_once_where_nothing_waits() -> None:
    async def scenario() -> None:
        await Doubling().batcher().drain()
        used = Doubling().batcher()
        await submitted(used, block(1))
        await used.drain()
        await used.drain()

    run(scenario())


def test_drain_survives_a_failing_batch(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        doubling = Doubling()
        doubling.stepping = failing_at(0)
        batcher = doubling.batcher(max_batch_size=1)
        futures = [submitted(batcher, block(n)) for n in range(2)]
        await batcher.drain()
        assert await told(futures) == [ServiceError, [2]]

    run(scenario())


def test_an_answer_that_cannot_be_given_costs_the_others_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        def fail(result: Answer | ServiceError) -> None:
            raise ZeroDivisionError("secret")

        batcher = Doubling().batcher()
        batcher.submit(block(1), fail, is_wanted=lambda: True)
        assert await told([submitted(batcher, block(2))]) == [[4]]
        await batcher.drain()

    run(scenario())
    assert "secret" in caplog.text


@pytest.mark.parametrize(("seconds_per_row", "retry_after"), [(0.001, "1"), (0.4, "3")])
def test_a_full_queue_says_when_it_will_have_been_worked_off(
    seconds_per_row: float, retry_after: str
) -> None:
    clock = FakeClock()

    async def scenario() -> None:
        def take_time(numbers: list[int]) -> None:
            clock.now_s += seconds_per_row * len(numbers)

        doubling = Doubling()
        doubling.stepping = take_time
        batcher = doubling.batcher(max_batch_size=2, max_waiting=6, clock=clock)
        await told([submitted(batcher, block(n, n)) for n in range(3)])
        clock.now_s += 1000  # with nothing to do, which says nothing about its pace
        await submitted(batcher, block(0))
        submitted(batcher, block(0, 1, 2, 3))
        submitted(batcher, block(4, 5))
        assert len(batcher) == 6
        with pytest.raises(Overloaded) as caught:
            batcher.submit(block(6), print, is_wanted=lambda: True)
        assert caught.value.headers["Retry-After"] == retry_after
        await batcher.drain()

    run(scenario())


Wave = list[tuple[str | None, int]]
"""The sessions of blocks that are submitted at once, and how many rows each has."""

waves = st.lists(
    st.lists(st.tuples(st.sampled_from([None, "a", "b", "c"]), st.integers(1, 7)), max_size=7),
    min_size=1,
    max_size=5,
)


@given(waves=waves, max_batch_size=st.integers(1, 5), turns=st.integers(0, 2))
def test_every_row_runs_once_and_in_order_and_nobody_is_overtaken_but_for_his_session(
    waves: list[Wave], max_batch_size: int, turns: int
) -> None:
    doubling = Doubling(turns=turns)
    blocks: list[Block] = []

    async def scenario() -> list[Told]:
        batcher = doubling.batcher(max_batch_size=max_batch_size, max_waiting=1000)
        futures: list[asyncio.Future[Answer]] = []
        for wave in waves:
            for session_id, num_rows in wave:
                first = 10 * len(blocks)
                blocks.append(block(*range(first, first + num_rows), session_id=session_id))
                futures.append(submitted(batcher, blocks[-1]))
            await asyncio.sleep(0)
        await batcher.drain()
        return await told(futures)

    assert run(scenario()) == [[2 * n for n in numbers_of(one)] for one in blocks]
    assert len(doubling._batcher) == doubling._batcher._num_behind == 0
    assert all(1 <= len(batch) <= max_batch_size for batch in doubling.batches)
    ran = [number for batch in doubling.batches for number in batch]
    assert sorted(ran) == [number for one in blocks for number in numbers_of(one)]
    batch_of = {n: at for at, batch in enumerate(doubling.batches) for n in batch}
    for number, one in enumerate(blocks):
        mine = [n for n in ran if n // 10 == number]
        assert mine == numbers_of(one)
        batches = [batch_of[n] for n in mine]
        if one.num_rows <= max_batch_size:
            assert len(set(batches)) == 1
        before = [
            at
            for at, other in enumerate(blocks[:number])
            if other.session_id == one.session_id is not None
        ]
        free_from = 1 + max(
            (batch_of[10 * at + blocks[at].num_rows - 1] for at in before), default=-1
        )
        assert batches[0] >= free_from
        overtaking = [at for at in range(number + 1, len(blocks)) if batch_of[10 * at] < batches[0]]
        launched = [doubling.num_collected[batch_of[10 * at]] for at in overtaking]
        assert all(num_collected < free_from for num_collected in launched)


def test_a_block_is_held_from_its_submission_until_it_is_settled() -> None:
    async def scenario() -> None:
        doubling = Doubling(turns=2)
        doubling.admitting = refuse_nine
        batcher = doubling.batcher(max_batch_size=3, max_waiting=5)
        futures = [submitted(batcher, block(n, session_id=f"{n}")) for n in (1, 2, 3, 9)]
        with pytest.raises(Overloaded):
            submitted(batcher, block(5, 5))
        assert doubling.held == Counter({1: 1, 2: 1, 3: 1, 9: 1})
        await asyncio.sleep(0)
        assert doubling.held.total() == 4
        await told(futures)
        assert set(doubling.held.values()) == {0}

    run(scenario())


def refuse_nine(numbers: list[int]) -> None:
    if 9 in numbers:
        raise Invalid("nine")


def test_those_that_came_late_keep_their_order_when_others_before_them_expire() -> None:
    async def scenario() -> None:
        clock = FakeClock()
        doubling = Doubling()
        batcher = doubling.batcher(max_batch_size=4, clock=clock)
        first = [submitted(batcher, block(n, session_id=s)) for n, s in enumerate("abcd")]
        expiring = [submitted(batcher, block(9, session_id=s), timeout_s=5.0) for s in "ad"]
        behind = [submitted(batcher, block(n, session_id=s)) for n, s in ((4, "b"), (5, "c"))]
        await asyncio.sleep(0)
        clock.now_s += 10.0
        await told([*first, *expiring, *behind])
        assert doubling.batches == [[0, 1, 2, 3], [4, 5]]

    run(scenario())
