"""What a request brings for the policy, as arrays: complete and consistent, or refused.

One set of rules for every form that requests come in. A sentence names the value by its place:
of a vector, the row first.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.step_spec import StepSpec
from service.engine.block import Given
from service.errors import Invalid
from service.runtime.arrays import are_all
from service.runtime.protocol import State

FLOAT32 = np.dtype(np.float32)


class InputReader:
    """Checks arrays with a leading axis of rows against one policy.

    `is_vector` says whether a sentence has a row to name. Raises Invalid.
    """

    def __init__(self, spec: StepSpec) -> None:
        self._spec = spec
        ends = np.cumsum(spec.head_sizes)
        self._first_columns = ends - np.array(spec.head_sizes)
        self.columns = {
            name: slice(int(end) - size, int(end))
            for name, size, end in zip(spec.head_names, spec.head_sizes, ends, strict=True)
        }
        self._has_blueprints = spec.blueprint_embedding_dim is not None
        ops = spec.heads[spec.op_index]
        slot = next((head for head in spec.heads if head.name == "slot"), None)
        self._everything = np.ones((1, spec.num_choices), dtype=np.bool_)
        self._everything.flags.writeable = False
        self._ops_that_need_a_slot = np.ones(ops.size, dtype=np.bool_)
        if slot is not None and slot.relevant_ops is not None:
            self._ops_that_need_a_slot = np.isin(np.arange(ops.size), slot.relevant_ops)

    def read(
        self,
        observation: NDArray[np.float32] | NDArray[np.float64],
        action_mask: NDArray[np.bool_] | None,
        blueprint_index: NDArray[np.int64] | None = None,
        slot_by_op_mask: NDArray[np.bool_] | None = None,
        *,
        is_vector: bool,
    ) -> Given:
        """The step's inputs; what is None is at its default: all allowed, no blueprints.

        Shapes are `[n, D]`, `[n, choices]`, `[n, slots]` and `[n, ops, slots]`, by the caller.
        """
        num_rows = len(observation)
        given: list[NDArray[np.generic]] = [finite("observation", observation, is_vector)]
        if action_mask is None:
            action_mask = self._everything
            if num_rows > 1:
                action_mask = np.broadcast_to(action_mask, (num_rows, action_mask.shape[1]))
        else:
            self._check_mask(action_mask, is_vector)
        given.append(action_mask)
        if self._has_blueprints:
            if blueprint_index is None:
                blueprint_index = np.full((num_rows, self._spec.num_slots), -1, dtype=np.int64)
            else:
                self._check_blueprints(blueprint_index, is_vector)
            given.append(blueprint_index)
        if self._spec.has_slot_by_op:
            if slot_by_op_mask is None:  # one mask for every op
                of_slots = action_mask[:, None, self.columns["slot"]]
                slot_by_op_mask = np.repeat(of_slots, self._spec.num_ops, axis=1)
            else:
                self._check_slots(slot_by_op_mask, action_mask, is_vector)
            given.append(slot_by_op_mask)
        return tuple(given)

    def _check_mask(self, mask: NDArray[np.bool_], is_vector: bool) -> None:
        has_one = np.logical_or.reduceat(mask, self._first_columns, 1)
        if not are_all(has_one):
            row, head = np.argwhere(~has_one)[0]
            name, where = self._spec.head_names[head], f" in row {row}" if is_vector else ""
            raise Invalid(f"`action_mask.{name}` allows nothing{where}")

    def _check_blueprints(self, blueprints: NDArray[np.int64], is_vector: bool) -> None:
        number = self._spec.num_blueprints
        outside = (blueprints < -1) | (blueprints >= number)
        if outside.any():
            where = _place(np.argwhere(outside)[0], is_vector)
            raise Invalid(
                f"`blueprint_index{where}` is not -1 (none) or one of the {number} blueprints"
            )

    def _check_slots(
        self, slots: NDArray[np.bool_], mask: NDArray[np.bool_], is_vector: bool
    ) -> None:
        allowed_ops = mask[:, self.columns[self._spec.head_names[self._spec.op_index]]]
        empty = allowed_ops & self._ops_that_need_a_slot & ~slots.any(axis=2)
        if empty.any():
            row, op = np.argwhere(empty)[0]
            raise Invalid(
                f"`slot_by_op_mask{_place((row, op), is_vector)}` allows no slot, and op {op} is "
                "allowed"
            )


def finite(
    name: str, array: NDArray[np.float32] | NDArray[np.float64], is_vector: bool
) -> NDArray[np.float32]:
    """The array in float32. Raises Invalid where a value is no finite one, naming its place."""
    floats: NDArray[Any] = array
    if array.dtype != FLOAT32:
        with np.errstate(over="ignore"):
            floats = array.astype(FLOAT32)
    if not are_all(np.isfinite(floats)):
        where = _place(np.argwhere(~np.isfinite(floats))[0], is_vector)
        raise Invalid(f"`{name}{where}` is not a finite float32")
    return floats


def finite_state(names: Sequence[str], state: Sequence[NDArray[Any]], is_vector: bool) -> State:
    """A state a client carries, in float32. Raises Invalid as `finite` does."""
    return tuple(finite(name, part, is_vector) for name, part in zip(names, state, strict=True))


def _place(index: Sequence[int] | NDArray[np.intp], is_vector: bool) -> str:
    """As a client would index what it sent."""
    return "".join(f"[{at}]" for at in (index if is_vector else index[1:]))
