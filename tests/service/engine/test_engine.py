from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.spec import PolicySpec
from service.engine.engine import StepAnswer, StepRequest, derived_seed
from service.engine.noise import gumbel_noise
from service.errors import (
    Invalid,
    Overloaded,
    ServiceError,
    SessionLost,
    StepConflict,
    UnknownSession,
)
from tests.service.fakes import Arrays, Bench, step_request

FULL_BATCH = 8


def noise_of(spec: PolicySpec, seed: int, step: int) -> NDArray[np.float32]:
    return gumbel_noise(np.array([seed], np.uint64), np.array([step], np.uint64), spec.num_choices)


def values(answers: list[StepAnswer | ServiceError]) -> list[float]:
    assert all(isinstance(answer, StepAnswer) for answer in answers), answers
    return [answer.value for answer in answers if isinstance(answer, StepAnswer)]


def test_a_session_s_state_carries_from_step_to_step(bench: Bench) -> None:
    assert [bench.start(1).value, bench.step(10).value, bench.step(100).value] == [1, 11, 111]


def test_both_halves_of_the_state_carry(bench: Bench) -> None:
    bench.start(1, "a")
    bench.start(10, "b")
    for _ in range(3):
        bench.step(1, "a")
    for name, h, c in (("a", 4, 4), ("b", 10, 1)):
        session = bench.sessions.find(name)
        assert session is not None
        assert (bench.sessions.h[session.row] == h).all()
        assert (bench.sessions.c[session.row] == c).all()


def test_answers_count_the_steps_of_the_episode(bench: Bench) -> None:
    assert [bench.start().step, bench.step().step, bench.step(step=2).step] == [0, 1, 2]
    assert bench.start().step == 0


def test_a_start_begins_from_zeros_again(bench: Bench) -> None:
    bench.start(1)
    bench.step(10)
    assert bench.start(5).value == 5
    assert bench.step(1).value == 6


def test_a_retry_gives_the_stored_answer_without_running_the_policy(bench: Bench) -> None:
    bench.start(1)
    answer = bench.step(10, step=1)
    num_batches = len(bench.runtime.batch_sizes)
    again = bench.step(10, step=1)
    assert len(bench.runtime.batch_sizes) == num_batches
    assert not answer.is_replay
    assert again.is_replay
    assert (again.action, again.log_prob, again.value, again.step) == (
        answer.action,
        answer.log_prob,
        answer.value,
        answer.step,
    )
    assert bench.step(100, step=2).value == 111


def test_a_retry_keeps_its_session_from_going_idle(bench: Bench) -> None:
    bench.start(step=0)
    for _ in range(3):
        bench.clock.now_s += 40
        assert bench.step(step=0, episode_start=True).is_replay
    assert bench.step(step=1).step == 1


def test_a_retry_of_a_start_gives_its_answer_and_starts_nothing(bench: Bench) -> None:
    first = bench.start(1, episode="7")
    again = bench.start(1, episode="7")
    assert again.is_replay
    assert again.value == first.value
    assert bench.step(1, step=1).value == 2


def test_a_stored_answer_outlives_the_steps_of_other_sessions(bench: Bench) -> None:
    bench.start(1, "a")
    answer = bench.step(10, "a", step=1)
    for number in range(5):
        bench.start(number, f"other {number}")
    again = bench.step(10, "a", step=1)
    assert again.is_replay
    assert again.log_prob == answer.log_prob
    assert again.value == 11


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
    assert bench.step(100).value == 111


def test_a_refused_request_leaves_its_session_as_it_was(bench: Bench) -> None:
    bench.start(1, seed=5)
    for fields in ({"step": 0}, {"step": 7}, {"episode": "x"}, {"seed": 6}):
        with pytest.raises(StepConflict):
            bench.step(10, **fields)
    assert bench.step(1, step=1, seed=5).value == 2


def test_unknown_and_lost_sessions_do_not_run_the_policy(bench: Bench) -> None:
    with pytest.raises(UnknownSession):
        bench.step()
    with pytest.raises(SessionLost):
        bench.step(step=3)
    assert bench.runtime.batch_sizes == []


