"""Wrappers and prefixes: the policy is found wherever a trainer put it, and never guessed."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.checkpoint import CheckpointError, load_checkpoint
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.golden import GOLDEN, needs_golden
from tests.random_inputs import random_policy

V1 = PolicySpec.tamiyo_v1(num_slots=2, observation_dim=3, feature_dim=4, hidden_dim=5, num_layers=1)
V2 = PolicySpec.tamiyo_v2(
    num_slots=2, observation_dim=85, feature_dim=12, hidden_dim=8, num_layers=2
)
Content = dict[str, Any]


def weights(spec: PolicySpec = V1, seed: int = 0) -> dict[str, Tensor]:
    return dict(random_policy(spec, seed=seed).state_dict())


def prefixed(prefix: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state_dict.items()}


def saved(directory: Path, content: object) -> Path:
    path = directory / "policy.pt"
    torch.save(content, path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def assert_is_read(path: Path, expected: dict[str, Tensor], spec: PolicySpec = V1) -> None:
    loaded_spec, loaded, _ = load_checkpoint(path)
    assert loaded_spec == spec
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


PREFIXES = [
    "module.",
    "_orig_mod.",
    "_orig_mod.module.",
    "module._orig_mod.",
    "module.module._orig_mod.",
    "policy.",
    "actor_critic.",
    "agent.policy.module.",
    "_forward_module.policy._orig_mod.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("spec", [V1, V2], ids=["V1", "V2"])
def test_a_prefix_that_every_name_has_comes_off(
    tmp_path: Path, prefix: str, spec: PolicySpec
) -> None:
    path = saved(tmp_path, prefixed(prefix, weights(spec)))
    assert_is_read(path, weights(spec), spec)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "policy._orig_mod."])
def test_a_prefix_comes_off_in_safetensors_too(tmp_path: Path, prefix: str) -> None:
    save_file(prefixed(prefix, weights()), tmp_path / "policy.safetensors")
    assert_is_read(tmp_path / "policy.safetensors", weights())


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_what_torch_wraps_a_module_in_is_read(tmp_path: Path) -> None:
    compiled: Any = torch.compile(random_policy(V1))
    for module in (compiled, nn.DataParallel(random_policy(V1)), nn.DataParallel(compiled)):
        assert_is_read(saved(tmp_path, {"model": module.state_dict()}), weights())


WRAPPERS = [
    "state_dict",
    "model_state_dict",
    "network_state_dict",
    "policy_state_dict",
    "policy",
    "model",
    "module",
    "net",
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("prefix", ["", "policy.", "module._orig_mod."])
def test_a_wrapper_beside_other_entries_is_found(tmp_path: Path, wrapper: str, prefix: str) -> None:
    other = nn.Linear(2, 3)
    content = {
        "epoch": 3,
        "global_step": torch.tensor(7),
        "pytorch-lightning_version": "2.5.0",
        "hyper_parameters": {"lr": 1e-3},
        "optimizer_states": [torch.optim.Adam(other.parameters()).state_dict()],
        "critic_state_dict": other.state_dict(),
        wrapper: OrderedDict(prefixed(prefix, weights())),
        "rng": torch.get_rng_state(),
    }
    assert_is_read(saved(tmp_path, content), weights())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: {"agent": {"policy": inner, "lr": 0.1}, "step": 3},
        lambda inner: {"state_dict": {"model": {"policy": inner}}},
        lambda inner: {"policies": {0: inner}},
    ],
)
def test_wrappers_in_wrappers_are_found(
    tmp_path: Path, wrap: Callable[[dict[str, Tensor]], Content]
) -> None:
    assert_is_read(saved(tmp_path, wrap(weights())), weights())


def test_one_state_dict_under_two_names_is_one_policy(tmp_path: Path) -> None:
    shared = weights()
    assert_is_read(saved(tmp_path, {"policy": shared, "best": shared}), weights())


def test_weights_may_be_numpy_s(tmp_path: Path) -> None:
    arrays = {name: tensor.numpy() for name, tensor in weights().items()}
    assert_is_read(saved(tmp_path, {"weights": arrays}), weights())


@pytest.mark.parametrize("names", [("state_dict", "model_state_dict"), ("ema", "policy")])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_two_policies_are_refused(tmp_path: Path, names: tuple[str, str], prefix: str) -> None:
    first, second = sorted(names)
    content = {names[0]: weights(), "step": 3, names[1]: prefixed(prefix, weights(seed=1))}
    said = f"holds 2 policies, under '{first}', '{second}'; save the one to export alone"
    assert refusal(saved(tmp_path, content)) == said


def test_the_trainer_s_entry_beside_another_policy_is_refused(tmp_path: Path) -> None:
    """A policy that is damaged counts: the other is not taken in its stead."""
    diverged = {name: tensor * float("nan") for name, tensor in weights().items()}
    content = {"network_state_dict": diverged, "ema": {"state_dict": weights(seed=1)}}
    said = "holds 2 policies, under 'ema.state_dict', 'network_state_dict'"
    assert refusal(saved(tmp_path, content)).startswith(said)


def test_a_state_dict_that_holds_another_is_refused(tmp_path: Path) -> None:
    content = weights() | {"ema": weights(seed=1)}
    said = "holds 2 policies, under 'its top', 'ema'; save the one to export alone"
    assert refusal(saved(tmp_path, content)) == said


@pytest.mark.parametrize("name", ["feature_net.0.weight", "op_head.2.bias", "lstm.bias_hh_l0"])
@pytest.mark.parametrize("bare", ["", "module."])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "policy."])
def test_a_name_with_the_prefix_and_without_is_refused(
    tmp_path: Path, name: str, bare: str, prefix: str
) -> None:
    """Whichever came later was taken before."""
    for twice in (
        prefixed(bare, weights()) | {bare + prefix + name: weights()[name] + 1},
        prefixed(bare + prefix, weights()) | {bare + name: weights()[name] + 1},
    ):
        assert refusal(saved(tmp_path, twice)).startswith(
            ("holds both '", "its weights are not all of one module: '", "is not a Tamiyo V1 pol")
        )


COMPILED_PARTS = ["lstm", "feature_net", "feature_net.0", "op_head", "op_head.2"]


@pytest.mark.parametrize("part", COMPILED_PARTS)
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "policy."])
def test_a_part_may_be_compiled(tmp_path: Path, part: str, prefix: str) -> None:
    compiled = {
        name.replace(f"{part}.", f"{part}._orig_mod.", 1): value
        for name, value in weights().items()
    }
    assert compiled.keys() != weights().keys()
    assert_is_read(saved(tmp_path, prefixed(prefix, compiled)), weights())


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_what_torch_compiles_a_part_to_is_read(tmp_path: Path) -> None:
    policy: Any = random_policy(V1)
    policy.lstm = torch.compile(policy.lstm)
    assert "lstm._orig_mod.weight_ih_l0" in policy.state_dict()
    assert_is_read(saved(tmp_path, policy.state_dict()), weights())


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        ("feature_net.0.weight", "_orig_mod.feature_net.0.weight"),
        ("feature_net.0.weight", "feature_net._orig_mod.0.weight"),
        ("lstm.weight_ih_l0", "lstm._orig_mod.weight_ih_l0"),
        ("op_head.2.bias", "_orig_mod.op_head.2.bias"),
    ],
)
def test_a_weight_with_and_without_compilation_is_refused(
    tmp_path: Path, name: str, compiled: str
) -> None:
    content = weights() | {compiled: weights()[name] + 1}
    said = f"holds both {name!r} and {compiled!r}; save one policy alone"
    assert refusal(saved(tmp_path, content)) == said


def test_two_modules_in_one_state_dict_are_refused(tmp_path: Path) -> None:
    content = prefixed("actor.", weights()) | prefixed("target.", weights(seed=1))
    said = (
        "holds both 'actor.feature_net.0.weight' and 'target.feature_net.0.weight'; "
        "save one policy alone"
    )
    assert refusal(saved(tmp_path, {"state_dict": content})) == said


def test_a_prefix_that_some_names_have_not_is_named(tmp_path: Path) -> None:
    """torch.optim.swa_utils.AveragedModel counts beside its module."""
    averaged = torch.optim.swa_utils.AveragedModel(random_policy(V1)).state_dict()
    said = (
        "its weights are not all of one module: 'module.feature_net.0.weight' has the prefix "
        "'module.' and 'n_averaged' has not"
    )
    assert refusal(saved(tmp_path, averaged)) == said


def test_what_is_left_of_a_prefix_must_be_a_policy(tmp_path: Path) -> None:
    lacking = weights()
    del lacking["op_head.2.bias"]
    message = refusal(saved(tmp_path, {"model": prefixed("policy.", lacking)}))
    assert message == "is not a Tamiyo V1 policy: it lacks op_head.2.bias"


def test_a_prefix_that_is_no_word_of_its_own_stays(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path, prefixed("old_", weights())))
    assert message.startswith("has no 'feature_net.0.weight' anywhere")


def test_a_weight_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path, {"model": weights() | {"op_head.2.bias": [0.0] * 6}}))
    assert message == "'op_head.2.bias' is a list, and weights are tensors"


# What the trainer writes beside its weights holds whatever these are called.


def of_v2(wrapper: str, **changes: Any) -> Content:
    mean = [0.5] * V2.observation_dim
    content = {
        wrapper: prefixed("_orig_mod.", weights(V2)),
        "value_normalizer_state_dict": {"mean": 3.0, "var": 4.0, "count": 99.0},
        "metadata": {
            "obs_normalizer_mean": mean,
            "obs_normalizer_var": mean,
            "obs_normalizer_contract": {
                "schema_version": 1,
                "slot_ids": ["r0c0", "r0c1"],
                "base_feature_size": 23,
                "slot_feature_size": 31,
                "state_dim": 85,
                "unknown_sentinel": -1.0,
            },
        },
    }
    return content | changes


@pytest.mark.parametrize("wrapper", ["model_state_dict", "policy"])
@pytest.mark.parametrize("is_nested", [True, False])
def test_statistics_and_scale_beside_any_wrapper_are_read(
    tmp_path: Path, wrapper: str, is_nested: bool
) -> None:
    content = of_v2(wrapper)
    if is_nested:
        content = {"step": 3, "agent": {wrapper: content.pop(wrapper)}, **content}
    spec, _, normalizer = load_checkpoint(saved(tmp_path, content))
    assert spec.value_scale == pytest.approx((4.0 + 1e-4) ** 0.5, rel=1e-12)
    assert normalizer is not None
    assert normalizer.mean.tolist() == [0.5] * 85


def test_what_stands_nearest_to_the_weights_is_theirs(tmp_path: Path) -> None:
    outer = {"value_normalizer_state_dict": {"var": 9.0, "count": 99.0}, "checkpoint_version": 7}
    content = {"agent": of_v2("policy", checkpoint_version=2), **outer}
    spec = load_checkpoint(saved(tmp_path, content))[0]
    assert spec.value_scale == pytest.approx((4.0 + 1e-4) ** 0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"checkpoint_version": 3}, "is checkpoint version 3; 1 and 2 can be read"),
        ({"checkpoint_version": 1}, "says it is checkpoint version 1, and holds a V2 policy"),
        ({"value_head_schema_version": 1}, "has value-head schema version 1; 2 can be read"),
        ({"value_normalizer_state_dict": 3}, "has an unusable value normaliser"),
    ],
)
@pytest.mark.parametrize("wrapper", ["model_state_dict", "policy"])
def test_what_contradicts_the_weights_is_refused_beside_any_wrapper(
    tmp_path: Path, wrapper: str, changes: Content, sentence: str
) -> None:
    assert refusal(saved(tmp_path, of_v2(wrapper, **changes))) == sentence


def test_only_the_trainer_s_own_entry_must_name_its_value_head(tmp_path: Path) -> None:
    assert load_checkpoint(saved(tmp_path, of_v2("policy")))[0].num_layers == 2
    message = refusal(saved(tmp_path, of_v2("network_state_dict")))
    assert message == "has value-head schema version None; 2 can be read"


@needs_golden
@pytest.mark.parametrize("name", ["ckpt_v1.pt", "ckpt_v1_meta.pt", "ckpt_v2.pt"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.policy."])
def test_a_recorded_checkpoint_is_the_same_under_another_wrapper(
    tmp_path: Path, name: str, prefix: str
) -> None:
    content = torch.load(GOLDEN / name, weights_only=True)
    spec, expected, normalizer = load_checkpoint(GOLDEN / name)
    content["model_state_dict"] = prefixed(prefix, content.pop("network_state_dict"))
    path = saved(tmp_path, content)
    assert_is_read(path, expected, spec)
    again = load_checkpoint(path)[2]
    assert (again is None) == (normalizer is None)
    if again is not None and normalizer is not None:
        assert torch.equal(again.mean, normalizer.mean)
        assert torch.equal(again.var, normalizer.var)
    FactoredRecurrentActorCritic(spec).load_state_dict(expected, strict=True)
