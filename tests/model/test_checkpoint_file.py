"""What a file is: read whatever its name, or refused by the name of what it is, entry and all."""

import argparse
import bz2
import collections
import datetime
import enum
import gzip
import io
import lzma
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from export.exporter import export_policy
from model.checkpoint import load_checkpoint, load_normalizer
from model.checkpoint_file import CheckpointError, read_file
from model.spec import PolicySpec
from tests.random_inputs import random_policy

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120
MEMORY_BYTES = 8 * 2**30

SPEC = PolicySpec.tamiyo_v1(
    num_slots=2, observation_dim=3, feature_dim=4, hidden_dim=5, num_layers=1
)


def weights() -> dict[str, Tensor]:
    return dict(random_policy(SPEC).state_dict())


def checkpoint(**more: Any) -> dict[str, Any]:
    return {"checkpoint_version": 1, "network_state_dict": weights(), **more}


def saved(directory: Path, content: object, **options: Any) -> Path:
    path = directory / "policy.pt"
    torch.save(content, path, **options)
    return path


def written(directory: Path, content: bytes, name: str = "policy.pt") -> Path:
    path = directory / name
    path.write_bytes(content)
    return path


def refusal(path: Path, read: Callable[[Path], object] = load_checkpoint) -> str:
    """The sentence with which the file is refused, without the path it begins with."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


# What holds data, and is read.


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.float16(0.5), 0.5),
        (np.int64(-7), -7),
        (np.uint8(7), 7),
        (np.bool_(True), True),
        (np.complex64(1j), 1j),
        (np.str_("best"), "best"),
        (np.bytes_(b"best"), b"best"),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False], ids=["torch.save", "before 1.6"])
def test_numpy_s_scalars_are_data(
    tmp_path: Path, value: object, expected: object, is_zip: bool
) -> None:
    content = checkpoint(metadata={"n_episodes": value})
    path = saved(tmp_path, content, _use_new_zipfile_serialization=is_zip)
    read = read_file(path)
    assert isinstance(read, dict)
    assert read["metadata"]["n_episodes"] == expected
    assert type(read["metadata"]["n_episodes"]) is type(expected)
    assert load_checkpoint(path)[0] == SPEC


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3, dtype=">f4"),
        np.zeros((0, 3)),
        np.array(3.0),
        np.array([True, False]),
        np.array(["r0c0", "r0c1"]),
        np.arange(6)[::2],
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_numpy_s_arrays_are_data(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    read = read_file(saved(tmp_path, {"array": array}))
    assert isinstance(read, dict)
    assert np.array_equal(read["array"], array)
    assert read["array"].dtype == array.dtype.newbyteorder("=")


def test_numpy_1_s_names_are_read_as_numpy_2_s(tmp_path: Path) -> None:
    content = {"scalar": np.float64(0.5), "array": np.arange(3.0)}
    path = saved(tmp_path, content, _use_new_zipfile_serialization=False)
    assert b"numpy._core" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
    read = read_file(path)
    assert isinstance(read, dict)
    assert read["scalar"] == 0.5
    assert read["array"].tolist() == [0.0, 1.0, 2.0]


def test_statistics_may_be_numpy_s(tmp_path: Path) -> None:
    metadata = {
        "obs_normalizer_mean": np.array([0.5, -1.0, 2.0]),
        "obs_normalizer_var": np.array([1.0, 0.0, 4.0], dtype=np.float32),
    }
    normalizer = load_checkpoint(saved(tmp_path, checkpoint(metadata=metadata)))[2]
    assert normalizer is not None
    assert normalizer.mean.tolist() == [0.5, -1.0, 2.0]
    assert normalizer.var.tolist() == [1.0, 0.0, 4.0]


def test_other_data_beside_the_weights_is_read(tmp_path: Path) -> None:
    config = {
        "device": torch.device("cuda:0"),
        "dtype": torch.bfloat16,
        "shape": torch.Size([2, 3]),
        "counts": collections.Counter("aab"),
        "tags": {"a", "b"},
        "grid": {(1, 2): "x"},
        "raw": b"\x00\xff",
        "growing": bytearray(b"\x00\xff"),
        "large": 10**30,
        "rng": torch.get_rng_state(),
        "numpy_rng": np.random.RandomState(0).get_state(),
        "sparse": torch.eye(2).to_sparse(),
        "scheme": torch.per_tensor_affine,
    }
    assert load_checkpoint(saved(tmp_path, checkpoint(config=config)))[0] == SPEC


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_zip", [True, False], ids=["torch.save", "before 1.6"])
def test_other_precisions_parameters_and_strides_are_read(
    tmp_path: Path, dtype: torch.dtype, is_zip: bool
) -> None:
    content = {
        name: nn.Parameter(tensor.to(dtype).repeat(2, *[1] * (tensor.ndim - 1))[::2])
        for name, tensor in weights().items()
    }
    path = saved(tmp_path, content, _use_new_zipfile_serialization=is_zip)
    assert load_checkpoint(path)[0] == SPEC


def test_a_file_is_read_by_what_it_holds_and_not_by_its_name(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "weights.pt")
    torch.save(checkpoint(), tmp_path / "checkpoint.safetensors")
    torch.save(checkpoint(), tmp_path / "no suffix")
    for name in ("weights.pt", "checkpoint.safetensors", "no suffix"):
        assert load_checkpoint(tmp_path / name)[0] == SPEC
    statistics = written(tmp_path, b' {"mean": [1.0, 2.0], "var": [3.0, 4.0]}\n', "statistics.txt")
    assert load_normalizer(statistics, 2).var.tolist() == [3.0, 4.0]


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    """torch.serialization.set_crc32_options(False) writes such."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path, checkpoint())
    finally:
        torch.serialization.set_crc32_options(before)
    assert load_checkpoint(path)[0] == SPEC


