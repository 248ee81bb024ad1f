import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.normalizer import ObservationNormalizer
from model.spec import PolicySpec
from tests.naive import FLOAT_ATOL, NaivePolicy

finite = st.floats(-1e6, 1e6, width=32)


@given(
    st.lists(st.tuples(finite, finite, st.floats(0, 1e6, width=32)), min_size=1, max_size=20),
)
def test_normalises_as_the_naive_policy_does(features: list[tuple[float, float, float]]) -> None:
    x, mean, var = np.array(features, np.float32).T
    actual = ObservationNormalizer(torch.tensor(mean), torch.tensor(var))(torch.tensor(x))
    expected = NaivePolicy(PolicySpec.tamiyo_v1(), {}, mean, var).normalize(x)
    np.testing.assert_allclose(actual, expected, atol=FLOAT_ATOL, rtol=1e-5)


def test_each_feature_has_its_own_statistics() -> None:
    normalizer = ObservationNormalizer(torch.tensor([1.0, -2.0]), torch.tensor([4.0, 0.25]))
    observations = torch.tensor([[3.0, -2.5], [1.0, -2.0]])
    expected = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    torch.testing.assert_close(normalizer(observations), expected, atol=1e-3, rtol=0.0)


def test_far_observations_are_clipped_to_ten() -> None:
    normalizer = ObservationNormalizer(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))
    clipped = normalizer(torch.tensor([1e6, -1.0, 10.5]))
    assert clipped.tolist() == [10.0, -10.0, 10.0]


def test_constant_feature_does_not_divide_by_zero() -> None:
    normalizer = ObservationNormalizer(torch.tensor([5.0]), torch.tensor([0.0]))
    assert normalizer(torch.tensor([5.0])).item() == 0.0


def test_statistics_are_its_own_and_float32() -> None:
    mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    normalizer = ObservationNormalizer(mean, var)
    mean += 1.0
    assert normalizer.mean.tolist() == [0.0, 0.0]
    assert normalizer.mean.dtype == normalizer.var.dtype == torch.float32
    assert set(normalizer.state_dict()) == {"mean", "var"}
    assert list(normalizer.parameters()) == []


@pytest.mark.parametrize(
    ("mean", "var"),
    [
        (torch.zeros(3), torch.zeros(4)),
        (torch.zeros(3, 1), torch.zeros(3, 1)),
        (torch.tensor(0.0), torch.tensor(1.0)),
    ],
)
def test_statistics_are_two_vectors_of_one_length(mean: torch.Tensor, var: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="two vectors of one length"):
        ObservationNormalizer(mean, var)


@pytest.mark.parametrize(
    ("mean", "var"),
    [
        (float("nan"), 1.0),
        (float("inf"), 1.0),
        (0.0, float("nan")),
        (0.0, float("inf")),
        (0.0, -1e-3),
    ],
)
def test_unusable_statistics_are_refused_naming_the_feature(mean: float, var: float) -> None:
    means, variances = torch.zeros(4), torch.ones(4)
    means[2], variances[2] = mean, var
    means[3] = float("nan")
    with pytest.raises(ValueError, match=f"of feature 2 are mean {mean}, variance {var:.5f}"[:38]):
        ObservationNormalizer(means, variances)


def test_statistics_too_large_for_float32_are_refused() -> None:
    """They are finite as given, and would be infinity as kept."""
    large, small = torch.tensor([1e300], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="feature 0"):
        ObservationNormalizer(large, small)
    with pytest.raises(ValueError, match="feature 0"):
        ObservationNormalizer(small, large)
