import asyncio
import threading
from collections.abc import Callable

import pytest

from service.engine.warm_up import WarmUp
from service.errors import NotReady
from tests.service.fakes import TIMEOUT_S, run


class Work:
    """What a warm-up runs: it began, goes on until `may_end`, and was wanted at its end or not."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.began, self.may_end, self.ended = (threading.Event() for _ in range(3))
        self.was_wanted: bool | None = None
        self.thread: threading.Thread | None = None
        self._failure = failure

    def __call__(self, is_wanted: Callable[[], bool]) -> None:
        self.thread = threading.current_thread()
        self.began.set()
        assert self.may_end.wait(TIMEOUT_S)
        self.was_wanted = is_wanted()
        self.ended.set()
        if self._failure is not None:
            raise self._failure


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, TIMEOUT_S)


def test_it_is_not_ready_before_it_starts() -> None:
    warm_up = WarmUp(Work())
    assert not warm_up.is_running()
    with pytest.raises(NotReady, match="still warming up"):
        warm_up.check()
    warm_up.stop()


def test_it_is_ready_once_its_work_has_ended_and_not_before() -> None:
    async def scenario() -> None:
        work = Work()
        warm_up = WarmUp(work)
        warm_up.start()
        await until(work.began)
        assert warm_up.is_running()
        with pytest.raises(NotReady):
            warm_up.check()
        work.may_end.set()
        assert warm_up.done is not None
        await warm_up.done
        warm_up.check()
        assert work.was_wanted

    run(scenario())


def test_the_loop_goes_on_meanwhile_as_it_works_in_a_thread_of_its_own() -> None:
    async def scenario() -> None:
        work = Work()
        warm_up = WarmUp(work)
        warm_up.start()
        await until(work.began)
        assert work.thread is not threading.current_thread()
        assert work.thread is not None
        assert work.thread.daemon, "the process would wait for it at its end"
        work.may_end.set()
        assert warm_up.done is not None
        await warm_up.done

    run(scenario())


def test_what_went_wrong_is_raised_to_who_waits_and_it_is_never_ready() -> None:
    async def scenario() -> None:
        work = Work(RuntimeError("no kernel"))
        work.may_end.set()
        warm_up = WarmUp(work)
        warm_up.start()
        assert warm_up.done is not None
        with pytest.raises(RuntimeError, match="no kernel"):
            await warm_up.done
        with pytest.raises(NotReady):
            warm_up.check()

    run(scenario())


@pytest.mark.parametrize("failure", [None, RuntimeError("no kernel")])
def test_one_that_is_stopped_hears_that_it_is_not_wanted_and_is_never_ready(
    failure: Exception | None,
) -> None:
    async def scenario() -> None:
        work = Work(failure)
        warm_up = WarmUp(work)
        warm_up.start()
        await until(work.began)
        warm_up.stop()
        assert warm_up.is_running()
        work.may_end.set()
        await until(work.ended)
        assert work.was_wanted is False
        with pytest.raises(NotReady):
            warm_up.check()
        assert work.thread is not None
        await asyncio.to_thread(work.thread.join, TIMEOUT_S)
        assert not warm_up.is_running()

    run(scenario())


def test_stopping_one_that_has_ended_leaves_it_ready() -> None:
    async def scenario() -> None:
        work = Work()
        work.may_end.set()
        warm_up = WarmUp(work)
        warm_up.start()
        assert warm_up.done is not None
        await warm_up.done
        warm_up.stop()
        warm_up.check()

    run(scenario())


def test_a_loop_that_ends_first_is_no_harm() -> None:
    work = Work()

    async def scenario() -> None:
        WarmUp(work).start()
        await until(work.began)

    run(scenario())
    work.may_end.set()
    assert work.thread is not None
    work.thread.join(TIMEOUT_S)
    assert not work.thread.is_alive()
