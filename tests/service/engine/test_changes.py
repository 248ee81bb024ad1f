"""Other weights between two batches, while blocks of any size come and go."""

import asyncio
from collections.abc import Callable
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.spec import PolicySpec
from service.engine.batcher import Batcher
from service.engine.block import Block
from service.errors import ServiceError, SessionLost
from tests.service.fakes import Bench, Stepped, run, single, vector

MOST_ROWS = 300
MOST_SESSIONS = 4
MOST_EVENTS = 40
SOME_TURNS = 20


def bench_of(spec: PolicySpec, *, largest_batch: int, turns: float) -> Bench:
    buckets = tuple(size for size in (1, 2, 4, 16, 64) if size <= largest_batch)
    return Bench(
        spec,
        capacity=MOST_SESSIONS * MOST_ROWS,
        buckets=buckets,
        turns=turns,
        largest=MOST_ROWS,
        spare_rows=6 * (MOST_ROWS + largest_batch),
        max_waiting=MOST_EVENTS * MOST_ROWS,
    )


def change_to(
    bench: Bench, scale: int, then: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """What has the fake policy's value be the sum times `scale`, which names the version too."""
    loaded = bench.loaded.with_parameters({"scale": np.array([scale], dtype=np.float32)})
    adopt = bench.runtime.prepare(loaded)

    def change() -> None:
        adopt()
        bench.stepper.policy_version = f"sha256:{scale}"
        then()

    return change


blocks = st.tuples(st.just("block"), st.integers(-1, MOST_SESSIONS - 1), st.integers(1, MOST_ROWS))
pauses = st.tuples(st.just("turns"), st.integers(1, 4), st.just(0))
changes = st.tuples(st.just("change"), st.just(0), st.just(0))
Event = tuple[str, int, int]


class Traffic:
    """Blocks of some sessions, each adding 1 to 5 to its rows' sums, and of nobody.

    A session sends without waiting for its answers: they come in order all the same.
    """

    def __init__(self, bench: Bench, batcher: Batcher, sizes: list[int]) -> None:
        self._bench = bench
        self._batcher = batcher
        self._sizes = sizes
        self._sums = [np.zeros(size, dtype=np.int64) for size in sizes]
        self._num_sent = 0
        self.sent: list[tuple[Block, list[int], asyncio.Future[Stepped | ServiceError]]] = []

    def send(self, session: int, num_rows: int) -> None:
        self._num_sent += 1
        xs = 1 + (np.arange(num_rows if session < 0 else self._sizes[session]) % 5)
        xs = np.roll(xs, self._num_sent)
        if session < 0:
            block, sums = vector(self._bench.spec, xs.tolist()), xs
        else:
            starts = not self._sums[session].any()
            name = f"session {session}"
            block = vector(self._bench.spec, xs.tolist(), name, starts=starts)
            self._sums[session] = sums = self._sums[session] + xs
        self.sent.append((block, sums.tolist(), self._bench.submit(self._batcher, block)))


@settings(max_examples=100)
@given(
    events=st.lists(st.one_of(blocks, blocks, pauses, changes), min_size=1, max_size=MOST_EVENTS),
    sizes=st.lists(st.integers(1, MOST_ROWS), min_size=MOST_SESSIONS, max_size=MOST_SESSIONS),
    largest_batch=st.sampled_from((4, 64)),
    turns=st.integers(0, 5),
)
def test_no_block_mixes_versions_and_every_answer_names_its_own(
    spec: PolicySpec, events: list[Event], sizes: list[int], largest_batch: int, turns: int
) -> None:
    """Every change happens, in order, and no block is lost or out of its session's order."""
    bench = bench_of(spec, largest_batch=largest_batch, turns=turns)
    bench.stepper.policy_version = "sha256:1"
    made: list[int] = []

    async def scenario() -> list[tuple[Block, list[int], Stepped | ServiceError]]:
        batcher = bench.batcher()
        traffic = Traffic(bench, batcher, sizes)
        pending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        pending.set_result(None)
        number = 1
        for what, one, other in events:
            if what == "block":
                traffic.send(one, other)
            elif what == "turns":
                for _ in range(one):
                    await asyncio.sleep(0)
            else:
                await pending  # there is one at a time
                number += 1
                pending = asyncio.get_running_loop().create_future()

                def done(number: int = number, pending: asyncio.Future[None] = pending) -> None:
                    made.append(number)
                    assert not bench.device._queue, "a batch is under way"
                    pending.set_result(None)

                batcher.between(change_to(bench, number, done))
        await pending
        await batcher.drain()
        return [(block, sums, answer.result()) for block, sums, answer in traffic.sent]

    told = run(scenario())
    num_changes = sum(what == "change" for what, _, _ in events)
    assert made == list(range(2, num_changes + 2))
    scales: dict[int, int] = {}
    for block, sums, answer in told:
        assert isinstance(answer, Stepped), answer
        scales[id(block)] = scale = int(answer.policy_version.removeprefix("sha256:"))
        assert answer.value == [total * scale for total in sums]
    in_order = [scales[id(block)] for block in bench.settled]
    assert len(in_order) == len(told)
    assert in_order == sorted(in_order), "a version served again"


async def some_turns() -> None:
    for _ in range(SOME_TURNS):
        await asyncio.sleep(0)


@pytest.fixture
def bench(spec: PolicySpec) -> Bench:
    """Its device works until it is told to finish."""
    return bench_of(spec, largest_batch=4, turns=inf)


def result(answer: "asyncio.Future[Stepped | ServiceError]") -> tuple[list[float], str]:
    stepped = answer.result()
    assert isinstance(stepped, Stepped), stepped
    return stepped.value, stepped.policy_version


def test_with_nothing_under_way_a_change_is_made_at_once(bench: Bench) -> None:
    async def scenario() -> None:
        batcher = bench.batcher()
        batcher.between(change_to(bench, 2))
        assert bench.stepper.policy_version == "sha256:2"
        answer = bench.submit(batcher, single(bench.spec, 3))
        await some_turns()
        bench.device.finish()
        await some_turns()
        assert result(answer) == ([6], "sha256:2")

    run(scenario())


def test_a_change_waits_for_the_block_that_is_half_run_and_nothing_rides_with_it(
    bench: Bench,
) -> None:
    async def scenario() -> None:
        batcher = bench.batcher()
        large = bench.submit(batcher, vector(bench.spec, range(9)))
        await some_turns()
        late = [bench.submit(batcher, single(bench.spec, x)) for x in (1, 2)]
        batcher.between(change_to(bench, 2))
        for num_done in range(3):
            assert bench.stepper.policy_version == "sha256:0", f"after {num_done} of 3 parts"
            bench.device.finish()
            await some_turns()
        assert result(large) == (list(range(9)), "sha256:0")
        assert bench.stepper.policy_version == "sha256:2"
        bench.device.finish()
        await some_turns()
        assert [result(answer) for answer in late] == [([2], "sha256:2"), ([4], "sha256:2")]
        assert bench.observed == [4, 4, 1, 2]

    run(scenario())


def test_however_much_waits_a_change_waits_for_what_is_under_way_only(spec: PolicySpec) -> None:
    bench = bench_of(spec, largest_batch=4, turns=inf)

    async def scenario() -> None:
        batcher = bench.batcher()
        answers = [bench.submit(batcher, single(spec, 1)) for _ in range(40)]
        await some_turns()
        under_way = len(bench.device._queue)
        batcher.between(change_to(bench, 2))
        for _ in range(under_way):
            assert bench.stepper.policy_version == "sha256:0"
            bench.device.finish()
            await some_turns()
        assert bench.stepper.policy_version == "sha256:2"
        while not all(answer.done() for answer in answers):
            bench.device.finish()
            await some_turns()
        versions = [result(answer)[1] for answer in answers]
        assert versions == ["sha256:0"] * 4 * under_way + ["sha256:2"] * (40 - 4 * under_way)

    run(scenario())


def test_a_batch_that_fails_does_not_keep_a_change_from_being_made(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        batcher = bench.batcher()
        large = bench.submit(batcher, vector(bench.spec, range(9)))
        await some_turns()
        batcher.between(change_to(bench, 2))
        bench.loaded.failure = RuntimeError("broken")
        bench.device.finish()
        await some_turns()
        assert str(large.result()) == "internal error"
        assert bench.stepper.policy_version == "sha256:2"

    run(scenario())
    assert "a batch of 1 failed" in caplog.text


def test_a_stored_answer_names_the_version_that_made_it(bench: Bench) -> None:
    """After a change as well: a retry is answered as the request was."""

    async def scenario() -> None:
        batcher = bench.batcher()
        block = single(bench.spec, 3, "a", starts=True, step=0, run="0")
        first = bench.submit(batcher, block)
        await some_turns()
        bench.device.finish()
        await some_turns()
        batcher.between(change_to(bench, 2))
        again = bench.submit(batcher, block)
        following = bench.submit(batcher, single(bench.spec, 4, "a", step=1))
        await some_turns()
        bench.device.finish()
        await some_turns()
        assert result(again) == result(first) == ([3], "sha256:0")
        assert result(following) == ([14], "sha256:2")

    run(scenario())


def test_draining_makes_the_change_that_was_asked_for(bench: Bench) -> None:
    async def scenario() -> None:
        batcher = bench.batcher()
        answer = bench.submit(batcher, single(bench.spec, 1))
        await some_turns()
        batcher.between(change_to(bench, 2))
        drained = asyncio.ensure_future(batcher.drain())
        bench.device.finish()
        await drained
        assert result(answer) == ([1], "sha256:0")
        assert bench.stepper.policy_version == "sha256:2"

    run(scenario())


def test_a_change_that_gives_up_sessions_is_told_to_what_waits_and_costs_no_row(
    bench: Bench,
) -> None:
    async def scenario() -> None:
        batcher = bench.batcher()
        start = bench.submit(batcher, vector(bench.spec, [1, 2], "a", starts=True))
        await some_turns()
        behind = bench.submit(batcher, vector(bench.spec, [1, 1], "a"))
        other = bench.submit(batcher, single(bench.spec, 7, "b", starts=True))
        batcher.between(change_to(bench, 2, bench.sessions.restart))
        bench.device.finish()
        await some_turns()
        assert result(start) == ([1, 2], "sha256:0")
        bench.device.finish()
        await some_turns()
        assert isinstance(behind.result(), SessionLost)
        assert result(other) == ([14], "sha256:2")
        again = bench.submit(batcher, vector(bench.spec, [4, 5], "a", starts=True))
        await some_turns()
        bench.device.finish()
        await some_turns()
        assert result(again) == ([8, 10], "sha256:2")

    run(scenario())
    assert bench.sessions.events["restarted"] == 1
    bench.check_rows()
