import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from model.spec import PolicySpec
from service.engine.rows import RowTable
from service.errors import Overloaded
from service.runtime.arrays import Arrays, allocate, decisions
from service.runtime.protocol import Rows

NUM_ROWS = 10


@pytest.fixture
def rows(spec: PolicySpec) -> RowTable:
    return RowTable(NUM_ROWS, decisions(spec), largest=NUM_ROWS)


def numbered(spec: PolicySpec, num_rows: int, first: int = 0) -> Arrays:
    """Of a step, each row's its own."""
    decided = allocate(decisions(spec), num_rows)
    for array in decided.values():
        array[:] = np.arange(first, first + num_rows).reshape(-1, *[1] * (array.ndim - 1))
    return decided


def words(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(numbers, dtype=np.uint64)


def test_all_rows_but_the_zero_one_can_be_had(rows: RowTable) -> None:
    assert sorted(rows.reserve(NUM_ROWS).tolist()) == list(range(NUM_ROWS))
    assert rows.zero_row == NUM_ROWS
    with pytest.raises(Overloaded):
        rows.reserve(1)


def test_the_rows_used_last_are_had_first(rows: RowTable) -> None:
    """So that memory once touched is touched again, and only as much as is used."""
    first = rows.reserve(4)
    assert sorted(first.tolist()) == [0, 1, 2, 3]
    rows.give_back(first)
    assert sorted(rows.reserve(4).tolist()) == [0, 1, 2, 3]


def test_lone_rows_used_last_are_had_first(rows: RowTable) -> None:
    used: set[int] = set()
    for _ in range(3 * NUM_ROWS):
        two = rows.reserve(1), rows.reserve(1)
        used |= {int(row[0]) for row in two}
        for row in two:
            rows.give_back(row)
    assert len(used) == 2


def test_few_lone_rows_are_kept_apart_from_the_others(
    rows: RowTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.engine.rows.MOST_LONE", 2)
    for row in [rows.reserve(1) for _ in range(NUM_ROWS)]:
        rows.give_back(row)
    assert len(rows._lone) == 2  # to join many takes long
    assert len(set(rows.reserve(NUM_ROWS - 2).tolist())) == NUM_ROWS - 2
    assert len(rows.reserve(2)) == 2


def test_a_reservation_outlives_what_others_reserve_and_give_back(rows: RowTable) -> None:
    mine = rows.reserve(3)
    numbers = mine.tolist()
    for _ in range(3):
        rows.give_back(rows.reserve(5))
    assert mine.tolist() == numbers


def test_the_row_that_episodes_start_from_comes_as_often_as_asked_for(rows: RowTable) -> None:
    for number in (1, 4, NUM_ROWS):
        assert rows.zeros(number).tolist() == [NUM_ROWS] * number


@pytest.mark.parametrize("at", [[7], [7, 2, 4]])
def test_what_is_kept_of_a_step_is_read_again_and_lies_in_no_other_row(
    rows: RowTable, spec: PolicySpec, at: list[int]
) -> None:
    num = len(at)
    for array in (*rows.outputs.values(), rows.seed, rows.step):
        array[:] = 77
    seeds, steps = words(2**64 - 1, 5, 6)[:num], words(3, 2**40, 5)[:num]
    decided = numbered(spec, num, first=10)
    rows.keep(np.array(at), seeds, steps, decided)
    for array in decided.values():
        array[:] = 0
    others = [row for row in range(NUM_ROWS) if row not in at]
    assert rows.seed[at].tolist() == seeds.tolist()
    assert rows.step[at].tolist() == (steps + words(1)).tolist()
    kept = rows.last(np.array(at)).arrays
    assert kept.keys() == decided.keys()
    for name, array in kept.items():
        expected = np.zeros_like(array) + np.arange(10, 10 + num).reshape(
            -1, *[1] * (array.ndim - 1)
        )
        assert np.array_equal(array, expected.astype(array.dtype))
        assert (rows.outputs[name][others] == 77).all()
    assert (rows.seed[others] == 77).all()


def test_what_was_read_is_a_copy(rows: RowTable, spec: PolicySpec) -> None:
    rows.keep(np.array([1]), words(0), words(0), numbered(spec, 1, first=5))
    last = rows.last(np.array([1]))
    rows.keep(np.array([1]), words(0), words(0), numbered(spec, 1, first=6))
    assert last.arrays["value"].tolist() == [5]


class Reservations(RuleBasedStateMachine):
    """Whatever is reserved and given back, in any order: no row is had twice, and none is lost."""

    spec: PolicySpec

    @initialize()
    def all_free(self) -> None:
        self.rows = RowTable(NUM_ROWS, decisions(self.spec), largest=NUM_ROWS)
        self.reserved: list[Rows] = []

    @rule(number=st.integers(1, NUM_ROWS))
    def reserve(self, number: int) -> None:
        had = sum(map(len, self.reserved))
        if had + number > NUM_ROWS:
            with pytest.raises(Overloaded):
                self.rows.reserve(number)
            return
        self.reserved.append(self.rows.reserve(number))
        numbers = np.concatenate(self.reserved).tolist()
        assert len(set(numbers)) == len(numbers) == had + number
        assert set(numbers) <= set(range(NUM_ROWS))

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.rows.give_back(self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1))))


def test_any_reservations_share_no_row(spec: PolicySpec) -> None:
    class OnThisSpec(Reservations):
        pass

    OnThisSpec.spec = spec
    case = OnThisSpec.TestCase
    case.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)
    case().runTest()
