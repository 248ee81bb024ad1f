"""A step of tensors gives what the manifest says, or nothing is copied."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from export.loaders.torch_step import TorchStep
from export.manifest import Array, ArtifactError
from tests.loaded_step import allocated

INPUTS = (
    Array(name="x", dtype="float32", shape=("batch", 3)),
    Array(name="y", dtype="float32", shape=("batch", 3)),
)
OUTPUTS = (
    Array(name="difference", dtype="float32", shape=("batch", 3)),
    Array(name="largest", dtype="int64", shape=("batch",)),
)


def difference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x - y, x.argmax(-1)


def test_inputs_and_outputs_go_by_their_names() -> None:
    inputs, outputs = allocated(INPUTS[::-1], 2), allocated(OUTPUTS[::-1], 2)
    inputs["x"][:] = [[1, 5, 2], [9, 1, 1]]
    inputs["y"][:] = 1
    step = TorchStep("difference", difference, INPUTS, OUTPUTS).bind(inputs, outputs)
    step()
    assert outputs["difference"].tolist() == [[0, 4, 1], [8, 0, 0]]
    assert outputs["largest"].tolist() == [1, 0]
    inputs["x"][:] = [[0, 0, 3], [0, 3, 0]]
    step()
    assert outputs["difference"].tolist() == [[-1, -1, 2], [-1, 2, -1]]
    assert outputs["largest"].tolist() == [2, 1]


def test_a_call_runs_where_nothing_asks_for_gradients() -> None:
    weight = torch.ones(3, requires_grad=True)
    inputs, outputs = allocated(INPUTS, 2), allocated(OUTPUTS, 2)
    inputs["x"][:] = 2
    TorchStep("weighed", lambda x, y: (x * weight, x.argmax(-1)), INPUTS, OUTPUTS).bind(
        inputs, outputs
    )()
    assert (outputs["difference"] == 2).all()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda d, n: (d,), "output 1 is missing, expected 'largest'"),
        (lambda d, n: (d, n, n), "output 2 is one too many, expected 2"),
        (lambda d, n: d, "gives a Tensor, not its outputs"),
        (lambda d, n: (d[:1], n), r"'difference' is float32 \[1, 3\], .* float32 \[2, 3\]"),
        (lambda d, n: (d[:, :1], n), r"'difference' is float32 \[2, 1\], .* float32 \[2, 3\]"),
        (lambda d, n: (d, n[:, None]), r"'largest' is int64 \[2, 1\], expected int64 \[2\]"),
        (lambda d, n: (d.double(), n), r"'difference' is float64 \[2, 3\], expected float32"),
        (lambda d, n: (d.bfloat16(), n), r"'difference' is bfloat16 \[2, 3\], expected float32"),
        (lambda d, n: (d, n.float()), r"'largest' is float32 \[2\], expected int64 \[2\]"),
    ],
    ids=["less", "more", "one", "row", "column", "rank", "double", "half", "no index"],
)
def test_results_that_are_not_the_manifests_are_refused_before_any_is_copied(
    changed: Callable[[Tensor, Tensor], Any], says: str
) -> None:
    step = TorchStep("wrong", lambda x, y: changed(*difference(x, y)), INPUTS, OUTPUTS)
    inputs, outputs = allocated(INPUTS, 2), allocated(OUTPUTS, 2)
    inputs["x"][:] = [[1, 5, 2], [9, 1, 1]]
    call = step.bind(inputs, outputs)
    for _ in range(2):
        with pytest.raises(ArtifactError, match=says):
            call()
    assert not any(array.any() for array in outputs.values())


def test_each_binding_is_checked() -> None:
    """A step may be right at one batch size and wrong at the next."""

    def one_row(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return difference(x[:1], y[:1])

    step = TorchStep("one row", one_row, INPUTS, OUTPUTS)
    step.bind(allocated(INPUTS, 1), allocated(OUTPUTS, 1))()
    with pytest.raises(ArtifactError, match=r"\[1, 3\], expected float32 \[2, 3\]"):
        step.bind(allocated(INPUTS, 2), allocated(OUTPUTS, 2))()
