"""Any sequence of requests to one engine, against a small model of what sessions promise."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model.step_spec import StepSpec
from service.engine.block import Block
from service.errors import (
    Invalid,
    Overloaded,
    ServiceError,
    SessionLost,
    StepConflict,
    UnknownSession,
)
from tamiyo_client.noise import gumbel_noise, row_seed
from tests.service.fakes import Bench, Stepped, single, vector
from tests.specs import TINY_LSTMS, TINY_MLPS, TINY_V1

CAPACITY = 8
MAX_BATCH_SIZE = 4
MAX_ROWS = 5
IDLE_S = 10.0
SINGLES, VECTORS = "abc", "vw"
SEEDS = (1, 2)


@dataclass(frozen=True)
class Request:
    """One that a client might send; `ahead` is how far its step is from the one that is due."""

    name: str | None
    is_vector: bool
    xs: tuple[float, ...]
    starts: tuple[bool, ...]
    poison: int | None
    deterministic: bool
    run: str | None
    ahead: int | None
    seed: int | None
    seeds: tuple[int, ...] | None

    @property
    def starts_all(self) -> bool:
        return all(self.starts)

    def content(self) -> tuple[Any, ...]:
        """What a retry has in common with what it repeats."""
        more = (self.starts, self.seeds) if self.is_vector else ()
        return (self.xs, self.poison, self.deterministic, *more)

    def block(self, spec: StepSpec, step: int | None) -> Block:
        starts = self.starts_all if self.starts_all or not any(self.starts) else self.starts
        fields: dict[str, Any] = {
            "deterministic": self.deterministic,
            "run": self.run,
            "step": step,
            "starts": starts if isinstance(starts, bool) else np.array(starts),
            "seed": self.seed,
        }
        if not self.is_vector:
            poisoned = self.poison is not None
            return single(spec, self.xs[0], self.name, is_poison=poisoned, **fields)
        if self.seeds is not None:
            fields["seeds"] = np.array(self.seeds, dtype=np.uint64)
        poison = [] if self.poison is None else [self.poison]
        return vector(spec, self.xs, self.name, poison=poison, **fields)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    name = draw(st.sampled_from([*SINGLES, *VECTORS, *VECTORS, None]))
    often, rarely = st.sampled_from([False] * 3 + [True]), st.sampled_from([False] * 11 + [True])
    is_vector = (name or draw(st.sampled_from("av"))) in VECTORS
    if draw(rarely):
        is_vector = not is_vector
    num_rows = draw(st.integers(1, MAX_ROWS)) if is_vector else 1
    if name == "v" and is_vector and not draw(often):
        num_rows = 3  # so that runs go on
    starts = [draw(st.booleans())] * num_rows
    if is_vector and draw(often):
        starts = draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows))
    seed = draw(st.sampled_from([None, None, *SEEDS]))
    seeds = None
    if is_vector and seed is None and draw(often):
        seeds = tuple(draw(st.lists(st.sampled_from([3, 4]), min_size=num_rows, max_size=num_rows)))
    ahead = draw(st.sampled_from([None, -2, -1, 0, 0, 0, 1]))
    return Request(
        name,
        is_vector,
        xs=tuple(draw(st.lists(st.sampled_from([1, 2]), min_size=num_rows, max_size=num_rows))),
        starts=tuple(starts),
        poison=draw(st.integers(0, num_rows - 1)) if draw(rarely) else None,
        deterministic=draw(often),
        run=None if name is None else draw(st.sampled_from([None, None, "p", "q"])),
        ahead=ahead,
        seed=seed,
        seeds=seeds,
    )


@dataclass
class Environment:
    """One row, as its own client would tell it; a seed of None is the server's choice."""

    seed: int | None
    num_episodes: int = 0
    step: int = 0
    sum: float = 0.0


@dataclass
class Run:
    """A session's run, as a client that saw every answer would tell it."""

    is_vector: bool
    name: str | None
    seed: int | None
    environments: list[Environment]
    previous: str | None = None
    next_step: int = 0
    used_s: float = 0.0
    last_content: tuple[Any, ...] = ()
    last_answer: Stepped | None = None


REPLAY = "replay"


