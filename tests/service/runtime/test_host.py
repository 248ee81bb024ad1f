"""States in host memory, and the fake policy stepping them."""

import threading
from collections.abc import Callable, Iterator
from itertools import chain, count
from math import inf
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.manifest import step_inputs, step_outputs
from model.spec import PolicySpec
from service.runtime.host import HostRuntime, HostStates, gather, scatter
from service.runtime.protocol import Outputs, Rows
from tests.service.fakes import POISON, TIMEOUT_S, Arrays, SummingRuntime

NUM_ROWS = 12
BATCH_SIZES = (4, 1, 8, 2)


class Host:
    """A runtime over the fake policy, and its states: those of each row are the row's own."""

    def __init__(self, spec: PolicySpec) -> None:
        self.loaded = SummingRuntime(spec)
        self.states = HostStates(spec, NUM_ROWS)
        self.runtime = HostRuntime(
            self.loaded,
            self.states,
            inputs=step_inputs(spec),
            outputs=step_outputs(spec),
            batch_sizes=BATCH_SIZES,
        )
        rows = np.arange(NUM_ROWS, dtype=np.float32)[:, None, None]
        self.h_rows, self.c_rows = self.states.arrays
        self.h_rows[:-1], self.c_rows[:-1] = 100 + rows, 200 + rows

    def step(self, read: list[int], write: list[int], xs: list[float]) -> Outputs:
        self.runtime.inputs["observation"][: len(xs), 0] = xs
        self.runtime.launch(rows_of(read), rows_of(write))
        assert self.runtime.is_done()
        return self.runtime.collect()

    def h(self) -> list[float]:
        """Of each row, the zero one last; all of a row's are alike."""
        assert (self.h_rows == self.h_rows[:, :1, :1]).all()
        of_rows: list[float] = self.h_rows[:, 0, 0].tolist()
        return of_rows


def rows_of(numbers: list[int]) -> Rows:
    return np.array(numbers, dtype=np.intp)


@pytest.fixture
def host(spec: PolicySpec) -> Host:
    return Host(spec)


def test_states_begin_as_zeros_with_one_row_more_that_stays_so(spec: PolicySpec) -> None:
    states = HostStates(spec, NUM_ROWS)
    assert states.zero_row == NUM_ROWS
    assert len(states.arrays) == 2
    for array in states.arrays:
        assert array.shape == (NUM_ROWS + 1, spec.num_layers, spec.hidden_dim)
        assert array.dtype == np.float32
        assert not array.any()


row_lists = st.lists(st.integers(0, NUM_ROWS - 1), min_size=1, max_size=8, unique=True)


@given(rows=row_lists)
def test_rows_are_gathered_in_order_and_nothing_beyond_them(
    spec: PolicySpec, rows: list[int]
) -> None:
    host = Host(spec)
    shape = (10, spec.num_layers, spec.hidden_dim)
    h, c = np.full(shape, -1, np.float32), np.full(shape, -2, np.float32)
    gather(rows_of(rows), host.states.beside((h, c)))
    rest = 10 - len(rows)
    assert h[:, 0, -1].tolist() == [100 + row for row in rows] + [-1] * rest
    assert c[:, 0, -1].tolist() == [200 + row for row in rows] + [-2] * rest


@given(rows=row_lists)
def test_rows_are_scattered_in_order_and_no_others(spec: PolicySpec, rows: list[int]) -> None:
    host = Host(spec)
    shape = (10, spec.num_layers, spec.hidden_dim)
    h = np.arange(10, dtype=np.float32)[:, None, None] + np.zeros(shape, np.float32)
    scatter(rows_of(rows), host.states.beside((h, -h)))
    expected_h = [float(rows.index(row)) if row in rows else 100 + row for row in range(NUM_ROWS)]
    expected_c = [-float(rows.index(row)) if row in rows else 200 + row for row in range(NUM_ROWS)]
    assert host.h() == [*expected_h, 0]
    assert host.c_rows[:-1, 0, -1].tolist() == expected_c
    assert not host.c_rows[-1].any()