# What is no data, and is named.


class Colour(enum.Enum):
    RED = 1

    def __reduce_ex__(self, protocol: object) -> tuple[type, tuple[object]]:
        # As Python does it, but for 3.11.0 to 3.11.3, where `getattr` made a member.
        return type(self), (self.value,)


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)


HERE = re.escape(__name__)


@pytest.mark.parametrize(
    ("entry", "value", "says"),
    [
        ("config", argparse.Namespace(lr=1.0), "'config' is made by argparse.Namespace,"),
        ("config", {"out": pathlib.PurePosixPath("x")}, r"'config.out' is made by pathlib\."),
        ("runs", [{"at": [{"dir": Path("x")}]}], r"'runs.at.dir' is made by pathlib\."),
        ("when", datetime.datetime(2026, 1, 1), "'when' is made by datetime.datetime,"),
        ("colour", Colour.RED, f"'colour' is made by {HERE}.Colour,"),
        ("colours", {Colour.RED: 1}, f"'colours' is made by {HERE}.Colour,"),
        ("log", collections.defaultdict(list), "'log' is made by collections.defaultdict,"),
        ("factory", dict, "'factory' is made by builtins.dict,"),
        ("names", np.array([None]), r"'names' is made by numpy.dtype\('O8'\),"),
        ("fields", np.zeros(2, [("x", "f4")]), r"'fields' is made by numpy.dtype\('V4'\),"),
        ("dates", np.zeros(2, "M8[s]"), r"'dates' is made by numpy.dtype\('M8'\),"),
        ("rng", np.random.default_rng(0), r"'rng' is made by numpy.random._pickle\."),
        ("metadata", {"deep": ({"a": Path()},)}, r"'metadata.deep.a' is made by pathlib\."),
        (7, {"a": Path()}, r"'7.a' is made by pathlib\."),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False], ids=["torch.save", "before 1.6"])
def test_what_is_no_data_is_named_with_its_class_and_entry(
    tmp_path: Path, entry: Any, value: object, says: str, is_zip: bool
) -> None:
    content = checkpoint() | {entry: value}
    message = refusal(saved(tmp_path, content, _use_new_zipfile_serialization=is_zip))
    assert re.match(f"its entry {says}", message)
    assert message.endswith("plain containers are read; nothing in it was run")


@pytest.mark.parametrize("is_zip", [True, False], ids=["torch.save", "before 1.6"])
def test_a_whole_module_is_said_to_be_one(tmp_path: Path, is_zip: bool) -> None:
    said = (
        f"a whole module, of class {__name__}.Policy; save its state_dict() instead; "
        "nothing in it was run"
    )
    path = saved(tmp_path, Policy(), _use_new_zipfile_serialization=is_zip)
    assert refusal(path) == f"is {said}"
    content = {"step": 3, "agent": {"policy": Policy()}}
    path = saved(tmp_path, content, _use_new_zipfile_serialization=is_zip)
    assert refusal(path) == f"its entry 'agent.policy' is {said}"


