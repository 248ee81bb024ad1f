"""What `/openapi.json` says beside the models: each route's answers, and examples that work."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from math import log, prod
from typing import Any

import numpy as np

from export.manifest import Manifest
from model.step_spec import StepSpec
from service.errors import (
    Disconnected,
    Forbidden,
    NoPreviousVersion,
    PushConflict,
    ServiceError,
    SessionLost,
    StepConflict,
    UnknownModel,
    UnknownSession,
    VersionMismatch,
)
from service.http.codec import SAFETENSORS
from service.http.safetensors_codec import SCALARS
from service.http.safetensors_file import DTYPE_NAMES
from service.http.schemas import ErrorResponse
from service.http.tensors import request_tensors
from service.runtime.arrays import decisions

Json = dict[str, Any]
Responses = dict[int | str, Json]

ANYWHERE = (408, 431, 500)
"""What any request may get, whatever its route."""
OF_SESSIONS = (UnknownSession, StepConflict, SessionLost)
OF_WEIGHTS = (Forbidden, PushConflict, NoPreviousVersion, VersionMismatch)
OF_MODELS = (UnknownModel,)
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
REPLAYED = {
    "Replayed": {
        "description": "On the answer to a retry: the stored one, byte for byte.",
        "schema": {"const": "true"},
    }
}
OF_ERRORS: Json = {
    "Retry-After": {
        "description": "Seconds to wait.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "WWW-Authenticate": {"description": "How to show a key.", "schema": {"const": "Bearer"}},
}
"""The headers that come with some errors."""
BEARER = {
    "type": "http",
    "scheme": "bearer",
    "description": "A key of `--act-keys` or, for what changes the policy, of `--admin-keys`.",
}


def error_responses(
    *statuses: int, but: Collection[type[ServiceError]] = (*OF_WEIGHTS, *OF_MODELS)
) -> Responses:
    """The errors of these statuses, in the one form, with the words and headers each comes with.

    A status that no `ServiceError` has, or only those of `but`, is left out.
    """
    by_status: dict[int, list[type[ServiceError]]] = defaultdict(list)
    for error in _sent_errors():
        if error not in but:
            by_status[error.status_code].append(error)
    return {
        status: _response(by_status[status]) for status in sorted(statuses) if by_status[status]
    }


def every_error(but: Collection[type[ServiceError]] = (*OF_WEIGHTS, *OF_MODELS)) -> Responses:
    """Everything that `POST /act` may answer but 200."""
    return error_responses(*{error.status_code for error in _sent_errors()}, but=but)


def bearer(*, is_needed: bool) -> Json:
    """What a route's operation says of keys."""
    return {"security": [{"bearer": []}] if is_needed else [{}, {"bearer": []}]}


def with_bearer(document: Json) -> Json:
    """The same document with what `bearer` speaks of."""
    components = document["components"] | {"securitySchemes": {"bearer": BEARER}}
    return {**document, "components": components}


def json_content(example: Any) -> Json:
    """A response's `content`, by what one looks like; its schema is the route's model."""
    return {"application/json": {"example": example}}


def text_content(media_type: str, example: str) -> Json:
    """The same of a response that is no JSON."""
    return {media_type: {"schema": {"type": "string"}, "example": example}}


def act_examples(spec: StepSpec) -> dict[str, Json]:
    """Bodies of `POST /act` that this policy answers, as they are."""
    observation = [0.1] * spec.observation_dim
    masks = {head.name: [True] * head.size for head in spec.heads}
    if spec.num_ops > 1:
        masks[spec.head_names[spec.op_index]][-1] = False
    inputs: Json = {"observation": observation, "action_mask": masks}
    if spec.blueprint_embedding_dim is not None:
        inputs["blueprint_index"] = [-1] * spec.num_slots
    if spec.has_slot_by_op:
        inputs["slot_by_op_mask"] = [[True] * spec.num_slots] * spec.num_ops
    turn: Json = {"session_id": "env-17", "episode": "7"}
    rows: Json = {name: [value] * 2 for name, value in inputs.items() if name != "action_mask"}
    rows["action_mask"] = {head: [mask] * 2 for head, mask in masks.items()}
    run: Json = {"session_id": "trainer-3", "run": "b6c1"}
    return {
        "start": {
            "summary": "The first step of an episode",
            "value": {**turn, "step": 0, "episode_start": True, "seed": 42, **inputs},
        },
        "step": {"summary": "The one after it", "value": {**turn, "step": 1, **inputs}},
        "stateless": {
            "summary": "A step without a session, and the most likely action",
            "value": {"observation": observation, "deterministic": True},
        },
        "vector_start": {
            "summary": "The first step of two environments that step together",
            "value": {**run, "step": 0, "episode_start": True, "seed": 42, **rows},
        },
        "vector_step": {
            "summary": "The one after it, in which the second environment starts an episode",
            "value": {**run, "step": 1, "episode_start": [False, True], **rows},
        },
        "vector_stateless": {
            "summary": "The most likely actions of two environments, without a session",
            "value": {"observation": [observation] * 2, "deterministic": True},
        },
    }


