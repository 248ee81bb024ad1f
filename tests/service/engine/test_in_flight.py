"""A device that works for some turns of the loop, and what may happen meanwhile."""

import asyncio
from collections.abc import Coroutine
from math import inf
from typing import Any

import pytest

from model.spec import PolicySpec
from service.engine.batcher import Batcher
from service.errors import (
    DeadlineExceeded,
    Draining,
    Invalid,
    Overloaded,
    ServiceError,
    SessionLost,
    UnknownSession,
)
from tests.service.fakes import Bench, Stepped, run, single, vector

IDLE_S = 60.0
MANY_TURNS = 20


@pytest.fixture
def bench(spec: PolicySpec) -> Bench:
    """Its device works until it is told to finish."""
    return Bench(spec, capacity=4, idle_timeout_s=IDLE_S, buckets=(1, 2, 4), turns=inf)


async def some_turns() -> None:
    for _ in range(MANY_TURNS):
        await asyncio.sleep(0)


async def finish(bench: Bench) -> None:
    """The batch under way comes back, and the next one may begin."""
    bench.device.finish()
    await some_turns()


async def finish_all(bench: Bench, batcher: Batcher) -> None:
    """Everything that waits is answered."""
    drained = asyncio.ensure_future(batcher.drain())
    while not drained.done():
        await finish(bench)


def value_of(answer: "asyncio.Future[Stepped | ServiceError]") -> list[float]:
    stepped = answer.result()
    assert isinstance(stepped, Stepped), stepped
    return stepped.value


def in_a_loop(scenario: Coroutine[Any, Any, None], bench: Bench) -> None:
    run(scenario)
    bench.check_rows()


def test_a_batch_is_answered_when_the_device_is_done_and_not_before(bench: Bench) -> None:
    async def scenario() -> None:
        answer = bench.submit(bench.batcher(), single(bench.spec, 3, "a", starts=True))
        await some_turns()
        assert not answer.done()
        assert len(bench.sessions) == 0
        await finish(bench)
        assert value_of(answer) == [3]
        assert len(bench.sessions) == 1

    in_a_loop(scenario(), bench)


def test_what_is_read_meanwhile_waits_and_forms_the_next_batch_in_order(bench: Bench) -> None:
    async def scenario() -> None:
        batcher = bench.batcher()
        answers = [bench.submit(batcher, single(bench.spec, 1, "a", starts=True))]
        await some_turns()
        for x, name in ((2, "a"), (3, "b"), (4, "c"), (5, "a")):
            starts = name != "a"
            answers.append(bench.submit(batcher, single(bench.spec, x, name, starts=starts)))
            await some_turns()
        assert len(batcher) == 4
        assert bench.loaded.batch_sizes == []
        for num_done in (1, 4, 5):
            await finish(bench)
            assert [answer.done() for answer in answers] == [True] * num_done + [False] * (
                5 - num_done
            )
        assert [value_of(answer) for answer in answers] == [[1], [3], [3], [4], [8]]
        assert bench.observed == [1, 3, 1]

    in_a_loop(scenario(), bench)


def test_a_large_block_goes_on_before_what_is_read_meanwhile(bench: Bench) -> None:
    async def scenario() -> None:
        batcher = bench.batcher()
        large = bench.submit(batcher, vector(bench.spec, range(9)))
        await some_turns()
        behind = [bench.submit(batcher, single(bench.spec, x)) for x in range(4)]
        await finish(bench)
        assert len(batcher) == 5
        await finish_all(bench, batcher)
        assert value_of(large) == list(range(9))
        assert [value_of(answer) for answer in behind] == [[0], [1], [2], [3]]
        assert bench.observed == [4, 4, 4, 1]

    in_a_loop(scenario(), bench)


