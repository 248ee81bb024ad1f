"""The wire types of the HTTP interface: what `/docs` shows is what is read and written.

`act_request` and `act_response` make them for one policy, whose lengths, heads and bounds they
have; the models here are what every policy has in common.
"""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, create_model
from pydantic.functional_validators import BeforeValidator
from pydantic_core import CoreSchema, PydanticCustomError
from typing_extensions import TypedDict

from export.manifest import Array, Parameter, Precision
from model.step_spec import StepSpec

Identifier = Annotated[str, Field(min_length=1, max_length=256)]

# Without it, pydantic collects an error for every wrong value of a long list: a body at the
# size limit would hold the event loop for seconds.
FAIL_FAST = Field(fail_fast=True)
# What is required and absent is empty, as nothing that is given can be: an error of pydantic's own
# would make Python objects of all that is there instead.
ABSENT: Any = Field(default_factory=list)
BEYOND_FLOAT32 = 2.0**128 - 2.0**103
"""The least number that rounds to no finite float32."""
FLOAT32 = {"exclusiveMinimum": -BEYOND_FLOAT32, "exclusiveMaximum": BEYOND_FLOAT32}
Float = Annotated[float, Field(json_schema_extra={**FLOAT32})]
Floats = Annotated[list[Float], FAIL_FAST]


class OneError:
    """A union that is refused in one sentence instead of one for each of its members."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schema = {
            **handler(source),
            "custom_error_type": "one_of",
            "custom_error_message": self._message,
        }
        return cast(CoreSchema, schema)


Allowed = Annotated[
    bool | Annotated[int, Field(ge=0, le=1)], OneError("Input should be true, false, 1 or 0")
]
"""Whether a choice is; gymnasium's masks are of integers."""
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Starts = Annotated[
    bool | Annotated[list[bool], Field(min_length=1), FAIL_FAST],
    OneError("Input should be true, false, or a list of them, one a row"),
]
Seeds = Annotated[
    Seed | Annotated[list[Seed], Field(min_length=1), FAIL_FAST],
    OneError("Input should be an integer from 0 to 2**64 - 1, or a list of them, one a row"),
]


NO_START = {"const": False}
ALLOWS_ONE = Field(json_schema_extra={"contains": {"enum": [True, 1]}})


def _config(**schema: Any) -> ConfigDict:
    # No unknown name is accepted: the codec refuses the first, where `forbid` would list them all.
    extra: Any = {"additionalProperties": False, **schema}
    return ConfigDict(strict=True, extra="allow", json_schema_extra=extra)


def _of_a_session_or_stateless(absent: dict[str, Any]) -> list[dict[str, Any]]:
    """A request's two kinds; `absent`: a session's own fields, and what each is without one."""
    return [
        {
            "title": "A step of a session",
            "required": ["session_id"],
            "properties": {"session_id": {"type": "string"}, "state": {"type": "null"}},
        },
        {
            "title": "A stateless step",
            "properties": {"session_id": {"type": "null"}, **absent},
        },
    ]


class _AnyActRequest(BaseModel):
    """What requests of one environment and of many have alike."""

    session_id: Annotated[
        Identifier | None,
        Field(description="Whose state the server keeps. Without it the request is stateless."),
    ] = None
    deterministic: Annotated[
        bool, Field(description="Take the most likely action instead of sampling.")
    ] = False
    timeout_ms: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="Give up (504) if the model was not free by then; without it, after "
            "`limits.timeout_ms` of `GET /policy`.",
        ),
    ] = None


