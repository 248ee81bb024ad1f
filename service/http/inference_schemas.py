"""The wire types of the Open Inference Protocol, as far as this server speaks it.

https://github.com/open-inference/open-inference-protocol, inference_rest.md, and Triton's
extensions of it for binary tensors, sequences and parameters.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.http.schemas import FAIL_FAST, Identifier, OneError, Seed

Size = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**64)]


MOST_DIMENSIONS = 8
"""Of a shape; no tensor of a policy's has as many."""
SequenceId = Annotated[
    Count | Annotated[str, Field(max_length=256)],
    OneError("Input should be an integer from 0 to 2**64 - 1 or a string of at most 256"),
]


class _Wire(BaseModel):
    # What is unknown is refused, by the codec: it may be what the client counts on.
    model_config = ConfigDict(
        strict=True, extra="allow", json_schema_extra={"additionalProperties": False}
    )


class InferParameters(_Wire):
    """What a request says besides its tensors. `priority` is taken, and makes no difference."""

    sequence_id: Annotated[
        SequenceId,
        Field(description='The session; 0 and "" are none: the request is stateless.'),
    ] = 0
    sequence_start: Annotated[
        bool, Field(description="Every row starts an episode, from zero state.")
    ] = False
    sequence_end: Annotated[
        bool, Field(description="The session takes no step after this one.")
    ] = False
    run: Annotated[Identifier | None, Field(description="As `run` of a vector in `POST /act`.")] = (
        None
    )
    step: Annotated[
        Count | None, Field(description="As `step` in `POST /act`; makes it safe to retry.")
    ] = None
    seed: Annotated[Seed | None, Field(description="As `seed` of a vector in `POST /act`.")] = None
    deterministic: Annotated[
        bool, Field(description="Take the most likely action instead of sampling.")
    ] = False
    timeout: Annotated[
        Count | None,
        Field(description="Microseconds after which to give up (504) if the model was not free."),
    ] = None
    binary_data_output: Annotated[
        bool, Field(description="Answer in binary, but for outputs that say otherwise.")
    ] = False
    priority: Count = 0


class InputParameters(_Wire):
    binary_data_size: Annotated[
        Size | None, Field(description="Its bytes, which follow the JSON; without it, `data`.")
    ] = None


class InferInput(_Wire):
    """One tensor, with a row for each environment."""

    name: str
    shape: Annotated[list[Size], Field(max_length=MOST_DIMENSIONS), FAIL_FAST]
    datatype: str
    parameters: InputParameters = InputParameters()
    data: Annotated[Any, Field(description="Row-major, flat or nested as `shape` says.")] = None


class OutputParameters(_Wire):
    binary_data: bool | None = None


class InferOutput(_Wire):
    """A tensor that the answer is to have."""

    name: str
    parameters: OutputParameters = OutputParameters()


class InferRequest(_Wire):
    """One step of the rows that the tensors have; `observation` is required."""

    id: Annotated[str, Field(max_length=256)] = ""
    parameters: InferParameters = InferParameters()
    inputs: Annotated[list[InferInput], Field(min_length=1), FAIL_FAST]
    outputs: Annotated[list[InferOutput], FAIL_FAST] = []


class TensorMetadata(BaseModel):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """What the policy reads and gives; -1 stands for any number of rows."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    live: Literal[True] = True


class ModelReady(BaseModel):
    name: str
    ready: Literal[True] = True


class InferredTensor(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    parameters: dict[str, int] | None = None


class InferResponse(BaseModel):
    """The decisions. `parameters` has `step`, `policy_version` and `heads`, comma-separated."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, str | int]
    outputs: list[InferredTensor]
