"""Models: those recorded, those the trainers save today, and hostile ones, which run nothing."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.checkpoint_file import CheckpointError
from model.sb3.checkpoint import is_sb3_zip, load_sb3
from model.sb3.spec import ObservationPart, Recurrence, SB3Spec
from model.step_spec import HeadSpec
from tests.model.sb3.saved_models import (
    PATH,
    data,
    loaded,
    model,
    pickled,
    refusal,
    state_dict,
    torch_saved,
    with_declared_size,
    zipped,
)
from tests.sb3.recorded import RECORDED, needs_recorded

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 120
MOST_GROWN_BYTES = 384 * 2**20

VECTOR = (ObservationPart(kind="box", size=6),)
ONE_HEAD = (HeadSpec(name="action", size=5),)


def head_per_choice(*sizes: int) -> tuple[HeadSpec, ...]:
    return tuple(HeadSpec(name=f"action_{index}", size=size) for index, size in enumerate(sizes))


def expected(**changes: Any) -> SB3Spec:
    return SB3Spec(
        **{
            "family": "mlps",
            "name": "recurrent-ppo",
            "observation_dim": 6,
            "heads": head_per_choice(3, 4, 2),
            "actor_layers": (10,),
            "critic_layers": (7,),
            "activation": "Tanh",
            "recurrence": Recurrence(hidden_dim=8, num_layers=1, critic="lstm"),
            "observation": VECTOR,
        }
        | changes
    )


def expected_mlps(name: str, **changes: Any) -> SB3Spec:
    return expected(name=name, recurrence=None, **changes)


IS_RECORDED = {
    "rppo_multidiscrete_sepcritic": expected(),
    "rppo_multidiscrete_shared_2layer": expected(
        recurrence=Recurrence(hidden_dim=8, num_layers=2, critic="shared")
    ),
    "rppo_multidiscrete_nocriticlstm": expected(
        recurrence=Recurrence(hidden_dim=8, num_layers=1, critic="linear")
    ),
    "rppo_multidiscrete_relu": expected(activation="ReLU"),
    "rppo_nonet": expected(actor_layers=(), critic_layers=()),
    "rppo_discrete": expected(heads=ONE_HEAD),
    "rppo_dictobs": expected(
        observation_dim=9,
        observation=(
            ObservationPart(key="mode", kind="one_hot", size=3),
            ObservationPart(key="vec", kind="box", size=6),
        ),
    ),
    "maskppo_discrete": expected_mlps("maskable-ppo", heads=ONE_HEAD, actor_layers=(10, 9)),
    "maskppo_multidiscrete": expected_mlps("maskable-ppo", actor_layers=(10, 9)),
    "maskppo_multibinary": expected_mlps(
        "maskable-ppo", heads=head_per_choice(2, 2, 2, 2), actor_layers=(10, 9)
    ),
    "a2c_multidiscrete_elu": expected_mlps(
        "a2c", activation="ELU", actor_layers=(8,), critic_layers=(8,)
    ),
}
CONTINUOUS = "its action space is a Box, and continuous actions are not exported"
IS_REFUSED = {
    "rppo_box": CONTINUOUS,
    "rppo_box_sde_squash": CONTINUOUS,
    "ppo_box": CONTINUOUS,
    "rppo_vecnorm": "was trained with VecNormalize, whose statistics are not in it: --normaliser "
    "FILE brings the vec_normalize.pkl saved beside it, --normaliser identity says that there are "
    "none",
}


def saved_weights(content: bytes) -> dict[str, Tensor]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        held = torch.load(io.BytesIO(archive.read("policy.pth")), weights_only=True)
    return dict(held)


def assert_same(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(weights) == set(expected)
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


@needs_recorded
def test_every_recorded_model_is_expected() -> None:
    recorded = {path.stem for path in RECORDED.glob("*.zip")}
    assert recorded == IS_RECORDED.keys() | IS_REFUSED.keys()


@needs_recorded
@pytest.mark.parametrize("name", IS_RECORDED)
def test_a_recorded_model_is_read(name: str) -> None:
    content = (RECORDED / f"{name}.zip").read_bytes()
    assert is_sb3_zip(content)
    checkpoint = loaded(content)
    assert checkpoint.spec == IS_RECORDED[name]
    assert checkpoint.normalizer is None
    assert checkpoint.provenance["stable_baselines3"] == "2.9.2"
    assert_same(checkpoint.state_dict, saved_weights(content))


@needs_recorded
@pytest.mark.parametrize("name", IS_REFUSED)
def test_a_recorded_model_that_is_not_exported_says_why(name: str) -> None:
    content = (RECORDED / f"{name}.zip").read_bytes()
    assert is_sb3_zip(content)
    assert refusal(content) == IS_REFUSED[name]


@needs_recorded
def test_that_there_are_no_statistics_can_be_said() -> None:
    content = (RECORDED / "rppo_vecnorm.zip").read_bytes()
    checkpoint = loaded(content, normaliser="identity")
    assert checkpoint.spec == expected()
    assert checkpoint.normalizer is None
    assert checkpoint.provenance["normalization"] == "--normaliser identity"


# What the trainers save today.


def environment(observation: Any, action: Any) -> Any:
    gymnasium = pytest.importorskip("gymnasium")

    class Toy(gymnasium.Env):  # type: ignore[misc, name-defined]
        observation_space = observation
        action_space = action

        def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
            return self.observation_space.sample(), {}

        def step(self, _: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            return self.observation_space.sample(), 0.0, False, False, {}

        def action_masks(self) -> Any:
            raise AssertionError("nothing is trained")

    return Toy()


def spaces() -> Any:
    return pytest.importorskip("gymnasium.spaces")


def toy_box() -> Any:
    return spaces().Box(-1, 1, (6,), np.float32)


def trained(
    directory: Path, algorithm: str, policy: str, observation: Any, action: Any, **kwargs: Any
) -> tuple[Any, bytes]:
    """A model that has not learned anything, and what it saves."""
    baselines = pytest.importorskip("stable_baselines3")
    contrib = pytest.importorskip("sb3_contrib")
    make = getattr(contrib if hasattr(contrib, algorithm) else baselines, algorithm)
    options = {"n_steps": 64, "seed": 0, "device": "cpu", "policy_kwargs": kwargs}
    made = make(policy, environment(observation, action), **options)
    made.save(directory / "model.zip")
    return made, (directory / "model.zip").read_bytes()


@pytest.mark.parametrize(
    ("kwargs", "changes"),
    [
        ({}, {}),
        ({"net_arch": []}, {"actor_layers": (), "critic_layers": ()}),
        ({"net_arch": [5]}, {"actor_layers": (5,), "critic_layers": (5,)}),
        ({"net_arch": {"pi": [5, 4]}}, {"actor_layers": (5, 4), "critic_layers": ()}),
        ({"net_arch": {"vf": [5, 4], "pi": []}}, {"actor_layers": (), "critic_layers": (5, 4)}),
        ({"net_arch": [np.int64(5)]}, {"actor_layers": (5,), "critic_layers": (5,)}),
        ({"activation_fn": nn.Identity}, {"activation": "Identity"}),
        ({"activation_fn": nn.Softsign, "ortho_init": False}, {"activation": "Softsign"}),
        ({"share_features_extractor": False}, {}),
        ({"optimizer_class": torch.optim.AdamW}, {}),
    ],
    ids=[
        *("default", "empty", "list", "no critic", "no actor", "NumPy's", "identity", "softsign"),
        *("unshared", "optimizer"),
    ],
)
@pytest.mark.parametrize(
    ("algorithm", "name"), [("PPO", "ppo"), ("A2C", "a2c"), ("MaskablePPO", "maskable-ppo")]
)
def test_mlps_are_read_as_their_trainer_builds_them(
    tmp_path: Path, algorithm: str, name: str, kwargs: dict[str, Any], changes: dict[str, Any]
) -> None:
    action = spaces().MultiDiscrete([3, 4, 2])
    made, content = trained(tmp_path, algorithm, "MlpPolicy", toy_box(), action, **kwargs)
    default = {"actor_layers": (64, 64), "critic_layers": (64, 64)}
    checkpoint = loaded(content)
    assert checkpoint.spec == expected_mlps(name, **default | changes)
    assert_same(checkpoint.state_dict, made.policy.state_dict())


@pytest.mark.parametrize(
    ("kwargs", "critic", "num_layers"),
    [
        ({}, "lstm", 1),
        ({"n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.5}}, "lstm", 2),
        ({"enable_critic_lstm": False}, "linear", 1),
        ({"enable_critic_lstm": False, "n_lstm_layers": 3}, "linear", 3),
        ({"enable_critic_lstm": False, "shared_lstm": True}, "shared", 1),
        ({"share_features_extractor": False}, "lstm", 1),
    ],
    ids=["default", "two layers", "linear", "three layers", "shared", "unshared"],
)
def test_lstms_are_read_as_their_trainer_builds_them(
    tmp_path: Path, kwargs: dict[str, Any], critic: Any, num_layers: int
) -> None:
    sizes: dict[str, Any] = {"lstm_hidden_size": 5, "net_arch": [4], "activation_fn": nn.ELU}
    args = (tmp_path, "RecurrentPPO", "MlpLstmPolicy", toy_box(), spaces().Discrete(5, start=2))
    made, content = trained(*args, **sizes | kwargs)
    checkpoint = loaded(content)
    assert checkpoint.spec == expected(
        heads=ONE_HEAD,
        actor_layers=(4,),
        critic_layers=(4,),
        activation="ELU",
        recurrence=Recurrence(hidden_dim=5, num_layers=num_layers, critic=critic),
    )
    assert_same(checkpoint.state_dict, made.policy.state_dict())


def test_dicts_are_read_in_the_order_of_their_keys(tmp_path: Path) -> None:
    whole = {
        "vec": spaces().Box(-1, 1, (2, 3), np.float32),
        "mode": spaces().Discrete(3),
        "bits": spaces().MultiBinary(4),
    }
    parts = (
        ObservationPart(key="bits", kind="bits", size=4),
        ObservationPart(key="mode", kind="one_hot", size=3),
        ObservationPart(key="turn", kind="one_hot", size=7),
        ObservationPart(key="vec", kind="box", size=6),
    )
    args = (spaces().Dict(whole), spaces().Discrete(5))
    made, content = trained(tmp_path, "RecurrentPPO", "MultiInputLstmPolicy", *args, net_arch=[])
    checkpoint = loaded(content)
    assert checkpoint.spec.observation == (*parts[:2], parts[3])
    assert checkpoint.spec.observation_dim == made.policy.features_dim
    assert_same(checkpoint.state_dict, made.policy.state_dict())

    # RecurrentPPO has no MultiDiscrete observations: torch's LSTM refuses NumPy's sum of them.
    args = (spaces().Dict(whole | {"turn": spaces().MultiDiscrete([2, 5])}), spaces().Discrete(5))
    made, content = trained(tmp_path, "PPO", "MultiInputPolicy", *args, net_arch=[])
    checkpoint = loaded(content)
    assert checkpoint.spec.observation == parts
    assert checkpoint.spec.observation_dim == made.policy.features_dim
    assert_same(checkpoint.state_dict, made.policy.state_dict())


def test_a_dict_that_is_given_in_an_order_is_read_in_that(tmp_path: Path) -> None:
    turned = spaces().Dict(OrderedDict([("b", toy_box()), ("a", spaces().Discrete(3))]))
    args = (tmp_path, "PPO", "MultiInputPolicy", turned, spaces().Discrete(5))
    made, content = trained(*args)
    parts = loaded(content).spec.observation
    assert [part.key for part in parts] == ["b", "a"]
    observation = {"a": np.array([2]), "b": np.linspace(-1, 1, parts[0].size)[None]}
    tensor, _ = made.policy.obs_to_tensor(observation)
    features = made.policy.extract_features(tensor, made.policy.pi_features_extractor)
    expected = [*observation["b"][0], 0.0, 0.0, 1.0]
    torch.testing.assert_close(features[0], torch.tensor(expected).float())


def test_a_multi_binary_s_heads_have_the_trainer_s_log_probs(tmp_path: Path) -> None:
    action = spaces().MultiBinary(3)
    args = (tmp_path, "PPO", "MlpPolicy", toy_box(), action)
    made, content = trained(*args, net_arch=[], ortho_init=False)
    weights = loaded(content).state_dict
    observation = torch.rand(8, 6) * 2 - 1
    chosen = torch.randint(0, 2, (8, 3))
    logits = observation @ weights["action_net.weight"].T + weights["action_net.bias"]
    log_probs = logits.reshape(8, 3, 2).log_softmax(2)
    ours = log_probs.gather(2, chosen[..., None]).sum((1, 2))
    with torch.no_grad():
        _, theirs, _ = made.policy.evaluate_actions(observation, chosen.float())
        greedy = made.policy._predict(observation, deterministic=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert torch.equal(logits.reshape(8, 3, 2).argmax(2), greedy.long())
    assert 0 < greedy.mean() < 1


def test_a_maskable_multi_binary_s_weights_stay_as_they_are(tmp_path: Path) -> None:
    args = (tmp_path, "MaskablePPO", "MlpPolicy", toy_box(), spaces().MultiBinary(3))
    made, content = trained(*args)
    assert loaded(content).spec.heads == head_per_choice(2, 2, 2)
    assert_same(loaded(content).state_dict, made.policy.state_dict())


IMAGES = "is of images, which the trainer scales or reads by a CNN, and vectors are read"


def test_images_are_refused_alone_and_within(tmp_path: Path) -> None:
    image = spaces().Box(0, 255, (3, 36, 36), np.uint8)
    args = (tmp_path, "PPO", "MlpPolicy", image, spaces().Discrete(5))
    assert refusal(trained(*args)[1]) == f"its observation space {IMAGES}"
    within = spaces().Dict({"eye": image, "vec": toy_box()})
    args = (tmp_path, "PPO", "MultiInputPolicy", within, spaces().Discrete(5))
    assert refusal(trained(*args)[1]).startswith(
        "its observations go through an extractor with weights "
        "('features_extractor.extractors.eye.cnn.0.weight')"
    )


def test_what_a_policy_saves_of_itself_is_refused(tmp_path: Path) -> None:
    args = (tmp_path, "PPO", "MlpPolicy", toy_box(), spaces().Discrete(5))
    made, _ = trained(*args)
    made.policy.save(tmp_path / "policy.zip")
    content = (tmp_path / "policy.zip").read_bytes()
    assert is_sb3_zip(content)
    assert refusal(content) == (
        "is what policy.save() writes, which takes running a pickle to read; save the whole model "
        "with model.save()"
    )


def test_another_algorithm_is_refused(tmp_path: Path) -> None:
    baselines = pytest.importorskip("stable_baselines3")
    made = baselines.DQN(
        "MlpPolicy", environment(toy_box(), spaces().Discrete(5)), buffer_size=8, device="cpu"
    )
    made.save(tmp_path / "model.zip")
    assert refusal((tmp_path / "model.zip").read_bytes()) == (
        "its policy is of stable_baselines3.dqn.policies, and policies of RecurrentPPO, "
        "MaskablePPO, PPO and A2C are read"
    )


# What is hostile.


class Marks:
    """A pickle that writes a file once anything runs it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_in_the_data_is_not_run(tmp_path: Path) -> None:
    import base64

    marker = tmp_path / "ran"
    bomb = base64.b64encode(pickle.dumps(Marks(marker))).decode()
    armed: dict[str, object] = {}
    for name, value in data().items():
        is_pickled = isinstance(value, dict) and ":serialized:" in value
        armed[name] = {**value, ":serialized:": bomb} if is_pickled else value  # type: ignore[dict-item]
    armed["learning_rate"] = pickled("__main__.Schedule") | {":serialized:": bomb}
    assert loaded(model(armed)).spec == loaded(model()).spec
    assert not marker.exists()
    pickle.loads(base64.b64decode(bomb))
    assert marker.exists()


