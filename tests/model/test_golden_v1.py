"""Our V1 against what the original computed, and the naive policy against the same."""

import numpy as np
import pytest
import torch
from torch import Tensor

from model.checkpoint import load_checkpoint
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.recurrence import State
from model.spec import PolicySpec
from tests.golden import GOLDEN, golden_json, golden_tensors, needs_golden
from tests.naive import FLOAT_ATOL, LOG_PROB_ATOL, NaivePolicy
from tests.random_inputs import stacked, weights_of

pytestmark = needs_golden

FORCED_STYLE = 2
Golden = dict[str, Tensor]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return golden_tensors("io_v1_a") | golden_tensors("io_v1_a_hidden")


@pytest.fixture(scope="module")
def original() -> FactoredRecurrentActorCritic:
    """The policy that set `v1_a` was recorded from."""
    sizes = golden_json("v1_a")["network_kwargs"]
    spec = PolicySpec.tamiyo_v1(
        num_slots=sizes["num_slots"],
        observation_dim=sizes["state_dim"],
        feature_dim=sizes["feature_dim"],
        hidden_dim=sizes["lstm_hidden_dim"],
        num_layers=sizes["lstm_layers"],
    )
    policy = FactoredRecurrentActorCritic(spec)
    policy.load_state_dict(golden_tensors("weights_v1_a"), strict=True)
    return policy


def under(golden: Golden, prefix: str) -> dict[str, Tensor]:
    """The tensors named `prefix.<head>`, by head."""
    return {
        name.removeprefix(f"{prefix}."): tensor
        for name, tensor in golden.items()
        if name.startswith(f"{prefix}.")
    }


def quirk_rows(op: Tensor, style_mask: Tensor) -> Tensor:
    """Where the original masks every style: its rule forces one that the caller's mask forbids.

    It takes style 0 there, with log-prob -1.39 and entropy 0. We take the forced style, with
    log-prob 0 and entropy 0, as in any other row with a forced style.
    """
    return (op != 1) & (op != 2) & ~style_mask[..., FORCED_STYLE]


def with_our_style(
    by_head: dict[str, Tensor], quirk: Tensor, ours: int | float
) -> dict[str, Tensor]:
    return by_head | {"style": by_head["style"].masked_fill(quirk, ours)}


