"""The gate: what passes it, and that every way of being wrong is stopped and named.

How many ways there are is `test_wrong_steps.py`'s to say.
"""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from export.comparison import ParityError
from export.episodes import ROWS, STEPS
from export.packed_step import StepOutput
from export.parity import TOLERANCES, Gate
from export.tamiyo_step import TamiyoStep
from model.heads import HeadTable
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.export.gate_cases import case_of
from tests.gate import gate_of, judged
from tests.loaded_step import TensorStep
from tests.machine import needs_bf16

MAX_BATCH_SIZE = 64
ATOL = TOLERANCES["fp32"].atol
NUDGE = ATOL / 4
"""Moves a choice within the tolerance: enough to turn a tie, too little to be a fault."""
Fault = Callable[[TensorStep, HeadTable], TensorStep]

OUTPUTS = ("action", "log_prob", "value", "state_h_out", "state_c_out")
ACTION, LOG_PROB, VALUE, STATE_H, STATE_C = range(5)


@pytest.fixture(scope="module")
def normalizer(spec: PolicySpec) -> ObservationNormalizer:
    generator = torch.Generator().manual_seed(7)
    mean = torch.randn(spec.observation_dim, generator=generator)
    return ObservationNormalizer(mean, 3.0 * torch.rand(mean.shape, generator=generator))


@pytest.fixture(scope="module")
def gate(policy: FactoredRecurrentActorCritic, normalizer: ObservationNormalizer) -> Gate:
    return gate_of(policy, normalizer, max_batch_size=MAX_BATCH_SIZE)


@pytest.fixture(scope="module")
def step(policy: FactoredRecurrentActorCritic, normalizer: ObservationNormalizer) -> TamiyoStep:
    return TamiyoStep(policy, normalizer).eval()


def with_output(step: TensorStep, index: int, change: Callable[[Tensor], Tensor]) -> TensorStep:
    """The step with one of its outputs changed."""

    def changed(*inputs: Tensor) -> StepOutput:
        outputs = list(step(*inputs))
        outputs[index] = change(outputs[index])
        action, log_prob, value, h, c = outputs
        return action, log_prob, value, h, c

    return changed


def with_row(tensor: Tensor, row: int, value: float) -> Tensor:
    changed = tensor.clone()
    changed[row] = value
    return changed


def passes(gate: Gate, step: TensorStep) -> bool:
    try:
        judged(gate, step)
    except ParityError:
        return False
    return True


def test_correct_step_passes_with_every_decision_equal(step: TamiyoStep, gate: Gate) -> None:
    parity = judged(gate, step).summary()
    assert parity.rows == ROWS * STEPS
    assert parity.action_agreement == 1.0
    assert parity.greedy_agreement == 1.0
    assert parity.max_error.keys() == {"log_prob", "value", "state_h_out", "state_c_out"}
    assert max(parity.max_error.values()) < ATOL


def test_comparison_is_the_same_each_time(step: TamiyoStep, gate: Gate) -> None:
    one, other = judged(gate, step), judged(gate, step)
    assert one.summary() == other.summary()
    assert one.error_by_step == other.error_by_step


def swapped_heads(step: TensorStep, heads: HeadTable) -> TensorStep:
    """Two heads of one size, so that no index gives it away."""
    order = list(range(len(heads.names)))
    first, second = heads.names.index("alpha_target"), heads.names.index("alpha_curve")
    order[first], order[second] = second, first
    swapped_action = with_output(step, ACTION, lambda action: action[:, order])
    return with_output(swapped_action, LOG_PROB, lambda log_prob: log_prob[:, order])


def style_rule_ignored(step: TensorStep, heads: HeadTable) -> TensorStep:
    changed = copy.deepcopy(step)
    assert isinstance(changed, TamiyoStep)
    changed.heads.relevance.fill_(True)
    return changed


def style_taken_where_it_does_not_matter(step: TensorStep, heads: HeadTable) -> TensorStep:
    ignored = style_rule_ignored(step, heads)

    def taken(*inputs: Tensor) -> StepOutput:
        _, log_prob, value, h, c = step(*inputs)
        return ignored(*inputs)[ACTION], log_prob, value, h, c

    return taken


