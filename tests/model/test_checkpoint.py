"""What `load_checkpoint` reads, and that it refuses everything else with one clear line."""

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from model.checkpoint import CheckpointError, load_checkpoint
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.random_inputs import random_policy

SPEC = PolicySpec.tamiyo_v1(
    num_slots=2, observation_dim=3, feature_dim=4, hidden_dim=5, num_layers=1
)
StateDict = dict[str, Tensor]


def weights(spec: PolicySpec = SPEC) -> StateDict:
    return dict(random_policy(spec).state_dict())


def as_trainer_writes(state_dict: StateDict, **more: Any) -> dict[str, Any]:
    """The V1 trainer's layout, `metadata` excepted: it leaves that out."""
    return {
        "checkpoint_version": 1,
        "network_state_dict": OrderedDict(state_dict),
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 3e-4, "params": [0, 1]}]},
        "train_steps": 7,
        "config": {"gamma": 0.995, "lstm_hidden_dim": 5, "compile_mode": "off"},
        "architecture": {"state_dim": 3, "slot_ids": ("r0c0", "r0c1"), "num_slots": 2},
        **more,
    }


def statistics(**changes: Any) -> dict[str, Any]:
    return {
        "obs_normalizer_mean": [0.5, -1.0, 2.0],
        "obs_normalizer_var": [1.0, 0.0, 4.0],
        "obs_normalizer_count": 100.0,
        "obs_normalizer_momentum": 0.99,
        "n_episodes": 3,
    } | changes


def saved(directory: Path, content: object, name: str = "policy.pt") -> Path:
    path = directory / name
    torch.save(content, path)
    return path


def refusal(path: Path) -> str:
    """The sentence with which the file is refused, without the path it begins with."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def assert_same_weights(loaded: StateDict, expected: StateDict) -> None:
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_dimensions_are_read_off_the_weights(tmp_path: Path, num_layers: int) -> None:
    spec = PolicySpec.tamiyo_v1(
        num_slots=5, observation_dim=7, feature_dim=6, hidden_dim=9, num_layers=num_layers
    )
    state_dict = weights(spec)
    loaded_spec, loaded, normalizer = load_checkpoint(
        saved(tmp_path, as_trainer_writes(state_dict))
    )
    assert loaded_spec == spec
    assert_same_weights(loaded, state_dict)
    FactoredRecurrentActorCritic(loaded_spec).load_state_dict(loaded, strict=True)
    assert normalizer is None


def test_bare_state_dict_is_read(tmp_path: Path) -> None:
    spec, loaded, normalizer = load_checkpoint(saved(tmp_path, weights()))
    assert spec == SPEC
    assert_same_weights(loaded, weights())
    assert normalizer is None


def test_path_may_be_a_string(tmp_path: Path) -> None:
    spec, _, _ = load_checkpoint(str(saved(tmp_path, weights())))
    assert spec == SPEC


def test_state_dict_of_a_compiled_module_is_read_under_its_own_names(tmp_path: Path) -> None:
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in weights().items()}
    spec, loaded, _ = load_checkpoint(saved(tmp_path, compiled))
    assert spec == SPEC
    assert_same_weights(loaded, weights())


def test_safetensors_is_read(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    save_file(weights(), path)
    spec, loaded, normalizer = load_checkpoint(path)
    assert spec == SPEC
    assert_same_weights(loaded, weights())
    assert normalizer is None


def test_file_of_torch_before_1_6_is_read(tmp_path: Path) -> None:
    path = tmp_path / "policy.pt"
    torch.save(as_trainer_writes(weights()), path, _use_new_zipfile_serialization=False)
    spec, loaded, _ = load_checkpoint(path)
    assert spec == SPEC
    assert_same_weights(loaded, weights())


def test_observation_statistics_are_read(tmp_path: Path) -> None:
    content = as_trainer_writes(weights(), metadata=statistics())
    _, _, normalizer = load_checkpoint(saved(tmp_path, content))
    assert normalizer is not None
    assert normalizer.mean.tolist() == [0.5, -1.0, 2.0]
    assert normalizer.var.tolist() == [1.0, 0.0, 4.0]


def test_metadata_without_statistics_is_no_normaliser(tmp_path: Path) -> None:
    content = as_trainer_writes(weights(), metadata={"n_episodes": 3})
    assert load_checkpoint(saved(tmp_path, content))[2] is None


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere.pt") == "there is no such file"
    assert refusal(tmp_path) == "is a directory, not a file"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 2, 7, 64, 0.1, 0.5, 0.9, 0.99, -22, -1])
def test_truncated_file_is_refused(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"policy{suffix}"
    whole = bytes_of(suffix)
    path.write_bytes(whole[: int(keep * len(whole)) if 0 < keep < 1 else int(keep)])
    message = refusal(path)
    assert "truncated" in message or "damaged" in message


def bytes_of(suffix: str) -> bytes:
    """A good small checkpoint of either kind."""
    if suffix == ".safetensors":
        return save(weights())
    buffer = io.BytesIO()
    torch.save(as_trainer_writes(weights(), metadata=statistics()), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04", b"{}", b"\x80\x02}q\x00.", b"\x89PNG\r\n", b" "]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"policy{suffix}"
    path.write_bytes(content * 50)
    assert refusal(path)


class CreatesAFile:
    """Unpickles by creating a file: what an attacker's checkpoint would do, with worse."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return create, (self.path,)