def test_whose_time_is_up_meanwhile_is_told_when_the_device_is_done(bench: Bench) -> None:
    async def scenario() -> None:
        batcher = bench.batcher()
        working = bench.submit(batcher, single(bench.spec, 1, "a", starts=True), timeout_s=0.5)
        await some_turns()
        late = [
            bench.submit(batcher, single(bench.spec, 2, name, starts=True), timeout_s=0.5)
            for name in ("a", "b", None)
        ]
        patient = bench.submit(batcher, single(bench.spec, 3, "a"), timeout_s=2.0)
        await some_turns()
        assert not any(answer.done() for answer in late)
        bench.clock.now_s += 1.0
        await finish(bench)
        assert [type(answer.result()) for answer in late] == [DeadlineExceeded] * 3
        assert value_of(working) == [1]
        assert not patient.done()
        await finish_all(bench, batcher)
        assert value_of(patient) == [4]

    in_a_loop(scenario(), bench)


def test_a_session_that_steps_is_neither_given_up_nor_idle(bench: Bench) -> None:
    async def scenario() -> None:
        batcher = bench.batcher()
        start = bench.submit(batcher, vector(bench.spec, [1, 2, 3], "v", starts=True))
        await some_turns()
        await finish(bench)
        step = bench.submit(batcher, vector(bench.spec, [1, 1, 1], "v"))
        await some_turns()
        bench.clock.now_s += IDLE_S
        assert "v" in bench.sessions
        too_many = bench.submit(batcher, vector(bench.spec, [7, 7], "w", starts=True))
        again = bench.submit(batcher, vector(bench.spec, [1, 1, 1], "v"))
        await finish_all(bench, batcher)
        assert value_of(start) == [1, 2, 3]
        assert value_of(step) == [2, 3, 4]
        assert isinstance(too_many.result(), Overloaded)
        assert value_of(again) == [3, 4, 5]

    in_a_loop(scenario(), bench)


def test_a_session_ended_meanwhile_answers_its_step_and_is_no_more(bench: Bench) -> None:
    async def scenario() -> None:
        batcher = bench.batcher()
        await started(bench, batcher, "a")
        step = bench.submit(batcher, single(bench.spec, 10, "a"))
        behind = bench.submit(batcher, single(bench.spec, 100, "a"))
        await some_turns()
        bench.sessions.end("a")
        restart = bench.submit(batcher, single(bench.spec, 5, "a", starts=True))
        with pytest.raises(UnknownSession):
            bench.sessions.end("a")
        await finish_all(bench, batcher)
        assert value_of(step) == [11]
        assert isinstance(behind.result(), UnknownSession)
        assert value_of(restart) == [5]
        assert len(bench.sessions) == 1

    in_a_loop(scenario(), bench)


async def started(bench: Bench, batcher: Batcher, name: str) -> None:
    start = bench.submit(batcher, single(bench.spec, 1, name, starts=True))
    await some_turns()
    await finish(bench)
    assert value_of(start) == [1]


@pytest.mark.parametrize("is_poison", [False, True])
def test_a_large_block_s_session_may_be_ended_between_its_parts(
    spec: PolicySpec, is_poison: bool
) -> None:
    bench = Bench(spec, capacity=9, buckets=(1, 2, 4), turns=inf)

    async def scenario() -> None:
        batcher = bench.batcher()
        start = bench.submit(batcher, vector(spec, [1] * 9, "v", starts=True))
        await some_turns()
        for _ in range(3):
            await finish(bench)
        poison = [8] if is_poison else []
        step = bench.submit(batcher, vector(spec, [1] * 9, "v", poison=poison))
        await some_turns()
        await finish(bench)
        bench.sessions.end("v")
        await finish(bench)
        assert not step.done()
        await finish(bench)
        assert value_of(start) == [1] * 9
        if is_poison:
            assert isinstance(step.result(), Invalid)
        else:
            assert value_of(step) == [2] * 9
        assert len(bench.sessions) == bench.sessions.num_rows == 0

    in_a_loop(scenario(), bench)


