"""The packed parameters: all that the weights decide, copied, and hashed as it is written down."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from export.manifest import Parameter, Precision
from export.parameters import Difference, described, first_difference, sha256, value_unit
from export.tamiyo_step import TamiyoStep
from export.weights import pack, pack_weights
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from tests.export.gate_cases import fresh, small_v1, small_v2, statistics
from tests.named_version import version_of
from tests.random_inputs import random_policy

Arrays = dict[str, NDArray[Any]]
FULL_V2 = small_v2(extras=True, floors=True, value_scale=3.0, num_layers=2)
SPECS = {"v1": small_v1(), "v1 of 2 layers": small_v1(num_layers=2), "v2": FULL_V2}
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
TINY: Arrays = {
    "linear.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "linear.bias": np.array([0.5, -0.0], dtype=np.float32),
    "mask": np.array([[0x3F80, 0xBF80]], dtype=np.uint16),
}
numbers = st.one_of(
    arrays(np.float32, array_shapes(max_dims=3, max_side=3)),
    arrays(np.uint16, array_shapes(max_dims=3, max_side=3)),
)
named = st.dictionaries(
    st.text(st.characters(min_codepoint=33, codec="utf-8"), min_size=1, max_size=8),
    numbers,
    min_size=1,
    max_size=4,
)


def packed(
    policy: FactoredRecurrentActorCritic,
    normalizer: ObservationNormalizer | None = None,
    precision: Precision = "fp32",
) -> Arrays:
    return pack(pack_weights(policy, normalizer), policy.spec, precision)


@given(parameters=named)
def test_a_version_is_the_hash_that_is_written_down(parameters: Arrays) -> None:
    assert f"sha256:{sha256(parameters)}" == version_of(parameters)


def test_a_version_is_the_same_on_every_machine_and_in_every_release() -> None:
    """Written by hand, once: `printf` and `sha256sum` give it as well."""
    assert sha256(TINY) == "be653cada531001f2d042e72195f165956d3496c6ad595bdb2151b17aef9803b"


@given(data=st.data())
def test_any_bit_of_any_parameter_changes_the_version(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*TINY]))
    other = copy.deepcopy(TINY)
    flat = other[name].reshape(-1).view(np.uint8)
    flat[data.draw(st.integers(0, len(flat) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert sha256(other) != sha256(TINY)


@given(parameters=named, random=st.randoms())
def test_the_order_of_the_parameters_and_of_their_bytes_is_of_no_account(
    parameters: Arrays, random: Any
) -> None:
    names = [*parameters]
    random.shuffle(names)
    shuffled = {name: np.asfortranarray(parameters[name]) for name in names}
    assert sha256(shuffled) == sha256(parameters)


@pytest.mark.parametrize(
    "other",
    [
        TINY | {"linear.weight": TINY["linear.weight"].reshape(3, 2)},
        TINY | {"linear.bias": np.array([0.5, 0.0], dtype=np.float32)},
        TINY | {"another": TINY["linear.bias"]},
        {name: array for name, array in TINY.items() if name != "mask"},
        {f"a{name}": array for name, array in TINY.items()},
        TINY | {"linear.weight": TINY["linear.weight"].T.copy().reshape(2, 3)},
    ],
    ids=["a shape", "a zero's sign", "one more", "one less", "names", "numbers' order"],
)
def test_what_is_not_the_same_has_another_version(other: Arrays) -> None:
    assert sha256(other) != sha256(TINY)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SPECS)
def test_packed_parameters_are_float32_or_the_products_bfloat16_and_the_same_each_time(
    name: str, precision: Precision
) -> None:
    policy = random_policy(SPECS[name])
    parameters = packed(policy, statistics(21), precision)
    again = packed(copy.deepcopy(policy), statistics(21), precision)
    assert sha256(again) == sha256(parameters)
    of_products = {p.dtype for p in described(parameters) if len(p.shape) > 1}
    assert of_products == {"float32" if precision == "fp32" else "bfloat16"}
    dtypes = {parameter.name: parameter.dtype for parameter in described(parameters)}
    assert dtypes["features.mean"] == dtypes["value_scale"] == "float32"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SPECS)
def test_every_weight_of_the_policy_is_in_the_parameters(name: str, precision: Precision) -> None:
    """One number of one tensor after another: each changes the version, as do the statistics.

    But those of what only training reads, which are no part of a step.
    """
    policy, normalizer = random_policy(SPECS[name]), statistics(21)
    version = sha256(packed(policy, normalizer, precision))
    unseen = set()
    for weight, tensor in policy.state_dict().items():
        if not tensor.is_floating_point():
            continue
        before = tensor.flatten()[-1].clone()
        tensor.view(-1)[-1] += 1.0
        if sha256(packed(policy, normalizer, precision)) == version:
            unseen.add(weight.partition(".")[0])
        tensor.view(-1)[-1] = before
    assert sha256(packed(policy, normalizer, precision)) == version
    assert unseen <= {"q_head", "contribution_predictor"} - {*policy.spec.extra_outputs, "q_head"}
    for statistic in (normalizer.mean, normalizer.var):
        statistic[-1] += 1.0
        assert sha256(packed(policy, normalizer, precision)) != version
        statistic[-1] -= 1.0
    assert sha256(packed(policy, None, precision)) != version


def test_the_value_scale_is_a_parameter() -> None:
    policy = random_policy(small_v2())
    other = FactoredRecurrentActorCritic(small_v2(value_scale=3.0)).eval()
    other.load_state_dict(policy.state_dict())
    one, three = packed(policy), packed(other)
    assert {name for name in one if not np.array_equal(one[name], three[name])} == {"value_scale"}
    assert (value_unit(one), value_unit(three), value_unit({})) == (1.0, 3.0, 1.0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_learner_that_goes_on_changes_nothing_that_was_packed(precision: Precision) -> None:
    policy, normalizer = fresh(small_v1()).train(), statistics(21)
    weights = pack_weights(policy, normalizer)
    parameters = packed(policy, normalizer, precision)
    step = TamiyoStep(policy, normalizer, precision)
    before = copy.deepcopy(parameters)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.no_grad():
        normalizer.mean.add_(1.0)
        normalizer.var.add_(1.0)
    assert sha256(packed(policy, normalizer, precision)) != sha256(before)
    for kept in (parameters, pack(weights, policy.spec, precision), step.packed()):
        assert kept.keys() == before.keys()
        for name, array in before.items():
            np.testing.assert_array_equal(kept[name], array, name)


def test_a_packed_array_is_nobody_elses() -> None:
    step = TamiyoStep(fresh(small_v1()), None)
    for array in step.packed().values():
        array[...] = 7
    assert all(not (array == 7).all() for array in step.packed().values())


EXPECTED = (
    Parameter(name="weight", dtype="float32", shape=(2, 2)),
    Parameter(name="rows", dtype="bfloat16", shape=(3,)),
)
RIGHT: Arrays = {
    "weight": np.zeros((2, 2), dtype=np.float32),
    "rows": np.array([0, 0x7F7F, 0xFF7F], dtype=np.uint16),
}


def with_number(name: str, where: tuple[int, ...], number: float) -> Arrays:
    other = copy.deepcopy(RIGHT)
    other[name][where] = number
    return other


WRONG: dict[str, tuple[Arrays, Difference]] = {
    "missing": ({"rows": RIGHT["rows"]}, Difference("weight", "is missing")),
    "extra": (
        RIGHT | {"bias": RIGHT["weight"]},
        Difference("bias", "is none of this policy's parameters"),
    ),
    "misshapen": (
        RIGHT | {"weight": np.zeros((2, 3), np.float32)},
        Difference("weight", "is [2, 3], expected [2, 2]"),
    ),
    "other precision": (
        RIGHT | {"weight": np.zeros((2, 2), np.uint16)},
        Difference("weight", "is bfloat16, expected float32"),
    ),
    "other precision back": (
        RIGHT | {"rows": np.zeros(3, np.float32)},
        Difference("rows", "is float32, expected bfloat16"),
    ),
    "no number": (
        RIGHT | {"weight": np.zeros((2, 2), np.int64)},
        Difference("weight", "is int64, expected float32"),
    ),
    "NaN": (
        with_number("weight", (1, 0), np.nan),
        Difference("weight[1][0]", "is NaN or infinite"),
    ),
    "infinite": (
        with_number("weight", (0, 1), -np.inf),
        Difference("weight[0][1]", "is NaN or infinite"),
    ),
    "bfloat16 infinity": (
        with_number("rows", (2,), 0xFF80),
        Difference("rows[2]", "is NaN or infinite"),
    ),
    "bfloat16 NaN": (
        with_number("rows", (0,), 0x7FC1),
        Difference("rows[0]", "is NaN or infinite"),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_parameters_is_named(wrong: str) -> None:
    parameters, difference = WRONG[wrong]
    assert first_difference(parameters, EXPECTED) == difference


def test_right_parameters_differ_in_nothing_in_whatever_order() -> None:
    assert first_difference(RIGHT, EXPECTED) is None
    assert first_difference(dict(reversed(RIGHT.items())), EXPECTED) is None
