"""Turns of blocks, taken a batch at a time over the fake policy, whose state is a running sum."""

from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.spec import PolicySpec
from service.engine.block import Block
from service.engine.sessions import Session, Turn
from service.engine.stepper import BLOCK_S, LONG_STEP_S, SHORT_STEP_S, Part
from service.errors import (
    Invalid,
    Overloaded,
    ServiceError,
    SessionLost,
    StepConflict,
    UnknownSession,
)
from service.runtime.protocol import Rows, State
from tamiyo_client.noise import gumbel_noise, row_seed
from tests.service.fakes import Arrays, Bench, Stepped, single, vector


def noise_of(spec: PolicySpec, seed: int, step: int) -> NDArray[np.float32]:
    return gumbel_noise(np.array([seed], np.uint64), np.array([step], np.uint64), spec.num_choices)


def decided_by(spec: PolicySpec, seed: int, step: int) -> tuple[list[int], list[float]]:
    """What the fake policy takes for the published noise, and gives as log-probs."""
    heads = np.split(noise_of(spec, seed, step)[0], np.cumsum(spec.head_sizes)[:-1])
    return [int(head.argmax()) for head in heads], [float(head.max()) for head in heads]


def test_a_session_s_state_carries_from_step_to_step(bench: Bench) -> None:
    assert [bench.start(1).value, bench.step(10).value, bench.step(100).value] == [[1], [11], [111]]


def test_both_halves_of_the_state_carry(bench: Bench) -> None:
    bench.values(vector(bench.spec, [1, 10], "v", starts=True))
    for _ in range(3):
        bench.values(vector(bench.spec, [1, 0], "v"))
    (session,) = [bench.sessions.admit(vector(bench.spec, [1, 0], "v", step=3))]
    assert isinstance(session, Session)
    h, c = bench.runtime.read(session.rows)
    assert (h[0] == 4).all()
    assert (h[1] == 10).all()
    assert (c == 4).all()


def test_answers_count_the_steps_of_the_episode(bench: Bench) -> None:
    assert [bench.start().step, bench.step().step, bench.step(step=2).step] == [0, 1, 2]
    assert bench.start().step == 0


def test_a_start_begins_from_zeros_again(bench: Bench) -> None:
    bench.start(1)
    bench.step(10)
    assert bench.start(5).value == [5]
    assert bench.step(1).value == [6]


def test_a_retry_gives_the_stored_answer_without_running_the_policy(bench: Bench) -> None:
    bench.start(1)
    answer = bench.step(10, step=1)
    num_batches = len(bench.loaded.batch_sizes)
    again = bench.step(10, step=1)
    assert len(bench.loaded.batch_sizes) == num_batches
    assert not answer.is_replay
    assert again.is_replay
    assert (again.action, again.log_prob, again.value, again.step) == (
        answer.action,
        answer.log_prob,
        answer.value,
        answer.step,
    )
    assert bench.step(100, step=2).value == [111]


def test_a_retry_keeps_its_session_from_going_idle(bench: Bench) -> None:
    bench.start(step=0)
    for _ in range(3):
        bench.clock.now_s += 40
        assert bench.step(step=0, starts=True).is_replay
    assert bench.step(step=1).step == 1


def test_a_retry_of_a_start_gives_its_answer_and_starts_nothing(bench: Bench) -> None:
    first = bench.start(1, run="7")
    again = bench.start(1, run="7")
    assert again.is_replay
    assert again.value == first.value
    assert bench.step(1, step=1).value == [2]


def test_a_stored_answer_outlives_the_steps_of_other_sessions(bench: Bench) -> None:
    bench.start(1, "a")
    answer = bench.step(10, "a", step=1)
    for number in range(5):
        bench.start(number, f"other {number}")
    again = bench.step(10, "a", step=1)
    assert again.is_replay
    assert again.log_prob == answer.log_prob
    assert again.value == [11]


