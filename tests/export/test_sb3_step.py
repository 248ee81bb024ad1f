"""The packed step of MLPs and LSTMs: the policy's own numbers, by name, in every wiring."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from export.comparison import ParityError
from export.exporter import export_policy
from export.families import family_of
from export.manifest import Manifest, step_inputs, step_outputs
from export.packed_step import StepOutput
from export.sb3_step import SB3Step
from export.weights import pack, pack_weights, rebuild
from model.sb3.normalizer import VecNormalizer
from model.sb3.policy import SB3Policy
from model.sb3.spec import Normalization, SB3Spec
from tests.gate import gate_of, judged
from tests.sb3.policies import SPECS, WIRINGS, random_masks, random_sb3, spec_of

ATOL = 1e-5
CPU = torch.device("cpu")
CLIP = 3.0


def normalized(policy: SB3Policy) -> tuple[SB3Policy, VecNormalizer]:
    """With statistics whose mean is far from 0, as those of a position or a price are."""
    normalization = Normalization(epsilon=1e-8, clip=CLIP)
    spec = SB3Spec.model_validate(
        policy.spec.model_dump() | {"normalization": normalization.model_dump()}
    )
    same = SB3Policy(spec).eval()
    same.load_state_dict(policy.state_dict())
    dim = spec.observation_dim
    mean = torch.linspace(-1e5, 1e5, dim, dtype=torch.float64) + 0.123456789
    return same, VecNormalizer(mean, torch.linspace(0.5, 2, dim).double(), normalization)


def run(step: SB3Step, *inputs: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        outputs = step(*inputs)
    return {array.name: out for array, out in zip(step_outputs(step.spec), outputs, strict=True)}


@settings(deadline=None, max_examples=40)
@given(spec=SPECS, seed=st.integers(0, 2**16), has_normalizer=st.booleans())
def test_a_step_is_the_policy_s(spec: SB3Spec, seed: int, has_normalizer: bool) -> None:
    policy, normalizer = random_sb3(spec, seed), None
    if has_normalizer:
        policy, normalizer = normalized(policy)
    step = SB3Step(policy, normalizer).eval()
    rng = np.random.default_rng(seed)
    rows = 4
    observation = torch.from_numpy(rng.normal(size=(rows, spec.observation_dim))).float()
    if normalizer is not None:
        observation = observation + normalizer.mean
    mask = torch.from_numpy(random_masks(spec, rng, rows))
    noise = torch.from_numpy(rng.gumbel(size=mask.shape)).float()
    state = tuple(
        torch.from_numpy(rng.uniform(-1, 1, size=(rows, *of.shape))).float() for of in spec.states
    )
    outputs = run(step, observation, mask, noise, *state)
    masks = dict(zip(spec.head_names, torch.split(mask, list(spec.head_sizes), -1), strict=True))
    read = observation if normalizer is None else normalizer(observation)
    act = policy.get_action(read, state, masks, noise)
    torch.testing.assert_close(outputs["value"], act.value, atol=ATOL, rtol=ATOL)
    for of, after in zip(spec.states, act.state, strict=True):
        torch.testing.assert_close(outputs[of.output], after, atol=ATOL, rtol=ATOL)
    for head, name in enumerate(spec.head_names):
        assert torch.equal(outputs["action"][:, head], act.action[name])
        torch.testing.assert_close(
            outputs["log_prob"][:, head], act.log_prob[name], atol=ATOL, rtol=ATOL
        )


@pytest.mark.parametrize("wiring", WIRINGS)
def test_an_example_has_the_manifest_s_names_in_order(wiring: str) -> None:
    spec = spec_of(recurrence=WIRINGS[wiring])
    step = SB3Step(random_sb3(spec), None)
    shapes = [tuple(tensor.shape[1:]) for tensor in step.example(2)]
    assert shapes == [array.shape[1:] for array in step_inputs(spec)]
    states = [name for state in spec.states for name in (state.input,)]
    assert [array.name for array in step_inputs(spec)][3:] == states


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    """In float32 alone it would: half a unit of 1e5 is 4e-3."""
    policy, normalizer = normalized(random_sb3(spec_of()))
    step = SB3Step(policy, normalizer)
    observation = (normalizer.mean + torch.linspace(-1, 1, 6)).expand(2, 6)
    deviation = torch.sqrt(normalizer.var.double() + 1e-8)
    mean = normalizer.mean.double() + normalizer.mean_rest.double()
    exact = ((observation.double() - mean) / deviation).clamp(-CLIP, CLIP)
    for computed in (normalizer(observation), step.normalizer(observation)):  # type: ignore[misc]
        torch.testing.assert_close(computed.double(), exact, atol=1e-6, rtol=1e-6)


def test_parts_that_the_trainer_leaves_alone_are_left_alone() -> None:
    parts = [{"key": "a", "size": 2}, {"key": "b", "size": 4}]
    normalization = Normalization(epsilon=1e-8, clip=CLIP, keys=("b",))
    spec = SB3Spec.model_validate(
        spec_of().model_dump() | {"observation": parts, "normalization": normalization.model_dump()}
    )
    policy = random_sb3(spec)
    mean = torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    normalizer = VecNormalizer(mean, torch.ones(6).double(), normalization, spec.observation)
    step = SB3Step(policy, normalizer)
    observation = torch.tensor([[1e6, -1e6, 1e6, -1e6, 3.0, 4.5]])
    expected = torch.tensor([[1e6, -1e6, CLIP, -CLIP, 0.0, 0.5]])
    for computed in (normalizer(observation), step.normalizer(observation)):  # type: ignore[misc]
        torch.testing.assert_close(computed, expected)


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("has_normalizer", [False, True])
def test_weights_travel_whole(wiring: str, has_normalizer: bool) -> None:
    """Through an artifact's bytes, and the parameters that name the version."""
    policy, normalizer = random_sb3(spec_of(recurrence=WIRINGS[wiring])), None
    if has_normalizer:
        policy, normalizer = normalized(policy)
    weights = pack_weights(policy, normalizer)
    rebuilt = rebuild(weights, policy.spec, CPU)
    for name, tensor in policy.state_dict().items():
        assert torch.equal(rebuilt.policy.state_dict()[name], tensor), name
    if normalizer is not None:
        assert rebuilt.normalizer is not None
        for name, tensor in normalizer.state_dict().items():
            assert torch.equal(rebuilt.normalizer.state_dict()[name], tensor), name
    packed = pack(weights, policy.spec, "fp32")
    for name, tensor in SB3Step(policy, normalizer).state_dict().items():
        np.testing.assert_array_equal(packed[name], tensor.numpy())


