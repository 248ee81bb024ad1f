"""The session table by itself: what a request means, and which session is given up."""

import re
from collections.abc import Callable

import numpy as np
import pytest

from model.spec import PolicySpec
from service.engine.sessions import START, Session, SessionTable, Turn
from service.errors import Overloaded, SessionLost, StepConflict, UnknownSession
from service.runtime.protocol import StepOutputs
from tests.service.fakes import FakeClock

IDLE_S = 60.0
CAPACITY = 3


class Table:
    """A session table, a clock, and `take`: a request that the model has answered at once."""

    def __init__(self, spec: PolicySpec, capacity: int = CAPACITY) -> None:
        self.clock = FakeClock()
        self.sessions = SessionTable(
            spec,
            capacity=capacity,
            idle_timeout_s=IDLE_S,
            default_seed=lambda session_id, episode, starts: 1000 + starts,
            clock=self.clock,
        )

    def ask(
        self,
        session_id: str = "a",
        *,
        start: bool = False,
        episode: str | None = None,
        step: int | None = None,
        seed: int | None = None,
        body: bytes = b"body",
    ) -> Turn | Session:
        return self.sessions.admit(
            session_id, start=start, episode=episode, step=step, seed=seed, fingerprint=body
        )

    def take(
        self,
        session_id: str = "a",
        *,
        start: bool = False,
        episode: str | None = None,
        step: int | None = None,
        seed: int | None = None,
        body: bytes = b"body",
    ) -> Turn:
        turn = self.ask(session_id, start=start, episode=episode, step=step, seed=seed, body=body)
        assert isinstance(turn, Turn), "a replay, where a turn was expected"
        self.sessions.commit(session_id, turn, episode=episode, fingerprint=body)
        return turn

    def start(self, session_id: str = "a", *, episode: str | None = None) -> Turn:
        return self.take(session_id, start=True, episode=episode)

    def is_live(self, session_id: str) -> bool:
        return self.sessions.find(session_id) is not None


@pytest.fixture
def table(spec: PolicySpec) -> Table:
    return Table(spec)


def test_a_start_is_step_0_from_zeros(table: Table) -> None:
    assert table.take("a", start=True, seed=5) == Turn(START, 0, 5)
    assert len(table.sessions) == 1


def test_steps_follow_the_start_with_or_without_their_number(table: Table) -> None:
    table.take("a", start=True, seed=5)
    row = table.sessions.find("a")
    assert row is not None
    assert table.take("a") == Turn(row.row, 1, 5)
    assert table.take("a", step=2) == Turn(row.row, 2, 5)
    assert table.take("a") == Turn(row.row, 3, 5)


def test_admitting_changes_nothing_until_the_commit(table: Table) -> None:
    table.start("a")
    table.take("a", step=1)
    assert table.ask("a", step=2, body=b"one") == table.ask("a", step=2, body=b"other")
    assert table.ask("b", start=True) == table.ask("b", start=True)
    assert not table.is_live("b")
    assert isinstance(table.ask("a", step=1), Session)


def test_the_last_step_with_the_same_body_is_a_retry(table: Table) -> None:
    table.start("a")
    table.take("a", step=1, body=b"x")
    assert table.ask("a", step=1, body=b"x") is table.sessions.find("a")


def test_the_last_step_with_another_body_is_a_conflict_naming_the_next_step(table: Table) -> None:
    table.start("a")
    table.take("a", step=1, body=b"x")
    with pytest.raises(StepConflict, match=r"step 1 with another content.* next step is 2"):
        table.ask("a", step=1, body=b"y")


@pytest.mark.parametrize("step", [0, 1, 4, 5, 2**63])
def test_an_earlier_or_later_step_is_a_conflict_naming_the_next_one(
    table: Table, step: int
) -> None:
    table.start("a")
    for _ in range(2):
        table.take("a")
    with pytest.raises(StepConflict, match="next step is 3"):
        table.ask("a", step=step)


def test_an_unnamed_start_restarts_whatever_step_came_last(table: Table) -> None:
    table.take("a", start=True, seed=5)
    assert table.take("a", start=True, seed=6) == Turn(START, 0, 6)
    assert table.take("a").seed == 6
    assert table.take("a", start=True, seed=7) == Turn(START, 0, 7)
    table.take("a")
    assert table.take("a", start=True, step=0, seed=8) == Turn(START, 0, 8)
    assert len(table.sessions) == 1


def test_an_unnamed_start_at_step_0_is_a_retry_while_step_0_is_the_last(table: Table) -> None:
    table.take("a", start=True, step=0, body=b"x")
    assert isinstance(table.ask("a", start=True, step=0, body=b"x"), Session)
    with pytest.raises(StepConflict, match="next step is 1"):
        table.ask("a", start=True, step=0, body=b"y")


