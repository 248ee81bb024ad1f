"""The exported step against the naive policy, against eager, and as a graph."""

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.formats import FORMATS, StepSource
from export.loaders.torch_formats import load_torchscript
from export.manifest import step_inputs, step_outputs
from export.packed_step import StepInput, StepOutput
from export.tamiyo_step import TamiyoStep
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.loaded_step import TensorStep
from tests.naive import FLOAT_ATOL, LOG_PROB_ATOL, NaivePolicy, NaiveStep
from tests.random_inputs import (
    gumbel_noise,
    packed,
    random_masks,
    random_observations,
    random_policy,
    random_state,
    stacked,
    tensors,
    weights_of,
)

EPISODES = ((1, 50), (2, 50), (7, 20), (64, 4))
"""Batch sizes, and how many carried steps of each; the naive policy is slow."""
GAP = 1e-4
"""Two choices closer than this may change places in float32; either is right."""
FORCED_STYLE = 2
DTYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}
FORBIDDEN = (
    "clone",  # ticket B9-PT-01
    "index_put",
    "nonzero",
    "masked_select",
    "rand",
    "normal_",
    "uniform",
    "bernoulli",
    "multinomial",
    "exponential",
    "dropout",
)

Masks = dict[str, NDArray[np.bool_]]


class Rows(NamedTuple):
    """One batch of a step's inputs but for the state, as NumPy arrays."""

    observation: NDArray[np.float32]
    masks: Masks
    noise: NDArray[np.float32]


def random_normalizer(spec: PolicySpec, rng: np.random.Generator) -> ObservationNormalizer:
    mean = rng.normal(0.0, 3.0, spec.observation_dim)
    var = 10.0 ** rng.uniform(-2, 2, spec.observation_dim)
    return ObservationNormalizer(torch.from_numpy(mean), torch.from_numpy(var))


def random_rows(
    spec: PolicySpec,
    rng: np.random.Generator,
    batch_size: int,
    normalizer: ObservationNormalizer | None = None,
) -> Rows:
    observation = random_observations(spec, rng, batch_size)
    if normalizer is not None:
        observation = observation * normalizer.var.sqrt().numpy() + normalizer.mean.numpy()
    return Rows(
        observation, random_masks(spec, rng, batch_size), gumbel_noise(spec, rng, batch_size)
    )


def one_legal(spec: PolicySpec, rng: np.random.Generator, batch_size: int) -> Masks:
    return {
        head.name: np.eye(head.size, dtype=np.bool_)[rng.integers(head.size, size=batch_size)]
        for head in spec.heads
    }


def step_input(spec: PolicySpec, rows: Rows, h: Tensor, c: Tensor) -> StepInput:
    mask = torch.from_numpy(packed(spec, rows.masks))
    return torch.from_numpy(rows.observation), mask, torch.from_numpy(rows.noise), h, c


def random_step_input(spec: PolicySpec, rng: np.random.Generator, batch_size: int) -> StepInput:
    h, c = random_state(spec, rng, batch_size)
    rows = random_rows(spec, rng, batch_size)
    return step_input(spec, rows, torch.from_numpy(h), torch.from_numpy(c))


def written_and_loaded(step: TamiyoStep) -> TensorStep:
    """The step by way of a frozen TorchScript file."""
    content = FORMATS["torchscript"].write(StepSource(step, max_batch_size=512))
    return load_torchscript(content, "cpu").call


def decided(
    policy: FactoredRecurrentActorCritic, observation: Tensor, rows: Rows, state: tuple[Tensor, ...]
) -> NDArray[np.bool_]:
    """`[B, heads]`: where no second choice, of this head or of the op, is within `GAP`."""
    heads = policy.heads
    h, c = state
    scores = policy.step_scores(observation, (h, c), tensors(rows.masks))
    perturbed = scores.choices.log_probs + heads.spread(torch.from_numpy(rows.noise))
    first, second = (
        perturbed.masked_fill(~heads.valid, -torch.inf).topk(2, dim=-1).values.unbind(-1)
    )
    clear = first - second > GAP
    return (clear & clear[:, heads.op_index, None]).numpy()


