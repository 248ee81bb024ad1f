"""What a server that was restarted, or killed, goes on from, and what it says is lost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.spec import PolicySpec
from service.engine.block import Block
from service.engine.kept_sessions import FRAME_NAMES, FRAME_ROWS, KeptSessions, Served
from service.engine.sessions import Past
from service.engine.snapshot_file import Draft, Frame, Snapshot, SnapshotError
from service.errors import ServiceError, SessionLost, StepConflict, UnknownSession
from tests.service.fakes import VERSION, Bench, Stepped, single, vector

RUN: dict[str, Any] = {"run": "p"}
NUM_STEPS = 6


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions"


def stale(bench: Bench, path: Path) -> Bench:
    """Another server after this one was killed: with all it knew, but it is not to trust that."""
    return bench.restarted(path, is_final=False)


def answer(bench: Bench, block: Block) -> Stepped | ServiceError:
    return bench.take(block)[0]


def steps_of(bench: Bench, session_id: str, **fields: Any) -> list[Stepped]:
    """The first three of a session's episode, of which each adds another number."""
    started = bench.start(1.0, session_id, step=0, **fields)
    return [started, *(bench.step(x, session_id, step=int(x) - 1, **fields) for x in (2.0, 3.0))]


def test_a_named_episode_that_has_not_moved_on_goes_on(bench: Bench, path: Path) -> None:
    steps_of(bench, "a", **RUN)
    after = stale(bench, path)
    assert after.step(4.0, "a", step=3, **RUN) == bench.step(4.0, "a", step=3, **RUN)
    assert after.step(5.0, "a") == bench.step(5.0, "a"), "stale no more: it needs no name any more"


def test_the_last_answer_of_one_is_given_again(bench: Bench, path: Path) -> None:
    *_, last = steps_of(bench, "a", **RUN)
    after = stale(bench, path)
    for _ in range(2):
        assert after.step(3.0, "a", step=2, **RUN) == last._replace(is_replay=True)
    assert after.step(4.0, "a", step=3, **RUN) == bench.step(4.0, "a", step=3, **RUN)