class ActRequest(_AnyActRequest):
    """One step of one environment. Only `observation` is required.

    With a `session_id` the server keeps the recurrent state: `episode_start` starts an episode, at
    step 0. Without one the request is stateless: it starts from zeros or from `state`, and has no
    `episode` and no `episode_start`.
    """

    model_config = _config(
        required=["observation"],
        oneOf=_of_a_session_or_stateless(
            {"episode": {"type": "null"}, "episode_start": {"const": False}}
        ),
        **{
            "not": {
                "title": "An episode starts at step 0",
                "required": ["episode_start", "step"],
                "properties": {
                    "episode_start": {"const": True},
                    "step": {"type": "integer", "minimum": 1},
                },
            }
        },
    )

    observation: Annotated[
        Floats,
        ABSENT,
        Field(description="Raw, as the environment gives it; the policy normalises."),
    ]
    action_mask: Annotated[
        Any,
        Field(
            description="Per head, true or 1 = allowed. A head left out has everything allowed; "
            "one that is here allows at least one choice."
        ),
    ] = None
    episode: Annotated[
        Identifier | None,
        Field(
            description="The client's name for the episode; makes a start safe to retry. Needs a "
            "`session_id`."
        ),
    ] = None
    step: Annotated[
        int | None,
        Field(ge=0, lt=2**64, description="Index in the episode; makes a step safe to retry."),
    ] = None
    episode_start: Annotated[
        bool,
        Field(
            description="Starts the session, or starts it anew, from zero state. Needs a "
            "`session_id`, and no `step` but 0."
        ),
    ] = False
    seed: Annotated[
        Seed | None,
        Field(
            description="Of the episode's noise; read at its start, and the same or absent later."
        ),
    ] = None
    state: Annotated[
        Any,
        Field(description="Stateless only, without `session_id`: `state` of the last answer."),
    ] = None


class VectorActRequest(_AnyActRequest):
    """One step of `n` environments that step together. Only `observation` is required.

    Everything has a row for each, in their order. A session's first request (`step` 0) starts every
    row; later, rows start where their environments do. Without a `session_id` the request is
    stateless, and starts from zeros or from `state`.
    """

    model_config = _config(
        required=["observation"],
        oneOf=_of_a_session_or_stateless(
            {
                "run": {"type": "null"},
                "episode_start": {"anyOf": [NO_START, {"type": "array", "items": NO_START}]},
            }
        ),
    )

    observation: Annotated[
        list[Floats], ABSENT, Field(description="Raw, one row for each environment.")
    ]
    action_mask: Annotated[
        Any, Field(description="Per head, one row for each environment, as for a single one.")
    ] = None
    run: Annotated[
        Identifier | None,
        Field(
            description="The client's name for all that follows from one first request; makes that "
            "one safe to retry, with `step` or without. Needs a `session_id`."
        ),
    ] = None
    step: Annotated[
        int | None,
        Field(
            ge=0,
            lt=2**64,
            description="Number of the request in its run, whatever episodes the rows are in; "
            "makes it safe to retry.",
        ),
    ] = None
    episode_start: Annotated[
        Starts,
        Field(
            description="Which rows start an episode, from zero state; or one for all. Needs a "
            "`session_id`."
        ),
    ] = False
    seed: Annotated[
        Seeds | None,
        Field(
            description="Of the run: each row's episodes draw with seeds made from it. Or one a "
            "row, read for the rows that start."
        ),
    ] = None
    state: Annotated[
        Any,
        Field(description="Stateless only: `state` of the last answer, `[n][layers][hidden]`."),
    ] = None


def act_request(spec: StepSpec) -> type[ActRequest]:
    """`ActRequest` with this policy's lengths and heads, and a field for each input of its own."""
    narrower: dict[str, Any] = {
        "observation": _exactly(spec.observation_dim, Float),
        "action_mask": _action_mask(spec) | None,
        "state": _state(spec),
    }
    fields: dict[str, Any] = {
        name: Annotated[values, ActRequest.model_fields[name]] for name, values in narrower.items()
    }
    if spec.blueprint_embedding_dim is not None:
        fields["blueprint_index"] = (_blueprint_index(spec), None)
    if spec.has_slot_by_op:
        fields["slot_by_op_mask"] = (_slot_by_op_mask(spec), None)
    return create_model("ActRequest", __base__=ActRequest, __doc__=ActRequest.__doc__, **fields)