def test_statistics_belong_to_a_spec_that_has_them() -> None:
    policy, normalizer = normalized(random_sb3(spec_of()))
    sentence = "^the policy's spec and its statistics do not agree whether it has any$"
    with pytest.raises(ValueError, match=sentence):
        pack_weights(random_sb3(spec_of()), normalizer)
    with pytest.raises(ValueError, match=sentence):
        pack_weights(policy, None)


def test_a_learner_that_goes_on_changes_no_step() -> None:
    policy, normalizer = normalized(random_sb3(spec_of(recurrence=WIRINGS["lstm"])))
    step = SB3Step(policy, normalizer)
    before = run(step, *step.example(3))
    for tensor in (*policy.state_dict().values(), *normalizer.state_dict().values()):
        tensor.add_(1)
    after = run(step, *step.example(3))
    assert all(torch.equal(before[name], after[name]) for name in before)


class Wrong(SB3Step):
    """A step with one mistake in it."""

    def __init__(
        self, policy: SB3Policy, normalizer: VecNormalizer | None, change: Callable[[Any], None]
    ) -> None:
        super().__init__(policy, normalizer)
        change(self)


def swapped_states(step: SB3Step) -> None:
    right: Callable[..., StepOutput] = step.forward

    def wrong(*inputs: Tensor) -> StepOutput:
        observation, mask, noise, h, c, *critic = inputs
        return right(observation, mask, noise, c, h, *critic)

    step.forward = wrong  # type: ignore[assignment, method-assign]


def swapped_lstms(step: SB3Step) -> None:
    first, second = step.recurrences
    step.recurrences = nn.ModuleList([second, first])