def test_a_snapshot_that_says_nothing_of_last_steps_is_read(
    bench: Bench, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those were that were written before there were any."""
    steps_of(bench, "a", **RUN)
    frame = KeptSessions._sessions_frame

    def older(*args: Any) -> Frame:
        record, arrays = frame(*args)
        return Frame(record, {name: of for name, of in arrays.items() if name != "is_over"})

    monkeypatch.setattr(KeptSessions, "_sessions_frame", older)
    after = bench.restarted(path)
    assert after.step(4.0, "a", step=3, **RUN) == bench.step(4.0, "a", step=3, **RUN)


def test_one_that_ended_is_the_first_to_be_given_up_after_a_restart(
    bench: Bench, path: Path
) -> None:
    bench.start(1.0, "a", step=0, **RUN)
    bench.start(1.0, "b", step=0, ends=True, **RUN)
    after = bench.restarted(path, capacity=2)
    after.start(1.0, "c")
    assert after.step(2.0, "a", step=1, **RUN) == bench.step(2.0, "a", step=1, **RUN)


@pytest.mark.parametrize("is_final", [True, False])
def test_after_its_last_step_a_session_takes_none_and_gives_that_one_again(
    bench: Bench, path: Path, is_final: bool
) -> None:
    bench.start(1.0, "a", step=0, **RUN)
    last = bench.step(2.0, "a", step=1, ends=True, **RUN)
    after = bench.restarted(path, is_final=is_final)
    assert after.step(2.0, "a", step=1, ends=True, **RUN) == last._replace(is_replay=True)
    assert isinstance(answer(after, single(after.spec, 3.0, "a", step=2, **RUN)), SessionLost)


def test_a_first_step_that_is_sent_again_is_given_again(bench: Bench, path: Path) -> None:
    first = bench.start(1.0, "a", **RUN)
    after = stale(bench, path)
    moreover: list[dict[str, Any]] = [{}, {"step": 0}]
    for more in moreover:
        assert after.start(1.0, "a", **RUN, **more) == first._replace(is_replay=True)


MOVED_ON: dict[str, dict[str, Any]] = {
    "a later step": {"run": "p", "step": 4},
    "a much later step": {"run": "p", "step": 400},
    "no step": {"run": "p"},
    "no name": {"step": 3},
    "neither": {},
    "another episode": {"run": "q", "step": 3},
    "another episode's step": {"run": "q", "step": 1},
    "the last step without a name": {"step": 2},
    "another episode of that name": {"run": "p", "step": 3, "seed": 99},
}


@pytest.mark.parametrize("what", MOVED_ON)
def test_an_episode_that_may_have_moved_on_is_lost_for_good(
    bench: Bench, path: Path, what: str
) -> None:
    steps_of(bench, "a", **RUN)
    after = stale(bench, path)
    for _ in range(2):
        assert isinstance(
            answer(after, single(after.spec, 3.0, "a", **MOVED_ON[what])), SessionLost
        )
    assert isinstance(answer(after, single(after.spec, 4.0, "a", step=3, **RUN)), SessionLost)
    assert after.sessions.events["lost"] == 1
    assert after.start(7.0, "a", **RUN).value == [7.0], "even under its old name"
    after.check_rows()


STARTS: dict[str, dict[str, Any]] = {
    "another name": {"run": "q"},
    "another name and a step": {"run": "q", "step": 0},
    "no name": {},
    "no name and a step": {"step": 0},
}


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("what", STARTS)
def test_a_start_begins_as_always(bench: Bench, path: Path, what: str, num_steps: int) -> None:
    for step in range(num_steps):
        bench.step(1.0, "a", starts=step == 0, step=step, **RUN)
    after = stale(bench, path)
    started = after.start(1.0, "a", **STARTS[what])
    assert (started.value, started.step, started.is_replay) == ([1.0], 0, False)
    assert after.step(1.0, "a").value == [2.0]


@pytest.mark.parametrize("what", STARTS)
def test_so_does_a_vector_s(bench: Bench, path: Path, what: str) -> None:
    bench.only(vector(bench.spec, [1.0, 2.0], "v", starts=True, **RUN))
    after = stale(bench, path)
    started = after.only(vector(after.spec, [5.0, 6.0, 7.0], "v", starts=True, **STARTS[what]))
    assert (started.value, started.step) == ([5.0, 6.0, 7.0], 0)
    after.check_rows()


def test_an_earlier_step_is_a_conflict_as_always_and_costs_nothing(
    bench: Bench, path: Path
) -> None:
    steps_of(bench, "a", **RUN)
    after = stale(bench, path)
    late = [
        single(after.spec, 1.0, "a", starts=True, step=0, **RUN),
        single(after.spec, 1.0, "a", starts=True, **RUN),
        single(after.spec, 2.0, "a", step=1, **RUN),
        single(after.spec, 9.0, "a", step=2, **RUN),  # of another content than the last
    ]
    for block in late:
        assert isinstance(answer(after, block), StepConflict)
    assert after.step(4.0, "a", step=3, **RUN) == bench.step(4.0, "a", step=3, **RUN)


def test_a_step_that_is_refused_leaves_it_as_stale_as_it_was(bench: Bench, path: Path) -> None:
    steps_of(bench, "a", **RUN)
    after = stale(bench, path)
    refused = answer(after, single(after.spec, 4.0, "a", step=3, is_poison=True, **RUN))
    assert "has not moved" in str(refused)
    assert isinstance(answer(after, single(after.spec, 4.0, "a")), SessionLost)


def test_it_stays_stale_over_restarts(bench: Bench, path: Path) -> None:
    steps_of(bench, "a", **RUN)
    steps_of(bench, "b", **RUN)
    after = stale(bench, path).restarted(path)
    assert isinstance(answer(after, single(after.spec, 4.0, "a")), SessionLost)
    assert after.step(4.0, "b", step=3, **RUN) == bench.step(4.0, "b", step=3, **RUN)


def test_a_name_that_is_of_another_kind_by_now_is_lost(bench: Bench, path: Path) -> None:
    bench.only(vector(bench.spec, [1.0, 2.0], "x", starts=True, **RUN))
    after = stale(bench, path)
    assert isinstance(answer(after, single(after.spec, 1.0, "x", step=1, **RUN)), SessionLost)
    assert after.start(1.0, "x").value == [1.0]


def test_a_vector_that_has_not_moved_on_goes_on_row_by_row(bench: Bench, path: Path) -> None:
    def block(step: int, starts: Sequence[bool] | bool) -> Block:
        which = starts if isinstance(starts, bool) else np.array(starts)
        return vector(bench.spec, [1.0, 2.0, 3.0], "v", step=step, starts=which, seed=5, **RUN)

    bench.take_waves([[block(0, True)], [block(1, [False, True, False])]])
    after = stale(bench, path)
    for step, starts in ((2, [True, True, False]), (3, True), (4, False)):
        assert after.only(block(step, starts)) == bench.only(block(step, starts))


def test_who_has_no_name_is_lost_and_starts_anew_with_another_seed(
    bench: Bench, path: Path
) -> None:
    steps_of(bench, "a")
    bench.only(vector(bench.spec, [1.0, 2.0], "v", starts=True))
    drawn = [bench.start(1.0, "a", deterministic=False).log_prob for _ in range(2)]
    after = stale(bench, path)
    assert len(after.sessions) == 0
    for block in (
        single(after.spec, 1.0, "a"),
        single(after.spec, 1.0, "a", step=1),
        vector(after.spec, [1.0, 2.0], "v"),
    ):
        assert isinstance(answer(after, block), SessionLost)
    started = after.start(1.0, "a")
    assert started.log_prob not in drawn
    assert started == bench.start(1.0, "a")


def test_what_became_of_others_is_remembered(bench: Bench, path: Path) -> None:
    for name in "abc":
        bench.start(1.0, name)
    bench.sessions.end("b")
    bench.clock.now_s += 100.0
    bench.sessions.expire_idle()
    bench.start(1.0, "d")
    for is_final in (True, False):
        after = bench.restarted(path, is_final=is_final)
        for name, error in (("a", SessionLost), ("b", UnknownSession), ("e", UnknownSession)):
            assert isinstance(answer(after, single(after.spec, 1.0, name)), error)
        assert after.start(1.0, "c").log_prob == bench.start(1.0, "c").log_prob
        bench.sessions.end("c")


def test_the_seeds_of_the_forgotten_go_on(spec: PolicySpec, path: Path) -> None:
    bench = Bench(spec, capacity=2)
    for name in ("a", "a", "b", "c", "d", "e", "f"):
        bench.start(1.0, name)
    after = bench.restarted(path)
    assert after.start(1.0, "a") == bench.start(1.0, "a")
    assert after.start(1.0, "new") == bench.start(1.0, "new")


def test_where_there_is_less_room_those_used_last_live_on(bench: Bench, path: Path) -> None:
    for name in "abcdef":
        bench.clock.now_s += 1.0
        bench.start(1.0, name, **RUN)
    bench.clock.now_s += 1.0
    bench.step(1.0, "a")
    for is_final in (True, False):
        after = bench.restarted(path, is_final=is_final, capacity=3)
        assert after.sessions.names(in_order=True) == ["e", "f", "a"]
        after.check_rows()
        for name in "bcd":
            assert isinstance(answer(after, single(after.spec, 1.0, name)), SessionLost)
        got = [
            after.step(1.0, name, step=step, **RUN) for name, step in (("e", 1), ("f", 1), ("a", 2))
        ]
        assert [step.value for step in got] == [[2.0], [2.0], [3.0]]
        assert after.sessions.events["restored"] == len(after.sessions) == 3


def test_a_vector_of_more_rows_than_a_request_may_have_is_lost(
    spec: PolicySpec, path: Path
) -> None:
    bench = Bench(spec, capacity=200, buckets=(64,))
    for number_of_rows, name in ((64, "fits"), (3, "small")):
        bench.only(vector(spec, [1.0] * number_of_rows, name, starts=True))
    bench.write(path)
    after = Bench(spec, capacity=200)
    with Snapshot(path) as snapshot:
        assert after.kept(max_rows=63).restore(snapshot).num_lost == 1
    assert isinstance(answer(after, vector(spec, [1.0] * 3, "fits")), SessionLost)
    assert after.only(vector(spec, [1.0] * 3, "small")).value == [2.0] * 3


def test_more_than_fits_in_a_frame_is_restored(spec: PolicySpec, path: Path) -> None:
    num_sessions = 2 * FRAME_ROWS + 3
    bench = Bench(spec, capacity=FRAME_NAMES + 1, buckets=(64,))
    past = {f"past{number}": Past(number, is_lost=True) for number in range(FRAME_NAMES + 1)}
    bench.sessions.restore({}, past, 0)
    bench.take(*(single(spec, x, f"s{x}", starts=True) for x in range(num_sessions)))
    bench.only(vector(spec, range(50), "v", starts=True))
    after = bench.restarted(path)
    assert after.sessions.past() == list(past.items())
    got = after.values(*(single(spec, 1.0, f"s{x}") for x in range(num_sessions)))
    assert got == [[x + 1.0] for x in range(num_sessions)]


def test_sessions_that_one_version_answered_share_its_name(spec: PolicySpec, path: Path) -> None:
    """Once in memory, and not once for each of a million."""
    names = [f"s{number}" for number in range(1000)]
    bench = Bench(spec, capacity=len(names), buckets=(64,))
    bench.take(*(single(spec, 1.0, name, starts=True) for name in names))
    after = bench.restarted(path)
    first, *others = [after.sessions.get(name) for name in names]
    assert first is not None
    assert first.policy_version == VERSION
    for other in others:
        assert other is not None
        assert other.policy_version is first.policy_version


def test_who_came_or_went_while_a_snapshot_was_written_is_as_it_was_then(
    spec: PolicySpec, path: Path
) -> None:
    """Each is whole in itself, and as it was when its frame was made."""
    bench = Bench(spec, capacity=400, buckets=(64,))
    first, last = "s0", f"s{FRAME_ROWS + 9}"
    bench.take(*(single(spec, 1.0, f"s{x}", starts=True, **RUN) for x in range(FRAME_ROWS + 10)))
    frames = bench.kept().frames(is_final=False)
    with Draft(path) as draft:
        draft.add(next(frames))
        for name in (first, last):
            bench.step(1.0, name)
        bench.sessions.end("s1")
        bench.sessions.end(f"s{FRAME_ROWS + 1}")
        bench.start(1.0, "new", **RUN)
        for frame in frames:
            draft.add(frame)
        draft.publish(is_final=False)
    after = bench.after(path)
    assert after.step(1.0, first, step=1, **RUN).value == [2.0]
    assert after.step(1.0, last, step=2, **RUN).value == [3.0]
    for name in ("s1", f"s{FRAME_ROWS + 1}", "new"):
        assert isinstance(answer(after, single(spec, 1.0, name)), UnknownSession)
    assert len(after.sessions) == FRAME_ROWS + 8


OTHER = "sha256:1"


def test_another_policy_s_is_refused_and_nothing_is_restored(bench: Bench, path: Path) -> None:
    bench.start(1.0, "a")
    bench.write(path)
    after = Bench(bench.spec)
    with (
        Snapshot(path) as snapshot,
        pytest.raises(SnapshotError, match=r"is of another policy, sha256:0 .* is sha256:1"),
    ):
        after.kept(OTHER).restore(snapshot)
    assert len(after.sessions) == 0


def test_one_of_other_shapes_is_refused(bench: Bench, path: Path) -> None:
    bench.start(1.0, "a")
    bench.write(path)
    larger = PolicySpec.tamiyo_v1(num_slots=2, observation_dim=11, feature_dim=12, hidden_dim=12)
    with Snapshot(path) as snapshot, pytest.raises(SnapshotError, match="another policy"):
        Bench(larger).kept().restore(snapshot)


PARAMETERS: dict[str, NDArray[Any]] = {
    "lstm.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "heads.op": np.array([1, 2**16 - 1], dtype=np.uint16),
}


def test_pushed_weights_come_back(bench: Bench, path: Path) -> None:
    write_pushed(bench, path)
    with Snapshot(path) as snapshot:
        restored = Bench(bench.spec).kept().restore(snapshot)
    served = restored.served
    assert served.policy_version == OTHER
    assert served.parameters is not None
    assert served.parameters.keys() == PARAMETERS.keys()
    for name, array in PARAMETERS.items():
        assert served.parameters[name].dtype == array.dtype
        np.testing.assert_array_equal(served.parameters[name], array)


def test_an_artifact_that_was_made_of_the_pushed_weights_goes_on(bench: Bench, path: Path) -> None:
    bench.start(1.0, "a")
    write_pushed(bench, path)
    after = Bench(bench.spec)
    with Snapshot(path) as snapshot:
        assert after.kept(OTHER).restore(snapshot).served == Served(OTHER)
    assert after.step(1.0, "a").value == [2.0]


def write_pushed(bench: Bench, path: Path) -> None:
    with Draft(path) as draft:
        for frame in bench.kept(served=Served(OTHER, PARAMETERS)).frames(is_final=True):
            draft.add(frame)
        draft.publish(is_final=True)


requests = st.fixed_dictionaries({"x": st.integers(1, 5), "starts": st.booleans()})


@given(
    script=st.lists(requests, min_size=NUM_STEPS, max_size=NUM_STEPS),
    is_named=st.booleans(),
    numbers_steps=st.booleans(),
    is_vector=st.booleans(),
    kept_at=st.integers(0, NUM_STEPS),
    killed_at=st.integers(0, NUM_STEPS),
    is_answer_lost=st.booleans(),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_after_a_kill_an_honest_client_is_told_the_truth_or_that_its_session_is_lost(
    spec: PolicySpec,
    tmp_path: Path,
    script: list[dict[str, Any]],
    is_named: bool,
    numbers_steps: bool,
    is_vector: bool,
    kept_at: int,
    killed_at: int,
    is_answer_lost: bool,
) -> None:
    """The truth is what the server would have gone on with that was not killed."""
    kept_at = min(kept_at, killed_at)
    blocks = blocks_of(spec, script, is_named, numbers_steps, is_vector)
    bench, path = Bench(spec), tmp_path / "sessions"
    undisturbed = []
    for at, block in enumerate(blocks):
        if at == kept_at:
            bench.write(path, is_final=False)
        undisturbed.append(bench.only(block))
    if kept_at == NUM_STEPS:
        bench.write(path, is_final=False)
    after = bench.after(path)
    first = max(0, killed_at - 1) if is_answer_lost and numbers_steps else killed_at
    has_moved_on = first > kept_at
    for at, block in enumerate(blocks[first:], first):
        got = answer(after, block)
        if isinstance(got, ServiceError):
            assert isinstance(got, SessionLost | UnknownSession)
            assert at == first
            assert has_moved_on or not (is_named and numbers_steps)
            return
        assert got._replace(is_replay=False) == undisturbed[at]
    if has_moved_on and first < NUM_STEPS:
        assert blocks[first].starts is True, "it was served from an older state"


def blocks_of(
    spec: PolicySpec,
    script: list[dict[str, Any]],
    is_named: bool,
    numbers_steps: bool,
    is_vector: bool,
) -> list[Block]:
    """One session's, whose episodes bring their seeds, and names where they have any."""
    blocks, step, episode = [], 0, 0
    for at, request in enumerate(script):
        starts = at == 0 or request["starts"]
        if starts and not is_vector:
            step, episode = 0, at
        fields: dict[str, Any] = {"run": str(episode)} if is_named else {}
        if numbers_steps and (is_named or is_vector or not starts):  # or it may be a retry
            fields["step"] = step
        x = float(request["x"])
        if is_vector:
            which = starts if at == 0 else np.array([starts, False])
            seeds: dict[str, Any] = {"seed": 5} if at == 0 else {}
            blocks.append(vector(spec, [x, 1.0], "s", starts=which, **seeds, **fields))
        else:
            seeds = {"seed": at} if starts else {}
            blocks.append(single(spec, x, "s", starts=starts, **seeds, **fields))
        step += 1
    return blocks


def test_an_artifact_of_the_same_weights_and_other_rules_is_another_policy(
    bench: Bench, path: Path
) -> None:
    """Floors are in no parameter, and so not in the version."""
    bench.start(1.0, "a")
    bench.write(path)
    other = Bench(bench.spec.with_probability_floors({"op": 0.1}))
    with Snapshot(path) as snapshot, pytest.raises(SnapshotError, match="is of another policy"):
        other.kept().restore(snapshot)
    renamed = Bench(bench.spec.model_copy(update={"name": "other", "value_scale": 3.0}))
    with Snapshot(path) as snapshot:
        assert renamed.kept().restore(snapshot).num_sessions == 1