def test_steps_are_sampled_with_the_published_noise_of_seed_and_step(
    bench: Bench, spec: PolicySpec
) -> None:
    answers = [bench.start(seed=42), bench.step(), bench.step()]
    for step, answer in enumerate(answers):
        columns = np.split(noise_of(spec, 42, step)[0], np.cumsum(spec.head_sizes)[:-1])
        assert answer.action == [int(column.argmax()) for column in columns]
        assert answer.log_prob == [float(column.max()) for column in columns]


def test_a_deterministic_step_has_no_noise(bench: Bench, spec: PolicySpec) -> None:
    zeros = [0.0] * len(spec.heads)
    assert bench.start(seed=42, deterministic=True).log_prob == zeros
    assert bench.step().log_prob != zeros
    assert bench.step(deterministic=True).log_prob == zeros


def test_deterministic_and_sampled_rows_ride_together(bench: Bench, spec: PolicySpec) -> None:
    requests = [
        bench.request(1, name, episode_start=True, seed=9, deterministic=name in "ac")
        for name in "abcd"
    ]
    answers = bench.engine.step(requests)
    zeros = [0.0] * len(spec.heads)
    sampled = Bench(spec).start(1, seed=9).log_prob
    got = [answer.log_prob for answer in answers if isinstance(answer, StepAnswer)]
    assert got == [zeros, sampled, zeros, sampled]


def test_a_mask_reaches_the_policy(bench: Bench, spec: PolicySpec) -> None:
    for only in range(spec.num_choices):
        head = int(np.searchsorted(np.cumsum(spec.head_sizes), only, side="right"))
        first = sum(spec.head_sizes[:head])
        others = set(range(first, first + spec.head_sizes[head])) - {only}
        assert bench.start(forbid=sorted(others)).action[head] == only - first


def test_a_mask_is_forgotten_after_its_step(bench: Bench, spec: PolicySpec) -> None:
    free = Bench(spec).start(seed=42).action
    bench.start(seed=42, forbid=[free[0]])
    assert bench.start(seed=42).action == free


def test_episodes_without_a_seed_differ_and_repeat_with_the_server_s_seed(
    bench: Bench, spec: PolicySpec
) -> None:
    def samples(bench: Bench) -> list[list[float]]:
        return [
            bench.start(1, "a").log_prob,
            bench.start(1, "a").log_prob,
            bench.start(1, "b").log_prob,
            bench.start(1, "b", episode="7").log_prob,
            bench.start(1, "b", episode="8").log_prob,
            bench.step(1, None).log_prob,
            bench.step(1, None).log_prob,
        ]

    first = samples(bench)
    assert len({tuple(log_prob) for log_prob in first}) == len(first)
    assert samples(Bench(spec)) == first


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


def test_a_stateless_step_starts_from_zeros_and_gives_its_state(bench: Bench) -> None:
    answer = bench.step(3, None)
    assert answer.state is not None
    assert answer.value == 3
    assert (answer.state[0] == 3).all()
    assert (answer.state[1] == 1).all()
    assert len(bench.sessions) == 0


def test_a_stateless_step_goes_on_from_the_state_it_brings(bench: Bench) -> None:
    first = bench.step(3, None)
    kept = first.state
    second = bench.step(4, None, state=kept)
    assert second.value == 7
    assert kept is not None
    assert (kept[0] == 3).all(), "the caller's state was written to"


def test_stateless_steps_equal_a_session_s(bench: Bench, spec: PolicySpec) -> None:
    state = None
    for step in range(4):
        x = 10.0**step
        alone = bench.step(x, None, state=state, seed=9, step=step)
        state = alone.state
        session = bench.step(x, "a", seed=9, episode_start=step == 0)
        assert (session.action, session.log_prob) == (alone.action, alone.log_prob)
        assert (session.value, session.step) == (alone.value, alone.step)
        assert session.state is None


def test_stateless_requests_may_share_a_batch(bench: Bench) -> None:
    answers = bench.engine.step([bench.request(x, None) for x in (1, 2, 3)])
    assert values(answers) == [1, 2, 3]