def assert_agrees(got: StepOutput, expected: NaiveStep, clear: NDArray[np.bool_]) -> None:
    action, log_prob, value, h, c = (tensor.numpy() for tensor in got)
    np.testing.assert_array_equal(action[clear], expected.action[clear])
    np.testing.assert_allclose(
        log_prob[clear], expected.log_prob[clear], rtol=0, atol=LOG_PROB_ATOL
    )
    np.testing.assert_allclose(value, expected.value, rtol=0, atol=FLOAT_ATOL)
    np.testing.assert_allclose(h, expected.h, rtol=0, atol=FLOAT_ATOL)
    np.testing.assert_allclose(c, expected.c, rtol=0, atol=FLOAT_ATOL)


@pytest.fixture
def step(policy: FactoredRecurrentActorCritic) -> TamiyoStep:
    return TamiyoStep(policy, None).eval()


@pytest.fixture(scope="module")
def scripted(
    spec: PolicySpec,
    policy: FactoredRecurrentActorCritic,
) -> TensorStep:
    return written_and_loaded(TamiyoStep(policy, None).eval())


@pytest.mark.parametrize("normalized", [False, True], ids=["bare", "normalised"])
@pytest.mark.parametrize("num_slots", [2, 3, 5])
@pytest.mark.parametrize("num_layers", [1, 2])
@torch.inference_mode()
def test_step_does_what_the_naive_policy_and_get_action_do(
    num_layers: int, num_slots: int, normalized: bool, rng: np.random.Generator
) -> None:
    spec = PolicySpec.tamiyo_v1(
        num_slots=num_slots, observation_dim=11, feature_dim=7, hidden_dim=9, num_layers=num_layers
    )
    policy = random_policy(spec, seed=num_slots)
    normalizer = random_normalizer(spec, rng) if normalized else None
    step = TamiyoStep(policy, normalizer).eval()
    statistics = () if normalizer is None else (normalizer.mean.numpy(), normalizer.var.numpy())
    naive = NaivePolicy(spec, weights_of(policy), *statistics)
    share_decided = []
    for batch_size, length in EPISODES:
        state = policy.initial_state(batch_size)
        naive_h, naive_c = naive.zero_state(batch_size)
        eager_state = state
        for _ in range(length):
            rows = random_rows(spec, rng, batch_size, normalizer)
            seen = torch.from_numpy(rows.observation)
            seen = seen if normalizer is None else normalizer(seen)
            clear = decided(policy, seen, rows, eager_state)
            share_decided.append(clear.mean())

            got = step(*step_input(spec, rows, *state))
            expected = naive.step(rows.observation, rows.masks, rows.noise, naive_h, naive_c)
            act = policy.get_action(
                seen, eager_state, tensors(rows.masks), torch.from_numpy(rows.noise)
            )

            assert_agrees(got, expected, clear)
            eager = NaiveStep(
                stacked(spec, act.action),
                stacked(spec, act.log_prob),
                act.value.numpy(),
                *(part.numpy() for part in act.state),
            )
            assert_agrees(got, eager, clear)
            state, eager_state = (got[3], got[4]), act.state
            naive_h, naive_c = expected.h, expected.c
    assert np.mean(share_decided) > 0.99


@torch.inference_mode()
def test_observations_beyond_every_scale_are_clipped_by_the_normaliser(
    spec: PolicySpec, policy: FactoredRecurrentActorCritic, rng: np.random.Generator
) -> None:
    normalizer = random_normalizer(spec, rng)
    step = TamiyoStep(policy, normalizer).eval()
    naive = NaivePolicy(spec, weights_of(policy), normalizer.mean.numpy(), normalizer.var.numpy())
    extremes = np.array([1e30, -1e30, 3.4e38, -3.4e38, 1e-45, 0.0], np.float32)
    rows = random_rows(spec, rng, 64)._replace(
        observation=rng.choice(extremes, size=(64, spec.observation_dim))
    )
    h, c = policy.initial_state(64)
    got = step(*step_input(spec, rows, h, c))
    assert all(tensor.isfinite().all() for tensor in got)
    clear = decided(policy, normalizer(torch.from_numpy(rows.observation)), rows, (h, c))
    assert_agrees(got, naive.step(rows.observation, rows.masks, rows.noise), clear)


