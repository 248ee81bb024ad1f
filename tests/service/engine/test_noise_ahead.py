"""Noise made ahead is the step's own noise, whatever came before and whoever had the row."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from service.engine.noise_ahead import STEPS_AHEAD, NoiseAhead

from service.engine.noise import gumbel_noise
from service.engine.sessions import START, Turn

COLUMNS = 5
STEPS = st.one_of(st.integers(0, 3 * STEPS_AHEAD), st.integers(2**64 - 2 * STEPS_AHEAD, 2**64 - 1))
TURNS = st.builds(
    Turn, row=st.integers(START, 3), step=STEPS, seed=st.sampled_from([0, 1, 2**64 - 1])
)


BATCHES = st.lists(
    TURNS,
    min_size=1,
    max_size=4,
    unique_by=lambda turn: turn.row if turn.row != START else (turn.step, turn.seed),
)


@given(batches=st.lists(BATCHES, min_size=1, max_size=12))
def test_every_turn_gets_the_noise_of_its_seed_and_step(batches: list[list[Turn]]) -> None:
    """Rows change hands, steps repeat, jump and go back: the noise never depends on it."""
    ahead = NoiseAhead(COLUMNS, 4)
    for turns in batches:
        got = np.full((len(turns) + 1, COLUMNS), np.nan, dtype=np.float32)
        ahead.take(turns, got)
        seeds = np.array([turn.seed for turn in turns], dtype=np.uint64)
        steps = np.array([turn.step for turn in turns], dtype=np.uint64)
        assert np.array_equal(got[:-1], gumbel_noise(seeds, steps, COLUMNS))
        assert np.isnan(got[-1]).all()