@pytest.mark.parametrize(
    "other",
    [{"x": 11}, {"forbid": (0,)}, {"deterministic": True}],
    ids=["another observation", "another mask", "deterministic"],
)
def test_another_body_under_the_same_step_is_a_conflict_and_moves_nothing(
    bench: Bench, other: dict[str, Any]
) -> None:
    bench.start(1)
    bench.step(10, step=1)
    with pytest.raises(StepConflict, match="next step is 2"):
        bench.step(**({"x": 10, "step": 1} | other))
    assert bench.step(100).value == [111]


def test_a_refused_request_leaves_its_session_as_it_was(bench: Bench) -> None:
    bench.start(1, seed=5)
    for fields in ({"step": 0}, {"step": 7}, {"run": "x"}, {"seed": 6}):
        with pytest.raises(StepConflict):
            bench.step(10, **fields)
    assert bench.step(1, step=1, seed=5).value == [2]


def test_unknown_and_lost_sessions_do_not_run_the_policy(bench: Bench) -> None:
    with pytest.raises(UnknownSession):
        bench.step()
    with pytest.raises(SessionLost):
        bench.step(step=3)
    assert bench.loaded.batch_sizes == []


def test_steps_are_sampled_with_the_published_noise_of_seed_and_step(
    bench: Bench, spec: PolicySpec
) -> None:
    answers = [bench.start(seed=42), bench.step(), bench.step()]
    for step, answer in enumerate(answers):
        assert (answer.action[0], answer.log_prob[0]) == decided_by(spec, 42, step)


def test_a_deterministic_step_has_no_noise(bench: Bench, spec: PolicySpec) -> None:
    zeros = [[0.0] * len(spec.heads)]
    assert bench.start(seed=42, deterministic=True).log_prob == zeros
    assert bench.step().log_prob != zeros
    assert bench.step(deterministic=True).log_prob == zeros


def test_deterministic_and_sampled_rows_ride_together(bench: Bench, spec: PolicySpec) -> None:
    answers = bench.take(
        *[
            single(spec, 1, name, starts=True, seed=9, deterministic=name in "ac")
            for name in "abcd"
        ],
        vector(spec, [1, 1], "v", starts=True, seed=9),
    )
    zeros = [[0.0] * len(spec.heads)]
    sampled = [decided_by(spec, 9, 0)[1]]
    of_rows = [
        decided_by(spec, int(row_seed(9, np.array(row), np.array(0))), 0)[1] for row in (0, 1)
    ]
    got = [answer.log_prob for answer in answers if isinstance(answer, Stepped)]
    assert got == [zeros, sampled, zeros, sampled, of_rows]


def test_a_mask_reaches_the_policy(bench: Bench, spec: PolicySpec) -> None:
    for only in range(spec.num_choices):
        head = int(np.searchsorted(np.cumsum(spec.head_sizes), only, side="right"))
        first = sum(spec.head_sizes[:head])
        others = set(range(first, first + spec.head_sizes[head])) - {only}
        assert bench.start(forbid=sorted(others)).action[0][head] == only - first


def test_a_mask_is_forgotten_after_its_step(bench: Bench, spec: PolicySpec) -> None:
    free = Bench(spec).start(seed=42).action
    bench.start(seed=42, forbid=[free[0][0]])
    assert bench.start(seed=42).action == free


def test_episodes_without_a_seed_differ_and_repeat_with_the_server_s_seed(
    bench: Bench, spec: PolicySpec
) -> None:
    def samples(bench: Bench) -> list[list[list[float]]]:
        return [
            bench.start(1, "a").log_prob,
            bench.start(1, "a").log_prob,
            bench.start(1, "b").log_prob,
            bench.start(1, "b", run="7").log_prob,
            bench.start(1, "b", run="8").log_prob,
            bench.step(1, None).log_prob,
            bench.step(1, None).log_prob,
        ]

    first = samples(bench)
    assert len({tuple(log_prob[0]) for log_prob in first}) == len(first)
    assert samples(Bench(spec)) == first


