"""Under autocast, acting and evaluating are one policy: their products are, and all between them.

PPO divides the one's probability by the other's: what differs besides the weights is a bias.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from model.actor_critic import Act
from model.policy import Evaluation, FactoredRecurrentActorCritic
from model.recurrence import State
from model.spec import PROBABILITY_FLOORS_V2, PolicySpec
from model.step_spec import SLOT_BY_OP
from tests.random_inputs import (
    gumbel_noise,
    random_blueprints,
    random_masks,
    random_observations,
    random_policy,
    random_slots_by_op,
    random_state,
    tensors,
)

ROWS, STEPS = 32, 50
RATIO_ATOL = 5e-4
"""On average: a sum that rounds to the other of two neighbours, of 10,000 sums, may move a step's
ratio by 0.02. Cells in bfloat16 move every one, by 0.01 on average."""
SMALLEST_COSINE = 0.9
"""Of one parameter's gradient; most have 0.999. Those before a LayerNorm are differences of large
sums, and a style's log-prob has no gradient on one side of its floor."""

SIZES = {"num_slots": 2, "observation_dim": 12, "feature_dim": 16, "hidden_dim": 24}
SPECS = {
    "V1": PolicySpec.tamiyo_v1(**SIZES, num_layers=2),
    "V2": PolicySpec.tamiyo_v2(**SIZES, num_layers=2),
    "V2 with floors, not projected": PolicySpec.tamiyo_v2(
        **SIZES | {"feature_dim": 24}
    ).with_probability_floors(PROBABILITY_FLOORS_V2),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


class Episode(NamedTuple):
    """What was seen and done, `[rows, steps, ...]`, from which state to which, and how likely."""

    observations: Tensor
    masks: dict[str, Tensor]
    blueprint_index: Tensor | None
    actions: dict[str, Tensor]
    log_prob: Tensor
    value: Tensor
    start: State
    end: State


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype)


def act(
    policy: FactoredRecurrentActorCritic,
    dtype: torch.dtype,
    num_steps: int = STEPS,
    step: Callable[..., Act] | None = None,
) -> Episode:
    """An episode for each row, from a state that other episodes have left."""
    spec, rng = policy.spec, np.random.default_rng(0)
    observations = torch.from_numpy(random_observations(spec, rng, ROWS, num_steps))
    noise = torch.from_numpy(gumbel_noise(spec, rng, ROWS, num_steps))
    masks = tensors(random_masks(spec, rng, ROWS, num_steps))
    blueprint_index = None
    if spec.has_slot_by_op:
        by_op = random_slots_by_op(spec, rng, masks["op"].numpy())
        masks[SLOT_BY_OP] = torch.from_numpy(by_op)
        blueprint_index = torch.from_numpy(random_blueprints(spec, rng, ROWS, num_steps))
    h, c = (torch.from_numpy(part) for part in random_state(spec, rng, ROWS))
    state: State = (h, c)
    acts: list[Act] = []
    for t in range(num_steps):
        with autocast(dtype):
            acts.append(
                (step or policy.get_action)(
                    observations[:, t],
                    state,
                    {name: mask[:, t] for name, mask in masks.items()},
                    noise[:, t],
                    blueprint_index=None if blueprint_index is None else blueprint_index[:, t],
                )
            )
        state = acts[-1].state
    by_head = {name: [act.action[name] for act in acts] for name in spec.head_names}
    actions = {name: torch.stack(taken, dim=1) for name, taken in by_head.items()}
    log_prob = torch.stack([total(act.log_prob) for act in acts], dim=1)
    value = torch.stack([act.value for act in acts], dim=1)
    return Episode(
        observations, masks, blueprint_index, actions, log_prob, value, start=(h, c), end=state
    )


def total(log_prob: dict[str, Tensor]) -> Tensor:
    """Of a step's whole action, float64 so that adding adds no rounding of its own."""
    return torch.stack(list(log_prob.values())).double().sum(0)


def evaluate(policy: FactoredRecurrentActorCritic, episode: Episode) -> Evaluation:
    return policy.evaluate_actions(
        episode.observations,
        episode.actions,
        episode.masks,
        episode.start,
        blueprint_index=episode.blueprint_index,
    )


