"""V2 through the exporter: its extra inputs, its rules and its value's scale, in every format."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from export.__main__ import main
from export.artifact import open_artifact
from export.comparison import ParityError
from export.exporter import export_policy
from export.formats import FORMATS, StepSource
from export.loaders.load import RUNTIME_OF
from export.manifest import Manifest, Precision
from export.packed_step import StepInput, StepOutput
from export.parity import Gate
from export.tamiyo_step import TamiyoStep
from export.verify import verify_artifact
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.spec import PROBABILITY_FLOORS_V2, PolicySpec
from model.step_spec import SLOT_BY_OP
from tests.export.test_tamiyo_step import exported_program, impurities, program_operators
from tests.gate import gate_of, judged
from tests.golden import GOLDEN, golden_json, golden_tensors, needs_golden
from tests.loaded_step import TensorStep, load_from, run_step
from tests.loaded_step import load as loaded
from tests.machine import needs_bf16
from tests.naive import FLOAT_ATOL
from tests.naive_v2 import NaivePolicyV2
from tests.random_inputs import (
    gumbel_noise,
    packed,
    random_blueprints,
    random_masks,
    random_observations,
    random_policy,
    random_slots_by_op,
    weights_of,
)

ATOL = 5e-5
"""Values and Q are in returns, three times what the network gives."""
MAX_BATCH_SIZE = 16
GATE_BATCH_SIZE = 64
"""The gate is quickest with batches of some size."""
BLUEPRINT_INPUT, SLOT_BY_OP_INPUT = 5, 6
SLOT = r"'slot'|log_prob\[\d+, 0\]|action is outside its head"


def spec_of(
    *,
    floors: bool = False,
    num_layers: int = 2,
    extra_outputs: tuple[str, ...] = ("q_value", "contribution"),
) -> PolicySpec:
    """Tiny, with an input projection, and with no two dimensions equal."""
    spec = PolicySpec.tamiyo_v2(
        num_slots=2,
        observation_dim=7,
        feature_dim=12,
        hidden_dim=16,
        num_layers=num_layers,
        value_scale=3.0,
    ).model_copy(update={"extra_outputs": extra_outputs})
    return spec.with_probability_floors(PROBABILITY_FLOORS_V2) if floors else spec


@pytest.fixture(scope="module", params=[False, True], ids=["without floors", "with floors"])
def policy(request: pytest.FixtureRequest) -> FactoredRecurrentActorCritic:
    return random_policy(spec_of(floors=request.param))


@pytest.fixture(scope="module")
def normalizer() -> ObservationNormalizer:
    return ObservationNormalizer(torch.linspace(-3, 3, 7), torch.linspace(0.1, 9, 7))


@pytest.fixture(scope="module")
def artifact(
    policy: FactoredRecurrentActorCritic,
    normalizer: ObservationNormalizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Every format, with everything that a V2 step can take and give."""
    output = tmp_path_factory.mktemp("whole") / "v2"
    export_policy(
        policy, normalizer, output, name="v2", formats=tuple(FORMATS), max_batch_size=MAX_BATCH_SIZE
    )
    return output


def load(artifact: Path, format_name: str) -> TensorStep:
    return partial(run_step, load_from(artifact, format_name), Manifest.read(artifact).spec)


def test_every_format_passes_the_gate_and_verifies(
    artifact: Path, policy: FactoredRecurrentActorCritic
) -> None:
    manifest = Manifest.read(artifact)
    assert manifest.spec == policy.spec
    assert manifest.parity.formats.keys() == FORMATS.keys()
    assert [array.name for array in manifest.inputs[5:]] == ["blueprint_index", "slot_by_op_mask"]
    assert [array.name for array in manifest.outputs[5:]] == ["q_value", "contribution"]
    for parity in manifest.parity.formats.values():
        assert {"q_value", "contribution"} <= parity.max_error.keys()
    assert verify_artifact(open_artifact(artifact)).keys() == FORMATS.keys()


