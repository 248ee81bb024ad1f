"""`POST /v2/models/NAME/infer`: the Open Inference Protocol's bodies, with tensors in JSON or in
binary behind it. The tensors are those of the safetensors form, and mean the same.
"""

from collections.abc import Mapping
from itertools import chain
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_json

from export.manifest import Manifest
from service.engine.block import Answer, Block
from service.errors import Invalid, Malformed, TooLarge, UnknownModel, short
from service.http.codec import JSON, Request
from service.http.inference_schemas import (
    InferInput,
    InferOutput,
    InferParameters,
    InferRequest,
    ModelMetadata,
    TensorMetadata,
)
from service.http.refusal import refusal, unknown_field
from service.http.safetensors_file import DTYPE_NAMES, DTYPES, view
from service.http.tensors import Scalars, Tensor, TensorReader
from service.runtime.arrays import decisions

BINARY = "application/octet-stream"
PLATFORM = "tamiyo_serve"
VERSION = "1"
"""There is one; which weights they are is `policy_version`."""
DATATYPES = {"F32": "FP32", "F64": "FP64", "I64": "INT64", "U64": "UINT64", "BOOL": "BOOL"}
"""The protocol's names of the dtypes, by those of safetensors."""
KINDS: dict[str, set[type]] = {
    "F32": {float, int},
    "F64": {float, int},
    "I64": {int},
    "U64": {int},
    "BOOL": {bool, int},
}
"""What a number may be in JSON."""
OBSERVATION = "observation"


class InferenceCodec:
    """What the bodies of one policy's requests and answers have in common."""

    def __init__(self, manifest: Manifest, *, max_rows: int, max_body_bytes: int) -> None:
        spec = manifest.spec
        self.reader = TensorReader(spec, max_rows=max_rows, session="sequence_id")
        self.max_json_bytes = max_body_bytes
        self.max_body_bytes = max_body_bytes + self.reader.largest_bytes
        self.name = manifest.name
        self.heads = ",".join(spec.head_names)
        self.observation_dim = spec.observation_dim
        outputs = {
            array.name: Tensor(
                (DTYPE_NAMES[np.dtype(array.dtype)],), tuple(int(size) for size in array.shape[1:])
            )
            for array in decisions(spec)
        }
        states = {name: self.reader.tensors[name] for name in self.reader.states}
        self.outputs = outputs | states
        masks = {f"action_mask.{head}" for head in spec.head_names}
        inputs = {name: of for name, of in self.reader.tensors.items() if name not in masks}
        self.metadata = ModelMetadata(
            name=self.name,
            versions=[VERSION],
            platform=PLATFORM,
            inputs=_metadata(inputs),
            outputs=_metadata(self.outputs),
        )
        # The one that pydantic keeps for the class is slower by its wrapper.
        self.validator = TypeAdapter(InferRequest).validator

    def check_model(self, model: str, version: str = VERSION) -> None:
        """Raises UnknownModel for another than the one there is."""
        if model != self.name:
            raise UnknownModel(f"there is no model {short(model)!r}, only {self.name!r}")
        if version != VERSION:
            raise UnknownModel(f"there is no version {short(version)!r}, only {VERSION!r}")