def create(path: Path) -> None:
    path.touch()


@pytest.mark.parametrize("place", ["network_state_dict", "metadata", "config", "everything"])
@pytest.mark.parametrize("wrapped", ["torch.save", "legacy torch.save", "pickle"])
def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, wrapped: str, place: str) -> None:
    ran = tmp_path / "ran"
    payload: object = CreatesAFile(ran)
    if place != "everything":
        payload = as_trainer_writes(weights()) | {place: payload}
    path = tmp_path / "policy.pt"
    if wrapped == "pickle":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=wrapped == "torch.save")

    message = refusal(path)

    assert not ran.exists()
    assert "nothing in it was run" in message
    if wrapped == "torch.save":
        torch.load(path, weights_only=False)  # the file does run code where it is let
        assert ran.exists()


@pytest.mark.parametrize("content", [[1, 2], (), "policy", 3, None, torch.zeros(3)])
def test_file_that_holds_no_mapping_is_refused(tmp_path: Path, content: object) -> None:
    message = refusal(saved(tmp_path, content))
    assert message == f"holds a {type(content).__name__}, not a checkpoint"


@pytest.mark.parametrize("value", [None, [], {}, 3, torch.zeros(2)])
def test_checkpoint_without_weights_is_refused(tmp_path: Path, value: object) -> None:
    content = as_trainer_writes(weights()) | {"network_state_dict": value}
    message = refusal(saved(tmp_path, content))
    assert message.startswith(
        "has no 'feature_net.0.weight' anywhere, so it holds no Tamiyo policy"
    )
    assert "its entries are 'checkpoint_version', 'network_state_dict'," in message


def test_mapping_of_something_else_is_refused(tmp_path: Path) -> None:
    content = as_trainer_writes(weights())
    del content["network_state_dict"]
    message = refusal(saved(tmp_path, content))
    assert message.endswith(
        "its entries are 'checkpoint_version', 'optimizer_state_dict', 'train_steps' and others"
    )
    message = refusal(saved(tmp_path, {0: torch.zeros(1)}))
    assert message.endswith("its entries are 0")
    assert refusal(saved(tmp_path, {})).endswith("its entries are none")


def test_another_networks_weights_are_refused(tmp_path: Path) -> None:
    other = dict(torch.nn.Linear(3, 4).state_dict())
    message = refusal(saved(tmp_path, other))
    assert message.endswith("so it holds no Tamiyo policy; its entries are 'weight', 'bias'")


def test_missing_and_unknown_weights_are_named(tmp_path: Path) -> None:
    state_dict = weights()
    del state_dict["op_head.2.bias"]
    message = refusal(saved(tmp_path, state_dict))
    assert re.search(r"lacks '?op_head.2.bias", message)
    assert "unknown" not in message
    state_dict["oop_head.2.bias"] = torch.zeros(6)
    message = refusal(saved(tmp_path, state_dict))
    assert re.search(r"lacks '?op_head.2.bias'? and has the unknown '?oop_head.2.bias", message)
    message = refusal(saved(tmp_path, weights() | {"q_head.0.bias": torch.zeros(1)}))
    assert re.search(r"it has the unknown '?q_head.0.bias", message)
    few = {name: t for name, t in weights().items() if "blueprint" not in name}
    message = refusal(saved(tmp_path, few))
    assert re.search(r"lacks '?blueprint_head.0.bias'?, '?blueprint_head.0.weight", message)
    assert message.endswith(" and others")


@pytest.mark.parametrize(
    "strange", [torch.zeros(3, 2, device="meta"), torch.zeros(3, 2).to_sparse()]
)
def test_weight_that_is_no_plain_tensor_is_refused(tmp_path: Path, strange: Tensor) -> None:
    message = refusal(saved(tmp_path, weights() | {"tempo_head.2.weight": strange}))
    assert "'tempo_head.2.weight' is no plain tensor" in message


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_weight_that_is_no_fraction_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    state_dict = weights()
    state_dict["tempo_head.2.weight"] = state_dict["tempo_head.2.weight"].to(dtype)
    message = refusal(saved(tmp_path, state_dict))
    assert message == f"'tempo_head.2.weight' is {dtype}, expected floating point"


def test_weight_too_large_for_float32_is_refused(tmp_path: Path) -> None:
    state_dict = weights()
    state_dict["tempo_head.2.bias"] = torch.full((3,), 1e300, dtype=torch.float64)
    assert refusal(saved(tmp_path, state_dict)) == "'tempo_head.2.bias' holds NaN or infinity"


def test_dimension_too_large_for_any_machine_is_refused(tmp_path: Path) -> None:
    """A stride of zero makes it cheap to claim."""
    state_dict = weights() | {"lstm.weight_hh_l0": torch.zeros(()).expand(4, 2**40)}
    assert "impossible shape" in refusal(saved(tmp_path, state_dict))