def style_scored_where_it_does_not_matter(
    step: TensorStep, heads: HeadTable, by: float = -1.0
) -> TensorStep:
    style = heads.names.index("style")

    def scored(log_prob: Tensor) -> Tensor:
        column = log_prob[:, style]
        return log_prob.index_copy(
            1, torch.tensor([style]), torch.where(column == 0, by, column)[:, None]
        )

    return with_output(step, LOG_PROB, scored)


def style_nearly_certain(step: TensorStep, heads: HeadTable) -> TensorStep:
    return style_scored_where_it_does_not_matter(step, heads, by=-ATOL / 2)


def style_more_than_certain(step: TensorStep, heads: HeadTable) -> TensorStep:
    return style_scored_where_it_does_not_matter(step, heads, by=ATOL / 2)


def masked_choice_taken(step: TensorStep, heads: HeadTable) -> TensorStep:
    size = heads.sizes[0]

    def taken(*inputs: Tensor) -> StepOutput:
        action, *others = step(*inputs)
        allowed = inputs[1][:, :size]
        forbidden = allowed.int().argmin(-1)
        action = torch.cat(
            [torch.where(allowed.all(-1), action[:, 0], forbidden)[:, None], action[:, 1:]], -1
        )
        return action, others[0], others[1], others[2], others[3]

    return taken


def state_not_carried(step: TensorStep, heads: HeadTable) -> TensorStep:
    def stuck(*inputs: Tensor) -> StepOutput:
        action, log_prob, value, _, _ = step(*inputs)
        return action, log_prob, value, inputs[3], inputs[4]

    return stuck


def cell_state_not_carried(step: TensorStep, heads: HeadTable) -> TensorStep:
    def stuck(*inputs: Tensor) -> StepOutput:
        action, log_prob, value, h, _ = step(*inputs)
        return action, log_prob, value, h, inputs[4]

    return stuck


def stale_state_for_restarted_rows(step: TensorStep, heads: HeadTable) -> TensorStep:
    """Keeps its own state, as graphs of one size do, and the caller's only for rows that go on."""
    kept: dict[int, list[Tensor]] = {}

    def stale(*inputs: Tensor) -> StepOutput:
        h, c = inputs[3], inputs[4]
        if len(h) in kept:
            restarted = (h == 0).flatten(1).all(1)[:, None, None]
            h, c = (
                torch.where(restarted, mine, given)
                for mine, given in zip(kept[len(h)], (h, c), strict=True)
            )
        outputs = step(*inputs[:3], h, c)
        kept[len(h)] = [state.clone() for state in outputs[3:]]
        return outputs

    return stale


def rows_reversed(step: TensorStep, heads: HeadTable) -> TensorStep:
    def backwards(*inputs: Tensor) -> StepOutput:
        action, log_prob, value, h, c = (output.flip(0) for output in step(*inputs))
        return action, log_prob, value, h, c

    return backwards


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (swapped_heads, r"(action of head 'alpha_target'|log_prob\[\d+, 4\])"),
        (style_taken_where_it_does_not_matter, r"action of head 'style'"),
        (style_scored_where_it_does_not_matter, r"log_prob\[\d+, 2\] is -1, expected 0"),
        (
            style_nearly_certain,
            r"log_prob\[\d+, 2\] is -9\.9+\d*e-06, expected exactly 0: head 'style'",
        ),
        (
            style_more_than_certain,
            r"log_prob\[\d+, 2\] is 9\.9+\d*e-06, expected exactly 0: head 'style'",
        ),
        (masked_choice_taken, r"action of head 'slot'"),
        (state_not_carried, r"state_h_out\["),
        (cell_state_not_carried, r"state_c_out\["),
        (stale_state_for_restarted_rows, r"state_h_out\["),
        (rows_reversed, r"state_h_out\["),
    ],
)
def test_fault_is_stopped_and_named(fault: Fault, named: str, step: TamiyoStep, gate: Gate) -> None:
    wrong = fault(step, gate.judge.heads)
    with pytest.raises(ParityError, match=rf"^it differs from the policy: {named}") as stopped:
        judged(gate, wrong)
    assert re.search(r"\(batch size \d+, step \d+\)$", str(stopped.value))
    assert "expected" in str(stopped.value)


