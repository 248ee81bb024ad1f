"""What bf16 costs a policy: measured apart from any format, said, and bounded."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from export.comparison import ParityError
from export.exporter import export_policy
from export.manifest import MANIFEST_FILE, Manifest, Precision
from export.parity import Gate
from export.report import Report
from export.tamiyo_step import TamiyoStep
from model.policy import FactoredRecurrentActorCritic
from tests.export.gate_cases import case_of, small_v1, statistics, trained
from tests.gate import gate_of, judged
from tests.golden import needs_golden
from tests.loaded_step import TensorStep
from tests.machine import needs_bf16

pytestmark = needs_bf16

LARGEST = 64
SPEC = small_v1()


@pytest.fixture(scope="module")
def policy() -> FactoredRecurrentActorCritic:
    return trained(SPEC)


@pytest.fixture(scope="module")
def sensitive(policy: FactoredRecurrentActorCritic) -> FactoredRecurrentActorCritic:
    """Its value is a small difference of large numbers: each unit's activation is 64 more, and all
    of that is taken off at the end."""
    lifted = copy.deepcopy(policy)
    with torch.no_grad():
        lifted.get_parameter("value_head.0.bias").add_(64.0)
        total = lifted.get_parameter("value_head.2.weight").sum(-1)
        lifted.get_parameter("value_head.2.bias").sub_(64.0 * total)
    return lifted


def right(policy: FactoredRecurrentActorCritic, precision: Precision) -> TensorStep:
    return TamiyoStep(policy, None, precision).eval()


def test_policy_whose_values_bf16_rounds_away_is_refused_in_a_sentence(
    sensitive: FactoredRecurrentActorCritic,
) -> None:
    gate = gate_of(sensitive, precision="bf16", max_batch_size=LARGEST)
    with pytest.raises(
        ParityError,
        match=r"^bf16 differs from the policy: value is [\d.]+ off in the mean, and at most 0\.02 "
        "is rounding$",
    ):
        judged(gate, right(sensitive, "bf16"))


def test_same_policy_passes_in_fp32(sensitive: FactoredRecurrentActorCritic) -> None:
    judged(gate_of(sensitive, max_batch_size=LARGEST), right(sensitive, "fp32"))


def test_policy_whose_decisions_bf16_changes_is_refused_in_a_sentence(
    policy: FactoredRecurrentActorCritic,
) -> None:
    """All ops alike but for less than bf16 can tell apart: in bf16 the first of them is taken."""
    undecided = copy.deepcopy(policy)
    with torch.no_grad():
        for name in SPEC.head_names:
            undecided.get_parameter(f"{name}_head.2.weight").mul_(1e-3)
            bias = undecided.get_parameter(f"{name}_head.2.bias")
            bias.copy_(1.0 + 1e-4 * torch.arange(len(bias)))
    gate = gate_of(undecided, precision="bf16", max_batch_size=LARGEST)
    with pytest.raises(
        ParityError,
        match=r"^bf16 differs from the policy: [\d.]+% of the free greedy decisions are the "
        r"policy's own, at least 98\.0% must be$",
    ):
        judged(gate, right(undecided, "bf16"))


@pytest.fixture(scope="module")
def exported(
    policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory
) -> dict[Precision, Path]:
    """The policy in both precisions. Tests only read it."""
    directory = tmp_path_factory.mktemp("precision")
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.measurement.SECONDS_PER_BATCH_SIZE", 0.005)
        for precision in precisions:
            export_policy(
                policy,
                statistics(SPEC.observation_dim),
                directory / precision,
                name="it",
                formats=("torchscript",),
                precision=precision,
                max_batch_size=LARGEST,
            )
    return {precision: directory / precision for precision in precisions}


def test_manifest_and_report_say_what_bf16_costs(exported: dict[Precision, Path]) -> None:
    manifest = Manifest.read(exported["bf16"])
    loss, of_format = manifest.parity.precision_loss, manifest.parity.formats["torchscript"]
    assert loss is not None
    assert Report.read(exported["bf16"], manifest).parity == manifest.parity
    assert loss.rows == of_format.rows >= 50 * 256
    outputs = {"state_h_out", "state_c_out", "value", "log_prob"}
    assert loss.mean_error.keys() == loss.max_error.keys() == outputs
    assert 0.98 <= loss.greedy_agreement < 1.0
    for name in outputs:
        assert 0 < abs(loss.mean_error[name]) < 0.02
        assert loss.max_error[name] > 1e-3  # bf16 has 8 bits: it is not nothing
        assert of_format.max_error[name] < loss.max_error[name]


def test_artifact_in_float32_has_nothing_to_say_of_it(exported: dict[Precision, Path]) -> None:
    in_bf16, in_fp32 = (
        json.loads((exported[precision] / MANIFEST_FILE).read_text())["parity"]
        for precision in ("bf16", "fp32")
    )
    assert in_bf16.keys() - in_fp32.keys() == {"precision_loss"}
    manifest = Manifest.read(exported["fp32"])
    assert Report.read(exported["fp32"], manifest).parity.precision_loss is None


@pytest.fixture(scope="module")
def recorded() -> tuple[Gate, TamiyoStep]:
    """V2 as it was trained, and its step in bf16."""
    case = case_of("v2 recorded in bf16")
    gate = gate_of(case.policy, case.normalizer, precision="bf16", max_batch_size=LARGEST)
    return gate, case.step()


@needs_golden
def test_recorded_policy_passes_in_bf16(recorded: tuple[Gate, TamiyoStep]) -> None:
    judged(*recorded)


@needs_golden
def test_recorded_policy_without_its_blueprints_is_stopped(
    recorded: tuple[Gate, TamiyoStep],
) -> None:
    gate, step = recorded

    def blind(*inputs: Tensor) -> tuple[Tensor, ...]:
        *others, blueprint_index, slot_by_op = inputs
        outputs: tuple[Tensor, ...] = step(
            *others, torch.full_like(blueprint_index, -1), slot_by_op
        )
        return outputs

    with pytest.raises(ParityError, match="it differs from the policy"):
        judged(gate, blind)


@needs_golden
def test_recorded_policy_with_log_probs_a_little_too_high_is_stopped(
    recorded: tuple[Gate, TamiyoStep],
) -> None:
    """In every head that is free: 0.72 of what a learner would add up."""
    gate, step = recorded

    def higher(*inputs: Tensor) -> tuple[Tensor, ...]:
        action, log_prob, *others = step(*inputs)
        return action, torch.where(log_prob != 0, log_prob + 0.09, 0.0), *others

    with pytest.raises(ParityError, match="it differs from the policy: log_prob"):
        judged(gate, higher)


@needs_golden
@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_recorded_policy_with_ops_more_or_less_decided_is_stopped(
    recorded: tuple[Gate, TamiyoStep], factor: float
) -> None:
    gate, _ = recorded
    case = case_of("v2 recorded in bf16")
    other = copy.deepcopy(case.policy)
    with torch.no_grad():
        for name in ("weight", "bias"):
            other.get_parameter(f"op_head.2.{name}").mul_(factor)
    with pytest.raises(ParityError, match="it differs from the policy"):
        judged(gate, case.with_policy(other).step())