def test_a_restart_whose_session_is_ended_meanwhile_begins_all_the_same(bench: Bench) -> None:
    async def scenario() -> None:
        batcher = bench.batcher()
        await started(bench, batcher, "a")
        restart = bench.submit(batcher, single(bench.spec, 5, "a", starts=True))
        await some_turns()
        bench.sessions.end("a")
        await finish(bench)
        step = bench.submit(batcher, single(bench.spec, 1, "a", step=1))
        await finish_all(bench, batcher)
        assert value_of(restart) == [5]
        assert value_of(step) == [6]

    in_a_loop(scenario(), bench)
    assert bench.sessions.events["started"] == 2


def test_a_restart_that_fails_while_its_session_is_ended_leaves_nothing(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        batcher = bench.batcher()
        await started(bench, batcher, "a")
        restart = bench.submit(batcher, single(bench.spec, 5, "a", starts=True))
        await some_turns()
        bench.sessions.end("a")
        bench.loaded.failure = RuntimeError("broken")
        await finish(bench)
        assert str(restart.result()) == "internal error"

    in_a_loop(scenario(), bench)
    assert bench.sessions.num_rows == 0
    assert "broken" in caplog.text


def test_a_device_that_fails_leaves_every_session_as_it_was(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        batcher = bench.batcher()
        for name in "ab":
            await started(bench, batcher, name)
        steps = [bench.submit(batcher, single(bench.spec, 10, name, step=1)) for name in "ab"]
        await some_turns()
        behind = bench.submit(batcher, single(bench.spec, 10, "a", step=1))
        bench.loaded.failure = RuntimeError("broken")
        await finish(bench)
        assert [str(step.result()) for step in steps] == ["internal error"] * 2
        bench.loaded.failure = None
        await finish_all(bench, batcher)
        assert value_of(behind) == [11]

    in_a_loop(scenario(), bench)
    assert "a batch of 2 failed" in caplog.text


def test_a_retry_read_meanwhile_waits_for_the_one_answer(bench: Bench) -> None:
    async def scenario() -> None:
        batcher = bench.batcher()
        await started(bench, batcher, "a")
        step = bench.submit(batcher, single(bench.spec, 10, "a", step=1))
        await some_turns()
        retry = bench.submit(batcher, single(bench.spec, 10, "a", step=1))
        await some_turns()
        assert not retry.done()
        await finish(bench)
        answer = step.result()
        assert isinstance(answer, Stepped)
        assert retry.result() == answer._replace(is_replay=True)
        assert bench.observed == [1, 1]

    in_a_loop(scenario(), bench)


def test_sessions_that_came_back_meanwhile_keep_their_rows_and_no_more_than_fit_stay(
    bench: Bench,
) -> None:
    """A run begins in the room of one that then asks for it: one too many, until it is through."""

    async def scenario() -> None:
        batcher = bench.batcher()
        for name in "abcd":
            await started(bench, batcher, name)
        for number in range(100):
            start = bench.submit(batcher, single(bench.spec, 5, f"new {number}", starts=True))
            await some_turns()
            steps = [bench.submit(batcher, single(bench.spec, 1, name)) for name in "abcd"]
            await finish(bench)
            assert bench.sessions.num_rows == 5
            await finish(bench)
            assert value_of(start) == [5]
            assert [value_of(step) for step in steps] == [[number + 2]] * 4
            assert bench.sessions.num_rows == 4
        lost = bench.submit(batcher, single(bench.spec, 1, "new 99"))
        await finish_all(bench, batcher)
        assert isinstance(lost.result(), SessionLost)

    in_a_loop(scenario(), bench)


def test_drain_waits_for_the_device(bench: Bench) -> None:
    async def scenario() -> None:
        batcher = bench.batcher()
        working = bench.submit(batcher, vector(bench.spec, [1] * 5))
        await some_turns()
        drained = asyncio.ensure_future(batcher.drain())
        await some_turns()
        assert not drained.done()
        with pytest.raises(Draining):
            bench.submit(batcher, single(bench.spec))
        await finish(bench)
        assert not drained.done()
        await finish(bench)
        assert drained.done()
        assert value_of(working) == [1] * 5

    in_a_loop(scenario(), bench)
