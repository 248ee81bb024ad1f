"""Our V2 against what the original computed."""

import numpy as np
import pytest
import torch
from torch import Tensor

from model.checkpoint import load_checkpoint
from model.policy import FactoredRecurrentActorCritic
from model.spec import PROBABILITY_FLOORS_V2, PolicySpec
from tests.golden import GOLDEN, golden_json, golden_tensors, needs_golden
from tests.model.test_golden_v1 import assert_heads_close, assert_state_close, under
from tests.naive import FLOAT_ATOL

pytestmark = needs_golden

Golden = dict[str, Tensor]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return golden_tensors("io_v2_a")


@pytest.fixture(scope="module")
def state() -> tuple[Tensor, Tensor]:
    """`[T, L, B, H]` each: the state after every step."""
    h, c = golden_tensors("io_v2_a_hidden_h"), golden_tensors("io_v2_a_hidden_c")
    return h["step.h"], c["step.c"]


def original(spec: PolicySpec) -> FactoredRecurrentActorCritic:
    """The policy that set `v2_a` was recorded from; its weights are stored in bf16, exactly."""
    weights = {
        name: tensor if tensor.dtype == torch.int64 else tensor.float()
        for name, tensor in golden_tensors("weights_v2_a").items()
    }
    policy = FactoredRecurrentActorCritic(spec).eval()
    policy.load_state_dict(weights, strict=True)
    return policy


@pytest.fixture(scope="module")
def spec() -> PolicySpec:
    sizes = golden_json("v2_a")["network_kwargs"]
    return PolicySpec.tamiyo_v2(
        num_slots=sizes["num_slots"],
        observation_dim=sizes["state_dim"],
        feature_dim=sizes["feature_dim"],
        hidden_dim=sizes["lstm_hidden_dim"],
        num_layers=sizes["lstm_layers"],
    )


@pytest.fixture(scope="module", params=["", "f"], ids=["without floors", "with floors"])
def policy_and_suffix(
    request: pytest.FixtureRequest, spec: PolicySpec
) -> tuple[FactoredRecurrentActorCritic, str]:
    suffix: str = request.param
    return original(spec.with_probability_floors(PROBABILITY_FLOORS_V2) if suffix else spec), suffix


def test_the_trainer_s_floors_are_the_recorded_ones() -> None:
    assert golden_json("v2_a")["probability_floor"] == PROBABILITY_FLOORS_V2


def test_chained_steps_take_the_recorded_actions(
    policy_and_suffix: tuple[FactoredRecurrentActorCritic, str],
    golden: Golden,
    state: tuple[Tensor, Tensor],
) -> None:
    policy, suffix = policy_and_suffix
    masks = under(golden, "in.mask") | {"slot_by_op": golden["in.slot_by_op"]}
    carried = None
    for t in range(golden_json("v2_a")["steps"]):
        recorded = {
            what: {head: of[:, t] for head, of in under(golden, f"step{suffix}.{what}").items()}
            for what in ("actions", "log_probs", "head_entropies")
        }
        observation, blueprint_index = (
            golden["in.states"][:, t],
            golden["in.blueprint_indices"][:, t],
        )
        now = {name: mask[:, t] for name, mask in masks.items()}
        with torch.no_grad():
            scores = policy.step_scores(observation, carried, now, blueprint_index=blueprint_index)
        act = policy.get_action(observation, carried, now, blueprint_index=blueprint_index)
        entropy = scores.choices.entropy(act.action["op"].clone())
        by_head = dict(zip(policy.heads.names, entropy.unbind(-1), strict=True))
        assert_heads_close(act.action, recorded["actions"], 0)
        assert_heads_close(act.log_prob, recorded["log_probs"], FLOAT_ATOL)
        assert_heads_close(by_head, recorded["head_entropies"], FLOAT_ATOL)
        np.testing.assert_allclose(act.value, golden["step.values"][:, t], rtol=0, atol=FLOAT_ATOL)
        assert_state_close(act.state, state[0][t], state[1][t])
        carried = act.state


