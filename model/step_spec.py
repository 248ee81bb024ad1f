"""What a policy's step is to whoever runs it: sizes, heads, states, other inputs and outputs.

Torch-free, and free of how the network is built: that is a family's own spec, one of these.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Annotated[int, Field(ge=1)]

SLOT_BY_OP = "slot_by_op"
"""Beside the heads' masks, the slot's by op."""


class HeadSpec(BaseModel):
    """One factor of the action: `size` choices, of which exactly one is taken each step.

    `relevant_ops` are the op indices for which this head matters; None means all of them. For
    every other op the head is forced to `forced_index` (or to the first choice its mask allows),
    with log-prob 0 and entropy 0. Allowed choices less likely than `probability_floor` are raised
    to it, and the others give way; 0 leaves them alone. `hidden_layers` is the depth of the head's
    network.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    size: Size
    relevant_ops: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    forced_index: Annotated[int, Field(ge=0)] | Literal["first_allowed"] | None = None
    probability_floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    hidden_layers: Annotated[int, Field(ge=1, le=2)] = 1

    @model_validator(mode="after")
    def _forced_where_irrelevant(self) -> Self:
        if (self.relevant_ops is None) != (self.forced_index is None):
            raise ValueError(
                f"head {self.name!r} needs both relevant_ops and forced_index, or none"
            )
        if isinstance(self.forced_index, int) and self.forced_index >= self.size:
            raise ValueError(f"head {self.name!r} is forced to {self.forced_index} of {self.size}")
        return self


class StateSpec(NamedTuple):
    """One array that a row carries from step to step, float32 of `shape`, from zeros."""

    name: str
    shape: tuple[int, ...]

    @property
    def tensor(self) -> str:
        """Its name where it stands among other tensors."""
        return f"state_{self.name}"

    @property
    def input(self) -> str:
        """The step's input of it."""
        return f"{self.tensor}_in"

    @property
    def output(self) -> str:
        """The step's output of it."""
        return f"{self.tensor}_out"


class StepSpec(BaseModel):
    """What every family's spec says of its step; frozen, with a JSON round trip.

    `heads` fixes the order of every packed array: masks and noise are the heads' columns side by
    side in this order. `value_scale` is what one unit of the network's value is worth in returns;
    `extra_outputs` are what a step also gives of its critic. With `blueprint_embedding_dim` it
    reads which blueprint each slot holds, with `has_slot_by_op` which slots each op allows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    masked_logit: ClassVar[float] = -1e4
    """What a disallowed choice's logit becomes: finite, so that no NaN can come of it (esper-lite),
    and below every logit that the family's networks give."""

    if TYPE_CHECKING:  # each family declares them itself, in the order that its files have
        name: str
        observation_dim: Size
        heads: tuple[HeadSpec, ...]
        value_scale: float
        extra_outputs: tuple[Literal["q_value", "contribution"], ...]
        blueprint_embedding_dim: Size | None
        has_slot_by_op: bool

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """What a row carries from step to step; nothing, for a policy without memory."""
        raise NotImplementedError  # each family's own

    @property
    def op_index(self) -> int:
        """Position in `heads` of the one that decides which others matter; where all do, any."""
        return 0

    @property
    def head_names(self) -> tuple[str, ...]:
        return tuple(head.name for head in self.heads)

    @property
    def head_sizes(self) -> tuple[int, ...]:
        return tuple(head.size for head in self.heads)

    @property
    def num_choices(self) -> int:
        """Columns of the packed mask and noise: the sum of all head sizes."""
        return sum(self.head_sizes)

    @property
    def num_ops(self) -> int:
        return self.heads[self.op_index].size

    @property
    def num_slots(self) -> int:
        return self._size_of("slot")

    @property
    def num_blueprints(self) -> int:
        return self._size_of("blueprint")

    def _size_of(self, head: str) -> int:
        return self.heads[self.head_names.index(head)].size

    def with_probability_floors(self, floors: Mapping[str, float]) -> Self:
        """The same policy with these floors, `{head: probability}`, and none for other heads.

        Raises ValueError for a head that there is not, and for a floor outside [0, 1).
        """
        unknown = floors.keys() - set(self.head_names)
        if unknown:
            raise ValueError(
                f"there is no head {min(unknown)!r}; the heads are {', '.join(self.head_names)}"
            )
        dumped = self.model_dump()
        for head in dumped["heads"]:
            head["probability_floor"] = floors.get(head["name"], 0.0)
        return self.model_validate(dumped)