def test_a_stateless_step_starts_from_zeros_and_gives_its_state(bench: Bench) -> None:
    answer = bench.step(3, None)
    assert answer.state is not None
    assert answer.value == [3]
    assert (answer.state[0] == 3).all()
    assert (answer.state[1] == 1).all()
    assert len(bench.sessions) == 0


def test_a_stateless_step_goes_on_from_the_state_it_brings(bench: Bench) -> None:
    first = bench.step(3, None)
    kept = first.state
    second = bench.step(4, None, state=kept)
    assert second.value == [7]
    assert kept is not None
    assert (kept[0] == 3).all(), "the caller's state was written to"


def test_stateless_steps_equal_a_session_s(bench: Bench, spec: PolicySpec) -> None:
    state = None
    for step in range(4):
        x = 10.0**step
        alone = bench.step(x, None, state=state, seed=9, step=step)
        state = alone.state
        session = bench.step(x, "a", seed=9, starts=step == 0)
        assert (session.action, session.log_prob) == (alone.action, alone.log_prob)
        assert (session.value, session.step) == (alone.value, alone.step)
        assert session.state is None


def test_a_stateless_step_without_a_state_starts_from_zeros_whatever_its_number(
    bench: Bench, spec: PolicySpec
) -> None:
    bench.start(100)
    answer = bench.step(3, None, seed=9, step=5)
    assert (answer.value, answer.step) == ([3], 5)
    assert (answer.action[0], answer.log_prob[0]) == decided_by(spec, 9, 5)


def test_stateless_blocks_leave_no_row_behind(bench: Bench, spec: PolicySpec) -> None:
    state = bench.only(vector(spec, range(3), None)).state
    bench.take(
        vector(spec, range(9), None),
        vector(spec, range(3), None, state=state, step=1),
        vector(spec, range(3), None, poison=[1]),
    )
    bench.check_rows()


def test_stateless_blocks_use_the_same_rows_again(bench: Bench, spec: PolicySpec) -> None:
    state = bench.only(single(spec, 1.0)).state
    for _ in range(20):
        state = bench.only(single(spec, 1.0, state=state)).state
    assert np.count_nonzero(bench.states.arrays[0].any(axis=(1, 2))) <= 2


def test_stateless_blocks_may_share_a_batch(bench: Bench, spec: PolicySpec) -> None:
    assert bench.values(single(spec, 1), vector(spec, [2, 3]), single(spec, 4)) == [
        [1],
        [2, 3],
        [4],
    ]
    assert bench.observed == [4]