def test_a_pickle_in_the_weights_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    content = model(weights=state_dict() | {"armed": Marks(marker)})
    assert refusal(content) == (
        f"policy.pth: its entry 'armed' is made by {os.mkdir.__module__}.mkdir, and only tensors, "
        "NumPy's numbers and arrays, and plain containers are read; nothing in it was run"
    )
    assert not marker.exists()


def test_a_module_of_the_weights_is_not_imported(tmp_path: Path) -> None:
    content = torch_saved({"a": torch.ones(1)})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("/data.pkl"))
    members[name] = b"\x80\x02}X\x01\x00\x00\x00acantigravity\nfly\nX\x01\x00\x00\x00x\x85Rs."
    whole = zipped({"data": json.dumps(data()), "policy.pth": zipped(members)})
    assert refusal(whole) == (
        "policy.pth: its entry 'a' is made by antigravity.fly, and only tensors, NumPy's numbers "
        "and arrays, and plain containers are read; nothing in it was run"
    )
    assert "antigravity" not in sys.modules


def test_reading_a_model_takes_nothing_of_its_trainer(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(model())
    code = (
        "import sys; from pathlib import Path; from model.sb3.checkpoint import load_sb3\n"
        "path = Path(sys.argv[1]); load_sb3(path, path.read_bytes())\n"
        "heavy = {'stable_baselines3', 'sb3_contrib', 'gymnasium', 'gym', 'cloudpickle'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.zip")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=TIMEOUT_S)