def forgotten_critic_state(step: SB3Step) -> None:
    right: Callable[..., StepOutput] = step.forward

    def wrong(*inputs: Tensor) -> StepOutput:
        *others, h, c = inputs
        return right(*others, 0 * h, 0 * c)

    step.forward = wrong  # type: ignore[assignment, method-assign]


def other_activation(step: SB3Step) -> None:
    step.action.layers[1] = nn.Softsign()


def no_last_activation(step: SB3Step) -> None:
    step.value.layers[-2] = nn.Identity()


def dropped_bias(step: SB3Step) -> None:
    step.action.layers[-1].bias[0] = 0  # type: ignore[operator]


def weak_mask(step: SB3Step) -> None:
    step.heads.masked_logit = -10.0


def other_clip(step: SB3Step) -> None:
    assert step.normalizer is not None
    step.normalizer.clip = step.normalizer.clip + 1


def rounded_mean(step: SB3Step) -> None:
    assert step.normalizer is not None
    step.normalizer.mean_rest = 0 * step.normalizer.mean_rest


def other_deviation(step: SB3Step) -> None:
    assert step.normalizer is not None
    step.normalizer.scale = step.normalizer.scale * 1.001


MISTAKES: dict[str, tuple[str, Callable[[SB3Step], None]]] = {
    "states swapped": ("lstm", swapped_states),
    "actor's and critic's LSTM swapped": ("lstm", swapped_lstms),
    "the critic's state forgotten": ("lstm", forgotten_critic_state),
    "another activation": ("none", other_activation),
    "another activation behind an LSTM": ("linear", other_activation),
    "no activation before the value": ("shared", no_last_activation),
    "a bias dropped": ("lstm", dropped_bias),
    "a mask that likely logits beat": ("none", weak_mask),
}
OF_THE_NORMALIZER: dict[str, Callable[[SB3Step], None]] = {
    "another clip": other_clip,
    "a mean in float32": rounded_mean,
    "another deviation": other_deviation,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_gate_sees_a_mistake(mistake: str) -> None:
    wiring, change = MISTAKES[mistake]
    policy = random_sb3(spec_of(recurrence=WIRINGS[wiring]))
    gate = gate_of(policy)
    with torch.inference_mode():
        judged(gate, SB3Step(policy, None).eval())
        with pytest.raises(ParityError):
            judged(gate, Wrong(policy, None, change).eval())


@pytest.mark.parametrize("mistake", OF_THE_NORMALIZER)
def test_the_gate_sees_a_mistake_about_observations(mistake: str) -> None:
    policy, normalizer = normalized(random_sb3(spec_of(recurrence=WIRINGS["lstm"])))
    gate = gate_of(policy, normalizer)
    with torch.inference_mode():
        judged(gate, SB3Step(policy, normalizer).eval())
        with pytest.raises(ParityError):
            judged(gate, Wrong(policy, normalizer, OF_THE_NORMALIZER[mistake]).eval())


@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_bf16_step_passes_the_gate(wiring: str) -> None:
    policy = random_sb3(spec_of(recurrence=WIRINGS[wiring]), gain=1.0)
    with torch.inference_mode():
        judged(gate_of(policy, precision="bf16"), SB3Step(policy, None, "bf16").eval())


def test_a_policy_of_one_s_own_is_exported_from_python(tmp_path: Any) -> None:
    policy, normalizer = normalized(random_sb3(spec_of(recurrence=WIRINGS["shared"])))
    output = tmp_path / "artifact"
    manifest = export_policy(
        policy, normalizer, output, name="own", formats=["onnx"], max_batch_size=8
    )
    assert Manifest.read(output) == manifest
    assert manifest.spec == policy.spec
    assert manifest.has_normalizer
    assert type(family_of(manifest.spec).policy(manifest.spec)) is SB3Policy


def test_a_head_of_very_many_choices_takes_no_memory_of_their_square() -> None:
    """Of its own numbers alone: 40,000 choices squared would be 6 GB."""
    spec = spec_of((40_000,), actor_layers=(), critic_layers=(), observation_dim=1)
    step = SB3Step(random_sb3(spec), None)
    assert sum(tensor.numel() for tensor in (*step.buffers(), *step.parameters())) < 20 * 40_000