def test_inspect_says_what_a_v2_artifact_does_beyond_its_weights(
    artifact: Path, policy: FactoredRecurrentActorCritic, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(artifact)]) == 0
    printed = capsys.readouterr().out
    floors = "slot 0.05, blueprint 0.12, " if policy.heads.has_floors else "none\n"
    assert f"  probability floors: {floors}" in printed
    assert "state_c_out, q_value, contribution\n" in printed
    assert "one unit of the network's value is 3 in returns" in printed


@pytest.mark.parametrize("format_name", FORMATS)
@torch.inference_mode()
def test_file_does_what_the_naive_policy_does_over_carried_steps(
    format_name: str,
    artifact: Path,
    policy: FactoredRecurrentActorCritic,
    normalizer: ObservationNormalizer,
    rng: np.random.Generator,
) -> None:
    spec = policy.spec
    naive = NaivePolicyV2(
        spec,
        weights_of(policy),
        normalizer.mean.numpy(),
        normalizer.var.numpy(),
        floors={head.name: head.probability_floor for head in spec.heads},
    )
    step = load(artifact, format_name)
    for batch_size in (1, 3, MAX_BATCH_SIZE):
        h = c = torch.zeros(batch_size, spec.num_layers, spec.hidden_dim)
        expected_h, expected_c = naive.zero_state(batch_size)
        for _ in range(10):
            observation = random_observations(spec, rng, batch_size) * 3
            masks = random_masks(spec, rng, batch_size)
            slots = random_slots_by_op(spec, rng, masks["op"])
            blueprints = random_blueprints(spec, rng, batch_size)
            noise = gumbel_noise(spec, rng, batch_size)
            arrays = (observation, packed(spec, masks), noise, h, c, blueprints, slots)
            action, log_prob, value, h, c, q_value, contribution = step(
                *(torch.as_tensor(array) for array in arrays)
            )
            masks[SLOT_BY_OP] = slots
            expected = naive.step_v2(observation, blueprints, masks, noise, expected_h, expected_c)
            expected_h, expected_c = expected.h, expected.c
            np.testing.assert_array_equal(action, expected.action)
            for got, want in (
                (log_prob, expected.log_prob),
                (value, expected.value * spec.value_scale),
                (h, expected.h),
                (c, expected.c),
                (q_value, expected.q_value * spec.value_scale),
                (contribution, expected.contribution),
            ):
                np.testing.assert_allclose(got, want, atol=ATOL, rtol=0)


@needs_bf16
def test_in_bf16_every_format_that_has_it_passes_the_gate_and_verifies(
    policy: FactoredRecurrentActorCritic, tmp_path: Path
) -> None:
    """With one layer, as the trainer has it: bf16's error grows with layers."""
    policy = random_policy(spec_of(floors=policy.heads.has_floors, num_layers=1))
    formats = ("torchscript", "pt2", "aoti")
    manifest = export_policy(
        policy,
        None,
        tmp_path / "v2",
        name="v2",
        formats=formats,
        precision="bf16",
        max_batch_size=MAX_BATCH_SIZE,
    )
    assert manifest.parity.formats.keys() == set(formats)
    for parity in manifest.parity.formats.values():
        assert {"q_value", "contribution"} <= parity.max_error.keys()
    assert verify_artifact(open_artifact(tmp_path / "v2")).keys() == set(formats)


@pytest.mark.parametrize("name", ["q_value", "contribution"])
def test_a_wrong_output_of_the_critic_is_stopped_and_named(name: str) -> None:
    policy = random_policy(spec_of(extra_outputs=(name,)))
    step = TamiyoStep(policy, None).eval()
    gate = gate_of(policy, max_batch_size=GATE_BATCH_SIZE)
    judged(gate, step)

    def off(*inputs: Tensor) -> StepOutput:
        *others, last = step(*inputs)
        return (*others, last + 0.01)

    with pytest.raises(ParityError, match=rf": {name}\["):
        judged(gate, off)


