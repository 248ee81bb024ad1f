"""V2 through the exporter: its extra inputs, its rules and its value's scale, in every format."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from export.__main__ import main
from export.exporter import export_policy
from export.formats import FORMATS, LoadedStep, StepSource
from export.manifest import Manifest, Precision
from export.parity import ParityError, Reference, check_parity
from export.step import PolicyStep, StepInput, StepOutput
from export.verify import verify_artifact
from model.policy import FactoredRecurrentActorCritic
from model.spec import PROBABILITY_FLOORS_V2, PolicySpec
from tests.golden import GOLDEN, golden_json, golden_tensors, needs_golden
from tests.naive import FLOAT_ATOL, LOG_PROB_ATOL
from tests.random_inputs import random_policy

BATCH_SIZES = (1, 2, 5)
BLUEPRINT, SLOT_BY_OP = 5, 6
SLOT = r"'slot'|log_prob\[\d, 0\]"


def spec_of(*, floors: bool = False, num_layers: int = 2, value_scale: float = 3.0) -> PolicySpec:
    """Tiny, with an input projection, and with no two dimensions equal."""
    spec = PolicySpec.tamiyo_v2(
        num_slots=2,
        observation_dim=7,
        feature_dim=12,
        hidden_dim=16,
        num_layers=num_layers,
        value_scale=value_scale,
    )
    return spec.with_probability_floors(PROBABILITY_FLOORS_V2) if floors else spec


@pytest.fixture(scope="module", params=[False, True], ids=["without floors", "with floors"])
def policy(request: pytest.FixtureRequest) -> FactoredRecurrentActorCritic:
    return random_policy(spec_of(floors=request.param))


@pytest.mark.parametrize(
    ("precision", "formats"),
    [("fp32", ("torchscript", "pt2", "onnx")), ("bf16", ("torchscript", "pt2"))],
)
def test_every_portable_format_passes_the_gate_and_verifies(
    policy: FactoredRecurrentActorCritic,
    precision: Precision,
    formats: tuple[str, ...],
    tmp_path: Path,
) -> None:
    if precision == "bf16":  # whose error grows with layers; the trainer has one
        floors = policy.heads.has_floors
        policy = random_policy(spec_of(floors=floors, num_layers=1))
    output = tmp_path / "v2"
    options = {"name": "v2", "formats": formats, "precision": precision, "max_batch_size": 4}
    manifest = export_policy(policy, None, output, **options)  # type: ignore[arg-type]
    assert manifest.parity.formats.keys() == set(formats)
    assert [array.name for array in manifest.inputs[5:]] == ["blueprint_index", "slot_by_op_mask"]
    assert verify_artifact(output).keys() == set(formats)


def test_machine_code_passes_the_gate(tmp_path: Path) -> None:
    policy = random_policy(spec_of(floors=True))
    output = tmp_path / "v2"
    manifest = export_policy(policy, None, output, name="v2", formats=("aoti",), max_batch_size=2)
    assert manifest.parity.formats["aoti"].rows > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_critic_s_other_outputs_pass_the_gate_where_they_are_asked_for(
    precision: Precision, tmp_path: Path
) -> None:
    spec = spec_of(num_layers=1).model_copy(update={"extra_outputs": ("q_value", "contribution")})
    formats = ("torchscript", "pt2", "onnx") if precision == "fp32" else ("torchscript",)
    manifest = export_policy(
        random_policy(spec),
        None,
        tmp_path / "v2",
        name="v2",
        formats=formats,
        precision=precision,
        max_batch_size=4,
    )
    assert [array.name for array in manifest.outputs[5:]] == ["q_value", "contribution"]
    for parity in manifest.parity.formats.values():
        assert {"q_value", "contribution"} <= parity.max_error.keys()


@pytest.mark.parametrize("name", ["q_value", "contribution"])
def test_a_wrong_output_of_the_critic_is_stopped_and_named(name: str) -> None:
    policy = random_policy(spec_of().model_copy(update={"extra_outputs": (name,)}))
    step = PolicyStep(policy, None).eval()
    reference = Reference(policy, None, batch_sizes=BATCH_SIZES)
    check_parity(step, reference)

    def off(*inputs: Tensor) -> StepOutput:
        *others, last = step(*inputs)
        return (*others, last + 0.01)

    with pytest.raises(ParityError, match=name):
        check_parity(off, reference)


def test_what_is_not_asked_for_is_not_in_the_graph() -> None:
    """As many products as the heads, the recurrence and V(s) take."""
    policy = random_policy(spec_of())
    plain = PolicyStep(policy, None)
    with_q = random_policy(spec_of().model_copy(update={"extra_outputs": ("q_value",)}))

    def products(step: PolicyStep) -> int:
        graph = StepSource(step.eval(), 4).program.graph
        return sum(str(node.target) == "aten.linear.default" for node in graph.nodes)

    assert products(PolicyStep(with_q, None)) == products(plain) + 4


def changed(step: LoadedStep, at: int, change: Callable[[Tensor], Tensor]) -> LoadedStep:
    """The step, given something else for one of its inputs."""

    def run(*inputs: Tensor) -> StepOutput:
        return step(*inputs[:at], change(inputs[at]), *inputs[at + 1 :])

    return run


def without_its_scale(policy: FactoredRecurrentActorCritic) -> LoadedStep:
    unscaled = FactoredRecurrentActorCritic(
        policy.spec.model_copy(update={"value_scale": 1.0})
    ).eval()
    unscaled.load_state_dict(policy.state_dict())
    return PolicyStep(unscaled, None).eval()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda step, policy: without_its_scale(policy), "value"),
        (lambda step, policy: changed(step, BLUEPRINT, torch.zeros_like), "state_h_out"),
        (lambda step, policy: changed(step, BLUEPRINT, lambda index: index.flip(1)), "state_h_out"),
        (lambda step, policy: changed(step, BLUEPRINT, lambda i: i.clamp(min=0)), "state_h_out"),
        (lambda step, policy: changed(step, SLOT_BY_OP, torch.ones_like), SLOT),
        (lambda step, policy: changed(step, SLOT_BY_OP, lambda mask: mask.flip(1)), SLOT),
    ],
    ids=["value scale", "no blueprint", "slots swapped", "none is noop", "any slot", "other op"],
)
def test_a_step_that_forgets_what_v2_adds_is_stopped(
    policy: FactoredRecurrentActorCritic,
    make: Callable[[LoadedStep, FactoredRecurrentActorCritic], LoadedStep],
    named: str,
) -> None:
    reference = Reference(policy, None, batch_sizes=BATCH_SIZES)
    step = PolicyStep(policy, None).eval()
    check_parity(step, reference)
    with pytest.raises(ParityError, match=named):
        check_parity(make(step, policy), reference)


@pytest.mark.parametrize("floors", [False, True])
def test_a_step_with_other_floors_is_stopped(floors: bool) -> None:
    one, other = (random_policy(spec_of(floors=each)) for each in (floors, not floors))
    with pytest.raises(ParityError):
        check_parity(PolicyStep(other, None).eval(), Reference(one, None, batch_sizes=BATCH_SIZES))


def recorded_inputs(recorded: dict[str, Tensor], spec: PolicySpec, t: int) -> tuple[Tensor, ...]:
    mask = torch.cat([recorded[f"in.mask.{head}"][:, t] for head in spec.head_names], dim=-1)
    return recorded["in.states"][:, t], mask, torch.zeros(mask.shape)


@needs_golden
@pytest.mark.parametrize("suffix", ["", "f"], ids=["without floors", "with floors"])
@torch.inference_mode()
def test_recorded_steps_are_taken_again_from_a_file(suffix: str, tmp_path: Path) -> None:
    spec = PolicySpec.tamiyo_v2()
    if suffix:
        spec = spec.with_probability_floors(golden_json("v2_a")["probability_floor"])
    policy = FactoredRecurrentActorCritic(spec).eval()
    weights = golden_tensors("weights_v2_a")
    policy.load_state_dict(
        {name: w if w.dtype == torch.int64 else w.float() for name, w in weights.items()}
    )
    format_ = FORMATS["torchscript"]
    format_.write(StepSource(PolicyStep(policy, None).eval(), 64), tmp_path / format_.file)
    step = format_.load((tmp_path / format_.file).read_bytes(), torch.device("cpu"))

    recorded = golden_tensors("io_v2_a")
    h_after = golden_tensors("io_v2_a_hidden_h")["step.h"]
    c_after = golden_tensors("io_v2_a_hidden_c")["step.c"]
    h = c = torch.zeros(64, 1, 512)
    for t in range(12):
        more = recorded["in.blueprint_indices"][:, t], recorded["in.slot_by_op"][:, t]
        inputs: StepInput = (*recorded_inputs(recorded, spec, t), h, c, *more)
        action, log_prob, value, h, c = step(*inputs)
        for at, head in enumerate(spec.head_names):
            assert torch.equal(action[:, at], recorded[f"step{suffix}.actions.{head}"][:, t])
            expected = recorded[f"step{suffix}.log_probs.{head}"][:, t]
            torch.testing.assert_close(log_prob[:, at], expected, rtol=0, atol=LOG_PROB_ATOL)
        expected = recorded["step.values"][:, t]
        torch.testing.assert_close(value, expected, rtol=0, atol=FLOAT_ATOL)
        torch.testing.assert_close(h, h_after[t].transpose(0, 1), rtol=0, atol=FLOAT_ATOL)
        torch.testing.assert_close(c, c_after[t].transpose(0, 1), rtol=0, atol=FLOAT_ATOL)


@needs_golden
@torch.inference_mode()
def test_the_recorded_checkpoint_becomes_an_artifact_that_acts_as_it_did(tmp_path: Path) -> None:
    output = tmp_path / "v2"
    command = ["--checkpoint", str(GOLDEN / "ckpt_v2.pt"), "--output", str(output)]
    assert main([*command, "--formats", "torchscript", "--max-batch-size", "16"]) == 0
    manifest = Manifest.read(output)
    assert manifest.has_normalizer
    content = manifest.formats["torchscript"].read(output)
    step = FORMATS["torchscript"].load(content, torch.device("cpu"))
    recorded = golden_tensors("ckpt_v2_io")
    spec = manifest.spec
    mask = torch.cat([recorded[f"in.mask.{head}"] for head in spec.head_names], dim=-1)
    zeros = torch.zeros(16, 1, 32)
    action, log_prob, value, h, c = step(
        recorded["in.raw_states"],
        mask,
        torch.zeros(mask.shape),
        zeros,
        zeros,
        recorded["in.blueprint_indices"],
        recorded["in.mask.slot_by_op"],
    )
    for at, head in enumerate(spec.head_names):
        assert torch.equal(action[:, at], recorded[f"out.actions.{head}"])
        torch.testing.assert_close(
            log_prob[:, at], recorded[f"out.log_probs.{head}"], rtol=0, atol=LOG_PROB_ATOL
        )
    for got, expected in (
        (value, recorded["out.values"]),
        (h, recorded["out.h"].transpose(0, 1)),
        (c, recorded["out.c"].transpose(0, 1)),
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=FLOAT_ATOL)
