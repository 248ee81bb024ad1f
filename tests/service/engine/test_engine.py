"""The whole engine, as the HTTP side has it: rows for all that may be under way at once."""

import asyncio
import threading
from math import inf
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from export.manifest import Manifest
from model.spec import PolicySpec
from service.engine.block import Answer, Block
from service.engine.engine import Engine
from service.engine.stepper import Stepper
from service.errors import Draining, ServiceError
from service.settings import Settings
from tests.service.fakes import (
    TIMEOUT_S,
    Bench,
    Stepped,
    SummingRuntime,
    run,
    single,
    vector,
)

LARGEST = 16


def engine_of(artifact: Path, manifest: Manifest, spec: PolicySpec, **settings: Any) -> Engine:
    given = {"max_rows": LARGEST, "max_sessions": LARGEST, "max_batch_size": 4} | settings
    return Engine(manifest, SummingRuntime(spec), Settings(artifact=artifact, **given))


async def told(engine: Engine, *blocks: Block) -> list[list[float] | ServiceError]:
    """What blocks submitted at once are answered: their values."""
    loop = asyncio.get_running_loop()
    futures: list[asyncio.Future[list[float] | ServiceError]] = []

    def submit(block: Block) -> None:
        future: asyncio.Future[list[float] | ServiceError] = loop.create_future()
        futures.append(future)

        def settle(answer: Answer | ServiceError) -> None:
            if isinstance(answer, ServiceError):
                future.set_result(answer)
            else:
                future.set_result(answer.array("value").tolist())

        engine.submit(block, settle, is_wanted=lambda: True, timeout_s=60.0)

    for block in blocks:
        submit(block)
    return [await future for future in futures]


def carrying(spec: PolicySpec, num_rows: int) -> Block:
    shape = (num_rows, spec.num_layers, spec.hidden_dim)
    ones = np.ones(shape, dtype=np.float32)
    return vector(spec, [1.0] * num_rows, None, state=(ones, ones), step=1)


@pytest.mark.parametrize("others", [(LARGEST,), (LARGEST - 1,) * 2, (9, LARGEST - 1, LARGEST, 7)])
def test_there_are_rows_for_all_that_can_be_under_way(
    artifact: Path, manifest: Manifest, spec: PolicySpec, others: tuple[int, ...]
) -> None:
    """The table full, and stateless blocks that take two rows each, large ones in parts."""

    async def scenario() -> None:
        engine = engine_of(artifact, manifest, spec)
        full = vector(spec, range(LARGEST), "full", starts=True)
        assert await told(engine, full) == [list(range(LARGEST))]
        for _ in range(3):
            blocks = [carrying(spec, number) for number in others]
            assert await told(engine, *blocks) == [[2.0] * number for number in others]
        again = vector(spec, [0.0] * LARGEST, "full")
        assert await told(engine, again) == [list(range(LARGEST))]

    run(scenario())


def test_there_are_rows_where_every_session_comes_back_as_runs_begin(
    artifact: Path, manifest: Manifest, spec: PolicySpec
) -> None:
    """So that none of them can be given up for those; and stateless blocks come behind."""
    capacity, largest = 40, 9
    bench = Bench(spec, capacity=capacity, buckets=(1, 2), turns=0)
    bench.values(*[single(spec, 1, f"{n}", starts=True) for n in range(capacity)])
    bench.device.turns = inf
    begun = {"x": 9, "v": 1, "w": 1, "y": 8}
    num_used: list[int] = []

    async def scenario() -> None:
        batcher = bench.batcher()
        blocks = [vector(spec, [1.0] * n, name, starts=True) for name, n in begun.items()]
        blocks += [vector(spec, [1.0] * n, None, step=1) for n in (1, 1, 8, 1, 1, 9)]
        answers = [bench.submit(batcher, block) for block in blocks]
        has_begun = False
        while not all(answer.done() for answer in answers):
            await asyncio.sleep(0)
            num_used.append(bench.num_rows - bench.rows._num_free)
            if not has_begun and bench.stepper._sessions._num_reserved == sum(begun.values()):
                has_begun = True
                blocks = [single(spec, 1, f"{n}") for n in range(capacity)]
                blocks += [vector(spec, [1.0] * n, name) for name, n in begun.items()]
                answers += [bench.submit(batcher, block) for block in blocks]
            if bench.device._queue:
                bench.device.finish()
        assert all(isinstance(answer.result(), Stepped) for answer in answers)

    run(scenario())
    limits = {"max_sessions": capacity, "max_rows": largest, "max_batch_size": 2}
    num_rows = engine_of(artifact, manifest, spec, **limits).runtime.zero_row
    assert capacity < max(num_used) <= num_rows


@pytest.mark.parametrize("drain_s", [0, 1])
def test_an_engine_that_stops_takes_nothing_more_even_where_no_time_is_left(
    artifact: Path, manifest: Manifest, spec: PolicySpec, drain_s: int
) -> None:
    async def scenario() -> None:
        engine = engine_of(artifact, manifest, spec, drain_s=drain_s)
        engine.start()
        assert engine.warm_up.done is not None
        await engine.warm_up.done
        await engine.stop()
        with pytest.raises(Draining):
            engine.check_open()
        with pytest.raises(Draining):
            await told(engine, single(spec, 1.0))

    run(scenario())


def test_a_step_beside_the_loop_is_told_as_long_as_one_runs(
    artifact: Path, manifest: Manifest, spec: PolicySpec
) -> None:
    """The process's end does not wait for it."""
    loaded = SummingRuntime(spec)
    gate = loaded.gate = threading.Event()
    engine = Engine(manifest, loaded, Settings(artifact=artifact))
    done: SimpleQueue[None] = SimpleQueue()
    engine.runtime.when_done = lambda: done.put(None)
    assert not engine.is_stepping()
    engine.runtime.launch(np.array([0]), np.array([1]), beside_s=0.0)
    assert engine.is_stepping()
    gate.set()
    done.get(timeout=TIMEOUT_S)
    assert not engine.is_stepping()


def test_a_block_too_many_is_refused_and_takes_no_row_along(
    artifact: Path, manifest: Manifest, spec: PolicySpec
) -> None:
    async def scenario() -> None:
        engine = engine_of(artifact, manifest, spec)
        steps = engine.batcher._steps
        assert isinstance(steps, Stepper)
        rows = steps._rows
        taken = rows.reserve(rows._num_free - LARGEST)
        (refused,) = await told(engine, carrying(spec, LARGEST))
        assert isinstance(refused, ServiceError)
        assert refused.error_type == "overloaded"
        assert rows._num_free == LARGEST
        rows.give_back(taken)
        assert await told(engine, carrying(spec, LARGEST)) == [[2.0] * LARGEST]

    run(scenario())


@pytest.mark.parametrize("limit", ["max_sessions", "max_waiting"])
def test_no_request_may_have_more_rows_than_can_live_or_wait(
    artifact: Path, manifest: Manifest, spec: PolicySpec, limit: str
) -> None:
    async def scenario() -> None:
        assert engine_of(artifact, manifest, spec, **{limit: 5}).max_rows == 5

    run(scenario())


def test_what_a_batch_was_made_of_is_not_kept(
    artifact: Path, manifest: Manifest, spec: PolicySpec
) -> None:
    async def scenario() -> None:
        engine = engine_of(artifact, manifest, spec)
        await told(engine, single(spec, 1.0, "a", starts=True))
        steps = engine.batcher._steps
        assert isinstance(steps, Stepper)
        assert not steps._launched
        assert not steps._collected

    run(scenario())