@dataclass
class Model:
    """What is promised: who is live, the least recently used first, and who was lost.

    A policy that `remembers` nothing knows the last observation alone; its noise tells steps apart.
    """

    remembers: bool = True
    live: dict[str, Run] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)

    def expected(self, request: Request, step: int | None) -> type[ServiceError] | Run | str:
        """The error's type, "replay", or the run that goes on; it is as if nobody else were."""
        if request.name is None:
            return Run(request.is_vector, None, request.seed, [])
        running = self.live.get(request.name)
        if running is not None and running.is_vector != request.is_vector:
            return StepConflict
        if request.starts_all and not step and not self.is_within(running, request, step):
            if running is not None and request.run and request.run == running.previous:
                return StepConflict
            previous = None if running is None else running.name
            return Run(request.is_vector, request.run, request.seed, [], previous)
        if running is None:
            is_lost = request.name in self.lost or (step or 0) > 0
            return SessionLost if is_lost else UnknownSession
        if len(request.xs) != len(running.environments):
            return Invalid
        if request.run not in (None, running.name) or request.seed not in (None, running.seed):
            return StepConflict
        if request.starts_all and (request.run or not request.is_vector) and step is None:
            step = 0  # a first request, sent again or late
        if step in (None, running.next_step):
            return running
        is_last = step == running.next_step - 1
        return REPLAY if is_last and request.content() == running.last_content else StepConflict

    @staticmethod
    def is_within(running: Run | None, request: Request, step: int | None) -> bool:
        """Whether a start of every row is not a new run's."""
        if running is None:
            return False
        if request.run is not None:
            return request.run == running.name
        if step is None:
            return request.is_vector
        return running.next_step == 1

    def go_on(self, run: Run, request: Request) -> None:
        if not run.environments:
            run.environments = [Environment(None, -1) for _ in request.xs]
        for row, (environment, x) in enumerate(zip(run.environments, request.xs, strict=True)):
            if run.next_step == 0 or (request.is_vector and request.starts[row]):
                environment.num_episodes += 1
                environment.seed = self.seed(run, request, row, environment.num_episodes)
                environment.step, environment.sum = 0, 0.0
            environment.sum = x + (environment.sum if self.remembers else 0.0)
            environment.step += 1
        run.next_step += 1
        run.last_content = request.content()

    @staticmethod
    def seed(run: Run, request: Request, row: int, episode: int) -> int | None:
        if request.seeds is not None:
            return request.seeds[row]
        if run.seed is None or not request.is_vector:
            return run.seed
        return int(row_seed(run.seed, np.array(row), np.array(episode)))

    def num_rows(self) -> int:
        return sum(len(run.environments) for run in self.live.values())

    def lose(self, name: str) -> None:
        del self.live[name]
        self.lost.add(name)


