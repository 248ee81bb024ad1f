import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tamiyo_client.noise import gumbel_noise, philox4x32, row_seed

WORDS = st.integers(min_value=0, max_value=2**64 - 1)
ROWS = st.integers(min_value=0, max_value=2**32 - 1)
EULER_GAMMA = 0.57721566490153286

# Random123's tests/kat_vectors, `philox4x32 10`: counter, key, output.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def uint32(values: Sequence[int] | Sequence[list[int]]) -> NDArray[np.uint32]:
    return np.array(values, dtype=np.uint32)


def uint64(values: Sequence[int] | Sequence[list[int]]) -> NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


def philox_of_one_block(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as the paper writes it, in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def word_of_one_column(seed: int, step: int, column: int) -> int:
    counter = [column // 4, step % 2**32, step // 2**32, 0]
    return philox_of_one_block(counter, [seed % 2**32, seed // 2**32])[column % 4]


def gumbel_of_one_column(seed: int, step: int, column: int) -> float:
    return -math.log(-math.log((word_of_one_column(seed, step, column) + 0.5) / 2**32))


def seed_of_one_row(seed: int, row: int, episode: int) -> int:
    counter = [row, episode % 2**32, episode // 2**32, 1]
    low, high, _, _ = philox_of_one_block(counter, [seed % 2**32, seed // 2**32])
    return low + high * 2**32


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter: str, key: str, output: str) -> None:
    got = philox4x32(uint32(words(counter))[:, None], uint32(words(key))[:, None])
    assert got[:, 0].tolist() == words(output)
    assert philox_of_one_block(words(counter), words(key)) == words(output)


def test_philox_blocks_side_by_side_do_not_mix() -> None:
    counters = uint32([words(counter) for counter, _, _ in KNOWN_ANSWERS]).T
    keys = uint32([words(key) for _, key, _ in KNOWN_ANSWERS]).T
    got = philox4x32(counters, keys)
    assert got.T.tolist() == [words(output) for _, _, output in KNOWN_ANSWERS]


@given(seed=WORDS, step=WORDS, num_columns=st.integers(min_value=1, max_value=9))
def test_noise_is_the_documented_function_of_seed_step_and_column(
    seed: int, step: int, num_columns: int
) -> None:
    got = gumbel_noise(uint64([seed]), uint64([step]), num_columns)
    expected = [gumbel_of_one_column(seed, step, column) for column in range(num_columns)]
    assert got.dtype == np.float32
    # One unit in the last place: NumPy's logarithm and C's may round differently.
    np.testing.assert_array_max_ulp(got[0], np.array(expected, dtype=np.float32), maxulp=1)


@given(
    seeds_and_steps=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=9),
    num_columns=st.integers(min_value=1, max_value=40),
)
def test_noise_is_float64_arithmetic_on_each_word_and_float32_last(
    seeds_and_steps: list[tuple[int, int]], num_columns: int
) -> None:
    drawn = np.array(
        [
            [word_of_one_column(seed, step, column) for column in range(num_columns)]
            for seed, step in seeds_and_steps
        ],
        dtype=np.float64,
    )
    seeds, steps = (uint64(each) for each in zip(*seeds_and_steps, strict=True))
    expected = -np.log(-np.log((drawn + 0.5) / 2**32))
    assert np.array_equal(gumbel_noise(seeds, steps, num_columns), expected.astype(np.float32))


@given(rows=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=9))
def test_a_row_is_the_same_alone_and_in_any_batch(rows: list[tuple[int, int]]) -> None:
    seeds, steps = uint64([seed for seed, _ in rows]), uint64([step for _, step in rows])
    batch = gumbel_noise(seeds, steps, 38)
    for at in range(len(rows)):
        alone = gumbel_noise(seeds[at : at + 1], steps[at : at + 1], 38)
        assert np.array_equal(batch[at], alone[0])


@given(seed=WORDS, step=WORDS)
def test_fewer_columns_are_a_prefix_of_more(seed: int, step: int) -> None:
    more = gumbel_noise(uint64([seed]), uint64([step]), 38)
    assert np.array_equal(gumbel_noise(uint64([seed]), uint64([step]), 5), more[:, :5])


def test_seeds_steps_and_columns_all_matter() -> None:
    far = 2**32  # differs in the high word only
    seeds, steps = uint64([0, 1, far, 0, 0]), uint64([0, 0, 0, 1, far])
    noise = gumbel_noise(seeds, steps, 38)
    assert len(np.unique(noise)) == noise.size


@pytest.mark.parametrize(("step", "word"), [(920_591_648, 0), (105_672_652, 0xFFFFFFFF)])
def test_noise_is_finite_for_the_smallest_and_the_largest_word(step: int, word: int) -> None:
    # Found by search: the first steps of seed 0 to draw these words, both in column 2.
    assert philox_of_one_block([0, step, 0, 0], [0, 0])[2] == word
    noise = gumbel_noise(uint64([0]), uint64([step]), 4)[0, 2]
    assert np.isfinite(noise)
    assert noise == pytest.approx(gumbel_of_one_column(0, step, 2), rel=1e-6)


def test_noise_has_the_gumbel_distribution() -> None:
    rows = 5000
    noise = gumbel_noise(np.arange(rows, dtype=np.uint64), uint64([3] * rows), 38)
    sample = np.sort(noise.ravel().astype(np.float64))
    distribution = np.exp(-np.exp(-sample))
    empirical = (np.arange(sample.size) + 0.5) / sample.size
    kolmogorov_smirnov = np.abs(distribution - empirical).max()
    assert kolmogorov_smirnov < 1.95 / math.sqrt(sample.size)  # p = 0.001, and the seeds are fixed
    assert abs(sample.mean() - EULER_GAMMA) < 0.01


def test_argmax_of_log_probs_and_noise_samples_the_probabilities() -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    rows = 20_000
    noise = gumbel_noise(uint64([11] * rows), np.arange(rows, dtype=np.uint64), 4)
    chosen = np.argmax(np.log(probabilities) + noise, axis=1)
    shares = np.bincount(chosen, minlength=4) / rows
    np.testing.assert_allclose(shares, probabilities, atol=0.015)


def test_row_seeds_are_the_published_ones() -> None:
    assert row_seed(42, uint64([0, 1]), uint64([0, 2**32 + 1])).tolist() == [
        10954971055776832260,
        11927979991760669682,
    ]


@given(
    seed=WORDS,
    rows=st.lists(ROWS, min_size=1, max_size=5),
    episodes=st.lists(WORDS, min_size=1, max_size=5),
)
def test_a_row_seed_is_the_documented_function_of_seed_row_and_episode(
    seed: int, rows: list[int], episodes: list[int]
) -> None:
    got = row_seed(seed, uint64(rows)[:, None], uint64(episodes))
    assert got.dtype == np.uint64
    assert got.tolist() == [
        [seed_of_one_row(seed, row, episode) for episode in episodes] for row in rows
    ]


@given(sessions=st.lists(st.tuples(WORDS, ROWS, WORDS), min_size=1, max_size=9))
def test_rows_of_several_sessions_draw_their_seeds_together(
    sessions: list[tuple[int, int, int]],
) -> None:
    seeds, rows, episodes = zip(*sessions, strict=True)
    got = row_seed(uint64(seeds), np.array(rows, dtype=np.int64), uint64(episodes))
    assert got.tolist() == [seed_of_one_row(*session) for session in sessions]


@given(seed=WORDS, row=ROWS, episode=WORDS)
def test_a_row_seed_is_never_drawn_as_noise(seed: int, row: int, episode: int) -> None:
    """Block `row` of step `episode` has the same key and counter but for the last word."""
    key = uint32([[seed % 2**32], [seed // 2**32]])
    counter = uint32([[row], [episode % 2**32], [episode // 2**32], [0]])
    low, high = philox4x32(counter, key)[:2, 0].tolist()
    assert row_seed(seed, uint64([row]), uint64([episode])).tolist() != [low + high * 2**32]