@pytest.mark.parametrize("name", ["lstm.weight_ih_l1", "lstm.weight_ih_l0_reverse"])
def test_weights_of_half_a_layer_are_refused(tmp_path: Path, name: str) -> None:
    message = refusal(saved(tmp_path, weights() | {name: torch.zeros(20, 5)}))
    assert re.search(r"not a Tamiyo V1 policy: it lacks '?lstm\.", message)


@pytest.mark.parametrize("name", list(weights()))
def test_weight_of_another_shape_is_refused(tmp_path: Path, name: str) -> None:
    state_dict = weights()
    state_dict[name] = torch.zeros(*state_dict[name].shape, 2)
    message = refusal(saved(tmp_path, state_dict))
    assert f"{name!r} has shape {tuple(state_dict[name].shape)}, expected" in message


@pytest.mark.parametrize(
    "name", ["feature_net.0.weight", "lstm.weight_hh_l0", "slot_head.2.weight"]
)
def test_weight_that_gives_an_impossible_dimension_is_refused(tmp_path: Path, name: str) -> None:
    for shape in [(0, 0), (1, 1), (10**6, 3)]:
        state_dict = weights()
        state_dict[name] = torch.zeros(()).expand(shape)
        assert "shape" in refusal(saved(tmp_path, state_dict))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    state_dict = weights()
    state_dict["tempo_head.2.weight"][1, 0] = bad
    assert refusal(saved(tmp_path, state_dict)) == "'tempo_head.2.weight' holds NaN or infinity"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"obs_normalizer_mean": [0.0, 0.0]}, "(2,) and (3,)"),
        ({"obs_normalizer_mean": [0.0] * 4, "obs_normalizer_var": [1.0] * 4}, "for 4 features"),
        ({"obs_normalizer_mean": [0.0, float("nan"), 0.0]}, "feature 1"),
        ({"obs_normalizer_var": [1.0, 1.0, -1.0]}, "feature 2"),
        ({"obs_normalizer_var": [1.0, 1.0, float("inf")]}, "feature 2"),
        ({"obs_normalizer_mean": [0.0, 1e300, 0.0]}, "feature 1"),
        ({"obs_normalizer_mean": 3.0}, "() and (3,)"),
        ({"obs_normalizer_mean": "zero"}, "unusable"),
        ({"obs_normalizer_mean": None}, "unusable"),
        ({"obs_normalizer_mean": [[0.0], [0.0, 1.0]]}, "unusable"),
        ({"obs_normalizer_mean": [0.0, "x", 0.0]}, "unusable"),
        ({"obs_normalizer_mean": [0.0, 10**400, 0.0]}, "unusable"),
        ({"obs_normalizer_mean": torch.zeros(3).to_sparse()}, "unusable"),
        ({"obs_normalizer_mean": torch.zeros(3, device="meta")}, "unusable"),
    ],
)
def test_unusable_observation_statistics_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content = as_trainer_writes(weights(), metadata=statistics(**change))
    assert message in refusal(saved(tmp_path, content))


@pytest.mark.parametrize("missing", ["obs_normalizer_mean", "obs_normalizer_var"])
def test_half_of_the_observation_statistics_is_refused(tmp_path: Path, missing: str) -> None:
    metadata = statistics()
    del metadata[missing]
    content = as_trainer_writes(weights(), metadata=metadata)
    assert missing in refusal(saved(tmp_path, content))


KINDS = {"torch.save": ".pt", "legacy torch.save": ".pt", "safetensors": ".safetensors"}


@pytest.fixture(scope="module")
def good_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("good")
    files = {
        kind: directory / f"{index}{suffix}" for index, (kind, suffix) in enumerate(KINDS.items())
    }
    files["torch.save"].write_bytes(bytes_of(".pt"))
    files["safetensors"].write_bytes(bytes_of(".safetensors"))
    content = as_trainer_writes(weights(), metadata=statistics())
    torch.save(content, files["legacy torch.save"], _use_new_zipfile_serialization=False)
    return files


def damage(content: bytes, changes: list[tuple[bool, int, int]]) -> bytes:
    """`content` with bytes replaced: anywhere, or where it describes its tensors."""
    damaged = bytearray(content)
    described = max(content.find(b"data.pkl"), 0)
    for anywhere, offset, byte in changes:
        damaged[offset % len(content) if anywhere else described + offset % 4000] = byte
    return bytes(damaged)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(
    changes=st.lists(
        st.tuples(st.booleans(), st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4
    )
)
def test_damaged_file_loads_or_is_refused_and_nothing_else(
    good_files: dict[str, Path], kind: str, changes: list[tuple[bool, int, int]]
) -> None:
    path = good_files[kind].with_stem("damaged")
    path.write_bytes(damage(good_files[kind].read_bytes(), changes))
    sentence = None
    try:
        spec, state_dict, _ = load_checkpoint(path)
    except CheckpointError as error:
        sentence = str(error)
    if sentence is None:
        FactoredRecurrentActorCritic(spec).load_state_dict(state_dict, strict=True)
    else:
        assert sentence.startswith(f"{path}: ")
        assert "\n" not in sentence
