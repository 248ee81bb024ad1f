"""What a report measures: rows against the same rows in another batch, and every format's time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from export.judge import Judge
from export.loaders.protocol import LoadedStep
from export.loaders.torch_step import TorchStep
from export.manifest import step_inputs, step_outputs, timed_sizes
from export.measurement import measure_latency, row_difference
from export.packed_step import StepOutput
from export.tamiyo_step import TamiyoStep
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from tests.gate import gate_of
from tests.loaded_step import TensorStep

MAX_BATCH_SIZE = 6
SIZES = timed_sizes(MAX_BATCH_SIZE)


@pytest.fixture(scope="module")
def normalizer(policy: FactoredRecurrentActorCritic) -> ObservationNormalizer:
    statistics = torch.linspace(0.5, 2.0, policy.spec.observation_dim)
    return ObservationNormalizer(statistics, statistics)


@pytest.fixture(scope="module")
def judge(policy: FactoredRecurrentActorCritic, normalizer: ObservationNormalizer) -> Judge:
    return gate_of(policy, normalizer).exact


@pytest.fixture
def step(policy: FactoredRecurrentActorCritic, normalizer: ObservationNormalizer) -> TamiyoStep:
    return TamiyoStep(policy, normalizer).eval()


def loaded(step: TensorStep, judge: Judge) -> LoadedStep:
    return TorchStep("step", step, step_inputs(judge.spec), step_outputs(judge.spec))


def row_by_row(step: TensorStep) -> TensorStep:
    """A step whose rows cannot depend on their batch: each is one of its own."""

    def one_at_a_time(*inputs: Tensor) -> StepOutput:
        rows = [step(*(array[row : row + 1] for array in inputs)) for row in range(len(inputs[0]))]
        action, log_prob, value, h, c = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return action, log_prob, value, h, c

    return one_at_a_time


def test_rows_of_their_own_do_not_depend_on_their_batch(step: TamiyoStep, judge: Judge) -> None:
    found = row_difference(judge, loaded(row_by_row(step), judge), MAX_BATCH_SIZE)
    assert found == dict.fromkeys(SIZES, 0.0)


@pytest.mark.parametrize("index", range(5))
def test_row_that_depends_on_its_batch_is_found_in_every_output(
    index: int, step: TamiyoStep, judge: Judge
) -> None:
    alone = row_by_row(step)

    def less_alike(*inputs: Tensor) -> StepOutput:
        outputs = list(alone(*inputs))
        if len(inputs[0]) == 2:
            outputs[index] = outputs[index].clone()
            outputs[index][1] += 3
        action, log_prob, value, h, c = outputs
        return action, log_prob, value, h, c

    found = row_difference(judge, loaded(less_alike, judge), MAX_BATCH_SIZE)
    assert found.pop(2) == pytest.approx(3.0)
    assert set(found.values()) == {0.0}


def test_every_step_and_the_policy_itself_are_timed_at_every_timed_size(
    step: TamiyoStep, judge: Judge
) -> None:
    timed = measure_latency(judge, {"packed": loaded(step, judge)}, MAX_BATCH_SIZE)
    assert timed.keys() == {"eager", "packed"}
    for latencies in timed.values():
        assert tuple(latency.batch_size for latency in latencies) == SIZES


def test_the_policy_itself_is_timed_from_raw_observations_as_every_step_is(
    step: TamiyoStep, judge: Judge
) -> None:
    assert judge.normalizer is not None
    calls: dict[str, int] = {"normaliser": 0, "policy": 0}

    def counted(name: str) -> Callable[..., None]:
        def count(*_: object) -> None:
            calls[name] += 1

        return count

    hooks = [
        judge.normalizer.register_forward_pre_hook(counted("normaliser")),
        judge.policy.get_submodule("lstm_ln").register_forward_pre_hook(counted("policy")),
    ]
    measure_latency(judge, {"packed": loaded(step, judge)}, MAX_BATCH_SIZE)
    for hook in hooks:
        hook.remove()
    assert calls["policy"] > 10 * len(SIZES)
    assert calls["normaliser"] >= calls["policy"]