def test_a_batch_is_padded_to_the_next_warm_size(bench: Bench) -> None:
    for size, bucket in ((1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)):
        bench.engine.step([bench.request(1, None) for _ in range(size)])
        assert bench.runtime.batch_sizes[-1] == bucket


def test_padding_rows_reach_nobody(bench: Bench) -> None:
    bench.engine.step([bench.request(100, str(n), episode_start=True) for n in range(8)])
    assert values(bench.engine.step([bench.request(1, str(n)) for n in range(3)])) == [101] * 3
    assert values(bench.engine.step([bench.request(1, str(n)) for n in range(8)])) == (
        [102] * 3 + [101] * 5
    )


def test_warming_up_runs_every_size_and_leaves_no_trace(bench: Bench) -> None:
    bench.engine.warm_up()
    assert set(bench.runtime.batch_sizes) == {1, 2, 4, 8}
    assert len(bench.sessions) == 0
    assert bench.start(1).value == 1


def test_the_largest_batch_is_the_largest_bucket(bench: Bench) -> None:
    assert bench.engine.max_batch_size == FULL_BATCH


def test_requests_are_not_written_to(bench: Bench) -> None:
    request = bench.request(1, episode_start=True, forbid=(0,))
    observation, mask = request.observation.copy(), request.action_mask.copy()
    bench.engine.step([request])
    assert np.array_equal(request.observation, observation)
    assert np.array_equal(request.action_mask, mask)


def test_a_failing_policy_leaves_every_session_as_it_was(bench: Bench) -> None:
    for name in "ab":
        bench.start(1, name)
    bench.runtime.failure = RuntimeError("out of memory")
    requests = [bench.request(10, name, step=1) for name in "ab"]
    requests.append(bench.request(10, "new", episode_start=True))
    with pytest.raises(RuntimeError, match="out of memory"):
        bench.engine.step(requests)
    bench.runtime.failure = None
    assert bench.sessions.find("new") is None
    assert values(bench.engine.step(requests)) == [11, 11, 10]


def test_an_output_that_is_not_finite_is_one_request_s_error_and_moves_nothing(
    bench: Bench,
) -> None:
    for name in "abc":
        bench.start(1, name)
    answers = bench.engine.step(
        [bench.request(10, name, step=1, is_poison=name == "b") for name in "abc"]
    )
    assert isinstance(answers[1], Invalid)
    assert "has not moved" in str(answers[1])
    assert values([answers[0], answers[2]]) == [11, 11]
    assert bench.step(10, "b", step=1).value == 11


def test_a_start_whose_output_is_not_finite_starts_nothing(bench: Bench) -> None:
    with pytest.raises(Invalid):
        bench.start(1, "a", is_poison=True)
    assert bench.sessions.find("a") is None


def test_a_restart_whose_output_is_not_finite_keeps_the_running_episode(bench: Bench) -> None:
    bench.start(1, episode="7")
    with pytest.raises(Invalid):
        bench.start(1, episode="8", is_poison=True)
    assert bench.step(1, episode="7", step=1).value == 2


@pytest.mark.parametrize("where", ["log_prob", "value", "state_h_out", "state_c_out"])
def test_no_output_that_is_not_finite_is_let_through(spec: PolicySpec, where: str) -> None:
    def spoil(decided: Arrays) -> None:
        decided[where][1:2].flat[-1] = np.inf

    bench = Bench(spec)
    bench.runtime.spoil = spoil
    answers = bench.engine.step([bench.request(1, name, episode_start=True) for name in "abc"])
    assert [isinstance(answer, Invalid) for answer in answers] == [False, True, False]


@pytest.mark.parametrize("where", ["q_value", "contribution"])
def test_no_output_of_the_critic_that_is_not_finite_is_let_through(where: str) -> None:
    spec = PolicySpec.tamiyo_v2(num_slots=2, observation_dim=7, feature_dim=8, hidden_dim=8)
    spec = spec.model_copy(update={"extra_outputs": ("q_value", "contribution")})

    def spoil(decided: Arrays) -> None:
        decided[where][1:2].flat[-1] = np.nan

    bench = Bench(spec)
    bench.runtime.spoil = spoil
    requests = [
        replace(
            bench.request(1, name, episode_start=True),
            blueprint_index=np.full(2, -1, np.int64),
            slot_by_op_mask=np.ones((6, 2), np.bool_),
        )
        for name in "abc"
    ]
    answers = bench.engine.step(requests)
    assert [isinstance(answer, Invalid) for answer in answers] == [False, True, False]


