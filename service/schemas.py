"""The wire types of the HTTP interface: what `/docs` shows is what is read and written."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from model.spec import PolicySpec

Identifier = Annotated[str, Field(min_length=1, max_length=256)]

# Without it, pydantic collects an error for every wrong value of a long list: a body at the
# size limit would hold the event loop for seconds.
FAIL_FAST = Field(fail_fast=True)
Floats = Annotated[list[float], FAIL_FAST]
Bools = Annotated[list[bool], FAIL_FAST]


class HiddenStateBody(BaseModel):
    """A recurrent state the client carries itself: each `[layers][hidden]`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    h: Annotated[list[Floats], FAIL_FAST]
    c: Annotated[list[Floats], FAIL_FAST]


class ActRequest(BaseModel):
    """One step of one environment. Only `observation` is required."""

    model_config = ConfigDict(strict=True, extra="forbid")

    observation: Annotated[
        Floats, Field(description="Raw, as the environment gives it; the policy normalises.")
    ]
    action_mask: Annotated[
        dict[str, Bools] | None,
        Field(description="Per head, true = allowed. A head left out has everything allowed."),
    ] = None
    session_id: Annotated[
        Identifier | None,
        Field(description="The environment. Without it the request is stateless."),
    ] = None
    episode: Annotated[
        Identifier | None,
        Field(description="The client's name for the episode; makes a start safe to retry."),
    ] = None
    step: Annotated[
        int | None,
        Field(ge=0, lt=2**64, description="Index in the episode; makes a step safe to retry."),
    ] = None
    episode_start: Annotated[
        bool, Field(description="Starts the session, or starts it anew, from zero state.")
    ] = False
    seed: Annotated[
        int | None,
        Field(ge=0, lt=2**64, description="Of the episode's noise; read at its start."),
    ] = None
    deterministic: Annotated[
        bool, Field(description="Take the most likely action instead of sampling.")
    ] = False
    timeout_ms: Annotated[
        float | None, Field(gt=0, description="Give up (504) if the model was not free by then.")
    ] = None
    state: Annotated[
        HiddenStateBody | None, Field(description="Stateless only: `state` of the last answer.")
    ] = None


BlueprintIndex = Annotated[
    Annotated[list[int], FAIL_FAST] | None,
    Field(description="Which blueprint each slot holds, -1 = none; without it, none in any."),
]
SlotByOpMask = Annotated[
    Annotated[list[Bools], FAIL_FAST] | None,
    Field(
        description="`[ops][slots]`, true = allowed: which slots each op may take, in place of "
        "`action_mask.slot`, which holds for every op."
    ),
]


def act_request(spec: PolicySpec) -> type[ActRequest]:
    """The request for this policy: `ActRequest`, and a field for each input that it alone has."""
    fields: dict[str, Any] = {}
    if spec.blueprint_embedding_dim is not None:
        fields["blueprint_index"] = (BlueprintIndex, None)
    if spec.has_slot_by_op:
        fields["slot_by_op_mask"] = (SlotByOpMask, None)
    if not fields:
        return ActRequest
    return create_model("ActRequest", __base__=ActRequest, __doc__=ActRequest.__doc__, **fields)


class ActResponse(BaseModel):
    """The decision; `value` is V(s) in returns. `state` comes with stateless requests only."""

    session_id: str | None = None
    step: int
    action: dict[str, int]
    log_prob: dict[str, float]
    value: float
    policy_version: str
    state: HiddenStateBody | None = None


EXTRA_FIELDS: dict[str, Any] = {
    "q_value": Annotated[float, Field(description="Q(s, op) in returns, of the op taken.")],
    "contribution": Annotated[
        list[float], Field(description="What each slot is predicted to contribute.")
    ],
}


def act_response(spec: PolicySpec) -> type[ActResponse]:
    """The answer of this policy: `ActResponse`, and what else its step gives of the critic."""
    fields = {name: (EXTRA_FIELDS[name], ...) for name in spec.extra_outputs}
    if not fields:
        return ActResponse
    of: Any = fields
    return create_model("ActResponse", __base__=ActResponse, __doc__=ActResponse.__doc__, **of)


class ErrorResponse(BaseModel):
    """Every answer that is not 2xx."""

    error: str
    error_type: str


class PolicyResponse(BaseModel):
    """What is served, and within which limits."""

    name: str
    policy_version: str
    spec: dict[str, Any]
    runtime: str
    device: str
    limits: dict[str, int | float]