def test_normaliser_of_another_policy_is_stopped(
    policy: FactoredRecurrentActorCritic, normalizer: ObservationNormalizer, step: TamiyoStep
) -> None:
    shifted = ObservationNormalizer(normalizer.mean + 1e-2, normalizer.var)
    for own in (None, shifted):
        with pytest.raises(ParityError, match="state_h_out"):
            judged(gate_of(policy, own, max_batch_size=MAX_BATCH_SIZE), step)


def test_forgotten_clip_of_the_normaliser_is_stopped(
    policy: FactoredRecurrentActorCritic, step: TamiyoStep, gate: Gate
) -> None:
    unclipped = TamiyoStep(policy, None).eval()
    mean, scale = step.features.mean, step.features.scale
    assert mean is not None
    assert scale is not None

    def without_clip(observation: Tensor, *others: Tensor) -> StepOutput:
        outputs: StepOutput = unclipped((observation - mean) * scale, *others)
        return outputs

    with pytest.raises(ParityError, match="state_h_out"):
        judged(gate, without_clip)


def test_wrong_epsilon_of_the_normaliser_is_stopped(
    policy: FactoredRecurrentActorCritic, normalizer: ObservationNormalizer
) -> None:
    """It decides how a feature counts that was constant in training and moves when serving."""
    var = normalizer.var.clone()
    var[0] = 0.0
    constant = ObservationNormalizer(normalizer.mean, var)
    step = TamiyoStep(policy, constant).eval()
    gate = gate_of(policy, constant, max_batch_size=MAX_BATCH_SIZE)
    assert passes(gate, step)
    assert step.features.scale is not None
    step.features.scale[0] *= 1.1
    with pytest.raises(ParityError, match="state_h_out"):
        judged(gate, step)


@pytest.mark.parametrize("index", [LOG_PROB, VALUE, STATE_H, STATE_C])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_output_that_is_not_finite_is_stopped_and_named(
    index: int, value: float, step: TamiyoStep, gate: Gate
) -> None:
    faulty = with_output(step, index, lambda output: with_row(output, -1, value))
    named = rf": {OUTPUTS[index]}\[\d.*\] is (nan|-?inf), expected -?\d"
    with pytest.raises(ParityError, match=named):
        judged(gate, faulty)


def test_fault_in_one_row_of_the_very_last_call_is_stopped(step: TamiyoStep, gate: Gate) -> None:
    sizes: list[int] = []

    def counted(*inputs: Tensor) -> StepOutput:
        sizes.append(len(inputs[0]))
        outputs: StepOutput = step(*inputs)
        return outputs

    judged(gate, counted)
    calls = 0

    def faulty_at_last(*inputs: Tensor) -> StepOutput:
        nonlocal calls
        calls += 1
        action, log_prob, value, h, c = step(*inputs)
        if calls == len(sizes):
            value = with_row(value, -1, torch.nan)
        return action, log_prob, value, h, c

    last = rf": value\[\d+\] is nan.*\(batch size {sizes[-1]}, step {STEPS - 1}\)$"
    with pytest.raises(ParityError, match=last):
        judged(gate, faulty_at_last)


@pytest.mark.parametrize(
    ("index", "dtype"),
    [
        (ACTION, torch.int32),
        (ACTION, torch.float32),
        (LOG_PROB, torch.float64),
        (VALUE, torch.float64),
        (VALUE, torch.bfloat16),
        (STATE_H, torch.float64),
        (STATE_C, torch.float16),
    ],
)
def test_wrong_dtype_is_stopped_and_named(
    index: int, dtype: torch.dtype, step: TamiyoStep, gate: Gate
) -> None:
    faulty = with_output(step, index, lambda output: output.to(dtype))
    got = str(dtype).removeprefix("torch.")
    named = (
        rf": the step fails: output '{OUTPUTS[index]}' is {got} \[.*\], expected (int64|float32)"
    )
    with pytest.raises(ParityError, match=named):
        judged(gate, faulty)


