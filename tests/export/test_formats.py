"""Every format does what the policy does, from its file, and says what it needs."""

import io
import platform
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from export.exporter import export_policy
from export.format_kinds import PORTABLE_FORMATS
from export.formats import FORMATS, FormatError, StepSource, check_onnx
from export.loaders.machine import machine_capability
from export.loaders.torch_warnings import torch_speaks_of_itself
from export.manifest import Manifest, Source, step_inputs, step_outputs
from export.parity import TOLERANCES
from export.tamiyo_step import TamiyoStep
from model.checkpoint import load_checkpoint
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.golden import GOLDEN, golden_tensors, needs_golden
from tests.loaded_step import allocated, load_from, run_step
from tests.machine import needs_bf16
from tests.naive import NaivePolicy
from tests.random_inputs import (
    gumbel_noise,
    packed,
    random_masks,
    random_observations,
    random_policy,
    stacked,
    weights_of,
)

ATOL = 2e-5
MAX_BATCH_SIZE = 16
RUNS_CODE = {"Loop", "If", "Scan"}


@pytest.fixture(
    scope="module",
    params=[(3, 1, 33, 14), (5, 2, 9, 10)],
    ids=["3 slots, 1 layer", "5 slots, 2 layers"],
)
def odd_spec(request: pytest.FixtureRequest) -> PolicySpec:
    num_slots, num_layers, observation_dim, hidden_dim = request.param
    return PolicySpec.tamiyo_v1(
        num_slots=num_slots,
        observation_dim=observation_dim,
        feature_dim=13,
        hidden_dim=hidden_dim,
        num_layers=num_layers,
    )


@pytest.fixture(scope="module")
def odd_policy(odd_spec: PolicySpec) -> FactoredRecurrentActorCritic:
    return random_policy(odd_spec, seed=3)


@pytest.fixture(scope="module")
def normalizer(odd_spec: PolicySpec) -> ObservationNormalizer:
    generator = torch.Generator().manual_seed(1)
    shape = (odd_spec.observation_dim,)
    return ObservationNormalizer(
        torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    )


