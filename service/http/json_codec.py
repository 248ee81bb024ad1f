"""`POST /act` in JSON: of one environment, or of a vector of them."""

import re
from itertools import chain
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from model.step_spec import StepSpec
from service.engine.block import Answer, Block
from service.errors import Invalid, Malformed, short
from service.http.codec import JSON, Request, check_rows, check_session, vector_starts
from service.http.inputs import FLOAT32, InputReader, finite_state
from service.http.refusal import refusal, unknown_field
from service.http.schemas import (
    ActRequest,
    VectorActRequest,
    act_request,
    vector_act_request,
)
from service.runtime.protocol import State

OF_ROWS = re.compile(rb'"observation"\s*:\s*\[\s*\[')
"""What is no observation of one environment is taken for a vector's if it looks like one. The error
would tell as well, but not without making Python objects of all that is wrong."""


class JsonCodec:
    """Reads and writes JSON bodies for one policy."""

    content_type = JSON

    def __init__(self, spec: StepSpec, *, max_rows: int, max_body_bytes: int) -> None:
        self.max_body_bytes = max_body_bytes
        self._spec = spec
        self._max_rows = max_rows
        self._reader = InputReader(spec)
        # What `model_validate_json` does, and in less time.
        self._request = TypeAdapter(act_request(spec)).validator
        self._vector_request = TypeAdapter(vector_act_request(spec)).validator
        # As C rounds them: a number beyond float32 is infinite, and refused as such.
        self._floats = Struct(f"{spec.observation_dim}f")
        self._observation_shape = (1, spec.observation_dim)
        self._extra = spec.extra_outputs
        self._allowed = {head.name: [True] * head.size for head in spec.heads}
        self._own_inputs: list[tuple[str, Any, tuple[int, ...]]] = []  # that not every policy has
        if spec.blueprint_embedding_dim is not None:
            self._own_inputs.append(("blueprint_index", np.int64, (spec.num_slots,)))
        if spec.has_slot_by_op:
            shape = (spec.num_ops, spec.num_slots)
            self._own_inputs.append(("slot_by_op_mask", np.bool_, shape))

    def parse(self, body: bytes | bytearray) -> Request:
        try:
            act: ActRequest = self._request.validate_json(body)
        except ValidationError as error:
            if OF_ROWS.search(body):
                return self._parse_vector(body)
            raise refusal(error) from error
        _check_fields(act)
        if act.session_id is None or act.state is not None:
            named = {"episode": act.episode}
            check_session(act.session_id, act.state is not None, act.episode_start, named)
        if act.episode_start and act.step:
            raise Invalid(f"an episode starts at step 0, not {act.step}")
        given = self._reader.read(
            np.ndarray(self._observation_shape, FLOAT32, self._floats.pack(*act.observation)),
            self._mask(act.action_mask) if act.action_mask else None,
            *(self._more(act, 1) if self._own_inputs else ()),
            is_vector=False,
        )
        block = Block(
            given,
            deterministic=act.deterministic,
            session_id=act.session_id,
            run=act.episode,
            step=act.step,
            starts=act.episode_start,
            seed=act.seed,
            state=None if act.state is None else self._state(act.state, is_vector=False),
        )
        return Request(block, act.timeout_ms)

    def write(self, block: Block, answer: Answer) -> bytes:
        names = self._allowed
        if block.is_vector:
            outputs = {name: answer.array(name) for name in answer.batch.arrays}
            action, log_prob = (outputs[name].T.tolist() for name in ("action", "log_prob"))
            value = outputs["value"].tolist()
        else:
            lists, at = answer.batch.lists, answer.first
            action, log_prob, value = lists["action"][at], lists["log_prob"][at], lists["value"][at]
        body: dict[str, Any] = {
            "session_id": block.session_id,
            "step": answer.step,
            "action": dict(zip(names, action, strict=True)),
            "log_prob": dict(zip(names, log_prob, strict=True)),
            "value": value,
            "policy_version": answer.policy_version,
        }
        if block.session_id is None:
            del body["session_id"]
        for name in self._extra:
            body[name] = outputs[name].tolist() if block.is_vector else lists[name][at]
        if answer.state:
            parts = answer.state if block.is_vector else [part[0] for part in answer.state]
            named = zip(self._spec.states, parts, strict=True)
            body["state"] = {state.name: part.tolist() for state, part in named}
        return to_json(body)

    def _parse_vector(self, body: bytes | bytearray) -> Request:
        try:
            act: VectorActRequest = self._vector_request.validate_json(body)
        except ValidationError as error:
            raise refusal(error) from error
        starts = (
            vector_starts(np.array(act.episode_start, dtype=np.bool_), act.step)
            if isinstance(act.episode_start, list)
            else act.episode_start
        )
        _check_fields(act)
        check_session(act.session_id, act.state is not None, starts is not False, {"run": act.run})
        seeds = act.seed if isinstance(act.seed, list) else None
        masks = act.action_mask or {}
        self._check_heads({**self._allowed, **masks})
        num_rows = len(act.observation)
        by_row: dict[str, Any] = {f"action_mask.{name}": rows for name, rows in masks.items()}
        for name in ("episode_start", "seed", *(name for name, _, _ in self._own_inputs)):
            by_row[name] = getattr(act, name)
        if act.state is not None:
            by_row |= {f"state.{name}": rows for name, rows in act.state}
        others = {name: len(rows) for name, rows in by_row.items() if isinstance(rows, list)}
        check_rows(num_rows, self._max_rows, others)
        given = self._reader.read(
            _array(act.observation),
            self._vector_mask(masks, num_rows) if masks else None,
            *self._more(act, num_rows),
            is_vector=True,
        )
        block = Block(
            given,
            is_vector=True,
            deterministic=act.deterministic,
            session_id=act.session_id,
            run=act.run,
            step=act.step,
            starts=starts,
            seed=None if isinstance(act.seed, list) else act.seed,
            seeds=None if seeds is None else np.array(seeds, dtype=np.uint64),
            state=None if act.state is None else self._state(act.state, is_vector=True),
        )
        return Request(block, act.timeout_ms)

    def _mask(self, by_head: dict[str, list[bool]]) -> NDArray[np.bool_]:
        every_head = {**self._allowed, **by_head}
        self._check_heads(every_head)
        flat = bytes(chain.from_iterable(every_head.values()))
        return np.ndarray((1, len(flat)), np.bool_, flat)

    def _vector_mask(self, by_head: dict[str, Any], num_rows: int) -> NDArray[np.bool_]:
        mask = np.ones((num_rows, self._spec.num_choices), dtype=np.bool_)
        for name, rows in by_head.items():
            mask[:, self._reader.columns[name]] = rows
        return mask

    def _check_heads(self, by_head: dict[str, Any]) -> None:
        if len(by_head) > len(self._allowed):
            unknown = next(name for name in by_head if name not in self._allowed)
            raise Invalid(
                f"`action_mask` names an unknown head '{short(unknown)}'; the heads are "
                f"{', '.join(self._allowed)}"
            )

    def _more(self, act: Any, num_rows: int) -> list[NDArray[Any] | None]:
        """What only some policies read, of a request with a field for each."""
        arrays: list[NDArray[Any] | None] = []
        for name, dtype, shape in self._own_inputs:
            values = getattr(act, name)
            arrays.append(
                None if values is None else _array(values, dtype).reshape(num_rows, *shape)
            )
        return arrays

    def _state(self, state: Any, *, is_vector: bool) -> State:
        names = [f"state.{of.name}" for of in self._spec.states]
        rows = [_array(getattr(state, of.name)).reshape(-1, *of.shape) for of in self._spec.states]
        return finite_state(names, rows, is_vector)


def _check_fields(act: ActRequest | VectorActRequest) -> None:
    if act.model_extra:
        raise unknown_field("", act.model_extra)
    if not act.observation:
        raise Malformed("`observation` is required")
    if act.state is not None:
        if act.state.model_extra:
            raise unknown_field("state.", act.state.model_extra)
        for name, rows in act.state:
            if not rows:
                raise Malformed(f"`state.{name}` is required")


def _array(values: Any, dtype: Any = np.float64) -> NDArray[Any]:
    try:
        return np.array(values, dtype=dtype)
    except OverflowError:  # of an integer beyond 64 bits, which is out of the policy's bounds too
        return np.array(values, dtype=object)