@pytest.mark.parametrize("index", range(5))
def test_wrong_shape_is_stopped_and_named(index: int, step: TamiyoStep, gate: Gate) -> None:
    """One dimension too many broadcasts against what is expected, and would compare as equal."""
    faulty = with_output(step, index, lambda output: output.unsqueeze(0))
    named = rf": the step fails: output '{OUTPUTS[index]}' is \w+ \[1, \d+.*\], expected"
    with pytest.raises(ParityError, match=named):
        judged(gate, faulty)


def test_rows_that_are_left_out_are_missed(step: TamiyoStep, gate: Gate) -> None:
    def cut(*inputs: Tensor) -> StepOutput:
        action, log_prob, value, h, c = (output[:2] for output in step(*inputs))
        return action, log_prob, value, h, c

    with pytest.raises(ParityError, match=r"output 'action' is int64 \[2, 8\], expected"):
        judged(gate, cut)


def test_step_that_fails_is_stopped(step: TamiyoStep, gate: Gate) -> None:
    """As one does whose export took the example's two rows for a constant."""

    def of_two_rows(*inputs: Tensor) -> StepOutput:
        action, *others = step(*inputs)
        return action.view(2, 8), others[0], others[1], others[2], others[3]

    with pytest.raises(ParityError, match=r"the step fails: shape .* \(batch size \d+\)$"):
        judged(gate, of_two_rows)


def test_step_that_writes_to_an_input_is_stopped_and_the_input_named(
    step: TamiyoStep, gate: Gate
) -> None:
    def centring(*inputs: Tensor) -> StepOutput:
        outputs: StepOutput = step(*inputs)
        inputs[0].sub_(inputs[0].mean())
        return outputs

    with pytest.raises(ParityError, match=r"the step writes to its input 'observation' \(batch"):
        judged(gate, centring)


@pytest.mark.parametrize("choice", [-1, 13])
def test_action_outside_its_head_is_stopped(choice: int, step: TamiyoStep, gate: Gate) -> None:
    faulty = with_output(step, ACTION, lambda action: with_row(action, -1, choice))
    with pytest.raises(ParityError, match="action is outside its head"):
        judged(gate, faulty)


def test_any_weight_tensor_off_by_a_thousandth_is_stopped(
    policy: FactoredRecurrentActorCritic, normalizer: ObservationNormalizer, gate: Gate
) -> None:
    unnoticed = []
    for name in policy.state_dict():
        off = copy.deepcopy(policy)
        with torch.no_grad():
            off.get_parameter(name).mul_(1.001)
        if passes(gate, TamiyoStep(off, normalizer)):
            unnoticed.append(name)
    assert unnoticed == []


def tied(policy: FactoredRecurrentActorCritic, head: str) -> FactoredRecurrentActorCritic:
    """The policy with choices 0 and 1 of a head equal, bit for bit, in every situation."""
    tied = copy.deepcopy(policy)
    last = tied.get_submodule(f"{head}_head.2")
    with torch.no_grad():
        for parameter in last.parameters():
            parameter[1] = parameter[0]
    return tied


def nudged(
    policy: FactoredRecurrentActorCritic, head: str, amount: float
) -> FactoredRecurrentActorCritic:
    """The policy with choice 1 of a head more likely."""
    nudged = copy.deepcopy(policy)
    with torch.no_grad():
        nudged.get_parameter(f"{head}_head.2.bias")[1] += amount
    return nudged