def vector_act_request(spec: StepSpec) -> type[VectorActRequest]:
    """`VectorActRequest` with this policy's lengths and heads, and its own inputs."""
    observation: Any = _exactly(spec.observation_dim, Float)
    masks = {head.name: _rows(_allowing_one(head.size)) for head in spec.heads}
    narrower: dict[str, Any] = {
        "observation": Annotated[list[observation], Field(min_length=1), FAIL_FAST],
        "action_mask": _by_head(
            "VectorActionMask", "What each head may choose, in each row.", masks, total=False
        )
        | None,
        "state": _state(spec, is_vector=True),
    }
    fields: dict[str, Any] = {
        name: Annotated[values, VectorActRequest.model_fields[name]]
        for name, values in narrower.items()
    }
    if spec.blueprint_embedding_dim is not None:
        rows = _rows(_exactly(spec.num_slots, _blueprint(spec)))
        fields["blueprint_index"] = (rows | None, None)
    if spec.has_slot_by_op:
        rows = _rows(_exactly(spec.num_ops, _exactly(spec.num_slots, Allowed)))
        fields["slot_by_op_mask"] = (rows | None, None)
    doc = VectorActRequest.__doc__
    return create_model("VectorActRequest", __base__=VectorActRequest, __doc__=doc, **fields)


def _rows(of: Any) -> Any:
    # As many as the observation has; pydantic's own word for none would be of the policy's lengths.
    return Annotated[list[of], Field(json_schema_extra={"minItems": 1}), FAIL_FAST]


def _exactly(length: int, of: Any) -> Any:
    return Annotated[list[of], Field(min_length=length, max_length=length), FAIL_FAST]


def _by_head(name: str, doc: str, fields: dict[str, Any], *, total: bool) -> Any:
    # Not a model: a head may be called what one of its methods is.
    make: Any = TypedDict
    by_head = make(name, fields, total=total)
    by_head.__doc__ = doc
    by_head.__pydantic_config__ = _config()
    return by_head


def _allowing_one(size: int) -> Any:
    return Annotated[_exactly(size, Allowed), ALLOWS_ONE]


def _action_mask(spec: StepSpec) -> Any:
    fields = {head.name: _allowing_one(head.size) for head in spec.heads}
    return _by_head("ActionMask", "What each head may choose.", fields, total=False)


def _state(spec: StepSpec, *, is_vector: bool = False) -> Any:
    """What a client may carry itself; None alone, where the policy has no state."""
    if not spec.states:
        return Annotated[None, BeforeValidator(_no_state)]
    fields: Any = {}
    for state in spec.states:
        values: Any = Float
        for length in reversed(state.shape):
            values = _exactly(length, values)
        fields[state.name] = Annotated[_rows(values) if is_vector else values, ABSENT]
    name = "VectorHiddenStateBody" if is_vector else "HiddenStateBody"
    doc = "A recurrent state the client carries itself: each `[layers][hidden]`."
    config = _config(required=[*fields])
    return create_model(name, __config__=config, __doc__=doc, **fields) | None


def _no_state(given: Any) -> None:
    if given is not None:
        raise PydanticCustomError("no_state", "this policy has no state that a client could carry")


def _blueprint(spec: StepSpec) -> Any:
    bounds = Field(json_schema_extra={"minimum": -1, "maximum": spec.num_blueprints - 1})
    return Annotated[int, bounds]


def _blueprint_index(spec: StepSpec) -> Any:
    return Annotated[
        _exactly(spec.num_slots, _blueprint(spec)) | None,
        Field(description="Which blueprint each slot holds, -1 = none; without it, none in any."),
    ]


def _slot_by_op_mask(spec: StepSpec) -> Any:
    return Annotated[
        _exactly(spec.num_ops, _exactly(spec.num_slots, Allowed)) | None,
        Field(
            description="`[ops][slots]`, true or 1 = allowed: which slots each op may take, in "
            "place of `action_mask.slot`, which holds for every op. An op that is allowed and "
            "needs a slot has at least one."
        ),
    ]


