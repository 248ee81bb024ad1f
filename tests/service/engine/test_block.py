from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.spec import PolicySpec
from service.engine.block import Answer, Batch, Block
from tests.service.fakes import single, vector


def of_one(spec: PolicySpec, x: float = 1.0, **fields: Any) -> bytes:
    return single(spec, x, "a", **fields).fingerprint


def of_two(spec: PolicySpec, *xs: float, **fields: Any) -> bytes:
    return vector(spec, xs or (1.0, 2.0), "a", **fields).fingerprint


def seeds(*numbers: int) -> NDArray[np.uint64]:
    return np.array(numbers, dtype=np.uint64)


def test_a_block_has_as_many_rows_as_it_brings(spec: PolicySpec) -> None:
    assert single(spec).num_rows == 1
    assert vector(spec, range(7)).num_rows == 7


def test_the_fingerprint_is_of_what_decides_the_answer(spec: PolicySpec) -> None:
    assert of_one(spec) == of_one(spec)
    others = [of_one(spec, 2.0), of_one(spec, forbid=(3,)), of_one(spec, deterministic=True)]
    assert len({of_one(spec), *others}) == 4
    assert of_one(spec, step=1, starts=True, run="p", seed=3) == of_one(spec)


def test_the_fingerprint_is_of_every_input_that_the_policy_reads(spec: PolicySpec) -> None:
    def with_more(*indices: int) -> bytes:
        return single(spec, more=(np.array([indices], np.int64),)).fingerprint

    assert len({with_more(), with_more(1, 2), with_more(2, 1)}) == 3


def test_a_vector_s_fingerprint_is_of_its_rows_in_order_their_starts_and_seeds(
    spec: PolicySpec,
) -> None:
    starts = [np.array([True, False]), np.array([False, True])]
    different = [
        of_two(spec),
        of_two(spec, 2.0, 1.0),
        of_two(spec, deterministic=True),
        of_two(spec, starts=True),
        *[of_two(spec, starts=which) for which in starts],
        of_two(spec, starts=True, seeds=seeds(1, 2)),
        of_two(spec, starts=True, seeds=seeds(2, 1)),
        of_two(spec, starts=starts[0], seeds=seeds(1, 2)),
    ]
    assert len(set(different)) == len(different)
    assert of_two(spec, starts=starts[0].copy()) == of_two(spec, starts=starts[0])
    assert of_two(spec, step=3, run="p", seed=3) == of_two(spec)


def test_the_fingerprint_is_the_same_wherever_the_arrays_lie(spec: PolicySpec) -> None:
    block = vector(spec, range(6), "a")
    strided = tuple(np.repeat(array, 2, axis=0)[::2] for array in block.given)
    assert not strided[0].flags.c_contiguous
    assert Block(strided, is_vector=True).fingerprint == block.fingerprint


def test_an_answer_is_its_own_rows_of_a_batch() -> None:
    batch = Batch({"value": np.arange(6), "action": np.arange(12).reshape(6, 2)})
    answer = Answer(batch, 2, 3, 0, "")
    assert answer.array("value").tolist() == [2, 3, 4]
    assert answer.array("action").tolist() == [[4, 5], [6, 7], [8, 9]]


def test_a_batch_s_lists_are_made_once() -> None:
    batch = Batch({"value": np.arange(2)})
    assert batch.lists == {"value": [0, 1]}
    assert batch.lists is batch.lists