@pytest.fixture(scope="module")
def artifact(
    odd_policy: FactoredRecurrentActorCritic,
    normalizer: ObservationNormalizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    output = tmp_path_factory.mktemp("formats") / "odd"
    source = Source(kind="preset", name="odd", seed=3)
    export_policy(
        odd_policy,
        normalizer,
        output,
        name="odd",
        source=source,
        formats=tuple(FORMATS),
        max_batch_size=MAX_BATCH_SIZE,
    )
    return output


@pytest.mark.parametrize("format_name", FORMATS)
def test_file_does_what_the_naive_policy_does_over_carried_steps(
    format_name: str,
    artifact: Path,
    odd_spec: PolicySpec,
    odd_policy: FactoredRecurrentActorCritic,
    normalizer: ObservationNormalizer,
    rng: np.random.Generator,
) -> None:
    naive = NaivePolicy(
        odd_spec, weights_of(odd_policy), normalizer.mean.numpy(), normalizer.var.numpy()
    )
    step = load_from(artifact, format_name)
    for batch_size in (1, 3, MAX_BATCH_SIZE):
        h = c = torch.zeros(batch_size, odd_spec.num_layers, odd_spec.hidden_dim)
        naive_h, naive_c = h.double().numpy(), c.double().numpy()
        for _ in range(10):
            observation = random_observations(odd_spec, rng, batch_size)
            masks = random_masks(odd_spec, rng, batch_size)
            noise = gumbel_noise(odd_spec, rng, batch_size)
            mask = packed(odd_spec, masks)
            with torch.inference_mode():
                action, log_prob, value, h, c = run_step(
                    step,
                    odd_spec,
                    torch.from_numpy(observation),
                    torch.from_numpy(mask),
                    torch.from_numpy(noise),
                    h,
                    c,
                )
            expected = naive.step(observation, masks, noise, naive_h, naive_c)
            naive_h, naive_c = expected.h, expected.c
            np.testing.assert_array_equal(action.numpy(), expected.action)
            np.testing.assert_allclose(log_prob.numpy(), expected.log_prob, atol=ATOL, rtol=0)
            np.testing.assert_allclose(value.numpy(), expected.value, atol=ATOL, rtol=0)
            np.testing.assert_allclose(h.numpy(), expected.h, atol=ATOL, rtol=0)
            np.testing.assert_allclose(c.numpy(), expected.c, atol=ATOL, rtol=0)


def test_onnx_graph_is_one_pure_step_with_the_manifests_names(artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    graph = onnx.load(artifact / FORMATS["onnx"].file).graph
    operators = {node.op_type for node in graph.node}
    assert not operators & RUNS_CODE
    assert not [name for name in operators if "Random" in name or name == "Multinomial"]
    assert [array.name for array in graph.input] == [array.name for array in manifest.inputs]
    assert [array.name for array in graph.output] == [array.name for array in manifest.outputs]


def test_onnx_rows_are_bit_equal_whatever_batch_they_ride_in(
    artifact: Path, odd_spec: PolicySpec, rng: np.random.Generator
) -> None:
    step = load_from(artifact, "onnx")
    state = rng.normal(size=(2, 64, odd_spec.num_layers, odd_spec.hidden_dim)).astype(np.float32)
    rows = [
        torch.from_numpy(array)
        for array in (
            random_observations(odd_spec, rng, 64),
            packed(odd_spec, random_masks(odd_spec, rng, 64)),
            gumbel_noise(odd_spec, rng, 64),
            *state,
        )
    ]
    together = run_step(step, odd_spec, *rows)
    for size in (1, 2, 3, 7, 8, 16, 32, 63):
        part = run_step(step, odd_spec, *(array[:size] for array in rows))
        for got, expected in zip(part, together, strict=True):
            assert torch.equal(got, expected[:size]), size


def test_machine_code_names_the_machine_it_needs_and_nothing_else_does(artifact: Path) -> None:
    formats = Manifest.read(artifact).formats
    assert formats["aoti"].requires == machine_capability("cpu")
    assert {formats[name].requires for name in PORTABLE_FORMATS} == {None}
    assert platform.machine() in (formats["aoti"].requires or "").split()


def test_pt2_takes_as_many_rows_as_the_largest_batch_and_no_more(
    artifact: Path, odd_spec: PolicySpec
) -> None:
    content = Manifest.read(artifact).formats["pt2"].read(artifact)
    (batch,) = exported(content).range_constraints.values()
    assert (batch.lower, batch.upper) == (1, MAX_BATCH_SIZE)
    step = load_from(artifact, "pt2")
    inputs, outputs = step_inputs(odd_spec), step_outputs(odd_spec)
    step.bind(allocated(inputs, MAX_BATCH_SIZE), allocated(outputs, MAX_BATCH_SIZE))()
    too_many = MAX_BATCH_SIZE + 1
    with pytest.raises(AssertionError, match=f"<= {MAX_BATCH_SIZE}"):
        step.bind(allocated(inputs, too_many), allocated(outputs, too_many))()


def exported(content: bytes) -> torch.export.ExportedProgram:
    with torch_speaks_of_itself():
        return torch.export.load(io.BytesIO(content))


def test_a_step_is_written_as_it_evaluates_whatever_it_did_before(
    odd_policy: FactoredRecurrentActorCritic,
) -> None:
    step = TamiyoStep(odd_policy, None)
    assert step.training
    assert not any(module.training for module in StepSource(step, 2).step.modules())


def onnx_model(**changes: int) -> onnx.ModelProto:
    """A model of one sum; `changes` to its output's size and its node's number of inputs."""
    size, num_inputs = changes.get("size", 3), changes.get("num_inputs", 2)
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [3])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [size])
    node = onnx.helper.make_node("Add", ["x"] * num_inputs, ["y"])
    return onnx.helper.make_model(onnx.helper.make_graph([node], "sum", [x], [y]))


@pytest.mark.parametrize("changes", [{"size": 4}, {"num_inputs": 3}])
def test_onnx_that_is_against_its_standard_is_refused(changes: dict[str, int]) -> None:
    check_onnx(onnx_model().SerializeToString())
    with pytest.raises(FormatError, match=r"^onnx was written against its standard: \S"):
        check_onnx(onnx_model(**changes).SerializeToString())


