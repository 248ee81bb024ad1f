"""`policy.pth`: float32 tensors by name, within the file's own size, or a sentence."""

import io
import zipfile
from collections.abc import Callable

import pytest
import torch
from torch import nn

from model.checkpoint_file import CheckpointError
from model.sb3.weights import load_weights
from tests.model.sb3.saved_models import torch_saved, zipped


def refusal(content: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_weights(content)
    return str(caught.value)


def test_weights_become_float32_and_contiguous() -> None:
    saved = {
        "a": torch.arange(6.0).reshape(2, 3),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.tensor([0.5], dtype=torch.bfloat16),
        "double": torch.tensor([1 / 3], dtype=torch.float64),
        "parameter": nn.Parameter(torch.ones(2)),
        "none": torch.empty(0, 3),
    }
    weights = load_weights(torch_saved(saved))
    assert list(weights) == list(saved)
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert weight.is_contiguous()
        assert not weight.requires_grad
        assert torch.equal(weight, saved[name].detach().float())


def test_names_may_share_a_tensor_larger_than_the_rest_of_the_file() -> None:
    shared = torch.randn(2000)
    weights = load_weights(torch_saved({str(name): shared for name in range(100)}))
    assert len(weights) == 100
    assert all(torch.equal(weight, shared) for weight in weights.values())


def deflated(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return zipped(members, zipfile.ZIP_DEFLATED)


OVERFLOWING = torch.tensor([1e300], dtype=torch.float64)
WEIGHTS_ARE_TENSORS = "and weights are tensors by name"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: b"", "is not what torch.save writes since version 1.6"),
        (
            lambda: torch_saved({"a": torch.ones(1)}, _use_new_zipfile_serialization=False),
            "is not what torch.save writes since version 1.6",
        ),
        (lambda: torch_saved({"a": torch.ones(1)})[:-30], "is a damaged or truncated zip"),
        (lambda: deflated(torch_saved({"a": torch.zeros(10**6)})), "unpacks to more than its own "
         "size"),
        (lambda: torch_saved({"a": torch.zeros(1).expand(2000)}), "its tensors have more "
         "numbers than the file"),
        (lambda: torch_saved({"a": torch.zeros(1).expand(10**7, 10**7)}), "its tensors have more "
         "numbers than the file"),
        (lambda: torch_saved([torch.ones(1)]), "holds a list, not weights by name"),
        (lambda: torch_saved({"a": 3}), f"its entry 'a' is a int, {WEIGHTS_ARE_TENSORS}"),
        (lambda: torch_saved({3: torch.ones(1)}), "its entry 3 is a Tensor, "
         f"{WEIGHTS_ARE_TENSORS}"),
        (lambda: torch_saved({"a": {"b": torch.ones(1)}}), f"its entry 'a' is a dict, "
         f"{WEIGHTS_ARE_TENSORS}"),
        (lambda: torch_saved({"a": torch.ones(1, dtype=torch.int64)}), "'a' is of torch.int64, and "
         "weights are floats"),
        (lambda: torch_saved({"a": torch.ones(1, dtype=torch.complex64)}), "'a' is of "
         "torch.complex64, and weights are floats"),
        (lambda: torch_saved({"a": torch.ones(2, 2).to_sparse()}), "'a' is no plain tensor"),
        (lambda: torch_saved({"a": torch.ones(2, device="meta")}), "'a' is no plain tensor"),
        (lambda: torch_saved({"a": torch.tensor([float("nan")])}), "'a' is not finite"),
        (lambda: torch_saved({"a": torch.tensor([1.0, float("-inf")])}), "'a' is not finite"),
        (lambda: torch_saved({"a": OVERFLOWING}), "'a' is not finite"),
    ],
    ids=[
        *("empty", "before 1.6", "truncated", "deflated", "a view of one", "a view of one number"),
        *("a list", "a number", "a number's name", "nested", "integers", "complex", "sparse"),
        *("meta", "NaN", "infinite", "beyond float32"),
    ],
)  # fmt: skip
def test_other_weights_are_refused(make: Callable[[], bytes], said: str) -> None:
    assert refusal(make()) == f"policy.pth: {said}"
