"""What rows carry from step to step: nothing, two arrays or four, by the names that a spec has."""

from pathlib import Path

import numpy as np
import pytest

from model.step_spec import StepSpec
from service.engine.block import Block
from service.engine.kept_sessions import OUTPUT
from service.engine.sessions import Session
from service.engine.snapshot_file import Snapshot, SnapshotError
from service.errors import StepConflict
from service.runtime.arrays import decisions
from tests.service.fakes import Bench, Stepped, single, vector
from tests.specs import TINY_LSTMS, TINY_MLPS, TINY_V1

OF_SESSIONS = {
    *("num_rows", "is_vector", "is_stale", "is_over", "seed", "next_step", "num_starts"),
    *("last_request", "idle_s", "episodes", "row_seed", "row_step"),
}


@pytest.fixture(params=[TINY_MLPS, TINY_V1, TINY_LSTMS], ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> StepSpec:
    of_family: StepSpec = request.param
    return of_family


def state_of(bench: Bench, session_id: str) -> dict[str, list[float]]:
    """A session's state by name, of each row the number that all of the row's are."""
    session = bench.sessions.get(session_id)
    assert isinstance(session, Session)
    state: dict[str, list[float]] = {}
    for of, array in zip(bench.spec.states, bench.runtime.read(session.rows), strict=True):
        assert array.shape == (len(session.rows), *of.shape)
        assert (array == array[:, :1, :1]).all()
        state[of.name] = array[:, 0, 0].tolist()
    return state


def numbers(answer: Stepped) -> tuple[list[list[int]], list[list[float]], list[float]]:
    return answer.action, answer.log_prob, answer.value


def test_every_array_carries_and_starts_from_zeros_by_row(bench: Bench, spec: StepSpec) -> None:
    bench.values(vector(spec, [1, 10], "v", starts=True))
    bench.values(vector(spec, [2, 20], "v"))
    starts = np.array([False, True])
    values = bench.values(vector(spec, [4, 40], "v", starts=starts))
    assert values == [[7, 40] if spec.states else [4, 40]]
    carried = {"h": [7, 40], "c": [3, 1], "critic_h": [14, 80], "critic_c": [6, 2]}
    assert state_of(bench, "v") == {state.name: carried[state.name] for state in spec.states}


def test_stateless_steps_that_carry_their_state_equal_a_session_s(
    bench: Bench, spec: StepSpec
) -> None:
    state = None
    for step in range(4):
        held = bench.only(vector(spec, [1, 2], "v", starts=step == 0, seeds=seeds(), step=step))
        free = bench.only(vector(spec, [1, 2], None, seeds=seeds(), step=step, state=state))
        assert numbers(free) == numbers(held)
        assert free.state is not None
        assert [array.shape for array in free.state] == [(2, *of.shape) for of in spec.states]
        state = free.state or None


def seeds() -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array([5, 6], dtype=np.uint64)


def test_a_step_counts_once_however_often_it_is_sent(bench: Bench, spec: StepSpec) -> None:
    bench.start(1, seed=3, step=0)
    first = bench.step(2, step=1)
    before = state_of(bench, "a")
    assert bench.step(2, step=1) == first._replace(is_replay=True)
    with pytest.raises(StepConflict, match="with another content"):
        bench.step(3, step=1)
    assert state_of(bench, "a") == before
    alone = Bench(spec)
    alone.start(1, seed=3)
    alone.step(2)
    assert numbers(bench.step(4, step=2)) == numbers(alone.step(4))


def moves(spec: StepSpec) -> list[Block]:
    return [single(spec, 3, "a"), vector(spec, [4, 5, 6], "v")]


def test_a_server_goes_on_from_a_snapshot(bench: Bench, spec: StepSpec, tmp_path: Path) -> None:
    bench.take(single(spec, 1, "a", starts=True, seed=1))
    bench.take(vector(spec, [1, 2, 3], "v", starts=True, seed=2))
    bench.take(*moves(spec))
    after = bench.restarted(tmp_path / "sessions")
    for name in ("a", "v"):
        assert state_of(after, name) == state_of(bench, name)
    for one, other in zip(bench.take(*moves(spec)), after.take(*moves(spec)), strict=True):
        assert isinstance(one, Stepped)
        assert isinstance(other, Stepped)
        assert numbers(other) == numbers(one)


def test_a_snapshot_has_the_state_by_its_names(
    bench: Bench, spec: StepSpec, tmp_path: Path
) -> None:
    bench.start()
    bench.write(tmp_path / "sessions")
    with Snapshot(tmp_path / "sessions") as snapshot:
        of_sessions = snapshot[0].arrays.keys()
    outputs = {f"{OUTPUT}{array.name}" for array in decisions(spec)}
    assert of_sessions == {state.name for state in spec.states} | OF_SESSIONS | outputs


def test_a_snapshot_of_another_family_is_refused(
    bench: Bench, spec: StepSpec, tmp_path: Path
) -> None:
    bench.start()
    bench.write(tmp_path / "sessions")
    other = Bench(TINY_V1 if spec is not TINY_V1 else TINY_MLPS)
    with (
        Snapshot(tmp_path / "sessions") as snapshot,
        pytest.raises(SnapshotError, match="is of another policy"),
    ):
        other.kept().restore(snapshot)