@pytest.mark.parametrize("head", ["slot", "tempo", "op"])
def test_tie_may_be_broken_either_way(head: str, policy: FactoredRecurrentActorCritic) -> None:
    """A tie between ops too: what it forces follows the op that was taken."""
    one_way, other_way = (nudged(tied(policy, head), head, by) for by in (-NUDGE, NUDGE))
    gate = gate_of(one_way, max_batch_size=MAX_BATCH_SIZE)
    parity = judged(gate, TamiyoStep(other_way, None)).summary()
    assert 0.9 < parity.action_agreement < 1.0
    assert parity.greedy_agreement < parity.action_agreement  # noise decides a tie


@pytest.mark.parametrize("head", ["slot", "tempo", "op"])
def test_choice_worse_by_more_than_the_tolerance_is_stopped(
    head: str, policy: FactoredRecurrentActorCritic
) -> None:
    even = tied(policy, head)
    heads = policy.heads
    index = heads.names.index(head)
    other_way = TamiyoStep(nudged(even, head, NUDGE), None)
    worse = nudged(even, head, -1.1 * ATOL)
    right = TamiyoStep(worse, None)

    def right_but_for_the_action(*inputs: Tensor) -> StepOutput:
        action = other_way(*inputs)[ACTION]
        _, log_prob, value, h, c = right(*inputs)
        return action, log_prob, value, h, c

    with pytest.raises(ParityError, match=f"action of head '{heads.names[index]}'"):
        judged(gate_of(worse, max_batch_size=MAX_BATCH_SIZE), right_but_for_the_action)


def ties_turned(step: TensorStep, heads: HeadTable, head: str, share: float) -> TensorStep:
    """For a policy whose choices 0 and 1 of a head are tied: takes 1 for 0, in a share of rows."""
    generator = torch.Generator().manual_seed(0)
    index = heads.names.index(head)

    def turned(*inputs: Tensor) -> StepOutput:
        action, *others = step(*inputs)
        allowed = torch.split(inputs[1], heads.sizes, -1)[index]
        greedy = (inputs[2] == 0).all(-1)
        chosen = torch.rand(len(action), generator=generator) < share
        action = action.clone()
        action[(action[:, index] == 0) & allowed[:, 1] & greedy & chosen, index] = 1
        return action, *others

    return turned


def test_tie_turned_is_no_worse_decision(policy: FactoredRecurrentActorCritic) -> None:
    """Bit for bit a tie: whichever way it is broken, nothing is lost."""
    even = tied(policy, "tempo")
    gate = gate_of(even, max_batch_size=MAX_BATCH_SIZE)
    run = judged(gate, ties_turned(TamiyoStep(even, None).eval(), even.heads, "tempo", 0.9))
    assert run.greedy_agreement < 0.99
    assert run.worse == 0


def test_decisions_count_where_there_is_something_to_decide(step: TamiyoStep, gate: Gate) -> None:
    """Not in a head that does not matter, nor with a lone choice, nor where noise points at one or
    is alike for all."""
    heads, counts = gate.judge.heads, {"free": 0, "greedy": 0}

    def counted(*inputs: Tensor) -> StepOutput:
        outputs: StepOutput = step(*inputs)
        _, mask, noise, *_ = inputs
        choices = [part.sum(-1) for part in torch.split(mask, heads.sizes, -1)]
        matters = heads.relevance[outputs[ACTION][:, heads.op_index]]
        spreads = [part.amax(-1) - part.amin(-1) for part in torch.split(noise, heads.sizes, -1)]
        is_alike = (torch.stack(spreads, -1) < 1).all(-1) & (noise != 0).any(-1)
        is_free = (noise < 1000).all(-1) & ~is_alike
        free = matters & (torch.stack(choices, -1) > 1) & is_free[:, None]
        counts["free"] += int(free.sum())
        counts["greedy"] += int(free[(noise == 0).all(-1)].sum())
        return outputs

    run = judged(gate, counted)
    assert (run.free, run.greedy_free) == (counts["free"], counts["greedy"])
    assert 0 < run.greedy_free < run.free < run.rows * len(heads.names)


