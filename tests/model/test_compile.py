"""Compilers and exporters take the step whole, and change nothing in it."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.actor_critic import Act
from model.policy import FactoredRecurrentActorCritic
from model.spec import PROBABILITY_FLOORS_V2, PolicySpec
from model.step_spec import SLOT_BY_OP
from tests.naive import FLOAT_ATOL
from tests.random_inputs import (
    gumbel_noise,
    packed,
    random_blueprints,
    random_masks,
    random_observations,
    random_policy,
    random_slots_by_op,
    random_state,
    tensors,
)

ROWS = 10_000
V1 = PolicySpec.tamiyo_v1(
    num_slots=3, observation_dim=9, feature_dim=12, hidden_dim=10, num_layers=2
)
V2 = PolicySpec.tamiyo_v2(
    num_slots=2, observation_dim=9, feature_dim=12, hidden_dim=16, num_layers=2
)
FLOORED = V2.with_probability_floors(PROBABILITY_FLOORS_V2)
every_spec = pytest.mark.parametrize("spec", [V1, V2, FLOORED], ids=["V1", "V2", "V2 with floors"])
UNWANTED = (
    "clone",  # ticket B9-PT-01
    *("index_put", "nonzero", "masked_select"),  # boolean indexing: waits for the device
    *("aten.item", "local_scalar_dense", "assert_async"),  # a check of values: waits for it too
    *("rand", "multinomial", "bernoulli", "exponential"),  # a step is a pure function
)

inductor_warns = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
lowering_warns = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")


class Inputs(NamedTuple):
    """A step's, as `get_action` takes them."""

    observation: Tensor
    state: tuple[Tensor, Tensor]
    masks: dict[str, Tensor]
    noise: Tensor
    blueprint_index: Tensor | None


def act(step: Callable[..., Act], inputs: Inputs) -> Act:
    *positional, blueprint_index = inputs
    return step(*positional, blueprint_index=blueprint_index)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def random_inputs(spec: PolicySpec, rows: int, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    h, c = random_state(spec, rng, rows)
    observation = torch.from_numpy(random_observations(spec, rng, rows))
    masks = tensors(random_masks(spec, rng, rows))
    noise = torch.from_numpy(gumbel_noise(spec, rng, rows))
    blueprint_index = None
    if spec.has_slot_by_op:
        masks[SLOT_BY_OP] = torch.from_numpy(random_slots_by_op(spec, rng, masks["op"].numpy()))
        blueprint_index = torch.from_numpy(random_blueprints(spec, rng, rows))
    state = torch.from_numpy(h), torch.from_numpy(c)
    return Inputs(observation, state, masks, noise, blueprint_index)


@inductor_warns
@every_spec
def test_compiled_step_takes_the_eager_steps_actions_at_every_batch_size(spec: PolicySpec) -> None:
    policy = random_policy(spec)
    compiled = torch.compile(policy.get_action, fullgraph=True, dynamic=True)
    inputs = random_inputs(spec, ROWS)
    expected = act(policy.get_action, inputs)
    style_is_free = (expected.action["op"] == 1) | (expected.action["op"] == 2)
    assert 1000 < style_is_free.sum() < ROWS - 1000

    actual = act(compiled, inputs)

    for head in spec.head_names:
        assert torch.equal(actual.action[head], expected.action[head]), head
        torch.testing.assert_close(
            actual.log_prob[head], expected.log_prob[head], atol=FLOAT_ATOL, rtol=0.0
        )
    torch.testing.assert_close(actual.value, expected.value, atol=FLOAT_ATOL, rtol=0.0)
    torch.testing.assert_close(actual.state, expected.state, atol=FLOAT_ATOL, rtol=0.0)

    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (2, 7, 256):
            inputs = random_inputs(spec, rows, seed=rows)
            again, expected = act(compiled, inputs), act(policy.get_action, inputs)
            for head in spec.head_names:
                assert torch.equal(again.action[head], expected.action[head]), head


class Step(nn.Module):
    """The policy's step and choice as exporters want them: arrays in, arrays out."""

    def __init__(self, policy: FactoredRecurrentActorCritic) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self,
        observation: Tensor,
        h: Tensor,
        c: Tensor,
        mask: Tensor,
        noise: Tensor,
        slot_by_op: Tensor | None = None,
        blueprint_index: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        heads = self.policy.heads
        masks = dict(zip(heads.names, torch.split(mask, heads.sizes, -1), strict=True))
        if slot_by_op is not None:
            masks[SLOT_BY_OP] = slot_by_op
        choices, value, state, _ = self.policy.step_scores(
            observation, (h, c), masks, blueprint_index=blueprint_index
        )
        action, log_prob = choices.choose(heads.spread(noise))
        return action, log_prob, value, *state


def step_arguments(spec: PolicySpec, rows: int, seed: int = 0) -> tuple[Tensor, ...]:
    observation, (h, c), masks, noise, blueprint_index = random_inputs(spec, rows, seed)
    by_head = {head: masks[head].numpy() for head in spec.head_names}
    given = observation, h, c, torch.from_numpy(packed(spec, by_head)), noise
    return given if blueprint_index is None else (*given, masks[SLOT_BY_OP], blueprint_index)


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
@every_spec
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exported_step_is_one_pure_graph_for_every_batch_size(
    spec: PolicySpec, strict: bool
) -> None:
    step = Step(random_policy(spec))
    program = export(step, step_arguments(spec, 3), strict)
    assert unwanted(operators(program)) == set()
    exported: Callable[..., tuple[Tensor, ...]] = program.module()
    for rows in (2, 3, 64, 1000):
        arguments = step_arguments(spec, rows, seed=rows)
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