def scaled(precision: Precision, value_scale: float) -> tuple[TamiyoStep, Gate]:
    spec = spec_of(num_layers=1).model_copy(update={"value_scale": value_scale})
    policy = random_policy(spec)
    gate = gate_of(policy, precision=precision, max_batch_size=GATE_BATCH_SIZE)
    return TamiyoStep(policy, None, precision).eval(), gate


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=needs_bf16), "fp32"])
@pytest.mark.parametrize("value_scale", [0.01, 0.1, 100.0, 1e4])
def test_a_value_is_judged_alike_whatever_a_return_is_worth(
    value_scale: float, precision: Precision
) -> None:
    """In the network's units: the tolerance is for its rounding, not for that of returns."""
    step, gate = scaled(precision, value_scale)
    judged(gate, step)

    for at, name in ((2, "value"), (5, "q_value")):

        def forgetful(*inputs: Tensor, at: int = at) -> StepOutput:
            outputs = list(step(*inputs))
            outputs[at] = torch.zeros_like(outputs[at])
            return tuple(outputs)

        with pytest.raises(ParityError, match=rf": {name}\["):
            judged(gate, forgetful)


def test_a_step_that_stumbles_over_ops_without_a_slot_is_stopped(
    policy: FactoredRecurrentActorCritic,
) -> None:
    """As environments send them: the row of an op that is not allowed is empty."""
    step = TamiyoStep(policy, None).eval()

    def stumbling(*inputs: Tensor) -> StepOutput:
        action, *others = step(*inputs)
        is_empty = ~inputs[SLOT_BY_OP_INPUT].any(-1).all(-1)
        return torch.where(is_empty[:, None], 0, action), *others

    with pytest.raises(ParityError, match=r": (action|log_prob|q_value)"):
        judged(gate_of(policy, max_batch_size=GATE_BATCH_SIZE), stumbling)


def test_a_step_with_an_output_less_is_stopped(policy: FactoredRecurrentActorCritic) -> None:
    step = TamiyoStep(policy, None).eval()
    gate = gate_of(policy, max_batch_size=GATE_BATCH_SIZE)
    with pytest.raises(ParityError, match="output 6 is missing, expected 'contribution'"):
        judged(gate, lambda *inputs: step(*inputs)[:-1])


def test_a_step_with_an_output_more_is_stopped(policy: FactoredRecurrentActorCritic) -> None:
    step = TamiyoStep(policy, None).eval()

    def generous(*inputs: Tensor) -> StepOutput:
        outputs: StepOutput = step(*inputs)
        return (*outputs, outputs[2])

    gate = gate_of(policy, max_batch_size=GATE_BATCH_SIZE)
    with pytest.raises(ParityError, match="output 7 is one too many, expected 7"):
        judged(gate, generous)


def test_a_deeper_head_goes_with_a_plain_critic_too() -> None:
    document = PolicySpec.tamiyo_v1(observation_dim=7, feature_dim=12, hidden_dim=10).model_dump()
    document["heads"][1]["hidden_layers"] = 2
    policy = random_policy(PolicySpec.model_validate(document))
    judged(gate_of(policy, max_batch_size=GATE_BATCH_SIZE), TamiyoStep(policy, None).eval())


def test_what_is_not_asked_for_is_not_in_the_graph() -> None:
    """As many products as the heads, the recurrence and V(s) take."""
    plain = TamiyoStep(random_policy(spec_of(extra_outputs=())), None)
    with_q = random_policy(spec_of(extra_outputs=("q_value",)))

    def products(step: TamiyoStep) -> int:
        graph = StepSource(step.eval(), 4).program.graph
        return sum(str(node.target) == "aten.linear.default" for node in graph.nodes)

    assert products(TamiyoStep(with_q, None)) == products(plain) + 4


def test_the_graph_copies_nothing_and_draws_nothing(policy: FactoredRecurrentActorCritic) -> None:
    step = TamiyoStep(policy, None).eval()
    operators = program_operators(exported_program(step, step.example(2)))
    assert {"aten.linear.default", "aten.argmax.default"} <= operators
    assert impurities(operators) == set()


def changed(step: TensorStep, at: int, change: Callable[[Tensor], Tensor]) -> TensorStep:
    """The step, given something else for one of its inputs."""

    def run(*inputs: Tensor) -> StepOutput:
        return step(*inputs[:at], change(inputs[at]), *inputs[at + 1 :])

    return run


