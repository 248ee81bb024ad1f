"""What a Stable-Baselines3 policy is, as data: two MLPs, and LSTMs before them where it has any.

Torch-free. Facts: stable-baselines3 and sb3-contrib 2.9.2, `ActorCriticPolicy` and
`RecurrentActorCriticPolicy`.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.step_spec import HeadSpec, Size, StateSpec, StepSpec

Activation = Literal[
    "CELU",
    "ELU",
    "GELU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "Identity",
    "LeakyReLU",
    "Mish",
    "ReLU",
    "ReLU6",
    "SELU",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
]
"""A class of `torch.nn` that needs no argument, and is computed elementwise without training."""


class ObservationPart(BaseModel):
    """A stretch of the observation, flattened from one space: of a Dict by its key, in the Dict's
    own order; the only one, without a key, of any other space.

    `box` is a Box's numbers, row by row; `one_hot` a Discrete's, a MultiDiscrete's side by side,
    and `bits` a MultiBinary's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str | None = None
    kind: Literal["box", "one_hot", "bits"] = "box"
    size: Size


class Recurrence(BaseModel):
    """The actor's LSTM, and the critic's way around it.

    `critic`: an LSTM of its own and of the same sizes, the actor's (`shared`), or one Linear.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_dim: Size
    num_layers: Size
    critic: Literal["lstm", "shared", "linear"]


class Normalization(BaseModel):
    """VecNormalize's: `clip((x - mean) / sqrt(var + epsilon), -clip, clip)`.

    `keys` are those of a Dict that it is done to, the rest left as it is; None is all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    keys: tuple[str, ...] | None = None


class SB3Spec(StepSpec):
    """The dimensions of an actor and a critic beside each other, and how observations are laid out.

    `actor_layers` and `critic_layers` are the widths of the MLPs' layers, each followed by the
    activation; action and value are one Linear more. No head depends on another, and there is
    nothing that `value_scale` would scale: values are in the units the trainer predicts.
    """

    masked_logit: ClassVar[float] = -(2.0**126)
    """Lower than any logit by far, there being no LayerNorm to bound them; twice it is finite."""

    family: Literal["mlps"]
    name: str
    observation_dim: Size
    heads: Annotated[tuple[HeadSpec, ...], Field(min_length=1)]
    actor_layers: tuple[Size, ...]
    critic_layers: tuple[Size, ...]
    activation: Activation
    recurrence: Recurrence | None = None
    normalization: Normalization | None = None
    observation: tuple[ObservationPart, ...] = ()
    value_scale: float = Field(default=1.0, ge=1.0, le=1.0)
    extra_outputs: tuple[()] = ()
    blueprint_embedding_dim: None = None
    has_slot_by_op: Literal[False] = False

    @model_validator(mode="after")
    def _parts_are_consistent(self) -> Self:
        if len(set(self.head_names)) != len(self.heads):
            raise ValueError(f"two heads have the same name: {', '.join(self.head_names)}")
        for head in self.heads:
            if head.relevant_ops is not None or head.probability_floor or head.hidden_layers > 1:
                raise ValueError(f"head {head.name!r} is more than one of choices side by side")
        size = sum(part.size for part in self.observation)
        if self.observation and size != self.observation_dim:
            raise ValueError(
                f"the observation's parts have {size} numbers, and {self.observation_dim} are read"
            )
        return self

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """The actor's (h, c), and the critic's where it has an LSTM of its own."""
        if self.recurrence is None:
            return ()
        shape = (self.recurrence.num_layers, self.recurrence.hidden_dim)
        names = ("h", "c", "critic_h", "critic_c")
        number = 4 if self.recurrence.critic == "lstm" else 2
        return tuple(StateSpec(name, shape) for name in names[:number])