@torch.inference_mode()
def test_lone_legal_choice_is_taken_for_certain_whatever_the_noise(
    spec: PolicySpec, step: TamiyoStep, rng: np.random.Generator
) -> None:
    masks = one_legal(spec, rng, 64)
    rows = random_rows(spec, rng, 64)._replace(masks=masks)
    h, c = random_state(spec, rng, 64)
    action, log_prob, *_ = step(*step_input(spec, rows, torch.from_numpy(h), torch.from_numpy(c)))
    legal = {head: mask.argmax(-1) for head, mask in masks.items()}
    style_matters = np.isin(legal["op"], (1, 2))
    legal["style"] = np.where(style_matters, legal["style"], FORCED_STYLE)
    np.testing.assert_array_equal(action, stacked(spec, legal))
    np.testing.assert_array_equal(log_prob, np.zeros(log_prob.shape))
    assert not style_matters.all()
    assert style_matters.any()
    assert not masks["style"][~style_matters, FORCED_STYLE].all()


@torch.inference_mode()
def test_frozen_torchscript_chooses_as_eager_does_over_ten_thousand_rows(
    rng: np.random.Generator,
) -> None:
    """At the real dimensions, in carried batches of 1000, every choice of every head taken."""
    spec = PolicySpec.tamiyo_v1()
    policy = random_policy(spec)
    scripted = written_and_loaded(TamiyoStep(policy, None).eval())
    state = eager_state = policy.initial_state(1000)
    taken: set[tuple[int, int]] = set()
    styles: set[tuple[int, int]] = set()
    share_decided = []
    for _ in range(10):
        rows = random_rows(spec, rng, 1000)
        observation = torch.from_numpy(rows.observation)
        clear = decided(policy, observation, rows, eager_state)
        share_decided.append(clear.mean())

        act = policy.get_action(
            observation, eager_state, tensors(rows.masks), torch.from_numpy(rows.noise)
        )
        action, _, _, *state_out = scripted(*step_input(spec, rows, *state))

        expected = stacked(spec, act.action)
        np.testing.assert_array_equal(action.numpy()[clear], expected[clear])
        eager_state = act.state
        state = (state_out[0], state_out[1])
        taken |= {(head, int(choice)) for row in action for head, choice in enumerate(row)}
        op, style = action[:, spec.op_index], action[:, spec.head_names.index("style")]
        styles |= set(zip(op.tolist(), style.tolist(), strict=True))
    assert np.mean(share_decided) > 0.999
    assert len(taken) == spec.num_choices
    assert styles == {(op, style) for op in (1, 2) for style in range(4)} | {
        (op, FORCED_STYLE) for op in (0, 3, 4, 5)
    }


def torchscript_operators(scripted: TensorStep) -> set[str]:
    """Every operator of the inlined graph and of the blocks within it."""

    def walk(block: Any) -> Iterator[str]:
        for node in block.nodes():
            yield node.kind()
            for inner in node.blocks():
                yield from walk(inner)

    return set(walk(cast(Any, scripted).inlined_graph))


@torch.inference_mode()
def exported_program(step: TamiyoStep, example: StepInput) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    return torch.export.export(step, example, dynamic_shapes=({0: batch},) * len(example))


def program_operators(program: torch.export.ExportedProgram) -> set[str]:
    return {
        str(node.target)
        for module in program.graph_module.modules()
        for node in cast(torch.fx.GraphModule, module).graph.nodes
        if node.op.startswith("call_")
    }


def impurities(operators: set[str]) -> set[str]:
    return {part for part in FORBIDDEN if any(part in name for name in operators)}


