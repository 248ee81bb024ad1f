"""What environments observe under load: each step is one of these observations and masks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json

from model.step_spec import StepSpec

POOL_SIZE = 64


@dataclass(frozen=True)
class Pool:
    """`POOL_SIZE` rows of what a request brings for the policy."""

    observations: NDArray[np.float32]
    action_masks: NDArray[np.bool_]
    blueprint_indices: NDArray[np.int64] | None = None
    slot_by_op_masks: NDArray[np.bool_] | None = None

    @classmethod
    def random(cls, spec: StepSpec, seed: int) -> "Pool":
        """Standard normal observations, and masks that allow nine choices of ten.

        Where the policy reads them, also blueprints, and half of the slots for each op.
        """
        rng = np.random.default_rng(seed)
        observations = rng.standard_normal((POOL_SIZE, spec.observation_dim), dtype=np.float32)
        masks = rng.random((POOL_SIZE, spec.num_choices)) < 0.9
        masks[:, np.cumsum([0, *spec.head_sizes[:-1]])] = True
        blueprints = slots = None
        if spec.blueprint_embedding_dim is not None:
            blueprints = rng.integers(-1, spec.num_blueprints, (POOL_SIZE, spec.num_slots))
        if spec.has_slot_by_op:
            slots = rng.random((POOL_SIZE, spec.num_ops, spec.num_slots)) < 0.5
            slots[..., 0] = True
        return cls(observations, masks, blueprints, slots)

    def by_name(self) -> dict[str, NDArray[Any]]:
        """The arrays there are, by the names of the step's inputs."""
        arrays: dict[str, NDArray[Any] | None] = {
            "observation": self.observations,
            "action_mask": self.action_masks,
            "blueprint_index": self.blueprint_indices,
            "slot_by_op_mask": self.slot_by_op_masks,
        }
        return {name: array for name, array in arrays.items() if array is not None}

    def bodies(self, spec: StepSpec) -> list[bytes]:
        """Each row as the fields of a JSON object, without its braces."""
        return [json_fields(spec, self, at) for at in range(POOL_SIZE)]


def json_fields(spec: StepSpec, pool: Pool, rows: int | NDArray[np.intp]) -> bytes:
    """One row of the pool, or several, as the fields of a JSON object, without its braces."""
    fields: dict[str, Any] = {name: array[rows] for name, array in pool.by_name().items()}
    by_head = np.split(fields["action_mask"], np.cumsum(spec.head_sizes)[:-1], axis=-1)
    named = zip(spec.head_names, by_head, strict=True)
    fields["action_mask"] = {name: columns.tolist() for name, columns in named}
    lists = {name: v.tolist() if name != "action_mask" else v for name, v in fields.items()}
    return to_json(lists)[1:-1]