def test_mean_error_is_that_of_all_rows(step: TamiyoStep, gate: Gate) -> None:
    errors: list[Tensor] = []
    weight = TOLERANCES["fp32"].rtol / ATOL

    def higher(*inputs: Tensor) -> StepOutput:
        action, log_prob, value, h, c = step(*inputs)
        errors.append(ATOL / 2 / (1 + weight * value.abs()))
        return action, log_prob, value + ATOL / 2, h, c

    run = judged(gate, higher)
    expected = pytest.approx(float(torch.cat(errors).mean()), rel=0.05)
    assert float(run.mean_error("value")) == expected
    assert float(run.mean_distance("value")) == expected


def test_every_row_of_a_batch_beyond_256_is_judged(policy: FactoredRecurrentActorCritic) -> None:
    step, sizes = TamiyoStep(policy, None).eval(), []

    def counted(*inputs: Tensor) -> StepOutput:
        sizes.append(len(inputs[0]))
        outputs: StepOutput = step(*inputs)
        return outputs

    run = judged(gate_of(policy, max_batch_size=2 * ROWS + 1), counted)
    assert max(sizes) == 2 * ROWS + 1
    assert run.rows == sum(sizes)


@needs_bf16
@pytest.mark.parametrize(("share", "is_enough"), [(0.005, True), (0.9, False)])
def test_in_bf16_enough_greedy_actions_must_be_the_policys_own(
    share: float, is_enough: bool, policy: FactoredRecurrentActorCritic
) -> None:
    """Each is as good as the policy's own; that so many are others is not rounding."""
    even = tied(policy, "tempo")
    gate = gate_of(even, precision="bf16", max_batch_size=MAX_BATCH_SIZE)
    step = ties_turned(TamiyoStep(even, None, "bf16").eval(), even.heads, "tempo", share)
    if is_enough:
        assert 0.998 <= judged(gate, step).greedy_agreement < 1.0
    else:
        with pytest.raises(ParityError, match=r"of the free greedy decisions are the policy's own"):
            judged(gate, step)


@needs_bf16
def test_in_bf16_few_choices_may_be_worse_than_the_policys_own(
    policy: FactoredRecurrentActorCritic,
) -> None:
    """Each by less than the tolerance, and in fewer decisions than have to agree: but no order of
    sums makes so many, nor their log-probs so far off."""
    worse = nudged(tied(policy, "tempo"), "tempo", -0.03)
    gate = gate_of(worse, precision="bf16", max_batch_size=MAX_BATCH_SIZE)
    step = TamiyoStep(worse, None, "bf16").eval()
    judged(gate, step)
    with pytest.raises(ParityError, match=r"decisions are worse|off in the mean"):
        judged(gate, ties_turned(step, worse.heads, "tempo", 0.015))


@needs_bf16
def test_what_bf16_may_be_off_by_is_too_much_in_fp32(
    policy: FactoredRecurrentActorCritic,
) -> None:
    rounded = TamiyoStep(policy, None, "bf16").eval()
    judged(gate_of(policy, precision="bf16", max_batch_size=MAX_BATCH_SIZE), rounded)
    with pytest.raises(ParityError):
        judged(gate_of(policy, max_batch_size=MAX_BATCH_SIZE), rounded)


def with_leaking_gates(step: TensorStep, leak: float) -> TensorStep:
    """A step whose closed forget gates let through that much of what a cell held."""

    def leaking(*inputs: Tensor) -> StepOutput:
        action, log_prob, value, h, c = step(*inputs)
        held = inputs[4].abs()
        return action, log_prob, value, h, torch.where(c.abs() < held / 100, c + leak * held, c)

    return leaking


def test_a_closed_gate_may_be_off_as_a_runtimes_is_and_no_further() -> None:
    """onnxruntime's sigmoid near 0 is up to 1.4e-7 off."""
    case = case_of("v1, normaliser")
    gate = gate_of(case.policy, case.normalizer, max_batch_size=64)
    judged(gate, with_leaking_gates(case.step(), 2.4e-7))
    with pytest.raises(ParityError, match=r"state_c_out\["):
        judged(gate, with_leaking_gates(case.step(), 2e-6))