@pytest.mark.parametrize("step", [None, 0])
def test_a_start_of_the_running_episode_is_a_retry_while_step_0_is_the_last(
    table: Table, step: int | None
) -> None:
    table.take("a", start=True, episode="7", body=b"x")
    again = table.ask("a", start=True, episode="7", step=step, body=b"x")
    assert isinstance(again, Session)


@pytest.mark.parametrize("step", [None, 0])
def test_a_late_start_of_the_running_episode_is_a_conflict_and_never_a_restart(
    table: Table, step: int | None
) -> None:
    table.take("a", start=True, episode="7", body=b"x")
    table.take("a", episode="7", step=1, body=b"x")
    with pytest.raises(StepConflict, match="next step is 2"):
        table.ask("a", start=True, episode="7", step=step, body=b"x")


def test_a_start_of_the_running_episode_with_another_body_is_a_conflict(table: Table) -> None:
    table.take("a", start=True, episode="7", body=b"x")
    with pytest.raises(StepConflict):
        table.ask("a", start=True, episode="7", body=b"y")


def test_a_start_of_another_episode_restarts(table: Table) -> None:
    table.start("a", episode="7")
    table.take("a", episode="7")
    assert table.start("a", episode="8").row == START
    table.take("a", episode="8", step=1)
    assert len(table.sessions) == 1


def test_a_step_of_another_episode_than_the_running_one_is_a_conflict(table: Table) -> None:
    table.start("a", episode="7")
    with pytest.raises(StepConflict, match=r"in episode '7', not '8'"):
        table.ask("a", episode="8", step=1)


def test_a_step_that_names_an_episode_of_an_unnamed_one_is_a_conflict(table: Table) -> None:
    table.start("a")
    with pytest.raises(StepConflict, match="an unnamed one"):
        table.ask("a", episode="8", step=1)


def test_a_step_need_not_name_the_episode(table: Table) -> None:
    table.start("a", episode="7")
    table.take("a", step=1)
    table.take("a", episode="7", step=2)


def test_a_seed_is_read_at_the_start_and_equal_or_absent_later(table: Table) -> None:
    table.take("a", start=True, seed=5)
    assert table.take("a", seed=5).seed == 5
    assert table.take("a").seed == 5
    with pytest.raises(StepConflict, match="another seed"):
        table.ask("a", seed=6)


def test_an_episode_without_a_seed_gets_one_that_differs_from_the_last(table: Table) -> None:
    assert table.start("a").seed == 1000
    assert table.take("a").seed == 1000
    assert table.start("a").seed == 1001


@pytest.mark.parametrize("step", [None, 0])
def test_a_session_that_never_was_is_unknown(table: Table, step: int | None) -> None:
    with pytest.raises(UnknownSession, match="'a' was never started"):
        table.ask("a", step=step)


def test_a_later_step_of_an_unknown_session_means_that_it_was_lost(table: Table) -> None:
    with pytest.raises(SessionLost, match="'a' has no state here any more"):
        table.ask("a", step=1)


def test_a_session_idle_for_too_long_is_lost_and_one_in_use_is_not(table: Table) -> None:
    table.start("idle")
    table.start("used")
    table.clock.now_s += IDLE_S - 1
    table.take("used")
    table.clock.now_s += 2
    assert table.is_live("used")
    for step in (None, 0, 1):
        with pytest.raises(SessionLost):
            table.ask("idle", step=step)
    assert len(table.sessions) == 1


def test_a_lost_session_can_start_again(table: Table) -> None:
    table.start("a")
    table.clock.now_s += IDLE_S + 1
    assert table.start("a").row == START
    table.take("a", step=1)


def test_a_full_table_gives_up_the_least_recently_used_session(table: Table) -> None:
    for session_id in "abc":
        table.start(session_id)
    table.take("a")
    table.start("d")
    assert [session_id for session_id in "abcd" if table.is_live(session_id)] == ["a", "c", "d"]
    with pytest.raises(SessionLost):
        table.ask("b")
    assert len(table.sessions) == CAPACITY


def test_a_restart_in_a_full_table_costs_nobody_anything(table: Table) -> None:
    for session_id in "abc":
        table.start(session_id)
    table.start("a")
    assert all(map(table.is_live, "abc"))


def test_a_session_with_a_request_waiting_is_never_given_up(table: Table) -> None:
    for session_id in "abc":
        table.start(session_id)
    table.sessions.hold("a")
    table.start("d")
    assert [session_id for session_id in "abcd" if table.is_live(session_id)] == list("acd")
    table.clock.now_s += IDLE_S + 1
    assert table.is_live("a")
    table.sessions.release("a")
    assert not table.is_live("a")