def deflated_zeros(size: int, weights: bytes) -> bytes:
    """A file whose data is so many zeros, which this process never has at once."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("data", "w") as member:
            for _ in range(size // 2**20):
                member.write(bytes(2**20))
        archive.writestr("policy.pth", weights)
    return file.getvalue()


def bombs() -> dict[str, tuple[bytes, str]]:
    deflated = zipfile.ZIP_DEFLATED
    weights = torch_saved(state_dict())
    zeros = zipped({"archive/data.pkl": b"", "archive/data/0": bytes(2**28)}, deflated)
    many = b'{"a": [' + b"[]," * 2**23 + b"0]}"
    largest = b'{"a": "' + b"x" * (2**26 - 9) + b'"}'
    view = torch_saved({"a": torch.zeros(1).expand(2**20, 2**20)})
    return {
        "data": (
            zipped({"data": b" " * (200 * 2**20), "policy.pth": weights}, deflated),
            "its member 'data' unpacks to 209715200 bytes, and 67108864 are read",
        ),
        "values": (
            zipped({"data": many, "policy.pth": weights}, deflated),
            "its data has more than 1000000 values",
        ),
        "text": (
            zipped({"data": largest, "policy.pth": weights}, deflated),
            "its data does not say of what module its policy is; --any-policy-class reads it as "
            "one of Stable-Baselines3's own, which its weights then have to fit",
        ),
        "depth": (
            zipped({"data": b"[" * 2**19, "policy.pth": weights}, deflated),
            "its data is nested too deeply",
        ),
        "weights": (
            zipped({"data": json.dumps(data()), "policy.pth": zeros}),
            "policy.pth: unpacks to more than its own size",
        ),
        "a lie": (
            with_declared_size(deflated_zeros(2**30, weights), b"data", 10),
            "is a damaged or truncated zip",
        ),
        "a view": (
            zipped({"data": json.dumps(data()), "policy.pth": view}),
            "policy.pth: its tensors have more numbers than the file",
        ),
    }


def test_memory_is_bounded_whatever_a_file_says_it_unpacks_to(tmp_path: Path) -> None:
    """In a process of its own: what it ever has of address space is at most 384 MiB more."""
    made = bombs()
    paths = []
    for index, (content, _) in enumerate(made.values()):
        paths.append(tmp_path / f"{index}.zip")
        paths[-1].write_bytes(content)
    code = (
        "import re, resource, sys; from pathlib import Path\n"
        "from model.sb3.checkpoint import load_sb3\n"
        "from model.checkpoint_file import CheckpointError\n"
        "def peak(): return 1024 * int(\n"
        "    re.search(r'VmPeak:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "load_sb3(Path(sys.argv[1]), Path(sys.argv[1]).read_bytes())\n"
        "before = peak(); most = before + 4 * 2**30\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        "for path in map(Path, sys.argv[2:]):\n"
        "    try: load_sb3(path, path.read_bytes())\n"
        "    except CheckpointError as error: print(error)\n"
        "print(peak() - before)\n"
    )
    (tmp_path / "model.zip").write_bytes(model())
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.zip"), *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    *refused, grown = done.stdout.splitlines()
    said = [f"{path}: {said}" for path, (_, said) in zip(paths, made.values(), strict=True)]
    assert refused == said
    assert int(grown) < MOST_GROWN_BYTES


def test_bytes_that_changed_anywhere_are_refused_in_a_sentence_or_make_no_difference() -> None:
    whole = model()
    spec = loaded(whole).spec
    generator = np.random.default_rng(0)
    for at in generator.integers(0, len(whole), 300):
        changed = bytearray(whole)
        changed[at] ^= int(generator.integers(1, 256))
        try:
            checkpoint = load_sb3(PATH, bytes(changed))
        except CheckpointError as error:
            assert str(error).startswith(f"{PATH}: ")  # noqa: PT017
        else:
            assert checkpoint.spec == spec
            assert_same(checkpoint.state_dict, state_dict())
