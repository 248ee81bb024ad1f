"""The step's ONNX graph with the input by which Triton's sequence batcher says: a sequence starts.

Knows ONNX; of Triton no more than what a control input looks like.
"""

import onnx
from onnx import TensorProto, helper

from export.loaders.load import first_line
from export.manifest import Array, ArtifactError
from model.step_spec import StepSpec

START = Array(name="START", dtype="bool", shape=("batch", 1))
"""True in the rows of sequences that start. Triton asks for `[batch, 1]` of any control."""


def carried(spec: StepSpec) -> dict[str, str]:
    """Each input that carries a state, `[batch, layers, hidden]`, and the output it goes on from.

    Triton pairs them by the order of their names (triton-inference-server/server#8586): so do
    these.
    """
    return {state.input: state.output for state in sorted(spec.states, key=lambda of: of.input)}


def sequence_graph(content: bytes, spec: StepSpec) -> bytes:
    """The ONNX model of a step, with START as its last input.

    In a row that starts each of its states is zeros to the rest of the graph, whatever it holds:
    NaN times zero would be NaN, so it is chosen and not multiplied.
    Raises ArtifactError where the result is no model as the ONNX standard has it.
    """
    model = onnx.load_from_string(content)
    graph = model.graph
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    graph.input.append(helper.make_tensor_value_info(START.name, TensorProto.BOOL, [batch, 1]))
    starts, zero, axis = (f"{START.name}.{what}" for what in ("rows", "zero", "axis"))
    graph.initializer.append(helper.make_tensor(zero, TensorProto.FLOAT, [], [0.0]))
    graph.initializer.append(helper.make_tensor(axis, TensorProto.INT64, [1], [2]))
    begun = {name: f"{START.name}.{name}" for name in carried(spec)}
    for node in graph.node:
        node.input[:] = [begun.get(name, name) for name in node.input]
    nodes = [
        helper.make_node("Unsqueeze", [START.name, axis], [starts]),  # [batch, 1, 1]
        *(helper.make_node("Where", [starts, zero, name], [begun[name]]) for name in begun),
        *graph.node,
    ]
    del graph.node[:]  # nodes stand in the order they run in
    graph.node.extend(nodes)
    edited: bytes = model.SerializeToString()
    try:
        onnx.checker.check_model(edited, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ArtifactError(f"its ONNX graph takes no {START.name}: {first_line(error)}") from error
    return edited
