"""Compilers and exporters take the step whole, and change nothing in it."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.naive import FLOAT_ATOL
from tests.random_inputs import (
    gumbel_noise,
    packed,
    random_masks,
    random_observations,
    random_policy,
    random_state,
    tensors,
)

ROWS = 10_000
SPEC = PolicySpec.tamiyo_v1(
    num_slots=3, observation_dim=9, feature_dim=12, hidden_dim=10, num_layers=2
)
UNWANTED = (
    "clone",  # ticket B9-PT-01
    *("index_put", "nonzero", "masked_select"),  # boolean indexing: waits for the device
    *("aten.item", "local_scalar_dense", "assert_async"),  # a check of values: waits for it too
    *("rand", "multinomial", "bernoulli", "exponential"),  # a step is a pure function
)

inductor_warns = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
lowering_warns = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")

State = tuple[Tensor, Tensor]
Inputs = tuple[Tensor, State, dict[str, Tensor], Tensor]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def random_inputs(rows: int, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    h, c = random_state(SPEC, rng, rows)
    return (
        torch.from_numpy(random_observations(SPEC, rng, rows)),
        (torch.from_numpy(h), torch.from_numpy(c)),
        tensors(random_masks(SPEC, rng, rows)),
        torch.from_numpy(gumbel_noise(SPEC, rng, rows)),
    )


@inductor_warns
def test_compiled_step_takes_the_eager_steps_actions_at_every_batch_size() -> None:
    policy = random_policy(SPEC)
    compiled = torch.compile(policy.get_action, fullgraph=True, dynamic=True)
    inputs = random_inputs(ROWS)
    expected = policy.get_action(*inputs)
    style_is_free = (expected.action["op"] == 1) | (expected.action["op"] == 2)
    assert 1000 < style_is_free.sum() < ROWS - 1000

    actual = compiled(*inputs)

    for head in SPEC.head_names:
        assert torch.equal(actual.action[head], expected.action[head]), head
        torch.testing.assert_close(
            actual.log_prob[head], expected.log_prob[head], atol=FLOAT_ATOL, rtol=0.0
        )
    torch.testing.assert_close(actual.value, expected.value, atol=FLOAT_ATOL, rtol=0.0)
    torch.testing.assert_close(actual.state, expected.state, atol=FLOAT_ATOL, rtol=0.0)

    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (2, 7, 256):
            inputs = random_inputs(rows, seed=rows)
            again, expected = compiled(*inputs), policy.get_action(*inputs)
            for head in SPEC.head_names:
                assert torch.equal(again.action[head], expected.action[head]), head


class Step(nn.Module):
    """The policy's step and choice as exporters want them: arrays in, arrays out."""

    def __init__(self, policy: FactoredRecurrentActorCritic) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self, observation: Tensor, h: Tensor, c: Tensor, mask: Tensor, noise: Tensor
    ) -> tuple[Tensor, ...]:
        heads = self.policy.heads
        masks = dict(zip(heads.names, torch.split(mask, heads.sizes, -1), strict=True))
        choices, value, state, _ = self.policy.step_scores(observation, (h, c), masks)
        action, log_prob = choices.choose(heads.spread(noise))
        return action, log_prob, value, *state


def step_arguments(rows: int, seed: int = 0) -> tuple[Tensor, ...]:
    observation, (h, c), masks, noise = random_inputs(rows, seed)
    by_head = {head: mask.numpy() for head, mask in masks.items()}
    return observation, h, c, torch.from_numpy(packed(SPEC, by_head)), noise


def export(
    module: nn.Module, arguments: tuple[Tensor, ...], strict: bool
) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=2)
    shapes = tuple({0: batch} for _ in arguments)
    with torch.no_grad():
        return torch.export.export(module, arguments, dynamic_shapes=shapes, strict=strict)


def operators(program: torch.export.ExportedProgram) -> set[str]:
    """Of the graph as exported, and as lowered to core operators."""
    lowered = program.run_decompositions()
    return {
        str(node.target)
        for graph_module in (program.graph_module, lowered.graph_module)
        for node in graph_module.graph.nodes
        if node.op == "call_function"
    }


def unwanted(names: set[str]) -> set[str]:
    return {name for name in names if any(word in name for word in UNWANTED)}


@lowering_warns
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exported_step_is_one_pure_graph_for_every_batch_size(strict: bool) -> None:
    step = Step(random_policy(SPEC))
    program = export(step, step_arguments(3), strict)
    assert unwanted(operators(program)) == set()
    exported: Callable[..., tuple[Tensor, ...]] = program.module()
    for rows in (2, 3, 64, 1000):
        arguments = step_arguments(rows, seed=rows)
        with torch.no_grad():
            actual, expected = exported(*arguments), step(*arguments)
        assert torch.equal(actual[0], expected[0])
        torch.testing.assert_close(actual[1:], expected[1:], atol=FLOAT_ATOL, rtol=0.0)


class MaskRewritingStep(nn.Module):
    """The form that ticket B9-PT-01 is about, to show that the check above can see it."""

    def forward(self, op: Tensor, mask: Tensor) -> Tensor:
        mask = mask.clone()
        mask[(op != 1) & (op != 2)] = False
        return mask


@lowering_warns
def test_unwanted_operators_would_be_seen() -> None:
    arguments = (torch.tensor([0, 1, 2]), torch.ones(3, 4, dtype=torch.bool))
    program = export(MaskRewritingStep(), arguments, strict=False)
    found = " ".join(unwanted(operators(program)))
    assert "clone" in found
    assert "index_put" in found
