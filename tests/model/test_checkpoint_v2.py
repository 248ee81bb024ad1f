"""V2 trainers' files, those from between V1 and V2, and statistics from a file of their own."""

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint import CheckpointError, load_checkpoint, load_normalizer
from model.spec import PolicySpec
from tests.random_inputs import random_policy

SPEC = PolicySpec.tamiyo_v2(
    num_slots=2, observation_dim=85, feature_dim=12, hidden_dim=8, num_layers=2
)
V1 = PolicySpec.tamiyo_v1(num_slots=2, observation_dim=7, feature_dim=6, hidden_dim=8, num_layers=1)

Content = dict[str, Any]


def as_trainer_writes(**changes: Any) -> Content:
    """The V2 trainer's layout; a change to None leaves the entry out."""
    mean = [0.5] * SPEC.observation_dim
    content = {
        "checkpoint_version": 2,
        "value_head_schema_version": 2,
        "network_state_dict": OrderedDict(random_policy(SPEC).state_dict()),
        "value_normalizer_state_dict": {
            "mean": torch.tensor(3.0),
            "var": torch.tensor(4.0),
            "count": torch.tensor(32.0),
        },
        "architecture": {"state_dim": 85, "slot_ids": ("r0c0", "r0c1"), "num_slots": 2},
        "metadata": {
            "obs_normalizer_mean": mean,
            "obs_normalizer_var": mean,
            "obs_normalizer_contract": contract(),
        },
        **changes,
    }
    return {name: value for name, value in content.items() if value is not None}


def contract(**changes: Any) -> Content:
    return {
        "schema_version": 1,
        "slot_ids": ["r0c0", "r0c1"],
        "base_feature_size": 23,
        "slot_feature_size": 31,
        "state_dim": 85,
        "unknown_sentinel": -1.0,
        **changes,
    }


def saved(directory: Path, content: object) -> Path:
    path = directory / "policy.pt"
    torch.save(content, path)
    return path


def refusal(read: Callable[[], object], path: Path) -> str:
    """The sentence with which the file is refused, without the path it begins with."""
    with pytest.raises(CheckpointError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def refused(directory: Path, content: object) -> str:
    path = saved(directory, content)
    return refusal(lambda: load_checkpoint(path), path)


def test_dimensions_statistics_and_the_value_s_scale_are_read(tmp_path: Path) -> None:
    spec, weights, normalizer = load_checkpoint(saved(tmp_path, as_trainer_writes()))
    scale = (4.0 + 1e-4) ** 0.5
    assert spec.model_copy(update={"value_scale": 1.0}) == SPEC
    assert spec.value_scale == pytest.approx(scale, rel=1e-12)
    assert weights.keys() == random_policy(SPEC).state_dict().keys()
    assert normalizer is not None
    assert normalizer.mean.tolist() == [0.5] * 85


def test_a_compiled_module_s_state_dict_is_read(tmp_path: Path) -> None:
    state_dict = random_policy(SPEC).state_dict()
    prefixed = {f"_orig_mod.{name}": tensor for name, tensor in state_dict.items()}
    spec, weights, normalizer = load_checkpoint(saved(tmp_path, prefixed))
    assert spec == SPEC
    assert weights.keys() == state_dict.keys()
    assert normalizer is None


@pytest.mark.parametrize(
    "statistics",
    [None, {"mean": torch.tensor(0.0), "var": torch.tensor(9.0), "count": torch.tensor(31.0)}],
)
def test_values_keep_their_scale_until_the_trainer_has_normalised_32_returns(
    tmp_path: Path, statistics: Content | None
) -> None:
    content = as_trainer_writes(value_normalizer_state_dict=statistics)
    assert load_checkpoint(saved(tmp_path, content))[0].value_scale == 1.0


@pytest.mark.parametrize(
    ("statistics", "sentence"),
    [
        ({"mean": 0.0}, "has an unusable value normaliser"),
        ({"var": 10**400, "count": 99.0}, "has an unusable value normaliser"),
        (
            {"var": float("inf"), "count": 99.0},
            "its value normaliser has variance inf of 99 returns",
        ),
        ({"var": -5e-5, "count": 99.0}, "its value normaliser has variance -5e-05 of 99 returns"),
        ({"var": 1e300, "count": 99.0}, "its value normaliser has variance 1e+300 of 99 returns"),
        ({"var": 1.0, "count": float("nan")}, "its value normaliser has variance 1 of nan returns"),
        (torch.ones(3), "has an unusable value normaliser"),
    ],
)
def test_a_value_normaliser_that_scales_nothing_is_refused(
    tmp_path: Path, statistics: object, sentence: str
) -> None:
    content = as_trainer_writes(value_normalizer_state_dict=statistics)
    assert refused(tmp_path, content) == sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schema_version": 2}, "schema_version 2, and the policy's is 1"),
        ({"slot_ids": ["r0c0"]}, "slots 1, and the policy's is 2"),
        ({"slot_ids": ["r0c1", "r0c0"]}, "the slots ['r0c1', 'r0c0'], and the policy has"),
        ({"slot_ids": 7}, "slots 0, and the policy's is 2"),
        ({"base_feature_size": 24}, "base_feature_size 24, and the policy's is 23"),
        ({"slot_feature_size": 39}, "slot_feature_size 39, and the policy's is 31"),
        ({"state_dim": 116}, "state_dim 116, and the policy's is 85"),
        ({"unknown_sentinel": 0.0}, "unknown_sentinel 0.0, and the policy's is -1.0"),
        ({"unknown_sentinel": torch.zeros(2)}, "unknown_sentinel tensor([0., 0.]), and the"),
    ],
)
def test_statistics_of_another_contract_are_refused(
    tmp_path: Path, changes: Content, sentence: str
) -> None:
    content = as_trainer_writes()
    content["metadata"]["obs_normalizer_contract"] = contract(**changes)
    assert sentence in refused(tmp_path, content)


