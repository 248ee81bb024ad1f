"""The noise a request is sampled with: a pure function of (seed, step, column).

Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel Random
Numbers: As Easy as 1, 2, 3" (SC 2011). Because there is no generator state, a step's noise is the
same alone or in a batch, after a retry and after a restart, and a client or learner can compute it.
"""

import sys

import numpy as np
from numpy.typing import NDArray

MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
KEY_INCREMENTS = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint32)
ROUNDS = 10
KEY_STEPS = np.arange(ROUNDS, dtype=np.uint32)[:, None, None] * KEY_INCREMENTS
LOW, HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Ten rounds of Philox4x32: `counter` `[4, N]` and `key` `[2, N]` to four words `[4, N]`."""
    even, odd = counter[0::2], counter[1::2]
    product = np.empty(even.shape, dtype=np.uint64)
    words = product.view(np.uint32).reshape(*even.shape, 2)
    high, low = words[::-1, :, HIGH], words[::-1, :, LOW]  # of the other half's product
    for round_key in key + KEY_STEPS:
        np.multiply(even, MULTIPLIERS, out=product)
        even = high ^ odd
        even ^= round_key
        odd = low.copy()
    return np.stack([even[0], odd[0], even[1], odd[1]])


def gumbel_noise(
    seeds: NDArray[np.uint64], steps: NDArray[np.uint64], num_columns: int
) -> NDArray[np.float32]:
    """Standard Gumbel noise `[rows, num_columns]` for each row's 64-bit seed and step.

    The key is the seed's two words, the counter (block, step low, step high, 0), where a block
    gives the four columns 4 * block to 4 * block + 3. A word w becomes the uniform
    u = (w + 1/2) / 2**32, and that the noise -ln(-ln u), in float64, rounded to float32 last.
    """
    num_rows, num_blocks = len(seeds), -(-num_columns // 4)
    seed_words = seeds.view(np.uint32).reshape(num_rows, 2)
    step_words = steps.view(np.uint32).reshape(num_rows, 2)
    counter = np.zeros((4, num_rows, num_blocks), dtype=np.uint32)
    counter[0] = np.arange(num_blocks, dtype=np.uint32)
    counter[1] = step_words[:, LOW, None]
    counter[2] = step_words[:, HIGH, None]
    key = np.empty((2, num_rows, num_blocks), dtype=np.uint32)
    key[0] = seed_words[:, LOW, None]
    key[1] = seed_words[:, HIGH, None]
    words = philox4x32(counter.reshape(4, -1), key.reshape(2, -1))
    columns = words.reshape(4, num_rows, num_blocks).transpose(1, 2, 0).reshape(num_rows, -1)
    noise = columns[:, :num_columns] + 0.5
    noise *= 2.0**-32
    np.log(noise, out=noise)
    np.negative(noise, out=noise)
    np.log(noise, out=noise)
    np.negative(noise, out=noise)
    return noise.astype(np.float32)