def test_the_policy_itself_as_a_module_is_said_to_be_one(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path, random_policy(SPEC)))
    assert message.startswith(
        "is a whole module, of class model.policy.FactoredRecurrentActorCritic; save its state_dict"
    )


# What is no checkpoint at all, and is called what it is.


LFS_POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


def packed(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("best.pt"))
    return buffer.getvalue()


def bytes_of_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def bytes_of_arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.zeros(3), np.ones(2))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (LFS_POINTER, "is a Git LFS pointer, not the file; `git lfs pull` fetches it"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "is an HTML page, which a download"),
        (b"\xef\xbb\xbf\n <HTML lang='en'>Sign in</HTML>", "is an HTML page, which a download"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "is a page of HTML or XML"),
        (gzip.compress(save(weights())), "is compressed by gzip; unpack it first"),
        (bz2.compress(save(weights())), "is compressed by bzip2; unpack it first"),
        (lzma.compress(save(weights())), "is compressed by xz; unpack it first"),
        (b"\x28\xb5\x2f\xfd" + b"\x00" * 50, "is compressed by zstd; unpack it first"),
        (tarred(), "is a tar archive; unpack it first"),
        (packed(**{"best.pt": b"x"}), "is a zip archive of 'best.pt', not a checkpoint"),
        (packed(data=b"{}", **{"policy.pth": b"x"}), "is a Stable-Baselines3 model, not a"),
        (bytes_of_array(), "is one NumPy array (.npy), not a checkpoint"),
        (bytes_of_arrays(), "is a NumPy archive (.npz), not a checkpoint"),
        (b"GGUF\x03\x00\x00\x00" + b"\x00" * 50, "is a GGUF file"),
        (b"\x89HDF\r\n\x1a\n" + b"\x00" * 50, "is an HDF5 file"),
        (b"learning_rate: 0.1\ngamma: 0.9\n", "it begins with 'learning_rate: 0.1'"),
        (b"{" * 200_000, "cannot be read as JSON"),
        (b'{"weight_map": {}}', "has no 'feature_net.0.weight' anywhere"),
        (b"", "is 0 bytes long, it is truncated or no checkpoint"),
        (b"PK\x03\x04" + b"\x00" * 50, "cannot be read, it is truncated or no checkpoint"),
        (b"\x89PNG\r\n\x1a\n" + b"\x00" * 50, "cannot be read, it is truncated or no checkpoint"),
        (pickle.dumps({"a": 1}), "is a pickle that torch.save did not write; nothing in it was"),
        (pickle.dumps({"a": 1}, 2), "is a pickle that torch.save did not write; nothing in it"),
    ],
)
@pytest.mark.parametrize("name", ["policy.pt", "policy.safetensors"])
def test_a_file_of_another_kind_is_called_what_it_is(
    tmp_path: Path, content: bytes, says: str, name: str
) -> None:
    assert says in refusal(written(tmp_path, content, name))


@pytest.mark.parametrize("content", [LFS_POINTER, b"<html></html>"])
def test_statistics_of_another_kind_are_called_what_they_are(
    tmp_path: Path, content: bytes
) -> None:
    path = written(tmp_path, content, "statistics.json")
    assert refusal(path, lambda path: load_normalizer(path, 2)).startswith(("is a Git", "is an HT"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("files") / "tiny"
    export_policy(
        random_policy(SPEC),
        None,
        output,
        name="tiny",
        formats=("torchscript", "pt2", "onnx"),
        max_batch_size=2,
    )
    return output


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("policy.ts", "is a TorchScript archive, which holds code; save the module's state_dict()"),
        ("policy.pt2", "is an archive of torch.export (.pt2), which holds a graph; save the"),
        ("policy.onnx", "is an ONNX model, not a checkpoint of torch"),
        ("report.html", "is an HTML page"),
        ("", "is a directory, not a file"),
    ],
)
def test_what_an_export_wrote_is_called_what_it_is(artifact: Path, name: str, says: str) -> None:
    assert refusal(artifact / name).startswith(says)


