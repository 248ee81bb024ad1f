import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from service.engine.noise import gumbel_noise
from service.engine.noise_ahead import FEW, STEPS_AHEAD, NoiseAhead

NUM_COLUMNS = 7
LARGEST = 2**64 - 1
rows = st.tuples(
    st.sampled_from([0, 1, 2, LARGEST]),
    st.one_of(st.integers(0, 3 * STEPS_AHEAD), st.sampled_from([LARGEST - 1, LARGEST])),
)
batches = st.lists(st.lists(rows, min_size=1, max_size=FEW + 2), max_size=12)


@given(batches)
def test_noise_is_that_of_seed_and_step_whatever_was_taken_before(
    batches: list[list[tuple[int, int]]],
) -> None:
    ahead = NoiseAhead(NUM_COLUMNS)
    for batch in batches:
        seeds, steps = (np.array(column, dtype=np.uint64) for column in zip(*batch, strict=True))
        out = np.full((len(batch), NUM_COLUMNS), np.nan, dtype=np.float32)
        ahead.take(seeds, steps, out)
        assert np.array_equal(out, gumbel_noise(seeds, steps, NUM_COLUMNS))


def test_what_is_kept_is_bounded() -> None:
    ahead = NoiseAhead(NUM_COLUMNS)
    out = np.empty((1, NUM_COLUMNS), dtype=np.float32)
    for seed in range(1100):
        ahead.take(np.array([seed], np.uint64), np.array([0], np.uint64), out)
    assert len(ahead._kept) == 1024
