"""The noise a request is sampled with: a pure function of (seed, step, column).

Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel Random
Numbers: As Easy as 1, 2, 3" (SC 2011). Because there is no generator state, a step's noise is the
same alone or in a batch, after a retry and after a restart, and a client or learner can compute it.
"""

import numpy as np
from numpy.typing import NDArray

MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
KEY_INCREMENTS = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
ROUNDS = 10
WORD = np.uint64(0xFFFFFFFF)
WORD_BITS = np.uint64(32)


def philox4x32(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Ten rounds of Philox4x32: `counter` `[4, N]` and `key` `[2, N]` to four words `[4, N]`.

    All entries are 32-bit words in 64-bit integers.
    """
    even, odd = counter[0::2], counter[1::2]
    for _ in range(ROUNDS):
        product = even * MULTIPLIERS
        high, low = product >> WORD_BITS, product & WORD
        even, odd = high[::-1] ^ odd ^ key, low[::-1]
        key = (key + KEY_INCREMENTS) & WORD
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
    counter = np.empty((4, num_rows, num_blocks), dtype=np.uint64)
    counter[0] = np.arange(num_blocks, dtype=np.uint64)
    counter[1] = (steps & WORD)[:, None]
    counter[2] = (steps >> WORD_BITS)[:, None]
    counter[3] = 0
    key = np.empty((2, num_rows, num_blocks), dtype=np.uint64)
    key[0] = (seeds & WORD)[:, None]
    key[1] = (seeds >> WORD_BITS)[:, None]
    words = philox4x32(counter.reshape(4, -1), key.reshape(2, -1))
    uniform = (words.reshape(4, num_rows, num_blocks) + 0.5) * 2.0**-32
    noise = -np.log(-np.log(uniform))
    columns = noise.transpose(1, 2, 0).reshape(num_rows, 4 * num_blocks)
    return np.asarray(columns[:, :num_columns], dtype=np.float32)