def test_a_session_is_held_until_the_last_of_its_requests(table: Table) -> None:
    table.start("a")
    table.sessions.hold("a")
    table.sessions.hold("a")
    table.sessions.release("a")
    table.clock.now_s += IDLE_S + 1
    assert table.is_live("a")
    table.sessions.release("a")
    assert not table.is_live("a")


def test_a_start_is_refused_where_every_session_has_a_request_waiting(table: Table) -> None:
    for session_id in "abc":
        table.start(session_id)
        table.sessions.hold(session_id)
    with pytest.raises(Overloaded, match="all 3 sessions have a request waiting"):
        table.start("d")
    assert all(map(table.is_live, "abc"))
    table.sessions.release("b")
    table.start("d")
    assert not table.is_live("b")


def test_only_as_many_lost_sessions_are_remembered_as_can_live(table: Table) -> None:
    for number in range(2 * CAPACITY + 1):
        table.start(str(number))
    with pytest.raises(UnknownSession):
        table.ask("0")
    for number in range(1, CAPACITY + 1):
        with pytest.raises(SessionLost):
            table.ask(str(number))


def test_ending_a_session_frees_its_row_and_forgets_it(table: Table) -> None:
    for session_id in "abc":
        table.start(session_id)
    table.sessions.end("b")
    with pytest.raises(UnknownSession):
        table.ask("b")
    table.start("d")
    assert all(map(table.is_live, "acd"))


def test_a_session_ended_for_good_is_not_lost_even_if_it_once_was(table: Table) -> None:
    table.start("a")
    table.clock.now_s += IDLE_S + 1
    with pytest.raises(SessionLost):
        table.ask("a")
    table.start("a")
    table.sessions.end("a")
    with pytest.raises(UnknownSession):
        table.ask("a")


@pytest.mark.parametrize(
    ("prepare", "error"),
    [
        (lambda table: None, UnknownSession),
        (lambda table: (table.start("a"), table.sessions.end("a")), UnknownSession),
        (lambda table: [table.start(name) for name in "abcd"], SessionLost),
    ],
    ids=["never started", "ended already", "lost"],
)
def test_ending_a_session_that_is_not_there_says_why(
    table: Table, prepare: Callable[[Table], object], error: type[Exception]
) -> None:
    prepare(table)
    with pytest.raises(error, match=re.escape("'a'")):
        table.sessions.end("a")


def test_rows_are_never_shared_and_never_run_out(table: Table) -> None:
    for round_ in range(5):
        for session_id in "abcdef":
            table.start(session_id)
            rows = [session.row for name in "abcdef" if (session := table.sessions.find(name))]
            assert len(set(rows)) == len(rows) <= CAPACITY
        table.clock.now_s += IDLE_S * (round_ % 2) * 2
        if table.is_live("f"):
            table.sessions.end("f")


def test_every_session_that_is_not_live_has_ended_expired_or_been_evicted(table: Table) -> None:
    for round_ in range(5):
        for session_id in "abcdef":
            table.start(session_id)
            table.start(session_id)  # anew: the same session still
        table.sessions.end("f")
        table.clock.now_s += IDLE_S * (round_ % 2) * 2
    table.sessions.expire_idle()
    events = table.sessions.events
    assert all(events.values()), events
    others = events["ended"] + events["expired"] + events["evicted"]
    assert events["started"] - others == len(table.sessions)
    assert events["ended"] == 5


def test_store_keeps_exactly_one_row_of_a_batch(table: Table, spec: PolicySpec) -> None:
    table.start("a")
    session = table.sessions.find("a")
    assert session is not None
    size = spec.num_layers * spec.hidden_dim
    decided = StepOutputs.allocate(spec, 2)
    decided.h[:] = np.arange(2 * size).reshape(decided.h.shape)
    decided.c[:] = -decided.h
    decided.action[:] = np.arange(2 * len(spec.heads)).reshape(decided.action.shape)
    decided.value[:] = [1, 2]
    stored_action = decided.action[1].tolist()
    table.sessions.store([session.row], decided, [1])
    for array in decided.by_name().values():
        array[:] = 0
    assert table.sessions.h[session.row].ravel()[0] == size
    assert table.sessions.c[session.row].ravel()[0] == -size
    assert table.sessions.action[session.row].tolist() == stored_action
    assert table.sessions.value[session.row] == 2
    untouched = [row for row in range(CAPACITY) if row != session.row]
    assert not table.sessions.h[untouched].any()
