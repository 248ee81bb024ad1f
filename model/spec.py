"""What a policy is, as data: sizes, heads, and which head matters for which op.

Torch-free, so that a manifest can be read where torch is not installed.
"""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Annotated[int, Field(ge=1)]


class HeadSpec(BaseModel):
    """One factor of the action: `size` choices, of which exactly one is taken each step.

    `relevant_ops` are the op indices for which this head matters; None means all of them. For
    every other op the head is forced to `forced_index`, with log-prob 0 and entropy 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    size: Size
    relevant_ops: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    forced_index: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _forced_where_irrelevant(self) -> Self:
        if (self.relevant_ops is None) != (self.forced_index is None):
            raise ValueError(
                f"head {self.name!r} needs both relevant_ops and forced_index, or none"
            )
        if self.forced_index is not None and self.forced_index >= self.size:
            raise ValueError(f"head {self.name!r} is forced to {self.forced_index} of {self.size}")
        return self


class PolicySpec(BaseModel):
    """The dimensions of a factored, recurrent actor-critic and the rules between its heads.

    Frozen; `model_dump_json` and `model_validate_json` are a round trip. `heads` fixes the order
    of every packed array: masks and noise are the heads' columns side by side in this order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    observation_dim: Size
    feature_dim: Size
    hidden_dim: Annotated[int, Field(ge=2)]
    num_layers: Size
    heads: tuple[HeadSpec, ...]
    op_head: str = "op"

    @model_validator(mode="after")
    def _heads_are_consistent(self) -> Self:
        if len(set(self.head_names)) != len(self.heads):
            raise ValueError(f"two heads have the same name: {', '.join(self.head_names)}")
        if "value" in self.head_names:
            raise ValueError("no head can be called 'value': value_head is the network's own")
        if self.op_head not in self.head_names:
            raise ValueError(f"there is no head {self.op_head!r} to decide which heads matter")
        op = self.heads[self.op_index]
        if op.relevant_ops is not None:
            raise ValueError(f"head {op.name!r} decides which heads matter and is never forced")
        for head in self.heads:
            beyond = [index for index in head.relevant_ops or () if index >= op.size]
            if beyond:
                raise ValueError(f"head {head.name!r} names op {beyond[0]}, there are {op.size}")
        return self

    @property
    def head_names(self) -> tuple[str, ...]:
        return tuple(head.name for head in self.heads)

    @property
    def head_sizes(self) -> tuple[int, ...]:
        return tuple(head.size for head in self.heads)

    @property
    def op_index(self) -> int:
        """Position of the op head in `heads`."""
        return self.head_names.index(self.op_head)

    @property
    def num_choices(self) -> int:
        """Columns of the packed mask and noise: the sum of all head sizes."""
        return sum(self.head_sizes)

    @classmethod
    def tamiyo_v1(
        cls,
        *,
        num_slots: int = 3,
        observation_dim: int = 140,
        feature_dim: int = 128,
        hidden_dim: int = 128,
        num_layers: int = 1,
    ) -> Self:
        """The policy of tachyon-beep/esper-lite on 2025-12-27 (commit ed036ee0).

        Only `style` depends on the op: where the op is neither GERMINATE (1) nor SET_ALPHA_TARGET
        (2) it is forced to SIGMOID_ADD (2).
        """
        return cls(
            name="tamiyo-v1",
            observation_dim=observation_dim,
            feature_dim=feature_dim,
            hidden_dim=hidden_dim,
            num_layers=num_layers,
            heads=(
                HeadSpec(name="slot", size=num_slots),
                HeadSpec(name="blueprint", size=13),
                HeadSpec(name="style", size=4, relevant_ops=(1, 2), forced_index=2),
                HeadSpec(name="tempo", size=3),
                HeadSpec(name="alpha_target", size=3),
                HeadSpec(name="alpha_speed", size=4),
                HeadSpec(name="alpha_curve", size=3),
                HeadSpec(name="op", size=6),
            ),
        )