def test_a_start_too_many_is_one_request_s_error(spec: PolicySpec) -> None:
    bench = Bench(spec, capacity=1)
    bench.start(1, "held")
    bench.sessions.hold("held")
    answers = bench.engine.step(
        [bench.request(1, "new", episode_start=True), bench.request(1, "held")]
    )
    assert isinstance(answers[0], Overloaded)
    assert values(answers[1:]) == [2]


def test_errors_replays_and_steps_share_a_batch_in_order(bench: Bench) -> None:
    for name in "ab":
        bench.start(1, name)
    bench.step(10, "a", step=1)
    answers = bench.engine.step(
        [
            bench.request(1, "nobody"),
            bench.request(10, "a", step=1),
            bench.request(100, "b", step=1),
            bench.request(1, "lost", step=9),
            bench.request(5, None),
        ]
    )
    assert isinstance(answers[0], UnknownSession)
    assert isinstance(answers[3], SessionLost)
    assert values([answers[1], answers[2], answers[4]]) == [11, 101, 5]
    assert bench.runtime.batch_sizes[-1] == 2


def test_a_batch_of_refused_requests_does_not_run_the_policy(bench: Bench) -> None:
    answers = bench.engine.step([bench.request(1, "x"), bench.request(1, "y", step=3)])
    assert [type(answer) for answer in answers] == [UnknownSession, SessionLost]
    assert bench.runtime.batch_sizes == []


def test_the_fingerprint_is_of_what_decides_the_answer(spec: PolicySpec) -> None:
    def fingerprint(x: float = 1.0, **fields: Any) -> bytes:
        return step_request(spec, x, "a", **fields).fingerprint

    assert fingerprint() == fingerprint()
    others = [fingerprint(2.0), fingerprint(forbid=(3,)), fingerprint(deterministic=True)]
    assert len({fingerprint(), *others}) == 4
    assert fingerprint(step=1, episode_start=True) == fingerprint()


Plan = list[tuple[str, float]]
plans = st.lists(
    st.tuples(st.sampled_from("abcde"), st.integers(min_value=-9, max_value=9)), max_size=30
)


def one_by_one(bench: Bench, plan: Plan) -> dict[str, list[StepAnswer]]:
    answers: dict[str, list[StepAnswer]] = {}
    for name, x in plan:
        of_session = answers.setdefault(name, [])
        of_session.append(bench.step(x, name, episode_start=not of_session, seed=ord(name)))
    return answers


@given(plan=plans)
def test_interleaved_sessions_equal_separate_ones(spec: PolicySpec, plan: Plan) -> None:
    interleaved = one_by_one(Bench(spec), plan)
    separate: dict[str, list[StepAnswer]] = {}
    for name in interleaved:
        separate |= one_by_one(Bench(spec), [(n, x) for n, x in plan if n == name])
    assert interleaved == separate


@given(plan=plans, data=st.data())
def test_batched_equals_one_by_one(spec: PolicySpec, plan: Plan, data: st.DataObject) -> None:
    expected = one_by_one(Bench(spec), plan)
    bench = Bench(spec)
    got: dict[str, list[StepAnswer]] = {name: [] for name in expected}
    queues = {name: [x for n, x in plan if n == name] for name in expected}
    while queues:
        names = data.draw(st.lists(st.sampled_from(sorted(queues)), min_size=1, unique=True))
        requests: list[StepRequest] = [
            bench.request(queues[name].pop(0), name, episode_start=not got[name], seed=ord(name))
            for name in names
        ]
        for name, answer in zip(names, bench.engine.step(requests), strict=True):
            assert isinstance(answer, StepAnswer)
            got[name].append(answer)
        queues = {name: queue for name, queue in queues.items() if queue}
    assert got == expected
