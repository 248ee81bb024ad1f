"""The arrays of the engine's batches, as the exported step takes and gives them by name."""

from math import prod
from typing import Any, NamedTuple, Self

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
    """`[B, heads]` int64, float32, then `[B]`, twice `[B, layers, hidden]`; all floats in a row.

    Where the spec names them: Q(s, op) `[B]`, and contributions `[B, slots]`, float32.
    """

    action: NDArray[np.int64]
    log_prob: NDArray[np.float32]
    value: NDArray[np.float32]
    h: NDArray[np.float32]
    c: NDArray[np.float32]
    floats: NDArray[np.float32]
    extra: dict[str, NDArray[np.float32]]

    @classmethod
    def allocate(cls, spec: PolicySpec, num_rows: int) -> Self:
        state = (num_rows, spec.num_layers, spec.hidden_dim)
        shapes = {"log_prob": (num_rows, len(spec.heads)), "value": (num_rows,)}
        shapes |= {"h": state, "c": state} | extra_shapes(spec, num_rows)
        sizes = [prod(shape) for shape in shapes.values()]
        floats = np.zeros(sum(sizes), dtype=np.float32)
        parts = np.split(floats, np.cumsum(sizes[:-1]))
        arrays = {
            name: part.reshape(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        log_prob, value, h, c = (arrays.pop(name) for name in ("log_prob", "value", "h", "c"))
        action = np.zeros(log_prob.shape, dtype=np.int64)
        return cls(action, log_prob, value, h, c, floats, arrays)

    def by_name(self) -> dict[str, NDArray[Any]]:
        """What the step gives, under the manifest's names and in its order."""
        return {
            "action": self.action,
            "log_prob": self.log_prob,
            "value": self.value,
            "state_h_out": self.h,
            "state_c_out": self.c,
            **self.extra,
        }


def extra_shapes(spec: PolicySpec, num_rows: int) -> dict[str, tuple[int, ...]]:
    """The shapes of what the spec's step gives of its critic beyond the value."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in spec.extra_outputs:
        shapes[name] = (num_rows,) if name == "q_value" else (num_rows, spec.num_slots)
    return shapes
