"""A graph for Triton's sequence batcher that does anything but zero the state is stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from export.manifest import ArtifactError, Manifest
from export.triton.comparison import GraphError, check_sequence_graph, load_graph
from export.triton.graph import START, carried, sequence_graph

Edit = Callable[[Any], None]


@pytest.fixture(params=["v1", "v2", "lstms"])
def graph(
    request: pytest.FixtureRequest, onnx_artifacts: dict[str, Path]
) -> tuple[bytes, Manifest]:
    """An artifact's ONNX file and its manifest."""
    artifact = onnx_artifacts[request.param]
    manifest = Manifest.read(artifact)
    return manifest.formats["onnx"].read(artifact), manifest


def check(content: bytes, sequence_content: bytes, manifest: Manifest) -> None:
    step = load_graph(content, manifest.inputs, manifest)
    sequence_step = load_graph(sequence_content, (*manifest.inputs, START), manifest)
    check_sequence_graph(step, sequence_step, manifest)


def edited(content: bytes, edit: Edit) -> bytes:
    model = onnx.load_from_string(content)
    edit(model.graph)
    changed: bytes = model.SerializeToString()
    onnx.checker.check_model(changed, full_check=True)
    return changed


def nodes(graph: Any, kind: str) -> list[Any]:
    return [node for node in graph.node if node.op_type == kind and "START" in str(node.output)]


def starts_nothing(graph: Any) -> None:
    for where in nodes(graph, "Where"):
        where.input[1] = where.input[2]


def starts_the_others(graph: Any) -> None:
    for where in nodes(graph, "Where"):
        where.input[1], where.input[2] = where.input[2], where.input[1]


def starts_one_state_only(graph: Any) -> None:
    where = nodes(graph, "Where")[0]
    where.input[1] = where.input[2]


def starts_from_ones(graph: Any) -> None:
    for initializer in graph.initializer:
        if initializer.name == "START.zero":
            initializer.CopyFrom(
                onnx.numpy_helper.from_array(np.ones((), np.float32), initializer.name)
            )


def starts_by_a_product(graph: Any) -> None:
    """Right for every number, and wrong for none."""
    (rows,) = nodes(graph, "Unsqueeze")[0].output
    new = [
        helper.make_node("Not", [rows], ["goes_on"]),
        helper.make_node("Cast", ["goes_on"], ["kept"], to=onnx.TensorProto.FLOAT),
    ]
    others = []
    for node in graph.node:
        if node in nodes(graph, "Where"):
            node = helper.make_node("Mul", ["kept", node.input[2]], list(node.output))
        others.append(node)
    at = 1 + others.index(nodes(graph, "Unsqueeze")[0])
    graph_nodes = [*others[:at], *new, *others[at:]]
    del graph.node[:]
    graph.node.extend(graph_nodes)


def mixes_the_states_up(graph: Any) -> None:
    first, second, *_ = nodes(graph, "Where")
    first.input[2], second.input[2] = second.input[2], first.input[2]


def starts_all_rows_with_the_first(graph: Any) -> None:
    """Seen in batches only."""
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "first"))
    rows = nodes(graph, "Unsqueeze")[0]
    gather = helper.make_node("Gather", [rows.input[0], "first"], ["START.first"], axis=0)
    rows.input[0] = "START.first"
    graph.node.insert(0, gather)


def test_the_graph_is_the_step_with_rows_that_may_start(graph: tuple[bytes, Manifest]) -> None:
    content, manifest = graph
    check(content, sequence_graph(content, manifest.spec), manifest)


@pytest.mark.parametrize(
    "edit",
    [
        starts_nothing,
        starts_the_others,
        starts_one_state_only,
        starts_from_ones,
        starts_by_a_product,
        mixes_the_states_up,
        starts_all_rows_with_the_first,
    ],
)
def test_a_graph_that_does_anything_else_is_stopped(
    graph: tuple[bytes, Manifest], edit: Edit
) -> None:
    content, manifest = graph
    with pytest.raises(GraphError, match=r"with START the step gives another .* \(batch size \d"):
        check(content, edited(sequence_graph(content, manifest.spec), edit), manifest)


def test_states_are_paired_in_the_order_of_their_names(graph: tuple[bytes, Manifest]) -> None:
    pairs = carried(graph[1].spec)
    assert list(pairs) == sorted(pairs)
    assert list(pairs.values()) == sorted(pairs.values())


def test_no_weight_and_no_other_array_changes(graph: tuple[bytes, Manifest]) -> None:
    before = onnx.load_from_string(graph[0])
    after = onnx.load_from_string(sequence_graph(graph[0], graph[1].spec))
    names = [array.name for array in before.graph.input]
    assert [array.name for array in after.graph.input] == [*names, "START"]
    assert list(after.graph.output) == list(before.graph.output)
    weights = {array.name: array for array in after.graph.initializer}
    for array in before.graph.initializer:
        assert weights.pop(array.name) == array
    assert weights.keys() == {"START.zero", "START.axis"}
    assert after.opset_import == before.opset_import
    assert after.ir_version == before.ir_version


def test_a_graph_without_the_input_is_not_taken_for_one(graph: tuple[bytes, Manifest]) -> None:
    content, manifest = graph
    with pytest.raises(ArtifactError, match=r"input \d is missing, expected 'START'"):
        check(content, content, manifest)


def test_a_graph_that_has_the_input_already_is_refused(graph: tuple[bytes, Manifest]) -> None:
    with pytest.raises(ArtifactError, match="its ONNX graph takes no START"):
        sequence_graph(sequence_graph(graph[0], graph[1].spec), graph[1].spec)