class ActResponse(BaseModel):
    """The decision; `value` is V(s) in returns. `state` comes with stateless requests only."""

    session_id: str | None = None
    step: int
    action: dict[str, int]
    log_prob: dict[str, float]
    value: float
    policy_version: str


def act_response(spec: StepSpec) -> type[ActResponse]:
    """`ActResponse` with this policy's heads, and what else its step gives of the critic."""
    choices: dict[str, Any] = {
        head.name: Annotated[int, Field(ge=0, lt=head.size)] for head in spec.heads
    }
    log_probs: dict[str, Any] = {head.name: float for head in spec.heads}
    fields: dict[str, Any] = {
        "action": (_by_head("Action", "The choice of each head.", choices, total=True), ...),
        "log_prob": (
            _by_head("LogProb", "Of each choice; 0 where it was forced.", log_probs, total=True),
            ...,
        ),
        **({"state": (_state(spec), None)} if spec.states else {}),
    }
    extra: dict[str, Any] = {
        "q_value": Annotated[float, Field(description="Q(s, op) in returns, of the op taken.")],
        "contribution": Annotated[
            list[float], Field(description="What each slot is predicted to contribute.")
        ],
    }
    fields |= {name: (extra[name], ...) for name in spec.extra_outputs}
    return create_model("ActResponse", __base__=ActResponse, __doc__=ActResponse.__doc__, **fields)


def vector_act_response(spec: StepSpec) -> type[BaseModel]:
    """The same for a vector: a row for each environment in every list."""
    choices: dict[str, Any] = {
        head.name: list[Annotated[int, Field(ge=0, lt=head.size)]] for head in spec.heads
    }
    log_probs: dict[str, Any] = {head.name: list[float] for head in spec.heads}
    extra: dict[str, Any] = {"q_value": list[float], "contribution": list[list[float]]}
    fields: dict[str, Any] = {
        "session_id": (str | None, None),
        "step": (int, ...),
        "action": (_by_head("VectorAction", "Each head's choices.", choices, total=True), ...),
        "log_prob": (_by_head("VectorLogProb", "Of each.", log_probs, total=True), ...),
        "value": (list[float], ...),
        "policy_version": (str, ...),
        **({"state": (_state(spec, is_vector=True), None)} if spec.states else {}),
        **{name: (extra[name], ...) for name in spec.extra_outputs},
    }
    doc = "The decisions for a vector, a row for each environment."
    return create_model("VectorActResponse", __doc__=doc, **fields)


class ErrorResponse(BaseModel):
    """Every answer that is not 2xx: a sentence for a person, and a word for a program."""

    error: str
    error_type: str


class Limits(BaseModel):
    """What the server holds and waits for at most."""

    max_batch_size: int
    max_rows: int
    max_waiting: int
    max_sessions: int
    session_idle_s: float
    timeout_ms: float
    max_body_bytes: int
    max_safetensors_bytes: int
    max_weights_bytes: int


class PolicyResponse(BaseModel):
    """What is served, and within which limits."""

    name: str
    policy_version: str
    spec: StepSpec
    states: list[Array]
    runtime: str
    device: str
    precision: Precision
    has_normalizer: bool
    parameters: list[Parameter]
    limits: Limits


def policy_response(spec: StepSpec) -> type[PolicyResponse]:
    """`PolicyResponse` with what a spec of this one's family has."""
    of_family: Any = (type(spec), ...)
    doc = PolicyResponse.__doc__
    return create_model("PolicyResponse", __base__=PolicyResponse, __doc__=doc, spec=of_family)


class Alive(BaseModel):
    """The process answers."""

    alive: Literal[True] = True


class Ready(BaseModel):
    """`POST /act` answers at full speed."""

    ready: Literal[True] = True


class FrontPage(BaseModel):
    """What this is and where to go."""

    service: str
    summary: str
    policy: str
    policy_version: str
    links: dict[str, str]