def test_onnx_is_checked_as_it_is_written(
    odd_policy: FactoredRecurrentActorCritic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's exporter writes something else than ONNX here, as a release of it might."""
    step, model = TamiyoStep(odd_policy, None), onnx_model(size=4)
    for name, array in step.packed().items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    monkeypatch.setattr("torch.onnx.export", lambda *_, **__: SimpleNamespace(model_proto=model))
    with pytest.raises(FormatError, match="against its standard"):
        FORMATS["onnx"].write(StepSource(step, 2))


def test_onnx_without_a_place_for_every_parameter_is_refused(
    odd_policy: FactoredRecurrentActorCritic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later release's optimiser may fold one into others."""
    right = SimpleNamespace(model_proto=onnx_model())
    monkeypatch.setattr("torch.onnx.export", lambda *_, **__: right)
    with pytest.raises(FormatError, match=r"^onnx cannot be had: its graph has no parameter '\w"):
        FORMATS["onnx"].write(StepSource(TamiyoStep(odd_policy, None), 2))


@needs_golden
@pytest.mark.parametrize("checkpoint", ["weights_v1_a.safetensors", "ckpt_v1_meta.pt"])
def test_recorded_actions_are_reproduced_from_every_file(checkpoint: str, tmp_path: Path) -> None:
    spec, weights, normalizer = load_checkpoint(GOLDEN / checkpoint)
    policy = FactoredRecurrentActorCritic(spec)
    policy.load_state_dict(weights)
    source = Source(kind="checkpoint", name="golden")
    export_policy(
        policy,
        normalizer,
        tmp_path / "x",
        name="x",
        source=source,
        formats=tuple(FORMATS),
        max_batch_size=64,
    )
    recorded = golden_tensors("io_v1_a" if normalizer is None else "ckpt_v1_io")
    names, style = spec.head_names, spec.head_names.index("style")
    if normalizer is None:
        observations, prefix = recorded["in.states"], "step.actions."
        quirk = recorded["step.style_quirk"].bool()
        masks = torch.cat([recorded[f"in.mask.{name}"] for name in names], dim=-1)
    else:  # one step each, from zeros
        observations, prefix = recorded["in.raw_states"][:, None], "out.actions."
        quirk = torch.zeros(observations.shape[:2], dtype=torch.bool)
        masks = torch.cat([recorded[f"in.mask.{name}"] for name in names], dim=-1)[:, None]
    actions = torch.from_numpy(
        stacked(spec, {name: recorded[f"{prefix}{name}"] for name in names})
    ).reshape(*observations.shape[:2], len(names))
    actions[..., style] = torch.where(quirk, 2, actions[..., style])
    for format_name in FORMATS:
        step = load_from(tmp_path / "x", format_name)
        h = c = torch.zeros(len(observations), spec.num_layers, spec.hidden_dim)
        noise = torch.zeros(len(observations), spec.num_choices)
        with torch.inference_mode():
            for t in range(observations.shape[1]):
                observation, mask = observations[:, t].contiguous(), masks[:, t].contiguous()
                action, _, _, h, c = run_step(step, spec, observation, mask, noise, h, c)
                assert torch.equal(action, actions[:, t]), (format_name, t)


@pytest.fixture(scope="module")
def half(policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every format that has bf16, of a policy with opinions."""
    output = tmp_path_factory.mktemp("half") / "tiny"
    export_policy(
        policy,
        None,
        output,
        name="tiny",
        formats=("torchscript", "pt2", "aoti"),
        precision="bf16",
        max_batch_size=MAX_BATCH_SIZE,
    )
    return output


@needs_bf16
@pytest.mark.parametrize("format_name", ["torchscript", "pt2", "aoti"])
def test_bf16_file_rounds_its_products_and_nothing_else(
    format_name: str, half: Path, policy: FactoredRecurrentActorCritic, rng: np.random.Generator
) -> None:
    """Near the naive policy, not equal to it, with states of full precision."""
    spec = policy.spec
    observation = random_observations(spec, rng, MAX_BATCH_SIZE)
    masks = random_masks(spec, rng, MAX_BATCH_SIZE)
    h = c = torch.zeros(MAX_BATCH_SIZE, spec.num_layers, spec.hidden_dim)
    noise = np.zeros((MAX_BATCH_SIZE, spec.num_choices), dtype=np.float32)
    expected = NaivePolicy(spec, weights_of(policy)).step(
        observation, masks, noise, h.numpy(), c.numpy()
    )
    step = load_from(half, format_name)
    with torch.inference_mode():
        outputs = run_step(
            step,
            spec,
            torch.from_numpy(observation),
            torch.from_numpy(packed(spec, masks)),
            torch.from_numpy(noise),
            h,
            c,
        )
    for got, want in zip(outputs[2:], (expected.value, expected.h, expected.c), strict=True):
        assert 1e-5 < np.abs(got.numpy() - want).max() < 0.05

    assert {output.dtype for output in outputs[1:]} == {torch.float32}
    for state in outputs[3:]:
        assert not torch.equal(state, state.bfloat16().float())


@needs_bf16
def test_bf16_artifact_says_so_and_keeps_the_weights_whole(
    half: Path, policy: FactoredRecurrentActorCritic
) -> None:
    manifest = Manifest.read(half)
    assert manifest.precision == "bf16"
    assert {array.dtype for array in manifest.outputs} == {"int64", "float32"}
    stored = load_file(half / manifest.weights.file)
    for name, tensor in policy.state_dict().items():
        assert torch.equal(stored[name], tensor)
    for parity in manifest.parity.formats.values():
        assert TOLERANCES["bf16"].min_greedy_agreement <= parity.greedy_agreement <= 1.0


def test_onnx_in_bf16_is_refused_in_a_sentence(
    policy: FactoredRecurrentActorCritic, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=r"^onnx has no bf16: .*torchscript, pt2, aoti have it$"):
        export_policy(
            policy, None, tmp_path / "x", name="x", formats=("onnx",), precision="bf16"
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("formats", "says"),
    [(("onnx", "tflite"), "unknown format 'tflite'"), ((), "at least one format is needed")],
)
def test_formats_that_cannot_be_had_are_refused_before_anything_is_written(
    formats: tuple[str, ...], says: str, policy: FactoredRecurrentActorCritic, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=says):
        export_policy(policy, None, tmp_path / "x", name="x", formats=formats)
    assert list(tmp_path.iterdir()) == []
