"""The session table by itself: what a block means, whose rows it gets, and who is given up."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from model.spec import PolicySpec
from service.engine.block import Block
from service.engine.rows import RowTable
from service.engine.sessions import Session, SessionTable, Turn, derived_seed, first_seeds
from service.errors import Invalid, Overloaded, SessionLost, StepConflict, UnknownSession
from service.runtime.arrays import decisions
from tamiyo_client.noise import row_seed
from tests.service.fakes import FakeClock, single, vector

IDLE_S = 60.0
CAPACITY = 3
NUM_ROWS = 40
SEED = 1000
VERSION = "sha256:0"


class Table:
    """A session table, a clock, and `take`: a block that the model has answered at once.

    `x` is what a block brings: another, another content.
    """

    def __init__(self, spec: PolicySpec, capacity: int = CAPACITY) -> None:
        self.spec = spec
        self.clock = FakeClock()
        self.rows = RowTable(NUM_ROWS, decisions(spec), largest=NUM_ROWS)
        self.sessions = SessionTable(
            self.rows, capacity=capacity, idle_timeout_s=IDLE_S, seed=SEED, clock=self.clock
        )

    def ask(self, session_id: str = "a", *, x: float = 1.0, **fields: Any) -> Turn | Session:
        return self.ask_of(single(self.spec, x, session_id, **fields))

    def ask_all(
        self, num_rows: int, session_id: str = "v", *, x: float = 1.0, **fields: Any
    ) -> Turn | Session:
        return self.ask_of(vector(self.spec, [x] * num_rows, session_id, **fields))

    def ask_of(self, block: Block) -> Turn | Session:
        return self.sessions.admit(block)

    def take(self, session_id: str = "a", **fields: Any) -> Turn:
        return self.taken(self.ask(session_id, **fields))

    def take_all(self, num_rows: int, session_id: str = "v", **fields: Any) -> Turn:
        return self.taken(self.ask_all(num_rows, session_id, **fields))

    def taken(self, turn: Turn | Session) -> Turn:
        assert isinstance(turn, Turn), "a replay, where a turn was expected"
        self.sessions.commit(turn, VERSION)
        return turn

    def start(self, session_id: str = "a", **fields: Any) -> Turn:
        return self.take(session_id, starts=True, **fields)

    def start_all(self, num_rows: int, session_id: str = "v", **fields: Any) -> Turn:
        return self.take_all(num_rows, session_id, starts=True, **fields)

    def is_live(self, session_id: str) -> bool:
        return session_id in self.sessions

    def live(self, names: str) -> str:
        return "".join(filter(self.is_live, names))

    def num_free_rows(self) -> int:
        """How many rows can be had; none of them twice."""
        rows: list[int] = []
        while len(rows) <= NUM_ROWS:
            try:
                rows += self.rows.reserve(1).tolist()
            except Overloaded:
                break
        assert len(set(rows)) == len(rows)
        self.rows.give_back(np.array(rows, dtype=np.intp))
        return len(rows)


@pytest.fixture
def table(spec: PolicySpec) -> Table:
    return Table(spec)


def test_a_start_is_step_0_from_zeros(table: Table) -> None:
    turn = table.start(seed=5)
    assert (turn.step, turn.seed, turn.read_rows.tolist()) == (0, 5, [table.rows.zero_row])
    assert len(table.sessions) == table.sessions.num_rows == 1


def test_steps_follow_the_start_with_or_without_their_number(table: Table) -> None:
    turns = [table.start(seed=5), table.take(), table.take(step=2), table.take()]
    assert [(turn.step, turn.seed) for turn in turns] == [(0, 5), (1, 5), (2, 5), (3, 5)]


def test_a_turn_reads_the_rows_that_the_last_one_wrote_and_writes_others(table: Table) -> None:
    for before, take in (
        (table.start(), table.take),
        (table.start_all(2), partial(table.take_all, 2)),
    ):
        for _ in range(3):
            turn = take()
            assert turn.read_rows.tolist() == before.write_rows.tolist()
            assert not set(turn.read_rows.tolist()) & set(turn.write_rows.tolist())
            before = turn


def test_abandoning_a_turn_leaves_everything_as_it_was(table: Table) -> None:
    table.start()
    table.take(step=1)
    free = table.num_free_rows()
    for _ in range(2):
        for session_id, fields in (
            ("a", {"step": 2}),
            ("a", {"starts": True}),
            ("b", {"starts": True}),
        ):
            turn = table.ask(session_id, **fields)
            assert isinstance(turn, Turn)
            table.sessions.abandon(turn)
    assert table.num_free_rows() == free
    assert table.live("ab") == "a"
    assert isinstance(table.ask(step=1), Session)
    assert table.take().step == 2


def test_the_last_step_with_the_same_content_is_a_retry(table: Table) -> None:
    table.start()
    turn = table.take(step=1, x=2.0)
    session = table.ask(step=1, x=2.0)
    assert isinstance(session, Session)
    assert session.rows.tolist() == turn.write_rows.tolist()
    assert session.policy_version == VERSION


def test_the_last_step_with_another_content_is_a_conflict_naming_the_next_step(
    table: Table,
) -> None:
    table.start()
    table.take(step=1, x=2.0)
    with pytest.raises(StepConflict, match=r"step 1 with another content.* next step is 2"):
        table.ask(step=1, x=3.0)


@pytest.mark.parametrize("step", [0, 1, 4, 5, 2**63])
def test_an_earlier_or_later_step_is_a_conflict_naming_the_next_one(
    table: Table, step: int
) -> None:
    table.start()
    table.start_all(2)
    for _ in range(2):
        table.take()
        table.take_all(2)
    for ask in (table.ask, partial(table.ask_all, 2)):
        with pytest.raises(StepConflict, match="next step is 3"):
            ask(step=step)


def test_an_unnamed_start_restarts_whatever_step_came_last(table: Table) -> None:
    for seed, step in ((5, None), (6, None), (8, 0)):
        turn = table.start(seed=seed, step=step)
        assert (turn.step, turn.seed) == (0, seed)
        assert turn.read_rows.tolist() == [table.rows.zero_row]
        assert table.take().seed == seed
    assert len(table.sessions) == table.sessions.num_rows == 1


def test_an_unnamed_start_at_step_0_is_a_retry_while_step_0_is_the_last(table: Table) -> None:
    table.start(step=0)
    assert isinstance(table.ask(starts=True, step=0), Session)
    with pytest.raises(StepConflict, match=r"already started with another content.* is 1;"):
        table.ask(starts=True, step=0, x=2.0)


@pytest.mark.parametrize("step", [None, 0])
def test_a_start_of_the_running_episode_is_a_retry_while_step_0_is_the_last(
    table: Table, step: int | None
) -> None:
    table.start(run="7")
    assert isinstance(table.ask(starts=True, run="7", step=step), Session)


@pytest.mark.parametrize("step", [None, 0])
def test_a_late_start_of_the_running_episode_is_a_conflict_and_never_a_restart(
    table: Table, step: int | None
) -> None:
    table.start(run="7")
    table.take(run="7", step=1)
    with pytest.raises(StepConflict, match="next step is 2"):
        table.ask(starts=True, run="7", step=step)


def test_a_start_of_the_running_episode_with_another_content_is_a_conflict(table: Table) -> None:
    table.start(run="7")
    with pytest.raises(StepConflict):
        table.ask(starts=True, run="7", x=2.0)


def test_a_start_of_another_episode_restarts(table: Table) -> None:
    table.start(run="7")
    table.take(run="7")
    assert table.start(run="8").step == 0
    assert table.take(run="8", step=1).step == 1
    assert len(table.sessions) == 1


@pytest.mark.parametrize("step", [None, 0])
def test_a_late_start_of_the_episode_before_is_a_conflict_and_never_a_restart(
    table: Table, step: int | None
) -> None:
    table.start(run="7")
    table.start(run="8")
    table.take(run="8")
    with pytest.raises(StepConflict, match=r"in episode '8', which came after '7'.* is 2$"):
        table.ask(starts=True, run="7", step=step)
    assert table.take(step=2).step == 2
    table.start_all(1, run="p")
    table.start_all(1, run="q")
    with pytest.raises(StepConflict, match="in run 'q', which came after 'p'"):
        table.ask_all(1, starts=True, run="p", step=0)


def test_a_step_of_another_episode_than_the_running_one_is_a_conflict(table: Table) -> None:
    table.start(run="7")
    with pytest.raises(StepConflict, match=r"in episode '7', not '8'; its next step is 1"):
        table.ask(run="8", step=1)


def test_a_step_that_names_an_episode_of_an_unnamed_one_is_a_conflict(table: Table) -> None:
    table.start()
    with pytest.raises(StepConflict, match="in an unnamed episode"):
        table.ask(run="8", step=1)


def test_a_step_need_not_name_the_episode(table: Table) -> None:
    table.start(run="7")
    table.take(step=1)
    table.take(run="7", step=2)


def test_a_seed_is_read_at_the_start_and_equal_or_absent_later(table: Table) -> None:
    table.start(seed=5)
    assert table.take(seed=5).seed == 5
    assert table.take().seed == 5
    with pytest.raises(StepConflict, match=r"another seed.* next step is 3"):
        table.ask(seed=6)


@pytest.mark.parametrize("ways", [["ended"], ["expired"], ["evicted"], ["ended", "evicted"]])
def test_episodes_without_a_seed_differ_whatever_becomes_of_the_session_between(
    spec: PolicySpec, ways: list[str]
) -> None:
    table = Table(spec, capacity=1)
    seeds = [table.start("a").seed]
    for way in ways * 3:
        if way == "ended":
            table.sessions.end("a")
        elif way == "expired":
            table.clock.now_s += IDLE_S
            assert not table.is_live("a")
        else:
            table.start("b")
            table.start("c")  # of which only as many are remembered as can live
        seeds.append(table.start("a").seed)
    seeds += [table.start("a").seed for _ in range(2)]
    assert len(set(seeds)) == len(seeds)


def test_a_named_episode_s_own_seed_is_its_name_s(spec: PolicySpec) -> None:
    seeds = set()
    for before in range(3):
        table = Table(spec)
        for _ in range(before):
            table.start()
        seeds.add(table.start(run="7").seed)
    assert seeds == {derived_seed(SEED, "a", "7", 0)}


def test_derived_seeds_fit_the_noise_and_depend_on_everything() -> None:
    seeds = {
        derived_seed(server, session, episode, starts)
        for server in (0, 1)
        for session in ("a", "b")
        for episode in (None, "0", "1")
        for starts in (0, 1)
    }
    assert len(seeds) == 2 * 2 * (2 + 2)  # a named episode does not count its starts
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize("step", [None, 0])
def test_a_session_that_never_was_is_unknown(table: Table, step: int | None) -> None:
    for starts in (False, np.array([True, False])):
        with pytest.raises(UnknownSession, match="'a' was never started"):
            table.ask_all(2, "a", step=step, starts=starts)
    with pytest.raises(UnknownSession, match="'a' was never started"):
        table.ask(step=step)


def test_a_later_step_of_an_unknown_session_means_that_it_was_lost(table: Table) -> None:
    for ask in (table.ask, partial(table.ask_all, 2, "a"), partial(table.ask_all, 2, starts=True)):
        with pytest.raises(SessionLost, match=r"'[av]' has no state here any more"):
            ask(step=1)


def test_a_session_idle_for_too_long_is_lost_and_one_in_use_is_not(table: Table) -> None:
    table.start("idle")
    table.start("used")
    table.clock.now_s += IDLE_S - 1
    table.take("used")
    table.clock.now_s += 2
    assert table.is_live("used")
    table.sessions.hold("idle")
    for step in (None, 0, 1):
        with pytest.raises(SessionLost):
            table.ask("idle", step=step)
    assert len(table.sessions) == 1


def test_a_session_that_comes_back_too_late_is_lost_whoever_else_has_a_request_waiting(
    table: Table,
) -> None:
    """Idleness is decided when a request comes, and before it keeps its session."""
    for name in "abc":
        table.start(name)
    table.clock.now_s += IDLE_S / 2
    table.sessions.hold("a")
    table.clock.now_s += IDLE_S / 2
    table.sessions.hold("b")
    assert table.live("abc") == "a"
    with pytest.raises(SessionLost):
        table.ask("b")
    table.take("a")


def test_a_request_that_came_in_time_finds_its_session_however_long_it_waited(
    table: Table,
) -> None:
    table.start()
    table.clock.now_s += IDLE_S - 1
    table.sessions.hold("a")
    table.clock.now_s += IDLE_S
    assert table.take().step == 1


def test_a_lost_session_can_start_again(table: Table) -> None:
    table.start()
    table.clock.now_s += IDLE_S + 1
    table.sessions.hold("a")
    assert table.start().step == 0
    table.take(step=1)


def test_a_full_table_gives_up_the_least_recently_used_session(table: Table) -> None:
    for session_id in "abc":
        table.start(session_id)
    table.take("a")
    table.start("d")
    assert table.live("abcd") == "acd"
    with pytest.raises(SessionLost):
        table.ask("b")
    assert len(table.sessions) == CAPACITY


def test_room_is_counted_in_rows(spec: PolicySpec) -> None:
    table = Table(spec, capacity=6)
    table.start_all(3, "a")
    table.start("b")
    table.start_all(2, "c")
    assert (len(table.sessions), table.sessions.num_rows) == (3, 6)
    table.start("d")
    assert table.live("abcd") == "bcd"
    assert table.sessions.num_rows == 4
    table.start_all(5, "e")
    assert table.live("bcde") == "de"
    assert table.sessions.num_rows == 6
    assert table.num_free_rows() == NUM_ROWS - 6


def test_a_restart_in_a_full_table_costs_nobody_anything(table: Table) -> None:
    for session_id in "abc":
        table.start(session_id)
    table.start("a")
    assert table.live("abc") == "abc"


def test_a_restart_with_more_rows_needs_room_for_those_only(spec: PolicySpec) -> None:
    table = Table(spec, capacity=4)
    table.start_all(2, "v", run="p")
    table.start("a")
    table.start_all(3, "v", run="q")
    assert table.live("va") == "va"
    table.sessions.hold("v")
    table.start_all(4, "v", run="r")
    assert table.live("va") == "v"
    table.start_all(1, "v", run="s")
    assert table.sessions.num_rows == 1
    assert table.num_free_rows() == NUM_ROWS - 1


def test_a_session_with_a_request_waiting_is_never_given_up(table: Table) -> None:
    for session_id in "abc":
        table.start(session_id)
    table.sessions.hold("a")
    table.start("d")
    assert table.live("abcd") == "acd"
    table.clock.now_s += IDLE_S + 1
    assert table.is_live("a")
    table.sessions.release("a")
    assert not table.is_live("a")


def test_a_session_that_steps_is_never_given_up(table: Table) -> None:
    for session_id in "abc":
        table.start(session_id)
    turn = table.ask("a")
    table.start("d")
    assert table.live("abcd") == "acd"
    assert table.taken(turn).step == 1


def test_a_session_is_held_until_the_last_of_its_requests(table: Table) -> None:
    table.start()
    table.sessions.hold("a")
    table.sessions.hold("a")
    table.sessions.release("a")
    table.clock.now_s += IDLE_S + 1
    assert table.is_live("a")
    table.sessions.release("a")
    assert not table.is_live("a")


def test_a_held_session_keeps_no_other_from_expiring(table: Table) -> None:
    for session_id in "abc":
        table.start(session_id)
    table.sessions.hold("a")
    table.clock.now_s += IDLE_S
    assert table.live("abc") == "a"


def test_a_start_is_refused_where_every_session_has_a_request_waiting(table: Table) -> None:
    for session_id in "abc":
        table.start(session_id)
        table.sessions.hold(session_id)
    free = table.num_free_rows()
    with pytest.raises(Overloaded, match=r"no room for \d rows more: 3 are kept at most"):
        table.ask("d", starts=True)
    assert table.live("abc") == "abc"
    assert table.num_free_rows() == free
    table.sessions.release("b")
    table.start("d")
    assert not table.is_live("b")


def test_rows_that_a_start_is_about_to_take_are_nobody_else_s(table: Table) -> None:
    table.start("a")
    first = table.ask_all(2, "v", starts=True)
    second = table.ask("b", starts=True)
    with pytest.raises(Overloaded):
        table.ask("c", starts=True)
    assert isinstance(first, Turn)
    table.sessions.abandon(first)
    third = table.ask("c", starts=True)
    for turn in (second, third):
        table.taken(turn)
    assert table.live("abcv") == "abc"


def test_a_start_that_is_not_taken_costs_nobody_his_session(table: Table) -> None:
    for session_id in "abc":
        table.start(session_id)
    turn = table.ask("d", starts=True)
    assert isinstance(turn, Turn)
    table.sessions.abandon(turn)
    assert table.live("abcd") == "abc"


def test_rows_beyond_the_room_are_given_up_as_soon_as_nobody_waits_for_them(table: Table) -> None:
    """Those that a run was to have may have been asked for again before it began."""
    for session_id in "abc":
        table.start(session_id)
    for number in range(NUM_ROWS):
        turn = table.ask(f"new {number}", starts=True)
        table.sessions.hold(f"new {number}")
        for session_id in "abc":
            table.sessions.hold(session_id)
        table.taken(turn)
        table.sessions.release(f"new {number}")
        assert table.sessions.num_rows == CAPACITY + 1
        for session_id in "abc":
            table.take(session_id)
            table.sessions.release(session_id)
        assert table.sessions.num_rows == CAPACITY
        assert table.live("abc") == "abc"


def test_only_as_many_past_sessions_are_remembered_as_can_live(table: Table) -> None:
    for number in range(2 * CAPACITY + 1):
        table.start(str(number))
    with pytest.raises(UnknownSession):
        table.ask("0")
    for number in range(1, CAPACITY + 1):
        with pytest.raises(SessionLost):
            table.ask(str(number))


def test_ending_a_session_frees_its_rows_and_forgets_it(table: Table) -> None:
    for session_id in "abc":
        table.start(session_id)
    table.sessions.end("b")
    with pytest.raises(UnknownSession):
        table.ask("b")
    table.start("d")
    assert table.live("acd") == "acd"
    for session_id in "acd":
        table.sessions.end(session_id)
    assert table.sessions.num_rows == 0
    assert table.num_free_rows() == NUM_ROWS


def test_a_session_ended_for_good_is_not_lost_even_if_it_once_was(table: Table) -> None:
    table.start()
    table.clock.now_s += IDLE_S + 1
    table.sessions.hold("a")
    with pytest.raises(SessionLost):
        table.ask()
    table.start()
    table.sessions.end("a")
    with pytest.raises(UnknownSession):
        table.ask()


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


def test_a_last_step_that_nobody_can_ask_for_again_ends_its_session(table: Table) -> None:
    table.start()
    table.take(ends=True)
    assert (len(table.sessions), table.sessions.events["ended"]) == (0, 1)
    assert table.num_free_rows() == NUM_ROWS
    with pytest.raises(UnknownSession):
        table.ask()
    table.start(ends=True)
    assert table.num_free_rows() == NUM_ROWS, "the first step may be the last"


def test_a_last_step_that_does_not_run_ends_nothing(table: Table) -> None:
    table.start()
    turn = table.ask(ends=True)
    assert isinstance(turn, Turn)
    table.sessions.abandon(turn)
    assert table.take(step=1).step == 1


def test_a_numbered_last_step_is_given_again_and_none_comes_after_it(table: Table) -> None:
    table.start(step=0)
    table.take(step=1, ends=True)
    again = table.ask(step=1, ends=True)
    assert isinstance(again, Session)
    for step in (None, 0, 1, 2):
        with pytest.raises(SessionLost if step else UnknownSession, match="its last step"):
            table.ask(step=step)
    assert table.start(run="b").begins
    assert table.take(step=1).step == 1, "a start begins as always"


@pytest.mark.parametrize("ended", [{"step": 0}, {"run": "p"}, {"run": "p", "step": 0}])
@pytest.mark.parametrize("again", [{}, {"step": 0}, {"run": "q"}])
def test_after_its_last_step_a_start_begins_whatever_was_there(
    table: Table, ended: dict[str, Any], again: dict[str, Any]
) -> None:
    """With other rows, another seed, as another kind: it has ended."""
    table.start(ends=True, seed=1, **ended)
    turn = table.take_all(3, "a", starts=True, seed=2, **again)
    assert (turn.begins, turn.step) == (True, 0)
    assert (len(table.sessions), table.sessions.num_rows) == (1, 3)
    assert table.num_free_rows() == NUM_ROWS - 3
    assert (table.sessions.events["started"], table.sessions.events["ended"]) == (2, 1)
    table.start("b", step=0, ends=True)
    table.start("b", step=0, x=2.0, ends=True)
    assert isinstance(table.ask("b", x=2.0, starts=True, step=0, ends=True), Session)


def test_a_late_start_of_the_run_that_ended_begins_nothing(table: Table) -> None:
    table.start(run="p", step=0)
    table.take(run="p", step=1, ends=True)
    for step in (0, None):
        with pytest.raises(UnknownSession, match="its last step"):
            table.ask(starts=True, run="p", step=step)
    assert isinstance(table.ask(run="p", step=1, ends=True), Session)


def test_what_names_no_step_is_not_kept_for_a_retry(table: Table) -> None:
    table.start(run="p")
    table.take(run="p", ends=True)
    assert (len(table.sessions), table.num_free_rows()) == (0, NUM_ROWS)


def test_who_took_the_last_step_is_given_up_before_anybody_who_acts(table: Table) -> None:
    table.start("a")
    table.start("b")
    table.start("c", step=0, ends=True)
    table.start("d")
    assert table.live("abd") == "abd"
    assert table.sessions.events["ended"] == 1


def test_a_first_step_of_a_named_run_may_be_the_last_and_is_given_again(table: Table) -> None:
    table.start(run="p", ends=True)
    assert isinstance(table.ask(starts=True, run="p", ends=True), Session)
    with pytest.raises(UnknownSession):
        table.ask()


@pytest.mark.parametrize("how", ["by DELETE", "idle", "no room"])
def test_a_session_that_took_its_last_step_was_ended_whoever_frees_its_rows(
    table: Table, how: str
) -> None:
    table.start(step=0, ends=True)
    if how == "by DELETE":
        table.sessions.end("a")
    elif how == "idle":
        table.clock.now_s += IDLE_S + 1
        table.sessions.expire_idle()
    else:
        for name in "bcd":
            table.start(name)
    assert table.sessions.events["ended"] == 1
    assert not table.sessions.events["expired"] + table.sessions.events["evicted"]
    with pytest.raises(UnknownSession):
        table.ask("a")


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_session_ended_while_it_steps_is_no_more_and_keeps_no_row(
    table: Table, is_taken: bool
) -> None:
    table.start()
    turn = table.ask()
    assert isinstance(turn, Turn)
    rows = {*turn.read_rows.tolist(), *turn.write_rows.tolist()}
    table.sessions.end("a")
    assert not rows & set(table.start("b").write_rows.tolist())
    settle(table, turn, is_taken)
    assert table.live("ab") == "b"
    with pytest.raises(UnknownSession):
        table.ask()
    assert table.sessions.num_rows == 1
    assert table.num_free_rows() == NUM_ROWS - 1


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_session_ended_while_it_restarts_keeps_only_what_it_began(
    table: Table, is_taken: bool
) -> None:
    table.start_all(2, run="p")
    turn = table.ask_all(1, starts=True, run="q")
    assert isinstance(turn, Turn)
    table.sessions.end("v")
    settle(table, turn, is_taken)
    assert table.is_live("v") == is_taken
    assert table.sessions.num_rows == is_taken
    assert table.num_free_rows() == NUM_ROWS - is_taken
    events = table.sessions.events
    assert events["started"] - events["ended"] == is_taken
    if is_taken:
        table.take_all(1, step=1, run="q")
        table.sessions.end("v")
    with pytest.raises(UnknownSession):
        table.ask_all(1)


def settle(table: Table, turn: Turn, is_taken: bool) -> None:
    if is_taken:
        table.sessions.commit(turn, VERSION)
    else:
        table.sessions.abandon(turn)


def test_rows_are_never_shared_and_never_run_out(spec: PolicySpec) -> None:
    table = Table(spec, capacity=7)
    for round_ in range(5):
        for number, session_id in enumerate("abcdef"):
            table.start_all(1 + number % 4, session_id, run=str(round_))
            assert table.sessions.num_rows <= 7
            assert table.num_free_rows() == NUM_ROWS - table.sessions.num_rows
        table.clock.now_s += IDLE_S * (round_ % 2) * 2
        if table.is_live("f"):
            table.sessions.end("f")


def test_every_session_that_is_not_live_has_an_event_that_says_why(table: Table) -> None:
    for round_ in range(5):
        for session_id in "abcdef":
            table.start(session_id)
            table.start(session_id)  # anew: the same session still
        table.sessions.end("f")
        table.clock.now_s += IDLE_S * (round_ % 2) * 2
        table.sessions.expire_idle()
        if round_ == 2:
            table.sessions.restart()
    events = dict(table.sessions.events)
    assert events.pop("restored") == events.pop("lost") == 0  # which takes a snapshot
    assert all(events.values()), events
    others = sum(number for event, number in events.items() if event != "started")
    assert events["started"] - others == len(table.sessions)
    assert events["ended"] == 5


def test_a_vector_s_first_step_starts_every_row_with_its_own_seed(table: Table) -> None:
    turn = table.start_all(3, seed=5)
    assert turn.read_rows.tolist() == [table.rows.zero_row] * 3
    expected = row_seed(5, np.arange(3), np.zeros(3, dtype=np.uint64))
    assert table.rows.seed[turn.write_rows].tolist() == expected.tolist()
    assert len(set(expected.tolist())) == 3


def test_rows_that_start_inside_a_run_read_zeros_and_draw_with_their_next_episode_s_seed(
    table: Table,
) -> None:
    table.start_all(3, seed=5)
    episodes = np.zeros(3, dtype=np.uint64)
    for starts in ([True, False, False], [True, False, True], [False, True, False]):
        turn = table.take_all(3, starts=np.array(starts))
        episodes += np.array(starts, dtype=np.uint64)
        is_zero = turn.read_rows == table.rows.zero_row
        assert is_zero.tolist() == starts
        expected = row_seed(5, np.arange(3), episodes)
        assert table.rows.seed[turn.write_rows][is_zero].tolist() == expected[is_zero].tolist()
        assert turn.seed == 5
    assert [table.take_all(3).step, table.take_all(3, step=5).step] == [4, 5]


def test_all_rows_that_start_together_go_on_in_their_run(table: Table) -> None:
    table.start_all(2, seed=5)
    for step in (None, 2):
        turn = table.take_all(2, starts=True, step=step)
        assert turn.read_rows.tolist() == [table.rows.zero_row] * 2
        expected = row_seed(5, np.arange(2), np.full(2, turn.step))
        assert table.rows.seed[turn.write_rows].tolist() == expected.tolist()
    assert turn.step == 2


def test_seeds_one_a_row_are_read_for_the_rows_that_start(table: Table) -> None:
    turn = table.start_all(3, seeds=np.array([7, 8, 9], dtype=np.uint64))
    assert table.rows.seed[turn.write_rows].tolist() == [7, 8, 9]
    starts = np.array([False, True, False])
    turn = table.take_all(3, starts=starts, seeds=np.array([1, 2, 3], dtype=np.uint64))
    assert table.rows.seed[turn.write_rows[1]] == 2


def test_another_number_of_rows_is_refused_until_another_run_begins(table: Table) -> None:
    table.start_all(2, run="p")
    for starts, step in ((False, None), (False, 0), (True, 0)):
        for other in (1, 3):
            with pytest.raises(Invalid, match=rf"'v' has 2 rows in this run, not {other};"):
                table.ask_all(other, starts=starts, run="p", step=step)
    assert table.take_all(2).step == 1
    assert table.start_all(3, run="q").step == 0


@pytest.mark.parametrize("starts", [False, True])
def test_a_session_is_of_one_kind_until_it_ends(table: Table, starts: bool) -> None:
    table.start("a")
    table.start_all(1, "v")
    with pytest.raises(StepConflict, match=r"'a' is a single environment, not a vector"):
        table.ask_all(1, "a", starts=starts)
    with pytest.raises(StepConflict, match=r"'v' is a vector of environments, not a single"):
        table.ask("v", starts=starts)
    table.take("a", step=1)
    table.sessions.end("a")
    table.start_all(1, "a")


def test_a_vector_s_step_0_restarts_it_only_where_it_is_not_the_running_one_s(
    table: Table,
) -> None:
    table.start_all(2, step=0)
    assert isinstance(table.ask_all(2, starts=True, step=0), Session)
    table.take_all(2, step=1)
    assert table.start_all(2, step=0).step == 0
    table.start_all(2, step=0, run="p")
    table.take_all(2, step=1)
    with pytest.raises(StepConflict, match=r"name another `run`"):
        table.ask_all(2, starts=True, step=0, run="p")


def test_whether_a_vector_s_rows_start_is_content(table: Table) -> None:
    table.start_all(2, step=0)
    table.take_all(2, step=1, starts=True)
    for starts in (False, np.array([True, False])):
        with pytest.raises(StepConflict, match="another content"):
            table.ask_all(2, step=1, starts=starts)
    assert isinstance(table.ask_all(2, step=1, starts=True), Session)


def test_first_seeds_of_a_single_environment_are_its_seed_itself(spec: PolicySpec) -> None:
    assert first_seeds(single(spec), 5) == 5
    assert first_seeds(vector(spec, [1]), 5) == row_seed(5, np.array([0]), np.array([0]))


def test_a_start_of_a_named_run_sent_again_without_a_step_is_a_retry(table: Table) -> None:
    table.start_all(3, run="a")
    admitted = table.ask_all(3, starts=True, run="a")
    assert isinstance(admitted, Session)
    table.take_all(3)
    with pytest.raises(StepConflict, match=r"name another `run`$"):
        table.ask_all(3, starts=True, run="a")


def test_rows_of_an_unnamed_run_start_together_without_a_step(table: Table) -> None:
    table.start_all(3)
    assert table.start_all(3).step == 1


def test_the_most_starts_of_any_forgotten_session_are_what_others_begin_at(table: Table) -> None:
    seeds = set()
    for _ in range(3):
        seeds.add(table.start("a").seed)
    table.sessions.end("a")
    for number in range(2 * table.sessions.capacity):  # the first to be forgotten is "a"
        table.start(f"other {number}")
        table.sessions.end(f"other {number}")
    assert table.start("a").seed not in seeds


def test_many_are_evicted_at_once_and_none_that_has_a_request_waiting(table: Table) -> None:
    for name in "abc":
        table.start(name)
    table.sessions.hold("b")
    table.start_all(2, "v")
    assert table.live("abc") == "b"
