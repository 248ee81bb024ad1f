"""The seam between the engine and whatever runs the exported step."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from model.spec import PolicySpec


class StepInputs(NamedTuple):
    """`[B, dim]` float32, `[B, choices]` bool and float32, then twice `[B, layers, hidden]`.

    Where the spec has them: `[B, slots]` int64, -1 = no blueprint, and `[B, ops, slots]` bool.
    """

    observation: NDArray[np.float32]
    action_mask: NDArray[np.bool_]
    noise: NDArray[np.float32]
    h: NDArray[np.float32]
    c: NDArray[np.float32]
    blueprint_index: NDArray[np.int64] | None = None
    slot_by_op_mask: NDArray[np.bool_] | None = None

    @classmethod
    def allocate(cls, spec: PolicySpec, num_rows: int) -> Self:
        """Zeros, with everything allowed, and no blueprints."""
        state = (num_rows, spec.num_layers, spec.hidden_dim)
        has_blueprints = spec.blueprint_embedding_dim is not None
        return cls(
            np.zeros((num_rows, spec.observation_dim), dtype=np.float32),
            np.ones((num_rows, spec.num_choices), dtype=np.bool_),
            np.zeros((num_rows, spec.num_choices), dtype=np.float32),
            np.zeros(state, dtype=np.float32),
            np.zeros(state, dtype=np.float32),
            np.full((num_rows, spec.num_slots), -1, dtype=np.int64) if has_blueprints else None,
            np.ones((num_rows, spec.num_ops, spec.num_slots), dtype=np.bool_)
            if spec.has_slot_by_op
            else None,
        )

    def first(self, num_rows: int) -> Self:
        """Views of the first rows."""
        arrays: tuple[Any, ...] = self
        views: Any = (None if array is None else array[:num_rows] for array in arrays)
        return type(self)(*views)

    def by_name(self) -> dict[str, NDArray[Any]]:
        """What the step takes, under the manifest's names and in its order."""
        named = dict(zip(NAMES, self, strict=True))
        return {name: array for name, array in named.items() if array is not None}


NAMES = (
    *("observation", "action_mask", "noise", "state_h_in", "state_c_in"),
    *("blueprint_index", "slot_by_op_mask"),
)


class StepOutputs(NamedTuple):
    """`[B, heads]` int64, float32, then `[B]`, twice `[B, layers, hidden]`; all floats in a row."""

    action: NDArray[np.int64]
    log_prob: NDArray[np.float32]
    value: NDArray[np.float32]
    h: NDArray[np.float32]
    c: NDArray[np.float32]
    floats: NDArray[np.float32]

    @classmethod
    def allocate(cls, spec: PolicySpec, num_rows: int) -> Self:
        heads, state = len(spec.heads), (num_rows, spec.num_layers, spec.hidden_dim)
        sizes = [num_rows * heads, num_rows, *(2 * [prod(state)])]
        floats = np.zeros(sum(sizes), dtype=np.float32)
        log_prob, value, h, c = np.split(floats, np.cumsum(sizes[:-1]))
        return cls(
            np.zeros((num_rows, heads), dtype=np.int64),
            log_prob.reshape(num_rows, heads),
            value,
            h.reshape(state),
            c.reshape(state),
            floats,
        )

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """What the step gives, in its order."""
        return self[:5]


class Runtime(Protocol):
    """One exported step. `name` is its format's or its own, `device` where it runs."""

    name: str
    device: str

    def bind(self, inputs: StepInputs, outputs: StepOutputs) -> Callable[[], None]:
        """A call that steps the policy from what `inputs` hold by then, into `outputs`.

        Both are contiguous arrays on the host that share no memory; binding them once spares each
        call finding and checking them.
        """