def assert_same_policy(evaluation: Evaluation, episode: Episode) -> None:
    ratio = (total(evaluation.log_prob) - episode.log_prob).detach().exp()
    assert (ratio - 1).abs().mean() < RATIO_ATOL
    assert (evaluation.value - episode.value).abs().mean() < RATIO_ATOL
    for evaluated, acted in zip(evaluation.state, episode.end, strict=True):
        assert evaluated.dtype == acted.dtype == torch.float32
        assert (evaluated - acted).abs().mean() < RATIO_ATOL


@every_spec
@every_dtype
@torch.no_grad()
def test_steps_are_scored_as_they_were_taken(spec: PolicySpec, dtype: torch.dtype) -> None:
    policy = random_policy(spec)
    episode = act(policy, dtype)
    with autocast(dtype):
        evaluation = evaluate(policy, episode)
    assert_same_policy(evaluation, episode)


@every_spec
@torch.no_grad()
def test_observations_may_lie_time_first_in_memory(spec: PolicySpec) -> None:
    policy = random_policy(spec)
    episode = act(policy, torch.bfloat16)
    time_first = episode.observations.transpose(0, 1).contiguous().transpose(0, 1)
    with autocast(torch.bfloat16):
        evaluation = evaluate(policy, episode._replace(observations=time_first))
    assert_same_policy(evaluation, episode)


@every_spec
@torch.no_grad()
def test_products_are_autocast_s_and_nothing_else_is(spec: PolicySpec) -> None:
    policy = random_policy(spec)
    episode = act(policy, torch.bfloat16, num_steps=2)
    seen: dict[str, set[torch.dtype]] = {"linear": set(), "results": set()}

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **kwargs or {})
            if func is torch.nn.functional.linear:
                seen["linear"].add(result.dtype)
            return result

    hooks = [
        module.register_forward_hook(lambda _, __, result: seen["results"].add(result.dtype))
        for module in policy.modules()
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm)
    ]
    assert hooks
    with autocast(torch.bfloat16), Recorder():
        evaluate(policy, episode)
    assert seen == {"linear": {torch.bfloat16}, "results": {torch.float32}}


def loss_of(evaluation: Evaluation, weight: Tensor) -> Tensor:
    """Every step's log-prob, entropy and value, each with a weight of its own."""
    terms = [*evaluation.log_prob.values(), *evaluation.entropy.values(), evaluation.value]
    if evaluation.q_value is not None and evaluation.contribution is not None:
        terms += [evaluation.q_value, *evaluation.contribution.unbind(-1)]
    return (torch.stack(terms) * weight[: len(terms)]).sum()


@every_spec
@every_dtype
def test_gradients_point_where_float32_s_do(spec: PolicySpec, dtype: torch.dtype) -> None:
    policy = random_policy(spec)
    episode = act(policy, dtype)
    named = dict(policy.named_parameters())
    weight = torch.randn(40, ROWS, STEPS, generator=torch.Generator().manual_seed(0))
    exact = torch.autograd.grad(loss_of(evaluate(policy, episode), weight), list(named.values()))
    with autocast(dtype):
        evaluation = evaluate(policy, episode)
    found = torch.autograd.grad(loss_of(evaluation, weight), list(named.values()))
    for name, ours, theirs in zip(named, found, exact, strict=True):
        assert ours.dtype == torch.float32
        assert ours.isfinite().all(), name
        cosine = torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
        assert cosine > SMALLEST_COSINE, name
        assert 0.8 < ours.norm() / theirs.norm() < 1.2, name


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled_steps_are_scored_by_eager_evaluation_as_they_were_taken() -> None:
    policy = random_policy(SPECS["V2"])
    episode = act(policy, torch.bfloat16, step=torch.compile(policy.get_action, fullgraph=True))
    with autocast(torch.bfloat16):
        evaluation = evaluate(policy, episode)
    assert_same_policy(evaluation, episode)


@pytest.mark.usefixtures("fresh_compiler")
@every_spec
def test_evaluation_is_one_graph_with_the_same_values_and_gradients(spec: PolicySpec) -> None:
    policy = random_policy(spec)
    episode = act(policy, torch.bfloat16, num_steps=2)
    compiled = torch.compile(evaluate, fullgraph=True, backend="aot_eager")
    found = []
    for evaluation_of in (compiled, evaluate):
        with autocast(torch.bfloat16):
            evaluation = evaluation_of(policy, episode)
        assert_same_policy(evaluation, episode)
        loss = total(evaluation.log_prob).mean() + evaluation.value.mean()
        named = dict(policy.named_parameters())
        gradients = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
        found.append(dict(zip(named, gradients, strict=True)))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0.02)
