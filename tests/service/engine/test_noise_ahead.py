from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.engine import noise_ahead
from service.engine.noise_ahead import MOST_WINDOWS, STEPS_AHEAD, NoiseAhead
from tamiyo_client.noise import gumbel_noise

NUM_COLUMNS = 7
LARGEST = 2**64 - 1
NUM_ROWS = 40
MOST_AT_ONCE = 16
draws = st.tuples(
    st.sampled_from([0, 1, 2, LARGEST]),
    st.one_of(st.integers(0, 3 * STEPS_AHEAD), st.sampled_from([LARGEST - 1, LARGEST])),
)
batches = st.lists(
    st.tuples(
        st.booleans(),
        st.permutations(range(NUM_ROWS)),
        st.lists(draws, min_size=1, max_size=MOST_AT_ONCE),
    ),
    max_size=12,
)


def numbers(values: Sequence[int]) -> NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


def of_nothing(num_rows: int) -> NDArray[np.float32]:
    """By themselves, or among what else a batch's rows bring."""
    rows = np.full((num_rows, NUM_COLUMNS + num_rows % 2), np.nan, dtype=np.float32)
    return rows[:, :NUM_COLUMNS]


def taken(
    ahead: NoiseAhead, rows: Sequence[int], seeds: Sequence[int], steps: Sequence[int]
) -> NDArray[np.float32]:
    out = of_nothing(len(rows))
    ahead.take(np.array(rows), numbers(seeds), numbers(steps), out)
    return out


def taken_each(
    ahead: NoiseAhead, seeds: Sequence[int], steps: Sequence[int]
) -> NDArray[np.float32]:
    out = of_nothing(len(seeds))
    ahead.take_each(numbers(seeds), numbers(steps), out)
    return out


@pytest.mark.parametrize("most_rows", [MOST_AT_ONCE, 24, 1000])
@given(batches)
def test_noise_is_that_of_seed_and_step_whatever_was_made_before(
    most_rows: int, batches: list[tuple[bool, list[int], list[tuple[int, int]]]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise_ahead, "MOST_ROWS", most_rows)
        ahead = NoiseAhead(NUM_COLUMNS, NUM_ROWS)
        for is_ahead, rows, batch in batches:
            seeds, steps = zip(*batch, strict=True)
            rows = rows[: len(batch)]
            if is_ahead:
                ahead.look_ahead(np.array(rows), numbers(seeds), numbers(steps))
            expected = gumbel_noise(numbers(seeds), numbers(steps), NUM_COLUMNS)
            assert np.array_equal(taken(ahead, rows, seeds, steps), expected)
            assert np.array_equal(taken_each(ahead, seeds, steps), expected)


def test_what_was_made_ahead_is_not_made_again(made: list[int]) -> None:
    ahead = NoiseAhead(NUM_COLUMNS, NUM_ROWS)
    rows, seeds, steps = range(20), range(100, 120), [7] * 20
    ahead.look_ahead(np.array(rows), numbers(seeds), numbers(steps))
    made.clear()
    backwards = taken(ahead, rows[::-1], seeds[::-1], steps)
    assert sum(made) == 0
    assert np.array_equal(backwards, gumbel_noise(numbers(seeds[::-1]), numbers(steps), 7))
    taken(ahead, range(5, 25), range(105, 125), steps)
    assert sum(made) == 5


def test_the_last_rows_that_were_told_of_are_kept(
    made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise_ahead, "MOST_ROWS", 30)
    ahead = NoiseAhead(NUM_COLUMNS, NUM_ROWS)
    for first in (0, 10, 20, 30):
        rows = range(first, first + 10)
        ahead.look_ahead(np.array(rows), numbers(rows), numbers([3] * 10))
    made.clear()
    for first, num_made in ((30, 0), (10, 0), (20, 0), (0, 10)):
        rows = range(first, first + 10)
        made.clear()
        taken(ahead, rows, rows, [3] * 10)
        assert sum(made) == num_made


def test_single_environments_draw_for_eight_steps_at_once(made: list[int]) -> None:
    ahead = NoiseAhead(NUM_COLUMNS, NUM_ROWS)
    for step in range(1, 3 * STEPS_AHEAD):
        taken_each(ahead, range(20), [step] * 20)
    assert sum(made) == 3 * STEPS_AHEAD * 20


def test_a_first_step_is_drawn_alone(made: list[int]) -> None:
    """As many have no second: stateless ones, each with a seed of its own."""
    ahead = NoiseAhead(NUM_COLUMNS, NUM_ROWS)
    for first in range(0, 2000, 20):
        taken_each(ahead, range(first, first + 20), [0] * 20)
    assert sum(made) == 2000
    assert not ahead._kept


def test_environments_of_one_seed_share_what_is_drawn(made: list[int]) -> None:
    ahead = NoiseAhead(NUM_COLUMNS, NUM_ROWS)
    for step in range(100):
        taken_each(ahead, [7] * 3, [step + 1, step + 9, step + 17])
    assert sum(made) < 3 * (100 + 2 * STEPS_AHEAD)


@pytest.mark.parametrize("num_envs", [900, 1500, 4000])
def test_of_more_environments_than_there_is_room_for_some_are_served(
    num_envs: int, made: list[int]
) -> None:
    """And none is drawn for in vain: no more is made than would be without."""
    ahead = NoiseAhead(NUM_COLUMNS, NUM_ROWS)
    for step in range(1, 41):
        if step == 17:
            made.clear()
        for first in range(0, num_envs, 50):
            taken_each(ahead, range(first, first + 50), [step] * 50)
    assert len(ahead._kept) <= MOST_WINDOWS
    assert sum(made) <= num_envs * 24
    assert len(made) < 24 * num_envs / 50 or num_envs > MOST_WINDOWS


def test_what_is_kept_of_the_ended_gives_way(made: list[int]) -> None:
    ahead = NoiseAhead(NUM_COLUMNS, NUM_ROWS)
    for episode in range(60):
        made.clear()
        for step in range(1, 2 * STEPS_AHEAD):
            for first in range(0, 100, 50):
                taken_each(
                    ahead, range(episode * 100 + first, episode * 100 + first + 50), [step] * 50
                )
        assert len(ahead._kept) <= MOST_WINDOWS
    assert sum(made) < 100 * 2.5 * STEPS_AHEAD  # each episode's steps, and few twice