def test_a_recorded_baselines_model_is_called_what_it_is() -> None:
    for model in sorted((ROOT.parent / "shared" / "sb3").glob("*.zip")):
        assert refusal(model).startswith("is a Stable-Baselines3 model")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    assert refusal(tmp_path / "pipe.pt") == "is no regular file"
    assert refusal(tmp_path / "nowhere.pt") == "there is no such file"
    written(tmp_path, b"", "file")
    assert refusal(tmp_path / "file" / "policy.pt") == "there is no such file"


def test_another_protocol_than_torch_save_s_is_named(tmp_path: Path) -> None:
    said = "is pickled in protocol 4, and torch.save's own, 2, can be read; nothing in it was run"
    assert refusal(saved(tmp_path, checkpoint(), pickle_protocol=4)) == said
    path = saved(tmp_path, checkpoint(), pickle_protocol=4, _use_new_zipfile_serialization=False)
    assert refusal(path) == said


# What is meant to harm, and does not.


def torch_archive(pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint of torch.save whose pickle is this one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("policy/data.pkl", pickled)
        archive.writestr("policy/byteorder", "little")
        archive.writestr("policy/version", "3\n")
    return buffer.getvalue()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def in_entry(pickled: bytes) -> bytes:
    """A pickle of {"gift": what the given opcodes leave}."""
    return b"\x80\x02}" + text("gift") + pickled + b"s."


NESTED = 200_000
DOUBLED = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
"""A tuple of itself twice, sixty times over: a few bytes whose hash takes for ever."""

HOSTILE = {
    "a call": (
        in_entry(b"cposix\nsystem\n" + text("touch ran") + b"\x85R"),
        "its entry 'gift' is made by posix.system,",
    ),
    "a call of a call's result": (
        in_entry(
            b"cbuiltins\ngetattr\ncos\nsystem\n" + text("x") + b"\x86R" + text("y") + b"\x85R"
        ),
        "its entry 'gift' is made by builtins.getattr,",
    ),
    "a call by way of a name that is data": (
        in_entry(b"c_codecs\nencode\ncos\nsystem\n\x85R"),
        "its entry 'gift' is made by os.system,",
    ),
    "a class under copyreg": (
        in_entry(b"ccopy_reg\n_reconstructor\nc__main__\nEvil\nc__builtin__\nobject\nN\x87R"),
        "its entry 'gift' is made by __main__.Evil,",
    ),
    "a name that is no word": (
        in_entry(b"c\x1b[2Jevil\n\x07bell\n)R"),
        r"its entry 'gift' is made by \x1b[2Jevil.\x07bell,",
    ),
    "an extension": (in_entry(b"\x82\x01)R"), "holds a damaged pickle"),
    "a memo of two thousand million": (
        in_entry(b"Nr\xff\xff\xff\x7f"),
        "has no 'feature_net.0.weight' anywhere",
    ),
    "a memo that is not there": (in_entry(b"j\xff\xff\xff\x7f"), "holds a damaged pickle"),
    "a text of four gigabytes": (
        in_entry(b"X\xff\xff\xff\xff" + b"abc"),
        "holds a damaged pickle",
    ),
    "bytes of 2**62": (
        in_entry(b"\x8e" + struct.pack("<Q", 2**62)),
        "holds a damaged pickle",
    ),
    "a bytearray of 2**36": (
        in_entry(b"c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R"),
        "its entry 'gift' is made by builtins.bytearray,",
    ),
    "an array larger than its bytes": (
        in_entry(
            b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
            + text("b")
            + b"\x87R(K\x01\x8a\x05\x00\x00\x00\x00\x10\x85cnumpy\ndtype\n"
            + text("f8")
            + b"\x85R"
            b"\x89c__builtin__\nbytes\n)Rtb"
        ),
        "cannot be read, it is truncated or no checkpoint",
    ),
    "a dtype of its own fields": (
        in_entry(b"cnumpy\ndtype\n" + text("V8") + b"\x85R(K\x03" + text("|") + b"NNNK\x08K\x01tb"),
        "its entry 'gift' is made by numpy.dtype('V8'),",
    ),
    "lists in lists": (
        in_entry(b"]" * NESTED + b"a" * (NESTED - 1)),
        "has no 'feature_net.0.weight' anywhere",
    ),
    "mappings in mappings": (
        in_entry((b"}" + text("a")) * NESTED + b"N" + b"s" * NESTED),
        "has no 'feature_net.0.weight' anywhere",
    ),
    "a call in a thousand mappings": (
        in_entry((b"}" + text("a")) * 1000 + b"cos\nsystem\n)R" + b"s" * 1000),
        "its entry 'gift.a.a.a.a' is made by os.system,",
    ),
    "a key of tuples in tuples": (
        in_entry(b"}" + b")" + b"\x85" * NESTED + b"Ns"),
        "holds a damaged pickle",
    ),
    "a key of doubled tuples": (in_entry(b"}" + DOUBLED + b"Ns"), "holds a damaged pickle"),
    "a set of doubled tuples": (
        in_entry(b"c__builtin__\nset\n]" + DOUBLED + b"a\x85R"),
        "holds a damaged pickle",
    ),
    "a counter of doubled tuples": (
        in_entry(b"ccollections\nCounter\n]" + DOUBLED + b"a\x85R"),
        "holds a damaged pickle",
    ),
    "a list that holds itself": (
        in_entry(b"]q\x00h\x00a"),
        "has no 'feature_net.0.weight' anywhere",
    ),
    "an empty stack": (b"\x80\x02R.", "holds a damaged pickle"),
    "no end": (b"\x80\x02}", "holds a damaged pickle"),
    "nothing": (b"", "holds a damaged pickle"),
}


@pytest.fixture(scope="module")
def said_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each is refused with, in a process of its own, which may not grow: they kill or hang
    what they get the better of."""
    directory = tmp_path_factory.mktemp("hostile")
    paths = {
        trick: written(directory, torch_archive(pickled), f"{index}.pt")
        for index, (trick, (pickled, _)) in enumerate(HOSTILE.items())
    }
    code = (
        "import resource, sys; from model.checkpoint import CheckpointError, load_checkpoint\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))\n"
        "for path in sys.argv[1:]:\n"
        "    try: load_checkpoint(path)\n"
        "    except CheckpointError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *paths.values()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert not (ROOT / "ran").exists()
    lines = done.stdout.splitlines()
    return {
        trick: line.removeprefix(f"{path}: ")
        for (trick, path), line in zip(paths.items(), lines, strict=True)
    }


@pytest.mark.parametrize("trick", HOSTILE)
def test_a_pickle_meant_to_harm_is_a_sentence(said_of: dict[str, str], trick: str) -> None:
    assert said_of[trick].startswith(HOSTILE[trick][1])


def test_a_pickle_that_unpacks_to_more_than_the_file_is_refused(tmp_path: Path) -> None:
    bomb = torch_archive(in_entry(text("a" * 50_000_000)), zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    message = refusal(written(tmp_path, bomb))
    assert message == "holds a pickle that unpacks to more than the file's own size"


@pytest.mark.parametrize("entry", ["checkpoint_version", "metadata", "architecture"])
def test_nesting_that_no_repr_survives_is_refused_where_it_is_read(
    tmp_path: Path, entry: str
) -> None:
    nested: list[Any] = [0.0]
    for _ in range(60):
        nested = [nested, nested]
    for _ in range(5000):
        nested = [nested]
    statistics = {"obs_normalizer_mean": nested, "obs_normalizer_var": nested}
    value = statistics if entry == "metadata" else nested
    path = written(tmp_path, b"")
    pickler_limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        torch.save(checkpoint(**{entry: value}), path)
    finally:
        sys.setrecursionlimit(pickler_limit)
    if entry == "architecture":
        assert load_checkpoint(path)[0] == SPEC
    else:
        says = "is checkpoint version [[[[" if entry == "checkpoint_version" else "is no number"
        assert says in refusal(path)


def test_an_archive_whose_members_differ_in_case_alone_is_refused(tmp_path: Path) -> None:
    """Torch would read the one that nobody looked at."""
    path = tmp_path / "two.pt"
    torch.save({"a": torch.zeros(2)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        archive.writestr(name.replace("data", "DATA"), archive.read(name))
    with pytest.raises(CheckpointError, match="two members of one name"):
        read_file(path)
