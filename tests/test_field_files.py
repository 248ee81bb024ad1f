"""What people really give to `python -m export`, and where they have it write: what holds, stays.

Files that are refused, and why, are in `tests.model.test_checkpoint`.
"""

import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from export.__main__ import main
from export.manifest import Manifest
from model.checkpoint import load_checkpoint
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.running_server import ROOT, clean_environment

FAST = ("--formats", "torchscript", "--max-batch-size", "16")
TIMEOUT_S = 120
StateDict = dict[str, Tensor]


def interleaved(tensor: Tensor) -> Tensor:
    """The same values, every second one of a storage."""
    return torch.stack([tensor, tensor.neg()], dim=-1)[..., 0]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor


def in_one_storage(weights: StateDict) -> StateDict:
    """As a flattened optimiser leaves them: each a view of one long vector."""
    flat = torch.cat([tensor.flatten() for tensor in weights.values()])
    views, start = {}, 0
    for name, tensor in weights.items():
        views[name] = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    return views


def each(change: Callable[[Tensor], Tensor]) -> Callable[[StateDict], StateDict]:
    return lambda weights: {name: change(tensor) for name, tensor in weights.items()}


KEPT: dict[str, Callable[[StateDict], StateDict]] = {
    "half precision": each(Tensor.half),
    "bf16": each(Tensor.bfloat16),
    "double precision": each(Tensor.double),
    "Parameters": each(torch.nn.Parameter),
    "an OrderedDict": OrderedDict,
    "tensors that require gradients": each(lambda tensor: tensor.clone().requires_grad_()),
    "transposed tensors": each(transposed),
    "interleaved tensors": each(interleaved),
    "parts of larger tensors": each(lambda tensor: torch.cat([tensor, tensor])[: len(tensor)]),
    "views of one vector": in_one_storage,
    "another order": lambda weights: dict(reversed(weights.items())),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["", "legacy"])
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_weights_are_read_however_they_were_kept(
    spec: PolicySpec,
    policy: FactoredRecurrentActorCritic,
    tmp_path: Path,
    kept: Callable[[StateDict], StateDict],
    legacy: bool,
) -> None:
    content = kept(dict(policy.state_dict()))
    torch.save(content, tmp_path / "policy.pt", _use_new_zipfile_serialization=not legacy)
    found, weights, _ = load_checkpoint(tmp_path / "policy.pt")
    assert found == spec
    read = FactoredRecurrentActorCritic(found)
    read.load_state_dict(weights, strict=True)
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, content[name].float()), name


ODD_NAMES = [
    *("policy", "policy.PT", "policy.ckpt", "policy.pt.tmp", "policy.tar", "...", "-policy.pt"),
    *("my policy (1).pt", "é\U0001f642.pt", "a\nb.pt", "'\".pt", "$x;.pt", "%s.pt", "[red].pt"),
    *("\x1b[31m.pt", f"{'x' * 250}.pt"),
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=[f"{name:.20}" for name in map(repr, ODD_NAMES)])
def test_a_file_may_have_any_name(
    spec: PolicySpec, policy: FactoredRecurrentActorCritic, tmp_path: Path, name: str
) -> None:
    torch.save(policy.state_dict(), tmp_path / name)
    assert load_checkpoint(tmp_path / name)[0] == spec


@pytest.mark.parametrize(
    "name", ["half precision.pt", "a\nb [red] \x1b[31m\U0001f642", "\udcff.pt"]
)
def test_what_is_read_is_exported_whatever_its_name(
    policy: FactoredRecurrentActorCritic, tmp_path: Path, name: str
) -> None:
    checkpoint, output = tmp_path / name, tmp_path / "of" / name
    torch.save(each(Tensor.half)(dict(policy.state_dict())), checkpoint)
    arguments = ["--checkpoint", str(checkpoint), "--output", str(output), *FAST]
    assert main(arguments) == 0
    assert Manifest.read(output).source.name == checkpoint.stem.replace("\udcff", "\ufffd")
    assert [path.name for path in (tmp_path / "of").iterdir()] == [name]


def test_of_two_exports_into_one_directory_one_is_there_whole(
    policy: FactoredRecurrentActorCritic, tmp_path: Path
) -> None:
    torch.save(policy.state_dict(), tmp_path / "policy.pt")
    output = tmp_path / "outputs" / "tiny"
    arguments = ["--checkpoint", str(tmp_path / "policy.pt"), "--output", str(output), *FAST]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "export", *arguments, "--name", name],
            cwd=ROOT,
            env=clean_environment() | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "other")
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT_S)[1] for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()
    (winner,) = (at for at, process in enumerate(both) if process.returncode == 0)
    assert both[1 - winner].returncode == 2
    last = said[1 - winner].splitlines()[-1]
    assert last.startswith(f"export: {output}")
    assert "Traceback" not in said[0] + said[1]
    manifest = Manifest.read(output)
    assert manifest.name == ("one", "other")[winner]
    for file in manifest.formats.values():
        assert file.read(output)
    assert [path.name for path in output.parent.iterdir()] == ["tiny"]