class InferenceCall:
    """One request, and the answer to it in the form it asks for: a codec that is used once.

    `json_bytes` is how much of the body is JSON: None is all, 0 none. `answer_json_bytes`, of an
    answer that is more than JSON, is known once it is written.
    """

    json_bytes: int | None = None
    answer_json_bytes: int | None = None

    def __init__(self, codec: InferenceCodec) -> None:
        self._codec = codec
        self._asked = InferRequest.model_construct(inputs=[])
        self.max_body_bytes = codec.max_body_bytes
        self.content_type = JSON

    def parse(self, body: bytes | bytearray) -> Request:
        tensors = self._observation(body) if self.json_bytes == 0 else self._tensors(body)
        asked = self._asked.parameters
        self._check_outputs(is_stateless=not asked.sequence_id)
        block = self._codec.reader.block(tensors, _scalars(asked))
        return Request(block, asked.timeout / 1000 if asked.timeout else None)

    def write(self, block: Block, answer: Answer) -> bytes:
        asked, codec = self._asked, self._codec
        tensors = answer.tensors(codec.reader.states)
        wanted = asked.outputs or [InferOutput(name=name) for name in tensors]
        outputs: list[dict[str, Any]] = []
        binary: list[bytes] = []
        for output in wanted:
            tensor = tensors[output.name]
            told: dict[str, Any] = {
                "name": output.name,
                "datatype": DATATYPES[DTYPE_NAMES[tensor.dtype]],
                "shape": tensor.shape,
            }
            is_binary = output.parameters.binary_data
            if asked.parameters.binary_data_output if is_binary is None else is_binary:
                content = tensor.tobytes()
                told["parameters"] = {"binary_data_size": len(content)}
                binary.append(content)
            else:
                told["data"] = tensor.ravel().tolist()
            outputs.append(told)
        body: dict[str, Any] = {"model_name": codec.name, "model_version": VERSION}
        if asked.id:
            body["id"] = asked.id
        body["parameters"] = {
            "step": answer.step,
            "policy_version": answer.policy_version,
            "heads": codec.heads,
        }
        text = to_json({**body, "outputs": outputs})
        if not binary:
            return text
        self.content_type, self.answer_json_bytes = BINARY, len(text)
        return b"".join((text, *binary))

    def _tensors(self, body: bytes | bytearray) -> Mapping[str, NDArray[Any]]:
        at = len(body) if self.json_bytes is None else self.json_bytes
        if at > len(body):
            raise Malformed(
                f"the Inference-Header-Content-Length is {at}, and the body has {len(body)} bytes"
            )
        if at > self._codec.max_json_bytes:
            raise TooLarge(f"the JSON is larger than {self._codec.max_json_bytes} bytes")
        try:
            self._asked = asked = self._codec.validator.validate_json(body[:at])
        except ValidationError as error:
            raise refusal(error) from error
        _check_fields(asked)
        tensors: dict[str, NDArray[Any]] = {}
        for given in asked.inputs:
            if given.name in tensors:
                raise Malformed(f"`{short(given.name)}` is given twice")
            dtype, size = self._dtype(given), given.parameters.binary_data_size
            if size is None:
                tensors[given.name] = _array(given, dtype)
                continue
            if given.data is not None:
                raise Malformed(f"`{given.name}` has both `data` and a `binary_data_size`")
            if prod(given.shape) * DTYPES[dtype].itemsize != size:
                raise Malformed(
                    f"`{given.name}` has {size} bytes, which are not {given.datatype} {given.shape}"
                )
            if size > len(body) - at:
                raise Malformed(f"`{given.name}` ends after the body, which has {len(body)} bytes")
            tensors[given.name] = view(body, given.name, dtype, given.shape, at)
            at += size
        if at != len(body):
            raise Malformed(f"the tensors end at byte {at} of the body, which has {len(body)}")
        return tensors

    def _observation(self, body: bytes | bytearray) -> Mapping[str, NDArray[Any]]:
        """A body that is nothing but the bytes of the one tensor that is required."""
        row = self._codec.observation_dim * DTYPES["F32"].itemsize
        if len(body) % row:
            raise Malformed(f"the body has {len(body)} bytes; a row of `observation` has {row}")
        shape = [len(body) // row, self._codec.observation_dim]
        return {OBSERVATION: view(body, OBSERVATION, "F32", shape, 0)}

    def _dtype(self, given: InferInput) -> str:
        """The input's, as safetensors have it."""
        dtypes = self._codec.reader.dtypes.get(given.name)
        if dtypes is None:
            raise Malformed(f"`{short(given.name)}` is not a tensor that is read here")
        for dtype in dtypes:
            if DATATYPES[dtype] == given.datatype:
                return dtype
        known = " or ".join(DATATYPES[dtype] for dtype in dtypes)
        raise Malformed(f"`{given.name}` is {short(given.datatype)}, not {known}")

    def _check_outputs(self, *, is_stateless: bool) -> None:
        seen = set[str]()
        for output in self._asked.outputs:
            if output.name in seen:
                raise Malformed(f"`{output.name}` is asked for twice")
            seen.add(output.name)
            if output.name not in self._codec.outputs:
                known = ", ".join(self._codec.outputs)
                raise Malformed(f"`{short(output.name)}` is no output; there are {known}")
            if output.name in self._codec.reader.states and not is_stateless:
                raise Invalid(
                    f"`{output.name}` is for stateless requests; the server keeps a session's state"
                )


def _check_fields(asked: InferRequest) -> None:
    """Raises Malformed where there is one that this server does not know."""
    parts: list[tuple[str, BaseModel]] = [("", asked), ("parameters.", asked.parameters)]
    for at, given in enumerate(asked.inputs):
        parts += [(f"inputs[{at}].", given), (f"inputs[{at}].parameters.", given.parameters)]
    for at, wanted in enumerate(asked.outputs):
        parts += [(f"outputs[{at}].", wanted), (f"outputs[{at}].parameters.", wanted.parameters)]
    for where, part in parts:
        if part.model_extra:
            raise unknown_field(where, part.model_extra)


def _metadata(tensors: Mapping[str, Tensor]) -> list[TensorMetadata]:
    return [
        TensorMetadata(name=name, datatype=DATATYPES[of.dtypes[0]], shape=[-1, *of.shape])
        for name, of in tensors.items()
    ]


def _scalars(asked: InferParameters) -> Scalars:
    if not asked.sequence_id:
        for name in ("sequence_start", "sequence_end"):
            if getattr(asked, name):
                raise Invalid(f"`{name}` needs a `sequence_id`")
    return Scalars(
        session_id=str(asked.sequence_id) if asked.sequence_id else None,
        run=asked.run,
        step=asked.step,
        seed=asked.seed,
        deterministic=asked.deterministic,
        starts=asked.sequence_start,
        ends=asked.sequence_end,
    )


def _array(given: InferInput, dtype: str) -> NDArray[Any]:
    """The tensor that stands in JSON. Numbers are kept in 64 bits until they are known to fit."""
    values, kinds = _flat(given), KINDS[dtype]
    if not {*map(type, values)} <= kinds or (dtype == "BOOL" and not {*values} <= {0, 1}):
        at = next(
            at
            for at, value in enumerate(values)
            if type(value) not in kinds or (dtype == "BOOL" and value not in (0, 1))
        )
        raise Malformed(f"`{given.name}.data` has at {at} what is no {given.datatype}")
    try:
        array = np.array(values, dtype=np.float64 if dtype == "F32" else DTYPES[dtype])
        return array.reshape(given.shape)
    except OverflowError as error:
        raise Malformed(f"`{given.name}.data` has what is no {given.datatype}") from error
    except ValueError as error:  # empty, and its other sizes are beyond any array's
        raise Malformed(f"`{given.name}` has a shape that no array has") from error


def _flat(given: InferInput) -> list[Any]:
    data, shape = given.data, given.shape
    if not isinstance(data, list):
        raise Malformed(f"`{given.name}` has neither `data`, a list, nor a `binary_data_size`")
    if len(shape) > 1 and data and isinstance(data[0], list):
        lists = [data]
        for depth, size in enumerate(shape):
            if any(not isinstance(of, list) or len(of) != size for of in lists):
                raise Malformed(f"`{given.name}.data` is not nested as its shape, {shape}")
            if depth < len(shape) - 1:
                lists = list(chain.from_iterable(lists))
        data = list(chain.from_iterable(lists))
    if len(data) != prod(shape):
        raise Malformed(f"`{given.name}.data` has {len(data)} values, which are not {shape}")
    return data
