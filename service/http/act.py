"""`POST /act`: bytes -> a validated request -> its turn -> bytes.

Everything that can be the client's fault is found here or in the session table, before the model
runs: a batch that fails is the server's fault.
"""

from itertools import chain
from math import isfinite
from struct import pack
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import to_json

from model.spec import PolicySpec
from service.engine.engine import HiddenState, StepAnswer, StepRequest
from service.errors import Invalid, Malformed, short
from service.http.schemas import ActRequest, HiddenStateBody, act_request

CONTENT_TYPE = "application/json"
WRONG_LENGTH = ("too_short", "too_long")


class ActCodec:
    """Reads and writes the bodies of `POST /act` for one policy."""

    def __init__(self, spec: PolicySpec, policy_version: str) -> None:
        self._spec = spec
        self._policy_version = policy_version
        self._columns: dict[str, slice] = {}
        start = 0
        for head in spec.heads:
            self._columns[head.name] = slice(start, start + head.size)
            start += head.size
        self._observation_shape = (spec.observation_dim,)
        self._state_shape = (spec.num_layers, spec.hidden_dim)
        self._request = act_request(spec)
        self._has_more_inputs = spec.has_slot_by_op or spec.blueprint_embedding_dim is not None
        ops = spec.heads[spec.op_index]
        slot = next((head for head in spec.heads if head.name == "slot"), None)
        self._ops_that_need_a_slot = np.ones(ops.size, dtype=np.bool_)
        if slot is not None and slot.relevant_ops is not None:
            self._ops_that_need_a_slot = np.isin(np.arange(ops.size), slot.relevant_ops)
        self._everything = np.ones(spec.num_choices, dtype=np.bool_)
        self._everything.flags.writeable = False

    def parse(self, body: bytes | bytearray) -> tuple[StepRequest, float | None]:
        """The request and its `timeout_ms`, complete and consistent with the policy.

        Raises Malformed where the body is not of the documented form, and Invalid where it is but
        a length, a value or a mask is not the policy's.
        """
        try:
            act = self._request.model_validate_json(body)
        except ValidationError as error:
            raise _refusal(error) from error
        self._check_combination(act)
        action_mask = self._action_mask(act.action_mask)
        blueprint_index = slot_by_op_mask = None
        if self._has_more_inputs:
            blueprint_index, slot_by_op_mask = self._more_inputs(act, action_mask)
        request = StepRequest(
            observation=_finite("observation", act.observation, self._observation_shape),
            action_mask=action_mask,
            deterministic=act.deterministic,
            session_id=act.session_id,
            episode=act.episode,
            step=act.step,
            episode_start=act.episode_start,
            seed=act.seed,
            state=None if act.state is None else self._state(act.state),
            blueprint_index=blueprint_index,
            slot_by_op_mask=slot_by_op_mask,
        )
        return request, act.timeout_ms

    def write(self, request: StepRequest, answer: StepAnswer) -> bytes:
        """The answer's bytes; the same answer always gives the same bytes."""
        names = self._columns
        body: dict[str, Any] = {}
        if request.session_id is not None:
            body["session_id"] = request.session_id
        body |= {
            "step": answer.step,
            "action": dict(zip(names, answer.action, strict=True)),
            "log_prob": dict(zip(names, answer.log_prob, strict=True)),
            "value": answer.value,
            "policy_version": self._policy_version,
        }
        if answer.extra:
            body |= answer.extra
        if answer.state is not None:
            body["state"] = {"h": answer.state[0].tolist(), "c": answer.state[1].tolist()}
        return to_json(body)

    @staticmethod
    def _check_combination(act: ActRequest) -> None:
        if act.model_extra:
            raise _unknown_field("", act.model_extra)
        if not act.observation:
            raise Malformed("`observation` is required")
        if act.session_id is not None and act.state is not None:
            raise Invalid("`state` is for stateless requests; the server keeps a session's state")
        if act.session_id is None:
            for name, is_given in (
                ("episode", act.episode is not None),
                ("episode_start", act.episode_start),
            ):
                if is_given:
                    raise Invalid(f"`{name}` needs a `session_id`")
        if act.episode_start and act.step:
            raise Invalid(f"an episode starts at step 0, not {act.step}")

    def _action_mask(self, by_head: dict[str, list[bool]] | None) -> NDArray[np.bool_]:
        if not by_head:
            return self._everything
        mask = self._everything.copy()
        for name, allowed in by_head.items():
            columns = self._columns.get(name)
            if columns is None:
                raise Invalid(
                    f"`action_mask` names an unknown head '{short(name)}'; the heads are "
                    f"{', '.join(self._columns)}"
                )
            if not any(allowed):
                raise Invalid(f"`action_mask.{name}` allows nothing")
            mask[columns] = allowed
        return mask

    def _more_inputs(
        self, act: Any, action_mask: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64] | None, NDArray[np.bool_] | None]:
        """What only some policies read, of a request with a field for each."""
        blueprint_index = slot_by_op_mask = None
        if self._spec.blueprint_embedding_dim is not None:
            blueprint_index = self._blueprint_index(act.blueprint_index)
        if self._spec.has_slot_by_op:
            slot_by_op_mask = self._slot_by_op_mask(act.slot_by_op_mask, action_mask)
        return blueprint_index, slot_by_op_mask

    def _blueprint_index(self, values: list[int] | None) -> NDArray[np.int64]:
        num_blueprints = self._spec.num_blueprints
        if values is None:
            return np.full(self._spec.num_slots, -1, dtype=np.int64)
        for slot, value in enumerate(values):
            if not -1 <= value < num_blueprints:
                raise Invalid(
                    f"`blueprint_index[{slot}]` is not -1 (none) or one of the {num_blueprints} "
                    "blueprints"
                )
        return np.array(values, dtype=np.int64)

    def _slot_by_op_mask(
        self, rows: list[list[bool]] | None, action_mask: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        if rows is None:  # one mask for every op
            return np.tile(action_mask[self._columns["slot"]], (self._spec.num_ops, 1))
        mask = np.array(rows, dtype=np.bool_)
        allowed_ops = action_mask[self._columns[self._spec.op_head]]
        empty = allowed_ops & self._ops_that_need_a_slot & ~mask.any(axis=1)
        if empty.any():
            op = int(empty.argmax())
            raise Invalid(f"`slot_by_op_mask[{op}]` allows no slot, and op {op} is allowed")
        return mask

    def _state(self, body: HiddenStateBody) -> HiddenState:
        if body.model_extra:
            raise _unknown_field("state.", body.model_extra)
        for name, rows in (("h", body.h), ("c", body.c)):
            if not rows:
                raise Malformed(f"`state.{name}` is required")
        shape = self._state_shape
        return (
            _finite("state.h", list(chain.from_iterable(body.h)), shape),
            _finite("state.c", list(chain.from_iterable(body.c)), shape),
        )


def _finite(name: str, values: list[float], shape: tuple[int, ...]) -> NDArray[np.float32]:
    # The sum is finite where all values are; a single one beyond float32 overflows the packing.
    if isfinite(sum(values)):
        try:
            packed = pack(f"={len(values)}f", *values)  # "=": without it, infinity is packed
        except OverflowError:
            pass
        else:
            return np.frombuffer(packed, dtype=np.float32).reshape(shape)
    with np.errstate(over="ignore"):
        flat = np.array(values).astype(np.float32)
    index = np.unravel_index(int(np.isfinite(flat).argmin()), shape)
    where = "".join(f"[{i}]" for i in index)
    raise Invalid(f"`{name}{where}` is not a finite float32")


def _refusal(error: ValidationError) -> Malformed | Invalid:
    """Of another form than the documented one; or of that form, with a length not the policy's."""
    errors = error.errors(include_url=False, include_input=False)
    first = next((found for found in errors if found["type"] not in WRONG_LENGTH), errors[0])
    where = _path(first["loc"])
    if first["type"] in WRONG_LENGTH:
        of = first["ctx"]
        length = of.get("min_length", of.get("max_length"))
        return Invalid(f"`{where}` has {of['actual_length']} values, the policy reads {length}")
    if first["type"] == "json_invalid":
        return Malformed(f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    return Malformed(f"`{where}`: {first['msg']}" if where else f"the body: {first['msg']}")


def _unknown_field(parent: str, given: dict[str, Any]) -> Malformed:
    return Malformed(f"`{parent}{short(next(iter(given)))}` is not a field of the request")


def _path(location: tuple[int | str, ...]) -> str:
    """As JavaScript and Python write it: `state.h[0]`."""
    return "".join(
        f"[{name}]" if isinstance(name, int) else f".{name}" for name in location
    ).removeprefix(".")
