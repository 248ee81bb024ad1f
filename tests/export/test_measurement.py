"""What a report measures: rows against the same rows in another batch, and every format's time."""

import pytest
import torch
from torch import Tensor

from export.manifest import bucket_sizes
from export.measurement import measure_latency, row_difference
from export.parity import Reference
from export.step import PolicyStep, StepOutput
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from tests.loaded_step import TensorStep

BATCH_SIZES = (1, 2, 3, 4, 6)
BUCKETS = bucket_sizes(BATCH_SIZES[-1])


@pytest.fixture(scope="module")
def reference(policy: FactoredRecurrentActorCritic) -> Reference:
    statistics = torch.linspace(0.5, 2.0, policy.spec.observation_dim)
    normalizer = ObservationNormalizer(statistics, statistics)
    return Reference(policy, normalizer, batch_sizes=BATCH_SIZES)


def row_by_row(step: TensorStep) -> TensorStep:
    """A step whose rows cannot depend on their batch: each is one of its own."""

    def one_at_a_time(*inputs: Tensor) -> StepOutput:
        rows = [step(*(array[row : row + 1] for array in inputs)) for row in range(len(inputs[0]))]
        action, log_prob, value, h, c = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return action, log_prob, value, h, c

    return one_at_a_time


@torch.inference_mode()
def test_rows_of_their_own_do_not_depend_on_their_batch(reference: Reference) -> None:
    step = row_by_row(PolicyStep(reference.policy, reference.normalizer).eval())
    assert row_difference(reference, step) == dict.fromkeys(BUCKETS, 0.0)


@torch.inference_mode()
@pytest.mark.parametrize("index", range(5))
def test_row_that_depends_on_its_batch_is_found_in_every_output(
    index: int, reference: Reference
) -> None:
    step = row_by_row(PolicyStep(reference.policy, reference.normalizer).eval())

    def less_alike(*inputs: Tensor) -> StepOutput:
        outputs = list(step(*inputs))
        if len(inputs[0]) == 2:
            outputs[index] = outputs[index].clone()
            outputs[index][1] += 3
        action, log_prob, value, h, c = outputs
        return action, log_prob, value, h, c

    found = row_difference(reference, less_alike)
    assert found.pop(2) == pytest.approx(3.0)
    assert set(found.values()) == {0.0}


def test_every_step_and_the_policy_itself_are_timed_at_every_bucket(reference: Reference) -> None:
    step = PolicyStep(reference.policy, reference.normalizer).eval()
    timed = measure_latency(reference, {"packed": step})
    assert timed.keys() == {"eager", "packed"}
    for latencies in timed.values():
        assert tuple(latency.batch_size for latency in latencies) == BUCKETS