def without_its_scale(policy: FactoredRecurrentActorCritic) -> TensorStep:
    unscaled = FactoredRecurrentActorCritic(
        policy.spec.model_copy(update={"value_scale": 1.0})
    ).eval()
    unscaled.load_state_dict(policy.state_dict())
    return TamiyoStep(unscaled, None).eval()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda step, policy: without_its_scale(policy), "value"),
        (lambda step, policy: changed(step, BLUEPRINT_INPUT, torch.zeros_like), "state_h_out"),
        (
            lambda step, policy: changed(step, BLUEPRINT_INPUT, lambda index: index.flip(1)),
            "state_h_out",
        ),
        (
            lambda step, policy: changed(step, BLUEPRINT_INPUT, lambda i: i.clamp(min=0)),
            "state_h_out",
        ),
        (lambda step, policy: changed(step, SLOT_BY_OP_INPUT, torch.ones_like), SLOT),
        (lambda step, policy: changed(step, SLOT_BY_OP_INPUT, lambda mask: mask.flip(1)), SLOT),
    ],
    ids=["value scale", "no blueprint", "slots swapped", "none is noop", "any slot", "other op"],
)
def test_a_step_that_forgets_what_v2_adds_is_stopped(
    policy: FactoredRecurrentActorCritic,
    make: Callable[[TensorStep, FactoredRecurrentActorCritic], TensorStep],
    named: str,
) -> None:
    gate = gate_of(policy, max_batch_size=GATE_BATCH_SIZE)
    step = TamiyoStep(policy, None).eval()
    judged(gate, step)
    with pytest.raises(ParityError, match=named):
        judged(gate, make(step, policy))


@pytest.mark.parametrize("floors", [False, True])
def test_a_step_with_other_floors_is_stopped(floors: bool) -> None:
    one, other = (random_policy(spec_of(floors=each)) for each in (floors, not floors))
    with pytest.raises(ParityError, match=r"action of head|log_prob"):
        judged(gate_of(one, max_batch_size=GATE_BATCH_SIZE), TamiyoStep(other, None).eval())


def test_a_choice_near_its_floor_is_judged_too() -> None:
    """In bf16, where rounding decides which choices are raised: its bounds are still bounds."""
    spec = spec_of(extra_outputs=()).with_probability_floors({"op": 0.16})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        undecided = FactoredRecurrentActorCritic(spec).eval()  # of 6 ops each has about 1/6
    step = TamiyoStep(undecided, None, "bf16").eval()
    gate = gate_of(undecided, precision="bf16", max_batch_size=GATE_BATCH_SIZE)
    judged(gate, step)
    op = spec.op_index

    def less_likely(*inputs: Tensor) -> StepOutput:
        """Where all ops are allowed, and so all of them are near their floor."""
        action, log_prob, *others = step(*inputs)
        is_near = torch.split(inputs[1], list(spec.head_sizes), dim=-1)[op].all(-1)
        log_prob = log_prob.clone()
        log_prob[:, op] -= is_near.float()
        return action, log_prob, *others

    with pytest.raises(ParityError, match=rf"log_prob\[\d+, {op}\]"):
        judged(gate, less_likely)


def test_a_choice_a_little_above_its_floor_is_not_on_it() -> None:
    """In float32, where the margin for rounding is far smaller than bf16's."""
    spec = spec_of(extra_outputs=()).with_probability_floors({"op": 0.165})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = FactoredRecurrentActorCritic(spec).eval()
    step, op, floor = TamiyoStep(policy, None).eval(), spec.op_index, math.log(0.165)
    gate = gate_of(policy, max_batch_size=GATE_BATCH_SIZE)
    judged(gate, step)

    def floored(*inputs: Tensor) -> StepOutput:
        action, log_prob, *others = step(*inputs)
        log_prob = log_prob.clone()
        log_prob[(log_prob[:, op] - floor).abs() < 1e-3, op] = floor
        return action, log_prob, *others

    with pytest.raises(ParityError, match=rf"log_prob\[\d+, {op}\] is -1\.80"):
        judged(gate, floored)


