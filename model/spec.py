"""What a Tamiyo is, as data: sizes, heads, and which head matters for which op.

Torch-free, so that a manifest can be read where torch is not installed.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from model.step_spec import HeadSpec, Size, StateSpec, StepSpec

SMALLEST_DEEP_CRITIC = 8


class PolicySpec(StepSpec):
    """The dimensions of a factored, recurrent actor-critic and the rules between its heads.

    Frozen; `model_dump_json` and `model_validate_json` are a round trip. `heads` fixes the order
    of every packed array: masks and noise are the heads' columns side by side in this order.

    `recurrence`: an LSTM with a LayerNorm after it, or one LayerNorm and residual for each layer.
    `critic`: V(s) alone, or with it Q(s, op) and each slot's predicted contribution.
    `blueprint_embedding_dim`: the network also reads which blueprint each slot holds, embedded.
    `has_slot_by_op`: which slots are allowed may depend on the op, by a mask of its own.
    `value_scale`: what one unit of the network's value is worth in returns.
    `extra_outputs`: what a step also gives of its critic; computed only if it is named here.
    """

    name: str
    observation_dim: Size
    feature_dim: Size
    hidden_dim: Annotated[int, Field(ge=2)]
    num_layers: Size
    heads: tuple[HeadSpec, ...]
    op_head: str = "op"
    recurrence: Literal["lstm", "residual_lstm"] = "lstm"
    critic: Literal["value", "value_q_contribution"] = "value"
    blueprint_embedding_dim: Size | None = None
    has_slot_by_op: bool = False
    value_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    extra_outputs: tuple[Literal["q_value", "contribution"], ...] = ()

    @model_validator(mode="after")
    def _heads_are_consistent(self) -> Self:
        if len(set(self.head_names)) != len(self.heads):
            raise ValueError(f"two heads have the same name: {', '.join(self.head_names)}")
        for name in ("value",) if self.critic == "value" else ("state_value", "q"):
            if name in self.head_names:
                raise ValueError(
                    f"no head can be called {name!r}: {name}_head is the network's own"
                )
        if self.op_head not in self.head_names:
            raise ValueError(f"there is no head {self.op_head!r} to decide which heads matter")
        op = self.heads[self.op_index]
        if op.relevant_ops is not None:
            raise ValueError(f"head {op.name!r} decides which heads matter and is never forced")
        for head in self.heads:
            beyond = [index for index in head.relevant_ops or () if index >= op.size]
            if beyond:
                raise ValueError(f"head {head.name!r} names op {beyond[0]}, there are {op.size}")
        if self.extra_outputs and self.critic == "value":
            raise ValueError(f"the critic of {self.name!r} has no {self.extra_outputs[0]}")
        if len(set(self.extra_outputs)) != len(self.extra_outputs):
            raise ValueError("an extra output is named twice")
        if self.has_slot_by_op != (self.blueprint_embedding_dim is not None):
            raise ValueError("slots by op and blueprints come together, the step's last two inputs")
        if self.critic == "value_q_contribution" and self.hidden_dim < SMALLEST_DEEP_CRITIC:
            raise ValueError(
                f"this critic halves its width three times: hidden_dim is at least "
                f"{SMALLEST_DEEP_CRITIC}, not {self.hidden_dim}"
            )
        for name, is_needed in (
            ("slot", self.has_slot_by_op or self.critic == "value_q_contribution"),
            ("slot", self.blueprint_embedding_dim is not None),
            ("blueprint", self.blueprint_embedding_dim is not None),
        ):
            if is_needed and name not in self.head_names:
                raise ValueError(f"there is no head {name!r}, and the network reads or predicts it")
        return self

    @property
    def states(self) -> tuple[StateSpec, ...]:
        shape = (self.num_layers, self.hidden_dim)
        return StateSpec("h", shape), StateSpec("c", shape)

    @property
    def op_index(self) -> int:
        """Position of the op head in `heads`."""
        return self.head_names.index(self.op_head)

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

    @classmethod
    def tamiyo_v2(
        cls,
        *,
        num_slots: int = 3,
        observation_dim: int = 116,
        feature_dim: int = 512,
        hidden_dim: int = 512,
        num_layers: int = 1,
        value_scale: float = 1.0,
    ) -> Self:
        """The policy of tachyon-beep/esper-lite on 2026-06-21 (commit 2016337e).

        Every head is forced where it does not matter for the op, the slot of WAIT (0) to the first
        that is allowed. No probability floors: `with_probability_floors` sets the trainer's,
        `PROBABILITY_FLOORS_V2`.
        """
        germinate, set_alpha_target, prune = 1, 2, 3
        return cls(
            name="tamiyo-v2",
            observation_dim=observation_dim,
            feature_dim=feature_dim,
            hidden_dim=hidden_dim,
            num_layers=num_layers,
            recurrence="residual_lstm",
            critic="value_q_contribution",
            blueprint_embedding_dim=4,
            has_slot_by_op=True,
            value_scale=value_scale,
            heads=(
                HeadSpec(
                    name="slot",
                    size=num_slots,
                    relevant_ops=(1, 2, 3, 4, 5),
                    forced_index="first_allowed",
                ),
                HeadSpec(
                    name="blueprint",
                    size=13,
                    relevant_ops=(germinate,),
                    forced_index=0,
                    hidden_layers=2,
                ),
                HeadSpec(
                    name="style",
                    size=4,
                    relevant_ops=(germinate, set_alpha_target),
                    forced_index=2,
                ),
                HeadSpec(name="tempo", size=3, relevant_ops=(germinate,), forced_index=1),
                HeadSpec(
                    name="alpha_target",
                    size=3,
                    relevant_ops=(germinate, set_alpha_target),
                    forced_index=2,
                ),
                HeadSpec(
                    name="alpha_speed",
                    size=4,
                    relevant_ops=(set_alpha_target, prune),
                    forced_index=0,
                ),
                HeadSpec(
                    name="alpha_curve",
                    size=5,
                    relevant_ops=(set_alpha_target, prune),
                    forced_index=0,
                ),
                HeadSpec(name="op", size=6),
            ),
        )


PROBABILITY_FLOORS_V2: Mapping[str, float] = {
    "op": 0.15,
    "slot": 0.05,
    "blueprint": 0.12,
    "style": 0.08,
    "tempo": 0.12,
    "alpha_target": 0.08,
    "alpha_speed": 0.06,
    "alpha_curve": 0.06,
}
"""The trainer's rollouts sample with these (esper-lite V2); no checkpoint says so."""