@pytest.mark.parametrize("by_op", [False, True], ids=["slot's own mask", "slot_by_op"])
@pytest.mark.parametrize(
    ("recorded", "actions"), [("det", "step.actions"), ("rand", "in.rand_actions")]
)
def test_evaluation_scores_the_recorded_actions(
    policy_and_suffix: tuple[FactoredRecurrentActorCritic, str],
    golden: Golden,
    recorded: str,
    actions: str,
    by_op: bool,
) -> None:
    """The trainer stores the slot mask of the op that was taken; by op, it is looked up here."""
    policy, suffix = policy_and_suffix
    masks, stored = under(golden, "in.mask"), under(golden, actions)
    if by_op:
        masks["slot_by_op"] = golden["in.slot_by_op"]
    else:
        index = stored["op"][..., None, None].expand(-1, -1, 1, policy.spec.num_slots)
        masks["slot"] = golden["in.slot_by_op"].gather(-2, index).squeeze(-2)
    with torch.no_grad():
        evaluation = policy.evaluate_actions(
            golden["in.states"], stored, masks, blueprint_index=golden["in.blueprint_indices"]
        )
    prefix = f"eval{suffix}_{recorded}"
    assert_heads_close(evaluation.log_prob, under(golden, f"{prefix}.log_probs"), FLOAT_ATOL)
    assert_heads_close(evaluation.entropy, under(golden, f"{prefix}.entropy"), FLOAT_ATOL)
    assert evaluation.q_value is not None
    assert evaluation.contribution is not None
    for name, got in (
        ("values", evaluation.value),
        ("q", evaluation.q_value),
        ("pred_contributions", evaluation.contribution),
    ):
        expected = golden[f"eval_{recorded}.{name}"]
        np.testing.assert_allclose(got, expected, rtol=0, atol=FLOAT_ATOL, err_msg=name)
    assert_state_close(evaluation.state, golden[f"eval_{recorded}.h"], golden[f"eval_{recorded}.c"])


def test_forward_gives_the_recorded_logits_and_the_critic_every_q(
    spec: PolicySpec, golden: Golden
) -> None:
    policy = original(spec)
    with torch.no_grad():
        forward = policy(golden["in.states"], blueprint_index=golden["in.blueprint_indices"])
        batch = forward.value.shape
        q_all = [
            policy.q_value(forward.output, torch.full(batch, op)) for op in range(spec.num_ops)
        ]
        contribution = policy.contribution(forward.output)
    assert_heads_close(forward.logits, under(golden, "fwd.logits"), FLOAT_ATOL)
    for got, name in (
        (forward.value, "state_value"),
        (torch.stack(q_all, dim=-1), "q_all"),
        (contribution, "pred_contributions"),
    ):
        np.testing.assert_allclose(got, golden[f"fwd.{name}"], rtol=0, atol=FLOAT_ATOL)
    assert_state_close(forward.state, golden["fwd.h"], golden["fwd.c"])


def test_the_recorded_checkpoint_acts_as_it_did() -> None:
    spec, weights, normalizer = load_checkpoint(GOLDEN / "ckpt_v2.pt")
    policy = FactoredRecurrentActorCritic(spec).eval()
    policy.load_state_dict(weights, strict=True)
    recorded = golden_tensors("ckpt_v2_io")
    assert normalizer is not None
    observation = normalizer(recorded["in.raw_states"])
    torch.testing.assert_close(observation, recorded["out.normalized"], atol=FLOAT_ATOL, rtol=0.0)
    act = policy.get_action(
        observation,
        masks=under(recorded, "in.mask"),
        blueprint_index=recorded["in.blueprint_indices"],
    )
    assert_heads_close(act.action, under(recorded, "out.actions"), 0)
    assert_heads_close(act.log_prob, under(recorded, "out.log_probs"), FLOAT_ATOL)
    np.testing.assert_allclose(act.value, recorded["out.values"], rtol=0, atol=FLOAT_ATOL)
    assert_state_close(act.state, recorded["out.h"], recorded["out.c"])


def test_the_recorded_checkpoints_dimensions_are_read_off_its_weights() -> None:
    spec, _, normalizer = load_checkpoint(GOLDEN / "ckpt_v2.pt")
    recorded = golden_json("ckpt_v2")
    assert spec == PolicySpec.tamiyo_v2(
        observation_dim=recorded["state_dim"],
        feature_dim=recorded["feature_dim"],
        hidden_dim=recorded["lstm_hidden_dim"],
    )
    assert normalizer is not None
    statistics = golden_tensors("ckpt_v2_io")
    torch.testing.assert_close(normalizer.mean, statistics["in.mean"])
    torch.testing.assert_close(normalizer.var, statistics["in.var"])
