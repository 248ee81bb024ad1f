"""Triton as far as its documentation and sources say what it does with a model, and no further.

It reads what tritonserver reads, `config.pbtxt` and `model.onnx`, and nothing of what wrote them:
its ONNX Runtime backend's checks as a model is loaded, its batches, and its sequence batcher of the
strategy `oldest` with the states it keeps.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import text_format
from numpy.typing import NDArray


def _model_config() -> Any:
    """`tritonclient.grpc.model_config_pb2`, which does not take the grpc that its package does."""
    (package,) = find_spec("tritonclient").submodule_search_locations  # type: ignore[union-attr,misc]
    spec = spec_from_file_location("model_config_pb2", f"{package}/grpc/model_config_pb2.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


proto = _model_config()

Arrays = Mapping[str, NDArray[Any]]

DTYPES: dict[int, tuple[str, Any]] = {
    proto.TYPE_BOOL: ("tensor(bool)", np.bool_),
    proto.TYPE_INT64: ("tensor(int64)", np.int64),
    proto.TYPE_FP32: ("tensor(float)", np.float32),
}
CONTROLS = {"bool": proto.TYPE_BOOL, "fp32": proto.TYPE_FP32}
GARBAGE: dict[Any, Any] = {np.bool_: True, np.int64: 0, np.float32: np.nan}


class Refused(Exception):
    """What Triton says to a client, or as it loads a model."""


class Model:
    """A version of a model, loaded."""

    def __init__(self, directory: Path, version: int = 1) -> None:
        text = (directory / "config.pbtxt").read_text()
        self.config: Any = text_format.Parse(text, proto.ModelConfig())
        file = directory / str(version) / "model.onnx"
        self.session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        if self.config.name != directory.name:
            raise Refused(f"{self.config.name} is in {directory.name}")
        self._check_arrays()

    @property
    def states(self) -> list[Any]:
        return list(self.config.sequence_batching.state)

    @property
    def controls(self) -> dict[str, tuple[int, Any]]:
        """Each control input: its type, and what it is false and true."""
        found = {}
        for control_input in self.config.sequence_batching.control_input:
            for control in control_input.control:
                for kind, data_type in CONTROLS.items():
                    if values := list(getattr(control, f"{kind}_false_true")):
                        found[control_input.name] = (data_type, values)
        return found

    def _check_arrays(self) -> None:
        """`ValidateInputs`, `ValidateOutputs` and `Validate*SequenceControl` of the backend."""
        given = {array.name: array for array in self.session.get_inputs()}
        expected = {
            array.name: (array.data_type, _model_dims(array)) for array in self.config.input
        }
        expected |= {name: (kind, [1]) for name, (kind, _) in self.controls.items()}
        expected |= {state.input_name: (state.data_type, list(state.dims)) for state in self.states}
        if given.keys() != expected.keys():
            raise Refused(f"the configuration expects {[*expected]}, the model has {[*given]}")
        told = {array.name: array for array in self.session.get_outputs()}
        outputs = {
            array.name: (array.data_type, _model_dims(array)) for array in self.config.output
        }
        outputs |= {state.output_name: (state.data_type, list(state.dims)) for state in self.states}
        if not told.keys() >= outputs.keys():
            raise Refused(f"the configuration expects {[*outputs]}, the model gives {[*told]}")
        for arrays, wanted in ((given, expected), (told, outputs)):
            for name, (data_type, dims) in wanted.items():
                batch, *others = arrays[name].shape
                if arrays[name].type != DTYPES[data_type][0] or others != dims:
                    raise Refused(f"{name} is {arrays[name].type} {others} in the model")
                if isinstance(batch, int):
                    raise Refused(f"{name} has a fixed batch")

    def infer(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """A request of any number of rows, alone in its batch."""
        for array in self.config.input:
            if list(inputs[array.name].shape[1:]) != list(array.dims):
                raise Refused(f"{array.name} has shape {inputs[array.name].shape}")
        if inputs.keys() != {array.name for array in self.config.input}:
            raise Refused(f"these are not all inputs, or more: {[*inputs]}")
        told = self.run(inputs)
        return {array.name: _client_s(array, told[array.name]) for array in self.config.output}

    def run(self, feed: Arrays) -> dict[str, NDArray[Any]]:
        names = [array.name for array in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, dict(feed)), strict=True))

    def warmup(self) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """The rows and the inputs of each warm-up request."""
        for request in self.config.model_warmup:
            size = request.batch_size
            yield (
                size,
                {
                    name: np.zeros((size, *given.dims), DTYPES[given.data_type][1])
                    for name, given in request.inputs.items()
                },
            )


@dataclass
class Request:
    """One request of a sequence, of one row."""

    sequence_id: int
    inputs: Arrays
    start: bool = False
    end: bool = False


@dataclass
class SequenceBatcher:
    """`oldest`: live sequences' requests share batches, each with the state of its own.

    What a new sequence's state holds is `uninitialised`: whatever Triton would put there, or what
    another sequence left. `num_empty` rows of a batch belong to nobody, and hold no numbers.
    """

    model: Model
    uninitialised: float = np.nan
    num_empty: int = 0
    live: dict[int, dict[str, NDArray[Any]]] = field(default_factory=dict)

    def infer(self, requests: Sequence[Request]) -> list[dict[str, NDArray[Any]]]:
        """The answers, in order, of requests that Triton has put into one batch."""
        ids = [request.sequence_id for request in requests]
        assert len(set(ids)) == len(ids), "requests of one sequence never share a batch"
        for request in requests:
            if any(len(array) != 1 for array in request.inputs.values()):
                raise Refused("a request of a sequence has one row")
            if request.start:
                self.live[request.sequence_id] = self._new_state()
            elif request.sequence_id not in self.live:
                raise Refused(f"sequence {request.sequence_id} must specify the START flag")
        told = self.model.run(self._feed(requests))
        # By order of names, not by what the configuration has side by side (server#8586).
        inputs = sorted(state.input_name for state in self.model.states)
        outputs = sorted(state.output_name for state in self.model.states)
        answers = []
        for row, request in enumerate(requests):
            self.live[request.sequence_id] = {
                name: told[output][row : row + 1].copy()
                for name, output in zip(inputs, outputs, strict=True)
            }
            answers.append(
                {
                    array.name: _client_s(array, told[array.name][row : row + 1])
                    for array in self.model.config.output
                }
            )
            if request.end:
                del self.live[request.sequence_id]
        return answers

    def _feed(self, requests: Sequence[Request]) -> dict[str, NDArray[Any]]:
        feed = {
            array.name: self._rows(array, [request.inputs[array.name] for request in requests])
            for array in self.model.config.input
        }
        for name, (data_type, (no, yes)) in self.model.controls.items():
            values = [yes if request.start else no for request in requests] + [no] * self.num_empty
            feed[name] = np.array(values, DTYPES[data_type][1])[:, None]
        for state in self.model.states:
            kept = [self.live[request.sequence_id][state.input_name] for request in requests]
            feed[state.input_name] = self._rows(state, kept)
        return feed

    def _rows(self, array: Any, rows: Sequence[NDArray[Any]]) -> NDArray[Any]:
        dtype = DTYPES[array.data_type][1]
        shape = (self.num_empty, *_model_dims(array))
        return np.concatenate([*rows, np.full(shape, GARBAGE[dtype], dtype)], dtype=dtype)

    def _new_state(self) -> dict[str, NDArray[Any]]:
        return {
            state.input_name: np.full(
                (1, *state.dims), self.uninitialised, DTYPES[state.data_type][1]
            )
            for state in self.model.states
        }


def _model_dims(array: Any) -> list[int]:
    """As the model has them: a reshape says what they are, of no more than the batch too."""
    is_reshaped = "reshape" in array.DESCRIPTOR.fields_by_name and array.HasField("reshape")
    return list(array.reshape.shape if is_reshaped else array.dims)


def _client_s(array: Any, told: NDArray[Any]) -> NDArray[Any]:
    """An output in the shape that its client is told."""
    return told.reshape(len(told), *array.dims)