def act_answer(spec: StepSpec, policy_version: str) -> Json:
    """What the first step of an episode may be answered."""
    extra: Json = (
        {"q_value": 0.2, "contribution": [0.0] * spec.num_slots} if (spec.extra_outputs) else {}
    )
    return {
        "session_id": "env-17",
        "step": 0,
        "action": dict.fromkeys(spec.head_names, 0),
        "log_prob": {head.name: round(-log(head.size), 4) for head in spec.heads},
        "value": 0.12,
        "policy_version": policy_version,
        **{name: extra[name] for name in spec.extra_outputs},
    }


def infer_examples(spec: StepSpec) -> dict[str, Json]:
    """Bodies of `POST .../infer` that this policy answers, as they are."""
    observation = {
        "name": "observation",
        "datatype": "FP32",
        "shape": [2, spec.observation_dim],
        "data": [0.1] * (2 * spec.observation_dim),
    }
    turn = {"sequence_id": "trainer-4", "run": "b6c1"}
    return {
        "start": {
            "summary": "The first step of two environments that step together",
            "value": {
                "parameters": {**turn, "step": 0, "sequence_start": True, "seed": 42},
                "inputs": [observation],
            },
        },
        "step": {
            "summary": "The one after it",
            "value": {"parameters": {**turn, "step": 1}, "inputs": [observation]},
        },
        "stateless": {
            "summary": "A step without a sequence: the most likely actions, and nothing else",
            "value": {
                "parameters": {"deterministic": True},
                "inputs": [observation],
                "outputs": [{"name": "action"}],
            },
        },
    }


def infer_answer(manifest: Manifest) -> Json:
    """What the last of them may be answered."""
    heads = manifest.spec.head_names
    shape = [2, len(heads)]
    told = {"step": 0, "policy_version": manifest.policy_version, "heads": ",".join(heads)}
    action = {"name": "action", "datatype": "INT64", "shape": shape, "data": [0] * prod(shape)}
    return {
        "model_name": manifest.name,
        "model_version": "1",
        "parameters": told,
        "outputs": [action],
    }


def safetensors_request(spec: StepSpec) -> Json:
    """The other form of a request: `content` by what its file holds, for this policy."""
    lines = [
        f"- `{name}`: {' or '.join(tensor.dtypes)} {_rows_of(tensor.shape)}"
        for name, tensor in request_tensors(spec).items()
    ]
    return _file(
        "A vector of n environments as one safetensors file.\n\n"
        "Tensors, of which only `observation` is required:\n\n"
        + "\n".join(lines)
        + "\n\n`action_mask` has the heads side by side, in the policy's order; in its place there "
        "may be one for each head that is to be masked. `seed` is read for the rows that start.\n\n"
        f"Metadata, all strings and optional: {_listed(SCALARS)}; `deterministic` is `true` or "
        "`false`. They mean what the fields of that name do."
    )


def safetensors_answer(spec: StepSpec) -> Json:
    """The same of an answer."""
    of_spec = ", ".join(
        f"`{array.name}` {DTYPE_NAMES[np.dtype(array.dtype)]} {_rows_of(array.shape[1:])}"
        for array in decisions(spec)
    )
    states = _listed(state.tensor for state in spec.states)
    shapes = " or ".join({_rows_of(state.shape): None for state in spec.states})
    also = f"; of a stateless request also {' and '.join(states.rsplit(', ', 1))} F32 {shapes}"
    return _file(
        f"One safetensors file. Tensors: {of_spec}{also if states else ''}. Metadata, all strings: "
        "`session_id`, if there is one, `step`, `policy_version`, and `heads`: the columns of "
        "`action` and `log_prob`, separated by commas."
    )


def _file(description: str) -> Json:
    return {
        SAFETENSORS: {"schema": {"type": "string", "format": "binary", "description": description}}
    }


def _rows_of(shape: Iterable[int | str]) -> str:
    return f"[{', '.join(['n', *map(str, shape)])}]"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def with_whole_bounds(node: Any) -> Any:
    """The same document with bounds of integers written as such.

    FastAPI makes floats of them, and validators then take 2**64 for less than 2**64.
    """
    if isinstance(node, list):
        return [with_whole_bounds(value) for value in node]
    if not isinstance(node, dict):
        return node
    return {
        name: int(value) if name in BOUNDS and _is_whole(value) else with_whole_bounds(value)
        for name, value in node.items()
    }


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer() and abs(value) <= 2**64


def _sent_errors(root: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    if root is not Disconnected:
        yield root
    for error in root.__subclasses__():
        yield from _sent_errors(error)


def _response(errors: list[type[ServiceError]]) -> Json:
    examples = {
        error.error_type: {"value": error((error.__doc__ or "").splitlines()[0]).body()}
        for error in errors
    }
    response: Json = {
        "model": ErrorResponse,
        "description": " ".join(
            f"`{name}`: {of['value']['error']}" for name, of in examples.items()
        ),
        "content": {"application/json": {"examples": examples}},
    }
    given = [error("").headers for error in errors]
    headers = {
        name: {**header, "required": all(name in of for of in given)}
        for name, header in OF_ERRORS.items()
        if any(name in of for of in given)
    }
    return {**response, "headers": headers} if headers else response