def test_torchscript_graph_copies_nothing_and_draws_nothing(scripted: TensorStep) -> None:
    operators = torchscript_operators(scripted)
    assert {"aten::linear", "aten::argmax"} <= operators
    assert "prim::GetAttr" not in operators  # frozen: the weights are constants
    assert impurities(operators) == set()


def test_exported_graph_copies_nothing_and_draws_nothing(
    spec: PolicySpec, step: TamiyoStep, rng: np.random.Generator
) -> None:
    operators = program_operators(exported_program(step, random_step_input(spec, rng, 2)))
    assert {"aten.linear.default", "aten.argmax.default"} <= operators
    assert impurities(operators) == set()


def test_copies_and_draws_would_be_seen_in_a_graph() -> None:
    class Impure(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.clone()
            y[x > 0] = torch.rand(())
            return y

    operators = program_operators(torch.export.export(Impure(), (torch.ones(2),)))
    assert impurities(operators) >= {"clone", "index_put", "rand"}


@pytest.mark.parametrize("batch_size", [1, 3, 257])
@torch.inference_mode()
def test_batch_traced_at_two_rows_is_any_number_of_rows(
    batch_size: int,
    spec: PolicySpec,
    step: TamiyoStep,
    scripted: TensorStep,
    rng: np.random.Generator,
) -> None:
    inputs = random_step_input(spec, rng, batch_size)
    for got, expected, array in zip(
        scripted(*inputs), step(*inputs), step_outputs(spec), strict=True
    ):
        assert got.dtype == DTYPES[array.dtype]
        assert got.shape == (batch_size, *array.shape[1:])
        torch.testing.assert_close(got, expected, rtol=0, atol=FLOAT_ATOL, msg=array.name)


@torch.inference_mode()
def test_exported_graph_takes_any_number_of_rows(
    spec: PolicySpec, step: TamiyoStep, rng: np.random.Generator
) -> None:
    program = exported_program(step, random_step_input(spec, rng, 2)).module()
    for batch_size in (2, 3, 257):
        inputs = random_step_input(spec, rng, batch_size)
        torch.testing.assert_close(program(*inputs), step(*inputs), rtol=0, atol=FLOAT_ATOL)


@pytest.mark.parametrize("batch_size", [2, 7, 64])
@pytest.mark.parametrize("which", ["eager", "torchscript"])
@torch.inference_mode()
def test_row_does_not_depend_on_the_other_rows(
    which: str,
    batch_size: int,
    spec: PolicySpec,
    step: TamiyoStep,
    scripted: TensorStep,
    rng: np.random.Generator,
) -> None:
    run: TensorStep = step if which == "eager" else scripted
    inputs = random_step_input(spec, rng, batch_size)
    alone = run(*inputs)
    for row in range(batch_size):
        others = random_step_input(spec, rng, batch_size)
        for array, mine in zip(others, inputs, strict=True):
            array[row] = mine[row]
        for got, expected, named in zip(run(*others), alone, step_outputs(spec), strict=True):
            assert torch.equal(got[row], expected[row]), f"{named.name}, row {row}"


@pytest.mark.parametrize("which", ["eager", "torchscript"])
@torch.inference_mode()
def test_step_writes_to_none_of_its_inputs(
    which: str,
    spec: PolicySpec,
    step: TamiyoStep,
    scripted: TensorStep,
    rng: np.random.Generator,
) -> None:
    run: TensorStep = step if which == "eager" else scripted
    inputs = random_step_input(spec, rng, 7)
    before = [array.clone() for array in inputs]
    outputs = run(*inputs)
    for array, kept, named in zip(inputs, before, step_inputs(spec), strict=True):
        assert torch.equal(array, kept), named.name
        assert all(output.data_ptr() != array.data_ptr() for output in outputs), named.name


def test_step_takes_its_arguments_in_the_order_of_the_manifest(spec: PolicySpec) -> None:
    _, *names = inspect.signature(TamiyoStep.forward).parameters
    of_v1 = [array.name for array in step_inputs(spec)]
    assert names[: len(of_v1)] == of_v1
    assert names == [array.name for array in step_inputs(PolicySpec.tamiyo_v2())]
