"""Any sequence of requests to one engine, against a small model of what sessions promise."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model.spec import PolicySpec
from service.engine.engine import StepAnswer
from service.errors import Invalid, ServiceError, SessionLost, StepConflict, UnknownSession
from tests.service.fakes import Bench

CAPACITY = 2
IDLE_S = 10.0
NAMES = st.sampled_from("abcd")


@dataclass
class Body:
    x: float
    is_poison: bool
    deterministic: bool

    def key(self) -> tuple[float, bool, bool]:
        return (self.x, self.is_poison, self.deterministic)


@dataclass
class Episode:
    """A running episode, as a client that saw every answer would tell it."""

    name: str | None
    seed: int | None
    used_s: float
    xs: list[float] = field(default_factory=list)
    last_body: tuple[float, bool, bool] | None = None
    last_answer: tuple[list[int], list[float], float] | None = None

    @property
    def next_step(self) -> int:
        return len(self.xs)


class SessionContract(RuleBasedStateMachine):
    """`live` is in order of use, the least recent first; `lost` in the order of loss."""

    spec: PolicySpec

    @initialize()
    def an_empty_server(self) -> None:
        self.bench = Bench(self.spec, capacity=CAPACITY, idle_timeout_s=IDLE_S, buckets=(1, 2))
        self.live: dict[str, Episode] = {}
        self.lost: list[str] = []

    @rule(
        session=NAMES,
        start=st.booleans(),
        episode=st.sampled_from([None, None, "p", "q"]),
        ahead=st.sampled_from([None, -2, -1, 0, 0, 0, 1]),
        seed=st.sampled_from([None, None, 1, 2]),
        body=st.builds(
            Body,
            x=st.sampled_from([1.0, 2.0]),
            is_poison=st.sampled_from([False] * 7 + [True]),
            deterministic=st.booleans(),
        ),
    )
    def a_request(
        self,
        session: str,
        start: bool,
        episode: str | None,
        ahead: int | None,
        seed: int | None,
        body: Body,
    ) -> None:
        """`ahead` is how far the step is from the one that the session would take next."""
        next_step = self.live[session].next_step if session in self.live else 0
        step = None if ahead is None else max(0, next_step + ahead)
        if start and step:
            step = 0  # the codec refuses any other
        self.forget_the_idle()
        expected = self.expected(session, start, episode, step, seed, body)
        (answer,) = self.bench.engine.step(
            [
                self.bench.request(
                    body.x,
                    session,
                    is_poison=body.is_poison,
                    deterministic=body.deterministic,
                    episode_start=start,
                    episode=episode,
                    step=step,
                    seed=seed,
                )
            ]
        )
        self.compare(session, expected, answer, body)

    def expected(
        self,
        session: str,
        start: bool,
        episode: str | None,
        step: int | None,
        seed: int | None,
        body: Body,
    ) -> type[ServiceError] | Episode | str:
        """The error's type, "replay", or the episode that the answer belongs to."""
        running = self.live.get(session)
        if start and not self.is_the_running_one(running, episode, step):
            return Episode(episode, seed, 0.0)
        if running is None:
            is_lost = session in self.lost or (step or 0) > 0
            return SessionLost if is_lost else UnknownSession
        if start:
            step = 0
        if episode not in (None, running.name) or seed not in (None, running.seed):
            return StepConflict
        if step in (None, running.next_step):
            return running
        is_last = step == running.next_step - 1
        return "replay" if is_last and body.key() == running.last_body else StepConflict

    @staticmethod
    def is_the_running_one(running: Episode | None, episode: str | None, step: int | None) -> bool:
        if running is None:
            return False
        if episode is not None:
            return episode == running.name
        return step == 0 and running.next_step == 1

    def compare(
        self,
        session: str,
        expected: type[ServiceError] | Episode | str,
        answer: StepAnswer | ServiceError,
        body: Body,
    ) -> None:
        if isinstance(expected, Episode) and body.is_poison:
            expected = Invalid
        if isinstance(expected, type):
            assert type(answer) is expected
            return
        assert isinstance(answer, StepAnswer)
        got = (answer.action, answer.log_prob, answer.value)
        if isinstance(expected, str):
            running = self.live[session]
            assert answer.is_replay
            assert (got, answer.step) == (running.last_answer, running.next_step - 1)
            return
        assert not answer.is_replay
        assert answer.step == expected.next_step
        expected.xs.append(body.x)
        assert answer.value == sum(expected.xs)
        expected.last_body, expected.last_answer = body.key(), got
        self.use(session, expected)

    def use(self, session: str, episode: Episode) -> None:
        episode.used_s = self.bench.clock.now_s
        self.live.pop(session, None)
        if len(self.live) == CAPACITY:
            self.lose(next(iter(self.live)))
        self.live[session] = episode
        if session in self.lost:
            self.lost.remove(session)

    def lose(self, session: str) -> None:
        del self.live[session]
        self.lost = [*self.lost, session][-CAPACITY:]

    def forget_the_idle(self) -> None:
        for session in list(self.live):
            if self.live[session].used_s <= self.bench.clock.now_s - IDLE_S:
                self.lose(session)

    @rule(seconds=st.sampled_from([1.0, 4.0, IDLE_S]))
    def time_passes(self, seconds: float) -> None:
        self.bench.clock.now_s += seconds

    @rule(session=NAMES)
    def an_end(self, session: str) -> None:
        self.forget_the_idle()
        if session in self.live:
            self.bench.sessions.end(session)
            del self.live[session]
            return
        error = SessionLost if session in self.lost else UnknownSession
        with pytest.raises(error):
            self.bench.sessions.end(session)

    @precondition(lambda self: self.live)
    @rule()
    def a_failing_policy(self) -> None:
        self.forget_the_idle()
        self.bench.runtime.failure = RuntimeError("broken")
        for session in self.live:
            with pytest.raises(RuntimeError, match="broken"):
                self.bench.step(1.0, session)
        self.bench.runtime.failure = None

    @invariant()
    def as_many_sessions_live_as_should(self) -> None:
        self.forget_the_idle()
        for session in "abcd":
            assert (self.bench.sessions.find(session) is not None) == (session in self.live)
        assert len(self.bench.sessions) == len(self.live)


def test_any_sequence_of_requests_keeps_the_promises_of_sessions(spec: PolicySpec) -> None:
    class OnThisSpec(SessionContract):
        pass

    OnThisSpec.spec = spec
    case = OnThisSpec.TestCase
    case.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
    case().runTest()
