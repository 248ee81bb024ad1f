"""`python -m export --checkpoint model.zip`: what is said of it, asked of it, and refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from export.__main__ import main
from export.manifest import Manifest
from model.sb3.spec import SB3Spec
from tests.model.sb3.saved_models import model, policy_class
from tests.random_inputs import random_policy
from tests.specs import TINY_V1

FAST = ("--formats", "onnx", "--max-batch-size", "4")
NVEC = "MultiDiscrete([3 4 2])"


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.zip"
    path.write_bytes(content)
    return path


def exported(tmp_path: Path, content: bytes, *options: str) -> Manifest:
    path, output = written(tmp_path, content), tmp_path / "artifact"
    assert main(["--checkpoint", str(path), "--output", str(output), *FAST, *options]) == 0
    return Manifest.read(output)


def refusal(capsys: pytest.CaptureFixture[str], path: Path, tmp_path: Path, *options: str) -> str:
    """The one line that is said, without the file's name; nothing is written."""
    output = tmp_path / "artifact"
    with pytest.raises(SystemExit) as stopped:
        main(["--checkpoint", str(path), "--output", str(output), *FAST, *options])
    assert stopped.value.code == 2
    assert not output.exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("export: ").removeprefix(f"{path}: ")


def test_a_model_is_exported_with_where_each_fact_was_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = exported(tmp_path, model())
    assert isinstance(manifest.spec, SB3Spec)
    assert manifest.spec.name == "recurrent-ppo"
    assert manifest.spec.head_sizes == (3, 4, 2)
    assert manifest.source.kind == "checkpoint"
    assert manifest.source.name == "model"
    assert manifest.source.provenance == {
        "policy_class": "data (text mirror)",
        "action_space": "data (text mirror)",
        "observation": "data (text mirror)",
        "activation": "default of the trainer",
        "hidden_dim": "policy.pth (shapes)",
        "num_layers": "policy.pth (shapes)",
        "critic": "policy.pth (shapes)",
        "actor_layers": "policy.pth (shapes)",
        "critic_layers": "policy.pth (shapes)",
        "normalization": "data (JSON)",
        "stable_baselines3": "2.9.2",
    }
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "artifact")]) == 0
    said = capsys.readouterr().out
    assert "    action_space: data (text mirror)\n" in said
    assert "  recurrent-ppo: 3 features, 2 x 2\n" in said


def test_a_space_that_the_file_does_not_say_is_the_user_s_to_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = model(action_space=...)
    path = written(tmp_path, content)
    said = refusal(capsys, path, tmp_path)
    assert said == "its data has no action space; --action-space says it"
    manifest = exported(tmp_path, content, "--action-space", NVEC)
    assert manifest.spec.head_sizes == (3, 4, 2)
    assert manifest.source.provenance["action_space"] == "--action-space"


def test_an_observation_space_is_the_user_s_to_say_too(tmp_path: Path) -> None:
    content = model(observation_space=...)
    space = "Box(-1.0, 1.0, (3,), float32)"
    manifest = exported(tmp_path, content, "--observation-space", space)
    assert manifest.source.provenance["observation"] == "--observation-space"


def test_a_class_of_one_s_own_is_taken_where_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = model(policy_class=policy_class("__main__"))
    assert "--any-policy-class" in refusal(capsys, written(tmp_path, content), tmp_path)
    manifest = exported(tmp_path, content, "--any-policy-class")
    assert manifest.source.provenance["policy_class"] == "--any-policy-class"


def test_statistics_come_from_a_file_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = model(_last_original_obs={":type:": "<class 'numpy.ndarray'>", ":serialized:": ""})
    assert refusal(capsys, written(tmp_path, content), tmp_path) == (
        "was trained with VecNormalize, whose statistics are not in it: --normaliser FILE brings "
        "the vec_normalize.pkl saved beside it, --normaliser identity says that there are none"
    )
    statistics = tmp_path / "statistics.json"
    moments = {"mean": [0.0, 1.0, 2.0], "var": [1.0, 2.0, 3.0], "clip_obs": 4.0}
    statistics.write_text(json.dumps(moments))
    manifest = exported(tmp_path, content, "--normaliser", str(statistics))
    assert manifest.has_normalizer
    assert isinstance(manifest.spec, SB3Spec)
    assert manifest.spec.normalization is not None
    assert manifest.spec.normalization.clip == 4.0
    assert manifest.source.provenance["normalization"] == "--normaliser statistics.json"


def test_no_statistics_are_said_to_be_none(tmp_path: Path) -> None:
    content = model(_last_original_obs={":type:": "<class 'numpy.ndarray'>", ":serialized:": ""})
    manifest = exported(tmp_path, content, "--normaliser", "identity")
    assert not manifest.has_normalizer
    assert manifest.source.provenance["normalization"] == "--normaliser identity"


@pytest.mark.parametrize(
    "option", [("--probability-floors", "default"), ("--outputs", "q")], ids=lambda it: it[0]
)
def test_what_is_tamiyo_s_is_refused_for_a_model(
    option: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, model())
    said = refusal(capsys, path, tmp_path, *option)
    assert said == f"{option[0]} is of Tamiyo's, and {path} holds none"


OF_A_MODEL = {
    "--action-space": ("--action-space", NVEC),
    "--observation-space": ("--observation-space", "Box(-1.0, 1.0, (3,), float32)"),
    "--any-policy-class": ("--any-policy-class",),
}


@pytest.mark.parametrize("option", OF_A_MODEL)
def test_what_is_a_model_s_is_refused_for_a_tamiyo(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "policy.safetensors"
    weights = random_policy(TINY_V1).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    said = refusal(capsys, path, tmp_path, *OF_A_MODEL[option])
    assert said == f"{option} is for Stable-Baselines3's model.zip, and {path} is none"


@pytest.mark.parametrize("option", OF_A_MODEL)
def test_what_is_a_model_s_is_refused_for_a_preset(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--preset", "tamiyo-v1", "--output", str(tmp_path / "artifact")]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, *OF_A_MODEL[option]])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"export: {option} is for a model.zip, not for a preset"


def test_an_ordinary_checkpoint_of_torch_is_no_model(tmp_path: Path) -> None:
    path, output = tmp_path / "policy.pt", tmp_path / "artifact"
    torch.save(random_policy(TINY_V1).state_dict(), path)
    assert main(["--checkpoint", str(path), "--output", str(output), *FAST]) == 0
    assert Manifest.read(output).source.provenance == {}