def test_stateless_blocks_of_a_batch_have_their_states_read_at_once(
    bench: Bench, spec: PolicySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device each time is a copy, and a wait for it."""
    read: list[int] = []
    of_runtime = bench.runtime.read

    def counted(rows: Rows) -> State:
        read.append(len(rows))
        return of_runtime(rows)

    monkeypatch.setattr(bench.runtime, "read", counted)
    answers = bench.take(
        single(spec, 1), single(spec, 9, "a", starts=True), vector(spec, [2, 3], None)
    )
    assert read == [3]
    states = [answer.state for answer in answers if isinstance(answer, Stepped)]
    of_rows = [state and state[0][:, 0, 0].tolist() for state in states]
    assert of_rows == [[1], None, [2, 3]]


def test_a_state_comes_with_a_stateless_answer_only(bench: Bench, spec: PolicySpec) -> None:
    assert bench.start().state is None
    state = bench.only(vector(spec, range(1, 20), None)).state
    assert state is not None
    assert state[0][:, 0, 0].tolist() == list(range(1, 20))


def test_a_batch_is_padded_to_the_next_warm_size(bench: Bench, spec: PolicySpec) -> None:
    for size, padded in ((1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)):
        bench.take(*[single(spec) for _ in range(size)])
        assert bench.loaded.batch_sizes[-1] == padded


def test_padding_rows_reach_nobody(bench: Bench, spec: PolicySpec) -> None:
    bench.take(*[single(spec, 100, str(n), starts=True) for n in range(8)])
    assert bench.values(*[single(spec, 1, str(n)) for n in range(3)]) == [[101]] * 3
    assert bench.values(*[single(spec, 1, str(n)) for n in range(8)]) == [[102]] * 3 + [[101]] * 5


def test_a_batch_that_ran_is_told_by_its_rows_and_none_where_no_model_was_needed(
    bench: Bench, spec: PolicySpec
) -> None:
    bench.values(single(spec, 1, "a", starts=True, step=0), vector(spec, range(9)))
    assert bench.observed == [8, 2]
    bench.take(single(spec, 1, "x"), single(spec, 1, "a", starts=True, step=0))
    assert bench.observed == [8, 2]


def test_blocks_are_not_written_to(bench: Bench) -> None:
    block = single(bench.spec, 1, "a", starts=True, forbid=(0,))
    given = [array.copy() for array in block.given]
    bench.only(block)
    assert all(map(np.array_equal, block.given, given))


@pytest.mark.parametrize("turns", [None, 0])
def test_a_failing_policy_leaves_every_session_as_it_was(
    spec: PolicySpec, turns: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(spec, turns=turns)
    for name in "ab":
        bench.start(1, name)
    bench.only(vector(spec, [1, 2], "v", starts=True))
    bench.loaded.failure = RuntimeError("out of memory")
    blocks = [single(spec, 10, name, step=1) for name in "ab"]
    blocks.append(single(spec, 10, "new", starts=True))
    blocks.append(vector(spec, [10, 10], "v", step=1, starts=np.array([False, True])))
    assert [str(error) for error in bench.take(*blocks)] == ["internal error"] * 4
    assert "out of memory" in caplog.text
    assert bench.observed[-1] == 5  # a batch that fails is one that was tried
    bench.loaded.failure = None
    assert "new" not in bench.sessions
    bench.check_rows()
    assert bench.values(*blocks) == [[11], [11], [10], [11, 10]]


def test_an_answer_that_cannot_be_kept_is_not_given_and_moves_nothing(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a retry would be told something else, and the next step go on from elsewhere."""
    bench.start(1, step=0)
    bench.rows.outputs["of no step"] = bench.rows.outputs["value"].copy()
    with pytest.raises(ServiceError, match="internal error"):
        bench.step(10, step=1)
    del bench.rows.outputs["of no step"]
    bench.check_rows()
    assert bench.start(1, step=0).is_replay
    again = bench.step(10, step=1)
    assert (again.value, again.is_replay) == ([11], False)
    assert bench.step(10, step=1).log_prob == again.log_prob
    assert bench.step(100, step=2).value == [111]


def test_what_needs_no_model_is_answered_though_the_batch_fails(
    bench: Bench, spec: PolicySpec, caplog: pytest.LogCaptureFixture
) -> None:
    bench.start(1, "a", step=0)
    bench.start(1, "b")
    bench.loaded.failure = RuntimeError("broken")
    replay, unknown, fails = bench.take(
        single(spec, 1, "a", starts=True, step=0), single(spec, 1, "x"), single(spec, 1, "b")
    )
    assert isinstance(replay, Stepped)
    assert replay.is_replay
    assert isinstance(unknown, UnknownSession)
    assert str(fails) == "internal error"


def test_an_output_that_is_not_finite_is_one_block_s_error_and_moves_nothing(
    bench: Bench, spec: PolicySpec
) -> None:
    for name in "abc":
        bench.start(1, name)
    answers = bench.take(*[single(spec, 10, name, step=1, is_poison=name == "b") for name in "abc"])
    assert [isinstance(answer, Invalid) for answer in answers] == [False, True, False]
    assert "this observation is not finite; the session has not moved" in str(answers[1])
    assert bench.values(*[single(spec, 10, name) for name in "abc"]) == [[21], [11], [21]]


@pytest.mark.parametrize("at", [0, 3, 7, 8, 12])
def test_a_row_that_is_not_finite_refuses_its_block_by_name_and_moves_none_of_it(
    spec: PolicySpec, at: int
) -> None:
    bench = Bench(spec, capacity=14)
    bench.values(single(spec, 1, "a", starts=True), vector(spec, [1] * 13, "v", starts=True))
    answers = bench.take(
        single(spec, 10, "a"), vector(spec, [10] * 13, "v", step=1, poison=[at, 12])
    )
    assert isinstance(answers[0], Stepped)
    assert isinstance(answers[1], Invalid)
    assert f"`observation[{at}]` is not finite" in str(answers[1])
    bench.check_rows()
    assert bench.values(vector(spec, [10] * 13, "v", step=1)) == [[11] * 13]


def test_a_row_that_is_not_finite_is_its_own_block_s_behind_the_rest_of_a_large_one(
    spec: PolicySpec,
) -> None:
    bench = Bench(spec, capacity=16)
    large, poisoned, other = bench.take(
        vector(spec, range(13), "v", starts=True),
        single(spec, 1, "a", starts=True, is_poison=True),
        single(spec, 2, "b", starts=True),
    )
    assert bench.observed == [8, 7]
    assert isinstance(large, Stepped)
    assert large.value == list(range(13))
    assert isinstance(poisoned, Invalid)
    assert isinstance(other, Stepped)
    assert other.value == [2]


def test_a_start_whose_output_is_not_finite_starts_nothing(bench: Bench) -> None:
    with pytest.raises(Invalid):
        bench.start(1, "a", is_poison=True)
    assert "a" not in bench.sessions
    bench.check_rows()


def test_a_restart_whose_output_is_not_finite_keeps_the_running_episode(bench: Bench) -> None:
    bench.start(1, run="7")
    with pytest.raises(Invalid):
        bench.start(1, run="8", is_poison=True)
    assert bench.step(1, run="7", step=1).value == [2]


@pytest.mark.parametrize("where", ["log_prob", "value", "state_h_out", "state_c_out"])
def test_no_output_that_is_not_finite_is_let_through(spec: PolicySpec, where: str) -> None:
    def spoil(decided: Arrays) -> None:
        decided[where][1:2].flat[-1] = np.inf

    bench = Bench(spec)
    bench.loaded.spoil = spoil
    answers = bench.take(*[single(spec, 1, name, starts=True) for name in "abc"])
    assert [isinstance(answer, Invalid) for answer in answers] == [False, True, False]


@pytest.mark.parametrize("where", ["q_value", "contribution"])
def test_no_output_of_the_critic_that_is_not_finite_is_let_through(where: str) -> None:
    spec = PolicySpec.tamiyo_v2(num_slots=2, observation_dim=7, feature_dim=8, hidden_dim=8)
    spec = spec.model_copy(update={"extra_outputs": ("q_value", "contribution")})

    def spoil(decided: Arrays) -> None:
        decided[where][1:2].flat[-1] = np.nan

    bench = Bench(spec)
    bench.loaded.spoil = spoil
    more = (np.full((1, 2), -1, np.int64), np.ones((1, 6, 2), np.bool_))
    answers = bench.take(*[single(spec, 1, name, starts=True, more=more) for name in "abc"])
    assert [isinstance(answer, Invalid) for answer in answers] == [False, True, False]


def test_a_start_too_many_is_one_block_s_error(spec: PolicySpec) -> None:
    bench = Bench(spec, capacity=1)
    bench.start(1, "held")
    answers = bench.take(single(spec, 1, "new", starts=True), single(spec, 1, "held"))
    assert isinstance(answers[0], Overloaded)
    assert isinstance(answers[1], Stepped)
    assert answers[1].value == [2]


def test_starts_there_is_no_room_for_do_not_run_the_policy(spec: PolicySpec) -> None:
    bench = Bench(spec, capacity=1)
    answers = bench.take(*[single(spec, 1, str(n), starts=True) for n in range(8)])
    assert isinstance(answers[0], Stepped)
    assert [type(answer) for answer in answers[1:]] == [Overloaded] * 7
    assert bench.observed == [1]
    bench.check_rows()


def test_errors_replays_and_steps_are_answered_in_order(bench: Bench, spec: PolicySpec) -> None:
    for name in "ab":
        bench.start(1, name)
    bench.step(10, "a", step=1)
    answers = bench.take(
        single(spec, 1, "nobody"),
        single(spec, 10, "a", step=1),
        single(spec, 100, "b", step=1),
        single(spec, 1, "lost", step=9),
        single(spec, 5, None),
    )
    assert isinstance(answers[0], UnknownSession)
    assert isinstance(answers[3], SessionLost)
    assert [answer.value for answer in answers if isinstance(answer, Stepped)] == [[11], [101], [5]]
    assert bench.observed[-1] == 2


def test_refused_blocks_do_not_run_the_policy(bench: Bench, spec: PolicySpec) -> None:
    answers = bench.take(single(spec, 1, "x"), single(spec, 1, "y", step=3))
    assert [type(answer) for answer in answers] == [UnknownSession, SessionLost]
    assert bench.loaded.batch_sizes == []


def test_a_step_asked_for_twice_at_once_is_taken_once(bench: Bench, spec: PolicySpec) -> None:
    bench.start(1)
    twice = [single(spec, 10, "a", step=1) for _ in range(2)]
    first, second = bench.take(*twice)
    assert isinstance(first, Stepped)
    assert isinstance(second, Stepped)
    assert second == first._replace(is_replay=True)
    assert bench.step(100, step=2).value == [111]


Plan = list[tuple[str, float]]
plans = st.lists(
    st.tuples(st.sampled_from("abcde"), st.integers(min_value=-9, max_value=9)), max_size=30
)


def blocks_of(spec: PolicySpec, plan: Plan) -> list[Block]:
    started: set[str] = set()
    blocks = []
    for name, x in plan:
        blocks.append(single(spec, x, name, starts=name not in started, seed=ord(name)))
        started.add(name)
    return blocks


@given(plan=plans)
def test_interleaved_sessions_equal_separate_ones(spec: PolicySpec, plan: Plan) -> None:
    interleaved = one_by_one(spec, plan)
    for name in {name for name, _ in plan}:
        alone = one_by_one(spec, [(n, x) for n, x in plan if n == name])
        assert [a for a, (n, _) in zip(interleaved, plan, strict=True) if n == name] == alone


@given(plan=plans, sizes=st.lists(st.integers(1, 12), min_size=30, max_size=30))
def test_all_at_once_equals_one_by_one(spec: PolicySpec, plan: Plan, sizes: list[int]) -> None:
    blocks, waves = blocks_of(spec, plan), []
    while blocks:
        size = sizes.pop()
        waves.append(blocks[:size])
        blocks = blocks[size:]
    at_once = Bench(spec).take_waves(waves)
    assert list(chain.from_iterable(at_once)) == one_by_one(spec, plan)


def one_by_one(spec: PolicySpec, plan: Plan) -> list[Stepped | ServiceError]:
    answers = Bench(spec).take_waves([[block] for block in blocks_of(spec, plan)])
    return list(chain.from_iterable(answers))


def test_a_step_runs_beside_the_loop_where_its_requests_take_less(spec: PolicySpec) -> None:
    """But not for a lone client, who has nothing else to do than wait for it."""
    bench = Bench(spec, capacity=1000, buckets=(256,), turns=0)

    def beside_s(*blocks: Block) -> float:
        bench.take(*blocks)
        return bench.device.beside_s

    def start(name: str) -> Block:
        return single(spec, 1, name, starts=True)

    assert beside_s(start("a")) == SHORT_STEP_S
    assert beside_s(single(spec, 1, "a")) == LONG_STEP_S
    assert beside_s(vector(spec, range(64), "v", starts=True)) == SHORT_STEP_S
    assert beside_s(vector(spec, range(64), "v")) == LONG_STEP_S
    assert beside_s(single(spec, 1, "a")) == SHORT_STEP_S
    assert beside_s(start("a"), start("b")) == SHORT_STEP_S
    assert beside_s(single(spec, 1, "a")) == SHORT_STEP_S
    assert beside_s(single(spec)) == beside_s(single(spec)) == SHORT_STEP_S
    assert beside_s(*[start(f"{n}") for n in range(20)]) == 20 * BLOCK_S
    assert beside_s(*[start(f"{n}") for n in range(200)]) == LONG_STEP_S


def test_a_step_runs_beside_the_loop_where_the_next_is_there_already(spec: PolicySpec) -> None:
    bench = Bench(spec, capacity=1000, buckets=(64,), turns=0)
    turns = [bench.stepper.admit(single(spec, 1, f"{n}", starts=True)) for n in range(64)]
    parts = [Part(turn, 0, 1) for turn in turns if isinstance(turn, Turn)]
    for is_followed, beside_s in ((True, SHORT_STEP_S), (False, LONG_STEP_S)):
        bench.stepper.launch(parts, is_followed=is_followed)
        assert bench.device.beside_s == beside_s


def test_noise_of_a_vector_s_next_step_is_made_when_it_was_answered(
    spec: PolicySpec, made: list[int]
) -> None:
    bench = Bench(spec, capacity=100, buckets=(64,))
    xs = [1.0] * 20
    bench.only(vector(spec, xs, "v", starts=True))
    assert made.count(20) == 2
    made.clear()
    bench.only(vector(spec, xs, "v"))
    assert made == [20]  # of the step after
    made.clear()
    bench.only(vector(spec, xs, "v", starts=np.arange(20) < 3))
    assert made == [3, 20]
    made.clear()
    bench.only(vector(spec, xs, "v", deterministic=True))
    bench.only(vector(spec, xs))
    assert made == [20]  # nobody knows what a stateless one does next


@pytest.mark.parametrize(("number", "num_ahead"), [(64, 64 * 8), (65, 65)])
def test_noise_of_many_single_environments_is_not_made_ahead(
    spec: PolicySpec, made: list[int], number: int, num_ahead: int
) -> None:
    """Eight steps of more would hold up who waits."""
    bench = Bench(spec, capacity=100, buckets=(128,))
    bench.take(*[single(spec, 1.0, f"{n}", starts=True) for n in range(number)])
    made.clear()
    bench.take(*[single(spec, 1.0, f"{n}") for n in range(number)])
    assert sum(made) == num_ahead


def test_noise_is_made_ahead_for_every_vector_of_the_batches_just_collected(
    spec: PolicySpec, made: list[int]
) -> None:
    bench = Bench(spec, capacity=200, buckets=(64,), turns=0)
    stepper = bench.stepper
    for names in (["v", "w"], ["x"]):
        turns = [stepper.admit(vector(spec, [1.0] * 20, name, starts=True)) for name in names]
        stepper.launch([Part(turn, 0, 20) for turn in turns if isinstance(turn, Turn)])
    made.clear()
    for _ in range(2):
        stepper.collect()
    assert made == []
    stepper.look_ahead()
    stepper.look_ahead()
    assert [num for num in made if num > 1] == [40, 20]


def test_seconds_of_a_batch_behind_another_begin_where_that_one_ended(
    spec: PolicySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(spec, capacity=200, turns=0)
    stepper, observed = bench.stepper, []
    monkeypatch.setattr(stepper, "_observe", lambda num_rows, seconds: observed.append(seconds))
    now_s = 100.0
    monkeypatch.setattr("service.engine.stepper.time.perf_counter", lambda: now_s)
    for name in "ab":
        turn = stepper.admit(single(spec, 1, name, starts=True))
        assert isinstance(turn, Turn)
        stepper.launch([Part(turn, 0, 1)])
        now_s += 1
    for _ in range(2):
        now_s += 5
        stepper.collect()
    assert observed == [7.0, 5.0]
