"""What a JSON Schema cannot say of `POST /act`, for schemathesis: the reasoned exceptions.

Loaded by its command line, by `SCHEMATHESIS_HOOKS`. Every check is on and nothing else is excused.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from typing import Any

import numpy as np
import schemathesis
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save

SAFETENSORS = "application/vnd.safetensors"
BINARY = "application/octet-stream"
OBSERVED: list[int] = []
"""How many numbers the policy observes, once its document is loaded."""
LARGEST = 1e6
"""Beyond it an observation is a float32 like any other, but the network's sums may not be."""
LONG_ENOUGH_MS = 60_000.0


@schemathesis.hook
def after_load_schema(context: Any, schema: Any) -> None:
    """Has safetensors bodies made: to a schema they are bytes like any other."""
    fields = schema.raw_schema["components"]["schemas"]["ActRequest"]["properties"]
    num_observed = fields["observation"]["minItems"]
    schemathesis.openapi.media_type(SAFETENSORS, _files(num_observed))
    schemathesis.openapi.media_type(BINARY, st.just(json.dumps(_asked(num_observed)).encode()))
    OBSERVED.append(num_observed)


def _asked(num_observed: int) -> dict[str, Any]:
    """What there is to be in an inference: the one tensor that is required."""
    tensor = {"name": "observation", "datatype": "FP32", "shape": [1, num_observed]}
    return {"inputs": [tensor | {"data": [0.5] * num_observed}]}


def _infer(body: Any) -> None:
    """Makes the tensors of a drawn body the policy's.

    What they are called and how long their data are is in `GET /v2/models/NAME` and in no schema.
    """
    if not isinstance(body, dict):
        return
    body |= _asked(OBSERVED[-1])
    if body.get("outputs"):
        body["outputs"] = [{"name": "action"}]
    said = body.get("parameters", {})
    if not said.get("sequence_id"):
        for name in ("sequence_start", "sequence_end", "run"):
            said.pop(name, None)
    if said.get("sequence_start"):
        said.pop("step", None)
    for name in ("sequence_id", "step", "seed", "timeout", "priority"):
        if isinstance(said.get(name), float):
            said[name] = int(said[name])
    if said.get("timeout"):
        said["timeout"] = max(1000 * int(LONG_ENOUGH_MS), said["timeout"])


@st.composite
def _files(draw: st.DrawFn, num_observed: int) -> bytes:
    """Vectors of a few environments that observe so many numbers each."""
    rows = draw(st.integers(1, 4))
    values = arrays(np.float32, (rows, num_observed), elements=st.floats(-1, 1, width=32))
    dtype = draw(st.sampled_from(("float32", "float64")))
    tensors = {"observation": draw(values).astype(dtype)}
    if draw(st.booleans()):
        tensors["seed"] = draw(arrays(np.uint64, rows))
    words = {"deterministic": st.sampled_from(("true", "false")), "step": st.just("7")}
    return save(tensors, draw(st.fixed_dictionaries({}, optional=words)))


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Makes a request that the schema allows one that the service means to answer."""
    body = case.body
    if not case.meta.generation.mode.is_positive:
        return
    if case.path.endswith("/infer"):
        # Of a length, an encoding and a name no schema says that they are the body's.
        for name in ("inference-header-content-length", "content-encoding", "x-session-id"):
            if name in case.headers:
                del case.headers[name]
        _infer(body)
        return
    # No schema compares a header with a body: `X-Session-Id` is the body's `session_id` or absent.
    if "x-session-id" in case.headers:
        del case.headers["x-session-id"]
        session_id = body.get("session_id") if isinstance(body, dict) else None
        if isinstance(session_id, str) and session_id.isascii() and session_id.isprintable():
            case.headers["x-session-id"] = session_id
    if not isinstance(body, dict):
        return
    # An integer is written without a point: to a schema, 1.0 is one.
    for name in ("step", "seed", "action_mask", "slot_by_op_mask", "blueprint_index"):
        _change(body, name, lambda value: int(value) if isinstance(value, float) else value)
    # 422 where the policy's output is not finite: what is too large depends on its weights.
    for name in ("observation", "state"):
        _change(body, name, lambda value: max(-LARGEST, min(LARGEST, value)))
    rows = body["observation"]
    is_vector = isinstance(rows[0], list)
    if is_vector:
        _fit(body, len(rows))
    # An op that is allowed and needs a slot has one: two arrays and the policy's rules decide it.
    slots = body.get("slot_by_op_mask") or ()
    for row in chain.from_iterable(slots) if is_vector else slots:
        if not any(row):
            row[:] = [True] * len(row)
    # 504 for whoever gives the model a nanosecond.
    _change(body, "timeout_ms", lambda value: max(LONG_ENOUGH_MS, value))


@schemathesis.hook
def filter_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
    """Whether what a check found stands."""
    # No schema makes parameters that do what their probe says, nor says which version serves.
    of_weights = case.path in ("/policy/weights", "/policy/rollback")
    if of_weights and response.status_code in (412, 422):
        return False
    body = case.body if isinstance(case.body, dict) else {}
    said = body.get("parameters")
    if isinstance(said, dict):
        body = {**said, "session_id": said.get("sequence_id")}
    # A later step of a session that never started: what came before a request is in no schema.
    return not (response.status_code == 410 and body.get("session_id") and body.get("step"))


def _fit(body: dict[str, Any], num_rows: int) -> None:
    """Makes a vector one whose fields have a row each for the same environments.

    No schema compares the lengths of two lists, nor says that a run begins with all of its rows.
    """
    for fields in (body, body.get("action_mask") or {}, body.get("state") or {}):
        for name, rows in fields.items():
            if isinstance(rows, list):
                fields[name] = [deepcopy(rows[at % len(rows)]) for at in range(num_rows)]
    starts = body.get("episode_start")
    if body.get("step") == 0 and isinstance(starts, list) and any(starts):
        body["episode_start"] = [True] * num_rows


def _change(body: dict[str, Any], name: str, change: Callable[[Any], Any]) -> None:
    """Changes every leaf of a field that is there and not null."""

    def changed(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: changed(value) for name, value in node.items()}
        return [changed(value) for value in node] if isinstance(node, list) else change(node)

    if body.get(name) is not None:
        body[name] = changed(body[name])