def test_statistics_of_a_network_that_reads_more_than_its_slots_are_refused(
    tmp_path: Path,
) -> None:
    """The contract agrees with the network, and neither with Obs V3."""
    wider = SPEC.model_copy(update={"observation_dim": 86})
    content = as_trainer_writes(network_state_dict=random_policy(wider).state_dict())
    statistics = [0.5] * 86
    content["metadata"] = {
        "obs_normalizer_mean": statistics,
        "obs_normalizer_var": statistics,
        "obs_normalizer_contract": contract(state_dim=86),
    }
    assert refused(tmp_path, content) == "2 slots make 85 features, and the network reads 86"


def test_statistics_without_a_contract_are_refused(tmp_path: Path) -> None:
    content = as_trainer_writes()
    del content["metadata"]["obs_normalizer_contract"]
    assert "without the contract that says what they are of" in refused(tmp_path, content)


def weights_with(spec: PolicySpec, *left_out: str, **added: Tensor) -> dict[str, Tensor]:
    kept = {
        name: tensor
        for name, tensor in random_policy(spec).state_dict().items()
        if not name.startswith(left_out or ("-",))
    }
    return kept | {name.replace("__", "."): tensor for name, tensor in added.items()}


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (weights_with(SPEC, "state_value_head."), "V(s) has no head yet (2026-01-12 to"),
        (
            weights_with(V1, blueprint_embedding__embedding__weight=torch.zeros(14, 4)),
            "it embeds blueprints, with V1's LSTM (2025-12-30",
        ),
        (
            weights_with(V1, alpha_curve_head__2__weight=torch.zeros(5, 4)),
            "it chooses among 5 alpha curves, V1 among 3 (from 2025-12-28 on)",
        ),
    ],
)
def test_what_was_trained_between_v1_and_v2_is_refused_by_what_it_is(
    tmp_path: Path, weights: dict[str, Tensor], sentence: str
) -> None:
    message = refused(tmp_path, weights)
    assert message.startswith("is from between V1 and V2, and neither reads it: ")
    assert sentence in message


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"checkpoint_version": 3}, "is checkpoint version 3; 1 and 2 can be read"),
        ({"checkpoint_version": "2"}, "is checkpoint version '2'; 1 and 2 can be read"),
        ({"checkpoint_version": 1}, "says it is checkpoint version 1, and holds a V2 policy"),
        ({"value_head_schema_version": 1}, "has value-head schema version 1; 2 can be read"),
        ({"value_head_schema_version": None}, "has value-head schema version None; 2 can be read"),
    ],
)
def test_another_version_is_refused(tmp_path: Path, changes: Content, sentence: str) -> None:
    assert refused(tmp_path, as_trainer_writes(**changes)) == sentence


def test_a_v1_policy_in_a_v2_file_is_refused(tmp_path: Path) -> None:
    content = as_trainer_writes(network_state_dict=random_policy(V1).state_dict())
    assert refused(tmp_path, content) == "says it is checkpoint version 2, and holds a V1 policy"


@pytest.mark.parametrize("index", [torch.tensor(12), torch.tensor(13.0)])
def test_another_index_for_no_blueprint_is_refused(tmp_path: Path, index: Tensor) -> None:
    weights = weights_with(SPEC, blueprint_embedding___null_idx=index)
    assert refused(tmp_path, weights) == "'blueprint_embedding._null_idx' is not 13"


@pytest.mark.parametrize("name", ["q_head.0.weight", "lstm.layers.1.bias_hh_l0"])
def test_missing_weights_are_named(tmp_path: Path, name: str) -> None:
    assert f"is not a Tamiyo V2 policy: it lacks {name}" in refused(
        tmp_path, weights_with(SPEC, name)
    )


def test_statistics_may_come_from_a_file_of_their_own(tmp_path: Path) -> None:
    as_json, as_tensors = tmp_path / "statistics.json", tmp_path / "statistics.safetensors"
    as_json.write_text(json.dumps({"mean": [1.0, 2.0], "var": [3.0, 4.0]}))
    save_file({"mean": torch.tensor([1.0, 2.0]), "var": torch.tensor([3.0, 4.0])}, as_tensors)
    for path in (as_json, as_tensors):
        normalizer = load_normalizer(path, 2)
        assert normalizer.mean.tolist() == [1.0, 2.0]
        assert normalizer.var.tolist() == [3.0, 4.0]


def test_statistics_may_come_from_another_checkpoint(tmp_path: Path) -> None:
    assert load_normalizer(saved(tmp_path, as_trainer_writes()), 85).var.tolist() == [0.5] * 85


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"mean": [1.0, 2.0]}', "holds no observation statistics, mean and var"),
        ('{"mean": [1.0], "var": [1.0]}', "for 1 features, the network reads 2"),
        ('{"mean": [1.0, 2.0], "var": [1.0, -2.0]}', "unusable observation statistics"),
        ("[1.0, 2.0]", "holds a list, not mean and var"),
        ('{"mean": [1.0', "cannot be read as JSON"),
        ("[" * 200_000, "cannot be read as JSON"),
    ],
)
def test_unusable_statistics_are_refused(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "statistics.json"
    path.write_text(content)
    assert sentence in refusal(lambda: load_normalizer(path, 2), path)
