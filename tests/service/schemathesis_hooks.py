"""What a JSON Schema cannot say of `POST /act`, for schemathesis: the reasoned exceptions.

Loaded by its command line, by `SCHEMATHESIS_HOOKS`. Every check is on and nothing else is excused.
"""

from collections.abc import Callable
from typing import Any

import schemathesis

LARGEST = 1e6
"""Beyond it an observation is a float32 like any other, but the network's sums may not be."""
LONG_ENOUGH_MS = 60_000.0


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Makes a request that the schema allows one that the service means to answer."""
    body = case.body
    if not (case.meta.generation.mode.is_positive and isinstance(body, dict)):
        return
    # No schema compares a header with a body: `X-Session-Id` is the body's `session_id` or absent.
    if "x-session-id" in case.headers:
        del case.headers["x-session-id"]
        session_id = body.get("session_id")
        if isinstance(session_id, str) and session_id.isascii() and session_id.isprintable():
            case.headers["x-session-id"] = session_id
    # An integer is written without a point: to a schema, 1.0 is one.
    for name in ("step", "seed", "action_mask", "slot_by_op_mask", "blueprint_index"):
        _change(body, name, lambda value: int(value) if isinstance(value, float) else value)
    # 422 where the policy's output is not finite: what is too large depends on its weights.
    for name in ("observation", "state"):
        _change(body, name, lambda value: max(-LARGEST, min(LARGEST, value)))
    # An op that is allowed and needs a slot has one: two arrays and the policy's rules decide it.
    for row in body.get("slot_by_op_mask") or ():
        if not any(row):
            row[:] = [True] * len(row)
    # 504 for whoever gives the model a nanosecond.
    _change(body, "timeout_ms", lambda value: max(LONG_ENOUGH_MS, value))


@schemathesis.hook
def filter_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
    """Whether what a check found stands."""
    body = case.body if isinstance(case.body, dict) else {}
    # A later step of a session that never started: what came before a request is in no schema.
    return not (response.status_code == 410 and body.get("session_id") and body.get("step"))


def _change(body: dict[str, Any], name: str, change: Callable[[Any], Any]) -> None:
    """Changes every leaf of a field that is there and not null."""

    def changed(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: changed(value) for name, value in node.items()}
        return [changed(value) for value in node] if isinstance(node, list) else change(node)

    if body.get(name) is not None:
        body[name] = changed(body[name])
