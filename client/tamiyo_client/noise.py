"""What a request is sampled with: a pure function of (seed, step, column), and rows' seeds.

Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel Random
Numbers: As Easy as 1, 2, 3" (SC 2011). Because there is no generator state, a step's noise is the
same alone or in a batch, after a retry and after a restart, and a client or learner can compute it.
"""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
KEY_INCREMENTS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint32)
ROUNDS = 10
LOW, HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)

NOISE, ROW_SEED = 0, 1
"""The counter's last word: so that what is drawn for the one never meets the other."""
HALF, UNIT = np.array(0.5), np.array(2.0**-32)


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Ten rounds of Philox4x32: `counter` `[4, N]` and `key` `[2, N]` to four words `[4, N]`."""
    even = np.concatenate([counter[0], counter[2, ::-1]]).astype(np.uint64)
    odd = np.concatenate([counter[1], counter[3, ::-1]])
    return _ten_rounds(even, odd, np.concatenate([key[0], key[1, ::-1]])).T


def _ten_rounds(
    even: NDArray[np.uint64], odd: NDArray[np.uint32], key: NDArray[np.uint32]
) -> NDArray[np.uint32]:
    """Counters' even and odd words and keys, each `[2 * N]`, to four words `[N, 4]`.

    Each holds the first word of every block, then the second of every block in reverse: the two
    swap by reading an array backwards. `even` and `key` are overwritten.
    """
    # One-dimensional, and of one dtype: for anything else NumPy makes an iterator, which takes
    # longer than a few rows' arithmetic.
    num = len(even) // 2
    multipliers, increments = MULTIPLIERS.repeat(num), KEY_INCREMENTS.repeat(num)
    even_words = even.view(np.uint32)[LOW::2]
    products = np.empty((2, 2 * num), dtype=np.uint64)
    swapped = products.view(np.uint32)[:, ::-1]
    in_turn = [*zip(products, swapped[:, 1 - HIGH :: 2], swapped[:, 1 - LOW :: 2], strict=True)]
    for product, high, low in in_turn * (ROUNDS // 2):
        np.multiply(even, multipliers, product)
        np.bitwise_xor(high, odd, even_words)
        even_words ^= key
        key += increments
        odd = low
    words = np.empty((num, 4), dtype=np.uint32)
    words[:, 0], words[:, 2] = even_words[:num], even_words[: num - 1 : -1]
    words[:, 1], words[:, 3] = odd[:num], odd[: num - 1 : -1]
    return words


def gumbel_noise(
    seeds: NDArray[np.uint64], steps: NDArray[np.uint64], num_columns: int
) -> NDArray[np.float32]:
    """Standard Gumbel noise `[rows, num_columns]` for each row's 64-bit seed and step.

    The key is the seed's two words, the counter (block, step low, step high, 0), where a block
    gives the four columns 4 * block to 4 * block + 3. A word w becomes the uniform
    u = (w + 1/2) / 2**32, and that the noise -ln(-ln u), in float64, rounded to float32 last.
    """
    num_rows, num_blocks = len(seeds), -(-num_columns // 4)
    seed_low, seed_high = _low_and_high(seeds[:, None])
    step_low, step_high = _low_and_high(steps[:, None])
    even = np.empty((2, num_rows, num_blocks), dtype=np.uint64)
    odd, key = np.empty((2, 2, num_rows, num_blocks), dtype=np.uint32)
    even[0], even[1] = np.arange(num_blocks), step_high[::-1]
    odd[0], odd[1] = step_low, NOISE
    key[0], key[1] = seed_low, seed_high[::-1]
    words = _ten_rounds(even.reshape(-1), odd.reshape(-1), key.reshape(-1))
    noise = words.reshape(num_rows, -1).astype(np.float64)
    noise += HALF
    noise *= UNIT
    np.log(noise, noise)
    np.negative(noise, noise)
    np.log(noise, noise)
    np.negative(noise, noise)
    return noise[:, :num_columns].astype(np.float32)


def row_seed(
    seed: int | NDArray[np.uint64], rows: int | NDArray[Any], episodes: int | NDArray[Any]
) -> NDArray[np.uint64]:
    """The 64-bit seed that each row's episode of a vector session with `seed` draws with.

    Rows, below 2**32, and episodes are counted from 0, and broadcast with the seeds. The key is the
    seed's two words, the counter (row, episode low, episode high, 1), which no noise has; word 0 of
    the four is the new seed's low one, word 1 its high one.
    """
    arrays = (np.asarray(array, dtype=np.uint64) for array in (seed, rows, episodes))
    seeds, of_rows, of_episodes = np.broadcast_arrays(*arrays)
    counter = np.empty((4, of_rows.size), dtype=np.uint32)
    counter[0] = of_rows.ravel()
    counter[1], counter[2] = _low_and_high(of_episodes.ravel())
    counter[3] = ROW_SEED
    low, high, _, _ = philox4x32(counter, np.stack(_low_and_high(seeds.ravel())))
    drawn: NDArray[np.uint64] = low | high.astype(np.uint64) << 32
    return drawn.reshape(seeds.shape)


def _low_and_high(numbers: NDArray[np.uint64]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Each number's two words."""
    words = numbers.view(np.uint32).reshape(*numbers.shape, 2)
    return words[..., LOW], words[..., HIGH]