def recorded_inputs(recorded: dict[str, Tensor], spec: PolicySpec, t: int) -> tuple[Tensor, ...]:
    mask = torch.cat([recorded[f"in.mask.{head}"][:, t] for head in spec.head_names], dim=-1)
    return recorded["in.states"][:, t], mask, torch.zeros(mask.shape)


@needs_golden
@pytest.mark.parametrize("suffix", ["", "f"], ids=["without floors", "with floors"])
@pytest.mark.parametrize("format_name", FORMATS)
@torch.inference_mode()
def test_recorded_steps_are_taken_again_from_every_file(format_name: str, suffix: str) -> None:
    spec = PolicySpec.tamiyo_v2()
    if suffix:
        spec = spec.with_probability_floors(golden_json("v2_a")["probability_floor"])
    policy = FactoredRecurrentActorCritic(spec).eval()
    weights = golden_tensors("weights_v2_a")
    policy.load_state_dict(
        {name: w if w.dtype == torch.int64 else w.float() for name, w in weights.items()}
    )
    written = FORMATS[format_name]
    content = written.write(StepSource(TamiyoStep(policy, None).eval(), 64))
    step = partial(run_step, loaded(content, RUNTIME_OF[format_name], spec), spec)

    recorded = golden_tensors("io_v2_a")
    h_after = golden_tensors("io_v2_a_hidden_h")["step.h"]
    c_after = golden_tensors("io_v2_a_hidden_c")["step.c"]
    h = c = torch.zeros(64, 1, 512)
    for t in range(12):
        more = recorded["in.blueprint_indices"][:, t], recorded["in.slot_by_op"][:, t]
        inputs: StepInput = (*recorded_inputs(recorded, spec, t), h, c, *more)
        action, log_prob, value, h, c = step(*(array.contiguous() for array in inputs))
        for at, head in enumerate(spec.head_names):
            assert torch.equal(action[:, at], recorded[f"step{suffix}.actions.{head}"][:, t])
            expected = recorded[f"step{suffix}.log_probs.{head}"][:, t]
            torch.testing.assert_close(log_prob[:, at], expected, rtol=0, atol=FLOAT_ATOL)
        for got, expected in (
            (value, recorded["step.values"][:, t]),
            (h, h_after[t].transpose(0, 1)),
            (c, c_after[t].transpose(0, 1)),
        ):
            torch.testing.assert_close(got, expected, rtol=0, atol=FLOAT_ATOL)


@needs_golden
@torch.inference_mode()
def test_the_recorded_checkpoint_becomes_an_artifact_that_acts_as_it_did(tmp_path: Path) -> None:
    output = tmp_path / "v2"
    command = ["--checkpoint", str(GOLDEN / "ckpt_v2.pt"), "--output", str(output)]
    assert main([*command, "--formats", "all", "--max-batch-size", "16"]) == 0
    manifest = Manifest.read(output)
    assert manifest.has_normalizer
    recorded = golden_tensors("ckpt_v2_io")
    spec = manifest.spec
    mask = torch.cat([recorded[f"in.mask.{head}"] for head in spec.head_names], dim=-1)
    zeros = torch.zeros(16, 1, 32)
    for format_name in FORMATS:
        action, log_prob, value, h, c = load(output, format_name)(
            recorded["in.raw_states"],
            mask,
            torch.zeros(mask.shape),
            zeros,
            zeros,
            recorded["in.blueprint_indices"],
            recorded["in.mask.slot_by_op"],
        )
        for at, head in enumerate(spec.head_names):
            assert torch.equal(action[:, at], recorded[f"out.actions.{head}"]), format_name
            torch.testing.assert_close(
                log_prob[:, at], recorded[f"out.log_probs.{head}"], rtol=0, atol=FLOAT_ATOL
            )
        for got, expected in (
            (value, recorded["out.values"]),
            (h, recorded["out.h"].transpose(0, 1)),
            (c, recorded["out.c"].transpose(0, 1)),
        ):
            torch.testing.assert_close(got, expected, rtol=0, atol=FLOAT_ATOL)