def test_the_zero_row_may_be_read_by_many_at_once(host: Host) -> None:
    outputs = host.step([NUM_ROWS, 3, NUM_ROWS], [0, 1, 2], [1, 2, 3])
    assert outputs.arrays["value"].tolist() == [1, 105, 3]
    assert host.h() == [1, 105, 3, *range(103, 112), 0]


def test_a_step_writes_its_rows_and_leaves_those_it_read(host: Host) -> None:
    host.step([3, 4], [7, 6], [10, 20])
    assert host.h() == [100, 101, 102, 103, 104, 105, 124, 113, 108, 109, 110, 111, 0]
    assert host.c_rows[[7, 6], 0, 0].tolist() == [204, 205]


@st.composite
def rows_to_read_and_write(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    rows = draw(st.permutations(range(NUM_ROWS)))
    num = draw(st.integers(1, NUM_ROWS // 2))
    return rows[:num], rows[num : 2 * num]


@given(steps=st.lists(rows_to_read_and_write(), max_size=6), starts=st.sets(st.integers(0, 5)))
def test_any_steps_equal_sums_kept_by_hand_and_never_touch_the_zero_row(
    spec: PolicySpec, steps: list[tuple[list[int], list[int]]], starts: set[int]
) -> None:
    host = Host(spec)
    sums = [100.0 + row for row in range(NUM_ROWS)]
    for read, write in steps:
        xs = [float(10 * row) for row in read]
        begun = [0.0 if at in starts else sums[row] for at, row in enumerate(read)]
        read = [NUM_ROWS if at in starts else row for at, row in enumerate(read)]
        values = host.step(read, write, xs).arrays["value"].tolist()
        assert values == [a + b for a, b in zip(begun, xs, strict=True)]
        for row, value in zip(write, values, strict=True):
            sums[row] = value
        assert host.h() == [*sums, 0]
        assert not host.c_rows[-1].any()


@pytest.mark.parametrize(
    ("num_rows", "padded"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (7, 8), (8, 8)]
)
def test_a_batch_runs_at_the_smallest_size_it_fits_whatever_their_order(
    host: Host, num_rows: int, padded: int
) -> None:
    outputs = host.step([NUM_ROWS] * num_rows, list(range(num_rows)), [0.0] * num_rows)
    assert host.loaded.batch_sizes == [padded]
    assert {len(array) for array in outputs.arrays.values()} == {num_rows}


def test_padding_is_what_former_batches_were_and_reaches_nobody(host: Host) -> None:
    host.step([NUM_ROWS] * 8, list(range(8)), [float(10**8)] * 8)
    host.step([8, 9, 10], [0, 1, 2], [1, 2, 3])
    assert host.h()[:3] == [109, 111, 113]
    assert host.h()[3:8] == [1e8] * 5


def test_inputs_and_outputs_are_all_but_the_states_as_the_manifest_names_them(
    host: Host, spec: PolicySpec
) -> None:
    states = {name for state in spec.states for name in (state.input, state.output)}
    inputs = [array.name for array in step_inputs(spec) if array.name not in states]
    outputs = [array.name for array in step_outputs(spec) if array.name not in states]
    assert list(host.runtime.inputs) == inputs
    assert list(host.step([0], [1], [0.0]).arrays) == outputs
    assert {len(array) for array in host.runtime.inputs.values()} == {max(BATCH_SIZES)}


def spoiling(name: str, row: int, number: float) -> Callable[[Arrays], None]:
    def spoil(decided: Arrays) -> None:
        decided[name][row].flat[-1:] = number

    return spoil


def faults(array: NDArray[Any] | None) -> list[int] | None:
    return None if array is None else np.flatnonzero(~array).tolist()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["log_prob", "state_h_out", "state_c_out"])
def test_a_row_is_finite_where_all_its_outputs_are_states_included(
    host: Host, name: str, number: float
) -> None:
    assert host.step([0, 1, 2], [3, 4, 5], [0.0] * 3).is_finite is None
    for row in range(3):
        host.loaded.spoil = spoiling(name, row, number)
        outputs = host.step([0, 1, 2], [3, 4, 5], [0.0] * 3)
        assert faults(outputs.is_finite) == [row]
        assert outputs.is_finite is not None
        assert len(outputs.is_finite) == 3


def test_every_row_that_is_not_finite_is_named(host: Host) -> None:
    host.runtime.inputs["observation"][[0, 2], -1] = POISON
    assert faults(host.step([0, 1, 2, 3], [5, 6, 7, 8], [0.0] * 4).is_finite) == [0, 2]


def test_padding_that_is_not_finite_is_nobody_s(host: Host) -> None:
    host.loaded.spoil = spoiling("log_prob", 3, np.nan)
    assert host.step([0, 1, 2], [3, 4, 5], [0.0] * 3).is_finite is None
    assert faults(host.step([0, 1, 2, 3], [5, 6, 7, 8], [0.0] * 4).is_finite) == [3]


def test_a_failing_step_is_raised_and_writes_nothing(host: Host) -> None:
    before = host.h()
    host.loaded.failure = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        host.step([0, 1], [2, 3], [0.0] * 2)
    assert host.h() == before
    host.loaded.failure = None
    assert host.step([0, 1], [2, 3], [0.0] * 2).arrays["value"].tolist() == [100, 101]


def test_states_read_are_copies_and_states_written_are_read_again(host: Host) -> None:
    h, c = host.runtime.read(rows_of([3, 5]))
    assert (h[:, 0, 0].tolist(), c[:, 0, 0].tolist()) == ([103, 105], [203, 205])
    h += 1
    assert host.h()[3] == 103
    host.runtime.write(rows_of([7, 2]), (h, c))
    assert host.h()[7] == 104
    assert host.h()[2] == 106
    assert host.runtime.read(rows_of([2]))[1][0, 0, 0] == 205


def test_warming_up_runs_every_size_and_touches_no_state(host: Host) -> None:
    states = host.h_rows.copy(), host.c_rows.copy()
    host.runtime.warm_up()
    assert sorted(host.loaded.batch_sizes) == [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8]
    assert np.array_equal(host.h_rows, states[0])
    assert np.array_equal(host.c_rows, states[1])


def test_warming_up_ends_once_it_is_not_wanted(host: Host) -> None:
    host.runtime.warm_up(is_wanted=lambda: len(host.loaded.batch_sizes) < 4)
    assert len(host.loaded.batch_sizes) == 4


def test_one_warms_up_while_another_serves_the_same_states(spec: PolicySpec, host: Host) -> None:
    other = HostRuntime(
        SummingRuntime(spec),
        host.states,
        inputs=step_inputs(spec),
        outputs=step_outputs(spec),
        batch_sizes=BATCH_SIZES,
    )
    host.runtime.inputs["observation"][:2, 0] = [1, 2]
    host.runtime.launch(rows_of([0, 1]), rows_of([2, 3]))
    other.warm_up()
    assert host.runtime.collect().arrays["value"].tolist() == [101, 103]
    assert host.h()[2:4] == [101, 103]


class Gated:
    """A host whose steps beside the caller's thread each wait to be let go."""

    def __init__(self, spec: PolicySpec) -> None:
        self.host = Host(spec)
        self.runtime = self.host.runtime
        self.gate = self.host.loaded.gate = threading.Event()
        self.done: SimpleQueue[int] = SimpleQueue()
        self.runtime.when_done = lambda: self.done.put(threading.get_ident())

    def launch(self, read: list[int], write: list[int], xs: list[float], **how: float) -> None:
        self.runtime.inputs["observation"][: len(xs), 0] = xs
        self.runtime.launch(rows_of(read), rows_of(write), **how)

    def values(self) -> list[float]:
        told: list[float] = self.runtime.collect().arrays["value"].tolist()
        return told

    def wait(self) -> int:
        """For the end of a step; the thread it ran on."""
        return self.done.get(timeout=TIMEOUT_S)


@pytest.fixture
def gated(spec: PolicySpec) -> Iterator[Gated]:
    gated = Gated(spec)
    yield gated
    gated.gate.set()


def test_a_step_that_takes_so_long_is_not_waited_for(gated: Gated) -> None:
    gated.launch([0, 1], [2, 3], [10, 20], beside_s=0.0)
    assert not gated.runtime.is_done()
    assert gated.done.empty()
    gated.gate.set()
    assert gated.wait() != threading.get_ident()
    assert gated.runtime.is_done()
    assert gated.values() == [110, 121]
    assert gated.host.h()[2:4] == [110, 121]


def test_a_shorter_step_is_done_by_its_launch_and_nobody_is_told(gated: Gated) -> None:
    gated.gate.set()
    gated.runtime.warm_up()
    for how in ({}, {"beside_s": 1e9}):
        gated.launch([0], [1], [1], **how)
        assert gated.runtime.is_done()
        assert gated.values() == [101]
    assert gated.done.empty()
    gated.launch([0], [1], [1], beside_s=1e-12)  # it took longer than that to warm up
    gated.wait()
    assert gated.values() == [101]


def test_one_batch_may_follow_another_and_each_has_arrays_of_its_own(gated: Gated) -> None:
    gated.launch([0, 1], [2, 3], [10, 20], beside_s=0.0)
    gated.launch([4], [5], [30])  # behind the other, however short it is
    assert not gated.runtime.is_done()
    gated.gate.set()
    gated.wait()
    gated.wait()
    assert gated.values() == [110, 121]
    assert gated.values() == [134]
    assert gated.host.h()[:6] == [100, 101, 110, 121, 104, 134]


def test_what_steps_gave_is_kept_however_many_follow(gated: Gated) -> None:
    """Answers are written when others have been launched, and may have ended."""
    gated.gate.set()
    given = []
    for number in range(6):
        gated.launch([0], [1], [number], beside_s=(0.0, inf)[number % 3 == 2])
        if number % 3 < 2:
            gated.wait()
        given.append(gated.runtime.collect().arrays["value"])
    assert [values.tolist() for values in given] == [[100 + number] for number in range(6)]


def test_a_launch_that_fails_leaves_the_batch_under_way_its_arrays(
    gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError

    gated.launch([0, 1], [2, 3], [10, 20], beside_s=0.0)
    with monkeypatch.context() as patch:
        patch.setattr("service.runtime.host.gather", fail)
        with pytest.raises(MemoryError):
            gated.launch([4, 5], [6, 7], [1, 1])
    gated.launch([4, 5], [6, 7], [1000, 2000])
    gated.gate.set()
    for _ in range(2):
        gated.wait()
    assert gated.values() == [110, 121]
    assert gated.values() == [1104, 2105]


def test_it_is_idle_once_the_last_step_has_ended(gated: Gated) -> None:
    assert gated.runtime.is_idle()
    gated.gate.set()
    gated.launch([0], [1], [1], beside_s=0.0)
    gated.wait()
    assert gated.runtime.is_idle()
    gated.gate.clear()
    gated.launch([2], [3], [1], beside_s=0.0)
    assert gated.runtime.is_done()
    assert not gated.runtime.is_idle()
    gated.gate.set()
    gated.wait()
    assert gated.runtime.is_idle()


def test_a_slow_first_run_does_not_make_a_step_a_long_one(
    gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated.gate.set()
    times_s = chain([0.0, 10.0], count(20.0, 1.0))
    monkeypatch.setattr("service.runtime.host.time.perf_counter", lambda: next(times_s))
    gated.runtime.warm_up()
    threads: list[int] = []
    gated.host.loaded.spoil = lambda decided: threads.append(threading.get_ident())
    for beside_s in (1.5, 0.5):
        gated.launch([0], [1], [1], beside_s=beside_s)
        assert gated.values() == [101]
    assert threads[0] == threading.get_ident() != threads[1]


def test_a_step_that_fails_beside_is_raised_where_it_is_collected(gated: Gated) -> None:
    before = gated.host.h()
    gated.host.loaded.failure = RuntimeError("out of memory")
    gated.launch([0], [1], [1], beside_s=0.0)
    gated.gate.set()
    gated.wait()
    assert gated.runtime.is_done()
    with pytest.raises(RuntimeError, match="out of memory"):
        gated.runtime.collect()
    assert gated.host.h() == before
    gated.host.loaded.failure = None
    gated.launch([0], [1], [1], beside_s=0.0)
    gated.wait()
    assert gated.values() == [101]


def test_with_nothing_under_way_it_is_done(gated: Gated) -> None:
    assert gated.runtime.is_done()