def assert_heads_close(actual: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert actual.keys() == expected.keys()
    for head, tensor in expected.items():
        np.testing.assert_allclose(actual[head], tensor, rtol=0.0, atol=atol, err_msg=head)


def assert_state_close(actual: State, h: Tensor, c: Tensor) -> None:
    """`h` and `c` are recorded layer-first."""
    torch.testing.assert_close(actual[0], h.transpose(0, 1), atol=FLOAT_ATOL, rtol=0.0)
    torch.testing.assert_close(actual[1], c.transpose(0, 1), atol=FLOAT_ATOL, rtol=0.0)


def test_chained_steps_take_the_recorded_actions(
    original: FactoredRecurrentActorCritic, golden: Golden
) -> None:
    masks = under(golden, "in.mask")
    quirk = quirk_rows(golden["step.actions.op"], masks["style"])
    actions = with_our_style(under(golden, "step.actions"), quirk, FORCED_STYLE)
    log_probs = with_our_style(under(golden, "step.log_probs"), quirk, 0.0)
    assert torch.equal(quirk, golden["step.style_quirk"])
    assert quirk.sum() == golden_json("v1_a")["quirk_rows"]["step"]

    state = None
    for t in range(golden_json("v1_a")["steps"]):
        act = original.get_action(
            golden["in.states"][:, t], state, {head: mask[:, t] for head, mask in masks.items()}
        )
        assert_heads_close(act.action, {head: a[:, t] for head, a in actions.items()}, 0)
        assert_heads_close(
            act.log_prob, {head: p[:, t] for head, p in log_probs.items()}, LOG_PROB_ATOL
        )
        torch.testing.assert_close(
            act.value, golden["step.values"][:, t], atol=FLOAT_ATOL, rtol=0.0
        )
        assert_state_close(act.state, golden["step.h"][t], golden["step.c"][t])
        state = act.state


@pytest.mark.parametrize(
    ("recorded", "actions"), [("eval_det", "step.actions"), ("eval_rand", "in.rand_actions")]
)
def test_evaluation_scores_the_recorded_actions(
    original: FactoredRecurrentActorCritic, golden: Golden, recorded: str, actions: str
) -> None:
    masks = under(golden, "in.mask")
    stored = under(golden, actions)
    quirk = quirk_rows(stored["op"], masks["style"])
    log_probs = with_our_style(under(golden, f"{recorded}.log_probs"), quirk, 0.0)

    with torch.no_grad():
        evaluation = original.evaluate_actions(golden["in.states"], stored, masks)

    assert quirk.any()
    assert_heads_close(evaluation.log_prob, log_probs, LOG_PROB_ATOL)
    assert_heads_close(evaluation.entropy, under(golden, f"{recorded}.entropy"), FLOAT_ATOL)
    torch.testing.assert_close(
        evaluation.value, golden[f"{recorded}.values"], atol=FLOAT_ATOL, rtol=0.0
    )
    assert_state_close(evaluation.state, golden[f"{recorded}.h"], golden[f"{recorded}.c"])


def test_forward_gives_the_recorded_logits(
    original: FactoredRecurrentActorCritic, golden: Golden
) -> None:
    with torch.no_grad():
        forward = original(golden["in.states"])
    assert_heads_close(forward.logits, under(golden, "fwd.logits"), FLOAT_ATOL)
    torch.testing.assert_close(forward.value, golden["fwd.value"], atol=FLOAT_ATOL, rtol=0.0)
    assert_state_close(forward.state, golden["fwd.h"], golden["fwd.c"])


def test_naive_policy_agrees_with_the_recording(
    original: FactoredRecurrentActorCritic, golden: Golden
) -> None:
    """The oracle of the other tests is itself held against the original."""
    naive = NaivePolicy(original.spec, weights_of(original))
    rows = slice(0, 12)
    masks = {head: mask[rows].numpy() for head, mask in under(golden, "in.mask").items()}
    observations = golden["in.states"][rows].numpy()
    stored = {head: action[rows] for head, action in under(golden, "in.rand_actions").items()}
    step_quirk = golden["step.style_quirk"][rows]
    quirk = golden["eval_rand.style_quirk"][rows]

    evaluation = naive.evaluate(observations, stacked(original.spec, stored), masks)
    first = naive.step(observations[:, 0], {head: mask[:, 0] for head, mask in masks.items()})

    recorded = {head: p[rows] for head, p in under(golden, "eval_rand.log_probs").items()}
    expected = stacked(original.spec, with_our_style(recorded, quirk, 0.0))
    np.testing.assert_allclose(evaluation.log_prob, expected, atol=LOG_PROB_ATOL, rtol=0.0)
    expected = stacked(original.spec, under(golden, "eval_rand.entropy"))[rows]
    np.testing.assert_allclose(evaluation.entropy, expected, atol=FLOAT_ATOL, rtol=0.0)
    np.testing.assert_allclose(
        evaluation.value, golden["eval_rand.values"][rows], atol=FLOAT_ATOL, rtol=0.0
    )
    np.testing.assert_allclose(
        evaluation.c.swapaxes(0, 1), golden["eval_rand.c"][:, rows], atol=FLOAT_ATOL, rtol=0.0
    )
    actions = with_our_style(under(golden, "step.actions"), golden["step.style_quirk"], 2)
    assert step_quirk.any()
    np.testing.assert_array_equal(first.action, stacked(original.spec, actions)[rows, 0])


@pytest.mark.parametrize("name", ["ckpt_v1", "ckpt_v1_meta", "raw_compiled_state_dict_v1"])
def test_recorded_checkpoint_acts_as_it_did(name: str) -> None:
    recorded = golden_tensors("ckpt_v1_io")
    masks = under(recorded, "in.mask")
    quirk = quirk_rows(recorded["out.actions.op"], masks["style"])

    spec, state_dict, normalizer = load_checkpoint(GOLDEN / f"{name}.pt")
    if normalizer is None:
        normalizer = ObservationNormalizer(recorded["in.mean"], recorded["in.var"])
    policy = FactoredRecurrentActorCritic(spec)
    policy.load_state_dict(state_dict, strict=True)
    normalized = normalizer(recorded["in.raw_states"])
    act = policy.get_action(normalized, masks=masks)

    torch.testing.assert_close(normalized, recorded["out.normalized"], atol=FLOAT_ATOL, rtol=0.0)
    actions = with_our_style(under(recorded, "out.actions"), quirk, FORCED_STYLE)
    assert_heads_close(act.action, actions, 0)
    log_probs = with_our_style(under(recorded, "out.log_probs"), quirk, 0.0)
    assert_heads_close(act.log_prob, log_probs, LOG_PROB_ATOL)
    torch.testing.assert_close(act.value, recorded["out.values"], atol=FLOAT_ATOL, rtol=0.0)
    assert_state_close(act.state, recorded["out.h"], recorded["out.c"])


def test_recorded_checkpoints_dimensions_are_read_off_their_weights() -> None:
    sizes = golden_json("ckpt_v1")
    spec, _, _ = load_checkpoint(GOLDEN / "ckpt_v1.pt")
    assert spec == PolicySpec.tamiyo_v1(
        observation_dim=sizes["state_dim"],
        feature_dim=sizes["feature_dim"],
        hidden_dim=sizes["lstm_hidden_dim"],
    )


def test_only_the_checkpoint_with_metadata_has_a_normaliser() -> None:
    recorded = golden_tensors("ckpt_v1_io")
    _, _, without = load_checkpoint(GOLDEN / "ckpt_v1.pt")
    _, _, normalizer = load_checkpoint(GOLDEN / "ckpt_v1_meta.pt")
    assert without is None
    assert normalizer is not None
    assert torch.equal(normalizer.mean, recorded["in.mean"])
    assert torch.equal(normalizer.var, recorded["in.var"])
