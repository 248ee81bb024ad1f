"""Files as `model.save()` writes them, made by hand: each part can be another than it should be."""

import base64
import io
import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.checkpoint_file import CheckpointError
from model.sb3.checkpoint import SB3Checkpoint, load_sb3
from model.sb3.network import Network, expected_shapes
from model.sb3.spec import Recurrence

PATH = Path("model.zip")
RECURRENT = "sb3_contrib.common.recurrent.policies"
MASKABLE = "sb3_contrib.common.maskable.policies"
ACTOR_CRITIC = "stable_baselines3.common.policies"

NETWORK = Network(
    observation_dim=3,
    rows=9,
    actor_layers=(4,),
    critic_layers=(5, 6),
    recurrence=Recurrence(hidden_dim=2, num_layers=2, critic="lstm"),
)
KWARGS = {"lstm_hidden_size": 2, "n_lstm_layers": 2, "net_arch": {"pi": [4], "vf": [5, 6]}}


def pickled(kind: str, **attributes: object) -> dict[str, object]:
    """What is no JSON, as `data` has it; its pickle would fail if anything ran it."""
    would_fail = base64.b64encode(b"no pickle").decode()
    return {":type:": f"<class '{kind}'>", ":serialized:": would_fail, **attributes}


def discrete(n: object = "9", start: object = "0") -> dict[str, object]:
    return pickled("gymnasium.spaces.discrete.Discrete", n=n, start=start)


def multi_discrete(nvec: str = "[3 4 2]", start: str = "[0 0 0]") -> dict[str, object]:
    return pickled("gymnasium.spaces.multi_discrete.MultiDiscrete", nvec=nvec, start=start)


def multi_binary(n: object) -> dict[str, object]:
    return pickled("gymnasium.spaces.multi_binary.MultiBinary", n=n)


def box(shape: list[int], dtype: str = "float32") -> dict[str, object]:
    return pickled("gymnasium.spaces.box.Box", _shape=shape, dtype=dtype, low="[-1. ... -1.]")


def dict_of(spaces: object) -> dict[str, object]:
    return pickled("gymnasium.spaces.dict.Dict", spaces=spaces)


def policy_class(module: str) -> dict[str, object]:
    return pickled("abc.ABCMeta", __module__=module)


def data(**changes: object) -> dict[str, object]:
    """The attributes that are read; what is changed to `...` is left out."""
    attributes: dict[str, object] = {
        "policy_class": policy_class(RECURRENT),
        "policy_kwargs": KWARGS,
        "action_space": multi_discrete(),
        "observation_space": box([3]),
        "use_sde": False,
        "_last_original_obs": None,
        "clip_range": 0.2,
        "gae_lambda": 0.95,
    }
    return {key: value for key, value in (attributes | changes).items() if value is not ...}


def state_dict(network: Network = NETWORK) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = expected_shapes(network)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def torch_saved(content: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zipped(members: Mapping[str, bytes | str], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def model(
    attributes: Mapping[str, object] | None = None, weights: object = None, **changes: object
) -> bytes:
    """A whole file; `changes` are of the attributes."""
    said = data(**changes) if attributes is None else attributes
    return zipped(
        {
            "data": json.dumps(said, indent=4),
            "pytorch_variables.pth": b"not read",
            "policy.pth": torch_saved(state_dict() if weights is None else weights),
            "_stable_baselines3_version": "2.9.2",
        }
    )


def loaded(content: bytes, **options: Any) -> SB3Checkpoint:
    return load_sb3(PATH, content, **options)


def refusal(content: bytes, **options: Any) -> str:
    """The sentence with which it is refused, without the path it begins with."""
    with pytest.raises(CheckpointError) as caught:
        loaded(content, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"{PATH}: ")
    return message.removeprefix(f"{PATH}: ")


def with_declared_size(content: bytes, name: bytes, size: int) -> bytes:
    """The zip whose central directory says another unpacked size of a member."""
    at = content.rindex(b"PK\1\2", 0, content.rindex(name))
    return content[: at + 24] + struct.pack("<I", size) + content[at + 28 :]