class SessionContract(RuleBasedStateMachine):
    spec: StepSpec

    @initialize(turns=st.sampled_from([None, 2]))
    def an_empty_server(self, turns: int | None) -> None:
        self.bench = Bench(
            self.spec,
            capacity=CAPACITY,
            idle_timeout_s=IDLE_S,
            buckets=(1, 2, MAX_BATCH_SIZE),
            turns=turns,
        )
        self.model = Model(remembers=bool(self.spec.states))
        self.held: Counter[str] = Counter()  # by those that the machine says wait
        self.unseeded: set[tuple[str, tuple[float, ...]]] = set()

    @rule(wave=st.lists(requests(), min_size=1, max_size=5))
    def requests_at_once(self, wave: list[Request]) -> None:
        steps = [self.step_of(request) for request in wave]
        blocks = [request.block(self.spec, step) for request, step in zip(wave, steps, strict=True)]
        if any(request.name is not None for request in wave):
            self.forget_the_idle()
        self.bench.settled.clear()
        answers = self.bench.take(*blocks)
        numbers = {id(block): number for number, block in enumerate(blocks)}
        order = [numbers[id(block)] for block in self.bench.settled]
        assert sorted(order) == list(range(len(wave)))
        waiting = Counter(request.name for request in wave if request.name is not None)
        claims = self.claims(wave)
        for at in order:
            request = wave[at]
            earlier = [n for n in range(at) if wave[n].name == request.name is not None]
            assert all(order.index(n) < order.index(at) for n in earlier)
            expected = self.model.expected(request, steps[at])
            others = {name for name in waiting + self.held if name != request.name}
            self.compare(request, steps[at], expected, answers[at], others, claims)
            if request.name is not None:
                waiting = waiting - Counter([request.name])
        self.bench.check_rows()

    def step_of(self, request: Request) -> int | None:
        if request.ahead is None:
            return None
        running = None if request.name is None else self.model.live.get(request.name)
        step = max(0, (running.next_step if running else 0) + request.ahead)
        # The codec refuses any other.
        return 0 if request.starts_all and not request.is_vector and request.name else step

    def claims(self, wave: list[Request]) -> int:
        """The rows that are not to be had while the wave's requests, and the held, wait."""
        names = {request.name for request in wave if request.name is not None} | set(+self.held)
        of_name = {
            name: max(
                [len(request.xs) for request in wave if request.name == name]
                + [len(self.model.live[name].environments) if name in self.model.live else 0]
            )
            for name in names
        }
        return sum(of_name.values())

    def compare(
        self,
        request: Request,
        step: int | None,
        expected: type[ServiceError] | Run | str,
        answer: Stepped | ServiceError,
        others: set[str],
        claims: int,
    ) -> None:
        begins = isinstance(expected, Run) and expected.next_step == 0 and request.name is not None
        if begins and isinstance(answer, Overloaded):
            assert claims > CAPACITY
            return
        if isinstance(expected, Run) and self.bench.loaded.failure is not None:
            assert type(answer) is ServiceError
            return
        if isinstance(expected, Run) and request.poison is not None:
            expected = Invalid
            assert "has not moved" in str(answer)
        if isinstance(expected, type):
            assert type(answer) is expected
            return
        assert isinstance(answer, Stepped)
        if isinstance(expected, str):
            assert request.name is not None
            running = self.model.live[request.name]
            assert running.last_answer is not None
            assert answer == running.last_answer._replace(is_replay=True)
            self.use(request.name, running, others)
            return
        assert not answer.is_replay
        if request.name is None:
            self.model.go_on(expected, request)
            assert answer.value == list(request.xs)
            return
        self.model.go_on(expected, request)
        assert answer.step == expected.next_step - 1
        assert answer.value == [environment.sum for environment in expected.environments]
        self.compare_noise(request.name, request, expected, answer)
        expected.last_answer = answer
        self.use(request.name, expected, others)

    def compare_noise(self, name: str, request: Request, run: Run, answer: Stepped) -> None:
        for environment, log_prob in zip(run.environments, answer.log_prob, strict=True):
            if request.deterministic:
                assert not any(log_prob)
            elif environment.seed is not None:
                assert log_prob == self.most_noise(environment.seed, environment.step - 1)
            elif environment.step == 1 and run.name is None:
                drawn = (name, tuple(log_prob))
                assert drawn not in self.unseeded, "an episode has another's noise"
                self.unseeded.add(drawn)

    def most_noise(self, seed: int, step: int) -> list[float]:
        seeds, steps = np.array([seed], np.uint64), np.array([step], np.uint64)
        (noise,) = gumbel_noise(seeds, steps, self.spec.num_choices)
        heads = np.split(noise, np.cumsum(self.spec.head_sizes)[:-1])
        return [float(head.max()) for head in heads]

    def use(self, name: str, run: Run, others: set[str]) -> None:
        """Whoever waits keeps his rows: of the rest, those least recently used make room."""
        run.used_s = self.bench.clock.now_s
        self.model.live.pop(name, None)
        self.model.lost.discard(name)
        self.model.live[name] = run
        while self.model.num_rows() > CAPACITY:
            self.model.lose(next(n for n in self.model.live if n not in others and n != name))

    def forget_the_idle(self) -> None:
        for name, run in list(self.model.live.items()):
            if run.used_s <= self.bench.clock.now_s - IDLE_S and not self.held[name]:
                self.model.lose(name)

    @rule(seconds=st.sampled_from([1.0, 4.0, IDLE_S]))
    def time_passes(self, seconds: float) -> None:
        self.bench.clock.now_s += seconds

    @rule(name=st.sampled_from(SINGLES + VECTORS))
    def an_end(self, name: str) -> None:
        self.forget_the_idle()
        if name in self.model.live:
            self.bench.sessions.end(name)
            del self.model.live[name]
            return
        error = SessionLost if name in self.model.lost else UnknownSession
        with pytest.raises(error):
            self.bench.sessions.end(name)

    @rule(name=st.sampled_from(SINGLES + VECTORS))
    def another_request_waits(self, name: str) -> None:
        self.forget_the_idle()
        self.bench.sessions.hold(name)
        self.held[name] += 1

    @precondition(lambda self: +self.held)
    @rule(data=st.data())
    def it_waits_no_more(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(+self.held)))
        self.bench.sessions.release(name)
        self.held[name] -= 1

    @rule()
    def a_restart(self) -> None:
        """Another server goes on from the last snapshot: no client can tell, whoever waited."""
        before_s = self.bench.clock.now_s
        with TemporaryDirectory() as directory:
            self.bench = self.bench.restarted(Path(directory) / "sessions")
        for run in self.model.live.values():
            run.used_s += self.bench.clock.now_s - before_s
        self.held.clear()

    @rule(wave=st.lists(requests(), min_size=1, max_size=4))
    def a_failing_policy(self, wave: list[Request]) -> None:
        self.bench.loaded.failure = RuntimeError("broken")
        self.requests_at_once(wave)
        self.bench.loaded.failure = None

    @invariant()
    def as_many_rows_live_as_should(self) -> None:
        assert len(self.bench.sessions) == len(self.model.live)
        assert self.bench.sessions.num_rows == self.model.num_rows() <= CAPACITY


@pytest.mark.parametrize(
    ("spec", "max_examples"),
    [
        pytest.param(TINY_V1, 80, id="two arrays"),
        pytest.param(TINY_MLPS, 30, id="no state"),
        pytest.param(TINY_LSTMS, 30, id="four arrays"),
    ],
)
def test_any_sequence_of_requests_keeps_the_promises_of_sessions(
    spec: StepSpec, max_examples: int
) -> None:
    class OnThisSpec(SessionContract):
        pass

    OnThisSpec.spec = spec
    case = OnThisSpec.TestCase
    case.settings = settings(max_examples=max_examples, stateful_step_count=30, deadline=None)
    case().runTest()
