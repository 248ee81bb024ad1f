import asyncio
import logging
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.batcher import LONG_BATCH_S, TURNS_BEHIND, Batcher
from service.errors import (
    DeadlineExceeded,
    Disconnected,
    Draining,
    Invalid,
    Overloaded,
    ServiceError,
)
from tests.service.fakes import FakeClock, run, submitted


class Doubling:
    """A `run_batch` that doubles its items, keeps what it saw, and fails as it is told to."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.failures: dict[int, Exception] = {}

    def __call__(self, items: list[int]) -> Sequence[int | ServiceError]:
        self.batches.append(items)
        for item in items:
            if item in self.failures:
                raise self.failures[item]
        return [2 * item for item in items]

    def batcher(self, *, max_batch_size: int = 8, max_waiting: int = 100) -> Batcher[int, int]:
        return Batcher(self, max_batch_size=max_batch_size, max_waiting=max_waiting)


async def outcomes(futures: Sequence[asyncio.Future[int]]) -> list[Any]:
    return await asyncio.gather(*futures, return_exceptions=True)


def test_a_lone_item_runs_in_the_loop_s_next_turn() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        future = submitted(doubling.batcher(), 21)
        assert not future.done()
        await asyncio.sleep(0)
        assert future.result() == 42
        assert doubling.batches == [[21]]

    run(scenario())


def test_items_submitted_together_share_a_batch_in_order() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        answers = await outcomes([submitted(batcher, item) for item in range(5)])
        assert answers == [0, 2, 4, 6, 8]
        assert doubling.batches == [[0, 1, 2, 3, 4]]

    run(scenario())


def test_items_without_a_key_share_a_batch_with_each_other_and_with_keys() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        keys: list[Hashable] = [None, "a", None, "b"]
        await outcomes([submitted(batcher, item, key=key) for item, key in enumerate(keys)])
        assert doubling.batches == [[0, 1, 2, 3]]

    run(scenario())


def test_a_batch_is_never_larger_than_the_largest_batch_size() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher(max_batch_size=3)
        answers = await outcomes([submitted(batcher, item) for item in range(7)])
        assert answers == [2 * item for item in range(7)]
        assert doubling.batches == [[0, 1, 2], [3, 4, 5], [6]]

    run(scenario())


def test_items_of_one_key_never_share_a_batch_and_keep_their_order() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        keys = ["a", "a", "b", "a", "b", "c"]
        await outcomes([submitted(batcher, item, key=key) for item, key in enumerate(keys)])
        assert doubling.batches == [[0, 2, 5], [1, 4], [3]]

    run(scenario())


def test_an_item_put_back_for_its_key_stays_ahead_of_those_behind_it() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher(max_batch_size=2)
        keys = ["a", "a", "b", "c"]
        await outcomes([submitted(batcher, item, key=key) for item, key in enumerate(keys)])
        assert doubling.batches == [[0, 2], [1, 3]]

    run(scenario())


def test_a_full_queue_refuses_more_and_takes_some_again_later() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher(max_waiting=2)
        waiting = [submitted(batcher, item) for item in range(2)]
        with pytest.raises(Overloaded, match="2 requests wait"):
            submitted(batcher, 2)
        assert await outcomes(waiting) == [0, 2]
        assert await submitted(batcher, 3) == 6
        assert doubling.batches == [[0, 1], [3]]

    run(scenario())


@pytest.mark.parametrize("timeout_s", [0.0, -1.0])
def test_an_item_whose_time_is_up_is_never_run(timeout_s: float) -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        late, other = submitted(batcher, 1, timeout_s=timeout_s), submitted(batcher, 2)
        with pytest.raises(DeadlineExceeded):
            await late
        assert await other == 4
        assert doubling.batches == [[2]]

    run(scenario())


def test_a_deadline_ends_at_its_very_moment() -> None:
    async def scenario() -> None:
        clock, doubling = FakeClock(), Doubling()
        batcher = Batcher(doubling, max_batch_size=8, max_waiting=8, clock=clock)
        ends_now = submitted(batcher, 1, timeout_s=0.5)
        ends_later = submitted(batcher, 2, timeout_s=0.75)
        clock.now_s += 0.5
        assert await ends_later == 4
        assert isinstance(ends_now.exception(), DeadlineExceeded)

    run(scenario())


def test_the_time_of_the_batch_before_counts_for_what_is_read_after_it() -> None:
    async def scenario() -> None:
        clock = FakeClock()

        def step(items: list[int]) -> list[int | ServiceError]:
            clock.now_s += 0.5
            return list(items)

        batcher = Batcher(step, max_batch_size=8, max_waiting=8, clock=clock)
        for _ in range(2):
            assert await submitted(batcher, 0) == 0
            late, patient = (submitted(batcher, 1, timeout_s=s) for s in (0.5, 0.75))
            with pytest.raises(DeadlineExceeded):
                await late
            assert await patient == 1
            for _ in range(2 * TURNS_BEHIND):  # an idle loop has read all there was
                await asyncio.sleep(0)
        assert await submitted(batcher, 2, timeout_s=0.25) == 2

    run(scenario())


@pytest.mark.parametrize("is_long", [True, False])
def test_what_is_read_right_after_a_long_batch_is_looked_at_once_more_before_it_runs(
    is_long: bool,
) -> None:
    async def scenario() -> None:
        clock, batches = FakeClock(), []

        def step(items: list[int]) -> list[int | ServiceError]:
            batches.append(items)
            clock.now_s += LONG_BATCH_S * (2 if is_long else 0.5)
            return list(items)

        batcher = Batcher(step, max_batch_size=8, max_waiting=8, clock=clock)
        assert await submitted(batcher, 1) == 1
        leaves, stays = submitted(batcher, 2), submitted(batcher, 3)
        await asyncio.sleep(0)
        leaves.cancel()
        assert await stays == 3
        assert batches == ([[1], [3]] if is_long else [[1], [2, 3]])
        for _ in range(2 * TURNS_BEHIND):  # an idle loop has read all there was
            await asyncio.sleep(0)
        lone = submitted(batcher, 4)
        await asyncio.sleep(0)
        assert lone.done()

    run(scenario())


def test_whose_time_is_up_is_told_at_the_next_batch_wherever_it_waits() -> None:
    """Ahead in the queue, behind others, or behind another one of its key."""

    async def scenario() -> None:
        clock = FakeClock()
        batches: list[list[int]] = []

        def step(items: list[int]) -> list[int | ServiceError]:
            batches.append(items)
            clock.now_s += 1.0
            return list(items)

        batcher = Batcher(step, max_batch_size=1, max_waiting=8, clock=clock)
        told: list[tuple[int, int]] = []

        def tell(item: int, future: asyncio.Future[int]) -> None:
            assert isinstance(future.exception(), DeadlineExceeded)
            told.append((item, len(batches)))

        in_time = [submitted(batcher, item, key=key) for item, key in enumerate("abc")]
        for item, key in ((3, "a"), (4, "b"), (5, None), (6, None)):
            late = submitted(batcher, item, key=key, timeout_s=0.5)
            late.add_done_callback(partial(tell, item))
        assert len(batcher) == 7
        assert await outcomes(in_time) == [0, 1, 2]
        assert batches == [[0], [1], [2]]
        assert sorted(told) == [(item, 2) for item in (3, 4, 5, 6)]
        assert len(batcher) == 0
        assert await submitted(batcher, 7, key="b") == 7

    run(scenario())


def test_those_whose_time_is_up_later_are_told_later() -> None:
    async def scenario() -> None:
        clock = FakeClock()

        def step(items: list[int]) -> list[int | ServiceError]:
            clock.now_s += 1.0
            return list(items)

        batcher = Batcher(step, max_batch_size=1, max_waiting=8, clock=clock)
        patient = [submitted(batcher, item) for item in range(4)]
        late = [submitted(batcher, 9, timeout_s=timeout_s) for timeout_s in (0.5, 1.5, 2.5)]
        assert [type(outcome) for outcome in await outcomes(late)] == [DeadlineExceeded] * 3
        assert await outcomes(patient) == [0, 1, 2, 3]

    run(scenario())


def test_those_behind_others_whose_time_is_up_keep_their_order() -> None:
    async def scenario() -> None:
        clock, doubling = FakeClock(), Doubling()
        batcher = Batcher(doubling, max_batch_size=1, max_waiting=8, clock=clock)
        late = [submitted(batcher, item, key=key, timeout_s=0.5) for item, key in enumerate("ab")]
        behind = [submitted(batcher, item + 2, key=key) for item, key in enumerate("ab")]
        clock.now_s += 1.0
        assert await outcomes(behind) == [4, 6]
        assert [type(outcome) for outcome in await outcomes(late)] == [DeadlineExceeded] * 2
        assert doubling.batches == [[2], [3]]

    run(scenario())


def test_a_batch_of_ten_milliseconds_is_a_long_one() -> None:
    """So long that a client may leave meanwhile; one of two is not."""
    assert 0.002 < LONG_BATCH_S < 0.01


def test_a_late_item_does_not_hold_up_its_key() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        late = submitted(batcher, 1, key="a", timeout_s=0.0)
        assert await submitted(batcher, 2, key="a") == 4
        assert isinstance(late.exception(), DeadlineExceeded)
        assert doubling.batches == [[2]]

    run(scenario())


def test_an_item_nobody_wants_any_more_is_not_run_and_does_not_hold_up_its_key() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        gone = submitted(batcher, 1, key="a", is_wanted=lambda: False)
        awaited = submitted(batcher, 2, key="a", is_wanted=lambda: True)
        (error, result) = await outcomes([gone, awaited])
        assert isinstance(error, Disconnected)
        assert result == 4
        assert doubling.batches == [[2]]

    run(scenario())


def test_a_cancelled_item_is_not_run() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        given_up, other = submitted(batcher, 1, key="a"), submitted(batcher, 2, key="a")
        given_up.cancel()
        assert await other == 4
        assert doubling.batches == [[2]]

    run(scenario())


def test_a_batch_of_cancelled_items_only_is_not_run_at_all() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher()
        for future in [submitted(batcher, item) for item in range(3)]:
            future.cancel()
        await batcher.drain()
        assert doubling.batches == []

    run(scenario())


def test_an_item_cancelled_while_its_batch_runs_harms_nobody() -> None:
    async def scenario() -> None:
        futures: list[asyncio.Future[int]] = []

        def cancel_the_first(items: list[int]) -> Sequence[int | ServiceError]:
            futures[0].cancel()
            return items

        batcher = Batcher(cancel_the_first, max_batch_size=8, max_waiting=8)
        futures += [submitted(batcher, item) for item in range(3)]
        assert await outcomes(futures[1:]) == [1, 2]
        assert futures[0].cancelled()

    run(scenario())


def test_a_batch_that_raises_fails_its_own_items_with_a_fixed_text_and_no_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        doubling = Doubling()
        doubling.failures[1] = ZeroDivisionError("secret")
        batcher = doubling.batcher(max_batch_size=2)
        answers = await outcomes([submitted(batcher, item) for item in range(4)])
        assert [type(answer) for answer in answers] == [ServiceError, ServiceError, int, int]
        assert answers[0] is not answers[1]
        assert str(answers[0]) == "internal error"
        assert await submitted(batcher, 5) == 10

    with caplog.at_level(logging.ERROR):
        run(scenario())
    assert "secret" in caplog.text


@pytest.mark.parametrize("num_results", [0, 1, 3])
def test_a_wrong_number_of_results_fails_the_batch(
    num_results: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        wrong = [7] * num_results
        batcher = Batcher[int, int](lambda items: wrong, max_batch_size=8, max_waiting=8)
        answers = await outcomes([submitted(batcher, item) for item in range(2)])
        assert [type(answer) for answer in answers] == [ServiceError, ServiceError]

    run(scenario())
    assert f"{num_results} results for a batch of 2" in caplog.text


def test_an_error_among_the_results_is_its_item_s_alone() -> None:
    async def scenario() -> None:
        def refuse_odd(items: list[int]) -> list[int | ServiceError]:
            return [Invalid(f"{item} is odd") if item % 2 else item for item in items]

        batcher = Batcher(refuse_odd, max_batch_size=8, max_waiting=8)
        answers = await outcomes([submitted(batcher, item) for item in range(4)])
        assert [str(answer) for answer in answers] == ["0", "1 is odd", "2", "3 is odd"]

    run(scenario())


def test_items_that_arrive_while_a_batch_runs_form_the_next_one() -> None:
    async def scenario() -> None:
        batches: list[list[int]] = []
        futures: list[asyncio.Future[int]] = []

        def submit_two_more(items: list[int]) -> list[int | ServiceError]:
            batches.append(items)
            if items == [0]:
                futures.extend([submitted(batcher, 1), submitted(batcher, 2)])
            return list(items)

        batcher = Batcher(submit_two_more, max_batch_size=8, max_waiting=8)
        assert await submitted(batcher, 0) == 0
        assert await outcomes(futures) == [1, 2]
        assert batches == [[0], [1, 2]]

    run(scenario())


def test_drain_answers_everybody_and_then_refuses() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        batcher = doubling.batcher(max_batch_size=2)
        futures = [submitted(batcher, item, key="same") for item in range(5)]
        drained = asyncio.ensure_future(batcher.drain())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            submitted(batcher, 99)
        await drained
        assert [future.result() for future in futures] == [0, 2, 4, 6, 8]
        with pytest.raises(Draining):
            submitted(batcher, 99)

    run(scenario())


def test_drain_returns_at_once_where_nothing_waits() -> None:
    async def scenario() -> None:
        doubling = Doubling()
        await doubling.batcher().drain()
        used = doubling.batcher()
        await submitted(used, 1)
        await used.drain()
        await used.drain()

    run(scenario())


def test_drain_survives_a_failing_batch(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        doubling = Doubling()
        doubling.failures[0] = ValueError()
        batcher = doubling.batcher(max_batch_size=1)
        futures = [submitted(batcher, item) for item in range(2)]
        await batcher.drain()
        assert isinstance(futures[0].exception(), ServiceError)
        assert futures[1].result() == 2

    run(scenario())


@st.composite
def submissions(draw: st.DrawFn) -> list[list[str | None]]:
    """Waves of keys: a wave is submitted at once, the next one a turn of the loop later."""
    keys = st.lists(st.sampled_from([None, "a", "b", "c"]), max_size=9)
    return draw(st.lists(keys, min_size=1, max_size=5))


@given(waves=submissions(), max_batch_size=st.integers(min_value=1, max_value=5))
def test_every_item_is_answered_once_and_in_the_order_of_its_key(
    waves: list[list[str | None]], max_batch_size: int
) -> None:
    doubling = Doubling()
    keys: list[str | None] = []

    async def scenario() -> list[Any]:
        batcher = doubling.batcher(max_batch_size=max_batch_size)
        futures: list[asyncio.Future[int]] = []
        for wave in waves:
            for key in wave:
                futures.append(submitted(batcher, len(keys), key=key))
                keys.append(key)
            await asyncio.sleep(0)
        await batcher.drain()
        return await outcomes(futures)

    assert run(scenario()) == [2 * item for item in range(len(keys))]
    ran = [item for batch in doubling.batches for item in batch]
    assert sorted(ran) == list(range(len(keys)))
    assert all(1 <= len(batch) <= max_batch_size for batch in doubling.batches)
    for batch in doubling.batches:
        named = [keys[item] for item in batch if keys[item] is not None]
        assert len(named) == len(set(named))
    for key in ("a", "b", "c"):
        of_key = [item for item in ran if keys[item] == key]
        assert of_key == sorted(of_key)


def test_an_answer_that_cannot_be_given_costs_the_others_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        def fail(result: int | ServiceError) -> None:
            raise ZeroDivisionError("secret")

        batcher = Doubling().batcher()
        batcher.submit(1, fail, is_wanted=lambda: True)
        assert await submitted(batcher, 2) == 4
        await batcher.drain()

    run(scenario())
    assert "secret" in caplog.text


@pytest.mark.parametrize(("seconds_per_item", "retry_after"), [(0.001, "1"), (0.4, "3")])
def test_a_full_queue_says_when_it_will_have_been_worked_off(
    seconds_per_item: float, retry_after: str
) -> None:
    clock = FakeClock()

    async def scenario() -> None:
        def step(items: list[int]) -> list[int | ServiceError]:
            clock.now_s += seconds_per_item * len(items)
            return list(items)

        batcher = Batcher(step, max_batch_size=2, max_waiting=6, clock=clock)
        await outcomes([submitted(batcher, item) for item in range(6)])
        clock.now_s += 1000  # with nothing to do, which says nothing about its pace
        await submitted(batcher, 0)
        for item in range(6):
            submitted(batcher, item)
        assert len(batcher) == 6
        with pytest.raises(Overloaded) as caught:
            batcher.submit(6, print, is_wanted=lambda: True)
        assert caught.value.headers["Retry-After"] == retry_after
        await batcher.drain()

    run(scenario())
