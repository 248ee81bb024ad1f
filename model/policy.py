"""The recurrent, factored-action, action-masked actor-critic: acting and evaluating.

Knows nothing of normalisation, artifacts or HTTP. Parameter names and shapes are esper-lite's, so
its state_dict loads with `strict=True`.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from model.actor_critic import ActorCritic, Scores
from model.blueprint_embedding import NO_BLUEPRINT, BlueprintEmbedding
from model.critic import critic_networks, reset_last_layers
from model.heads import HeadTable
from model.linear import Linear
from model.policy_inputs import (
    Masks,
    allowed_choices,
    check_allowed,
    check_blueprints,
    check_in_range,
    check_shape,
    check_state,
    packed_actions,
    refuse_inference,
)
from model.recurrence import LSTM, RECURRENCES, LayerParameters, ResidualLSTM, State
from model.spec import PolicySpec


class Forward(NamedTuple):
    """Raw outputs over a sequence: `{head: [B, T, n]}` unmasked logits, `[B, T]` values, state.

    `output` `[B, T, hidden]` is what heads and critic read.
    """

    logits: dict[str, Tensor]
    value: Tensor
    state: State
    output: Tensor


class Evaluation(NamedTuple):
    """A sequence's result, all float32 `[B, T]`; entropy is normalised to [0, 1] per head.

    Where the critic has them: Q(s, op) of the stored op `[B, T]`, and each slot's predicted
    contribution `[B, T, slots]`. Their gradients end at the recurrence's output.
    """

    log_prob: dict[str, Tensor]
    value: Tensor
    entropy: dict[str, Tensor]
    state: State
    q_value: Tensor | None = None
    contribution: Tensor | None = None


class FactoredRecurrentActorCritic(ActorCritic):
    """observation -> Linear, LayerNorm, ReLU -> recurrence -> one MLP per head, and the critic.

    `get_action` takes one step without gradient; `evaluate_actions` takes sequences with it. What
    recurrence, critic and heads there are is the spec's.

    Both are one policy under `torch.autocast` too: products are in its dtype there, and all else
    is in the parameters', the state that either returns included.
    """

    spec: PolicySpec
    lstm: LSTM | ResidualLSTM
    lstm_ln: nn.LayerNorm | nn.Identity

    def __init__(self, spec: PolicySpec) -> None:
        super().__init__()
        self.spec = spec
        self.heads = HeadTable(spec)
        self.observation_dim = spec.observation_dim
        self.blueprint_embedding: BlueprintEmbedding | None = None
        input_dim = spec.observation_dim
        if spec.blueprint_embedding_dim is not None:
            self.blueprint_embedding = BlueprintEmbedding(
                spec.num_blueprints, spec.blueprint_embedding_dim
            )
            input_dim += spec.num_slots * spec.blueprint_embedding_dim
        self.feature_net = nn.Sequential(
            Linear(input_dim, spec.feature_dim), nn.LayerNorm(spec.feature_dim), nn.ReLU()
        )
        self.lstm = RECURRENCES[spec.recurrence](spec.feature_dim, spec.hidden_dim, spec.num_layers)
        has_norm = spec.recurrence == "lstm"  # the residual one has its own
        self.lstm_ln = nn.LayerNorm(spec.hidden_dim) if has_norm else nn.Identity()
        for head in spec.heads:
            mlp = _mlp(spec.hidden_dim, head.size, head.hidden_layers)
            self.add_module(f"{head.name}_head", mlp)
        critic = critic_networks(spec)
        self.critic_names = list(critic)
        for name, network in critic.items():
            self.add_module(name, network)
        self.reset_parameters()

    @property
    def value_network(self) -> nn.Sequential:
        """V(s)."""
        return cast(nn.Sequential, getattr(self, self.critic_names[0]))

    def head_mlps(self) -> list[nn.Sequential]:
        """The heads' networks in spec order."""
        return [cast(nn.Sequential, getattr(self, f"{name}_head")) for name in self.heads.names]

    def reset_parameters(self) -> None:
        """esper-lite's initialisation: orthogonal weights, zero biases, near-uniform heads."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, math.sqrt(2))
                nn.init.zeros_(module.bias)
        for mlp in self.head_mlps():
            nn.init.orthogonal_(cast(Tensor, mlp[-1].weight), 0.01)
        reset_last_layers({name: getattr(self, name) for name in self.critic_names})
        self.lstm.reset_parameters()
        if self.blueprint_embedding is not None:
            self.blueprint_embedding.reset_parameters()

    def forward(
        self,
        observations: Tensor,
        state: State | None = None,
        *,
        blueprint_index: Tensor | None = None,
    ) -> Forward:
        """Logits and values over `observations` `[B, T, D]`, before any mask.

        `blueprint_index` is int64 `[B, T, slots]`, as `get_action` has it.
        """
        logits, value, state, y = self._sequence(observations, state, blueprint_index)
        parts = torch.split(logits, self.heads.sizes, -1)
        return Forward(dict(zip(self.heads.names, parts, strict=True)), value, state, y)

    def q_value(self, output: Tensor, op: Tensor) -> Tensor:
        """Q(s, op) float32 `[...]`, of `output` `[..., hidden]` and `op` int64 `[...]`.

        No gradient goes back into `output`. Only where the spec's critic has it.
        """
        one_hot = nn.functional.one_hot(op, self.spec.num_ops).to(output.dtype)
        q_value: Tensor = self.get_submodule("q_head")(
            torch.cat([output.detach(), one_hot], dim=-1)
        )
        return q_value.squeeze(-1).float()

    def contribution(self, output: Tensor) -> Tensor:
        """What each slot is predicted to contribute: float32 `[..., slots]` of `[..., hidden]`.

        No gradient goes back into `output`. Only where the spec's critic has it.
        """
        predicted: Tensor = self.get_submodule("contribution_predictor")(output.detach())
        return predicted.float()

    def scores(
        self,
        observation: Tensor,
        state: State,
        allowed: Tensor,
        slot_by_op: Tensor | None,
        blueprint_index: Tensor | None,
    ) -> Scores:
        features = self.features(observation, blueprint_index)
        y, state = self.lstm.step(features, state)
        logits, value, y = self._decode(y)
        choices = self.heads.choices(self.heads.spread(logits), allowed, slot_by_op)
        return Scores(choices, value, state, y)

    def evaluate_actions(
        self,
        observations: Tensor,
        actions: Mapping[str, Tensor],
        masks: Masks | None = None,
        state: State | None = None,
        *,
        blueprint_index: Tensor | None = None,
    ) -> Evaluation:
        """Log-probs, values and entropies of stored actions, with gradient: the learner's half.

        `observations` `[B, T, D]`, `actions` `{head: int64 [B, T]}` for every head, `masks`
        `{head: bool [B, T, n]}`, `state` at the first step, `blueprint_index` int64
        `[B, T, slots]`. A head that does not matter for a
        step's op has log-prob 0 and entropy 0 whatever was stored for it. Raises ValueError for
        wrong shapes, an action out of range or a mask with nothing allowed, naming head and row;
        and, while gradients are on, for inference tensors (what `get_action` returns): store a
        `.clone()` of them instead.
        """
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            refuse_inference("observations", [observations])
            refuse_inference("actions", actions.values())
            refuse_inference("masks", (masks or {}).values())
            refuse_inference("state", state or ())
        check_shape("observations", observations, (None, None, self.observation_dim))
        lead = observations.shape[:-1]
        action = packed_actions(self.heads, actions, lead)
        allowed, slot_by_op = allowed_choices(self.spec, self.heads, masks, lead)
        if not torch.compiler.is_compiling():
            check_allowed(self.spec, self.heads, allowed, slot_by_op)
            check_in_range(self.heads, action)
        logits, value, state, y = self._sequence(observations, state, blueprint_index)
        choices = self.heads.choices(self.heads.spread(logits), allowed, slot_by_op)
        op = action[..., self.heads.op_index]
        has_more = self.spec.critic == "value_q_contribution"
        return Evaluation(
            self.heads.by_name(choices.log_prob_of(action)),
            value,
            self.heads.by_name(choices.entropy(op)),
            state,
            self.q_value(y, op) if has_more else None,
            self.contribution(y) if has_more else None,
        )

    def extra_output(self, name: str, output: Tensor, op: Tensor) -> Tensor:
        return self.q_value(output, op) if name == "q_value" else self.contribution(output)

    def recurrences(self) -> list[list[LayerParameters]]:
        if isinstance(self.lstm, LSTM):
            return [self.lstm.layer_parameters()]
        return [[cast(LSTM, layer).layer_parameters()[0] for layer in self.lstm.layers]]

    def recurrence_inputs(
        self, observation: Tensor, blueprint_index: Tensor | None
    ) -> list[Tensor]:
        x = self.features(observation, blueprint_index)
        return [x if isinstance(self.lstm, LSTM) else self.lstm.input_proj(x)]

    def _sequence(
        self, observations: Tensor, state: State | None, blueprint_index: Tensor | None
    ) -> tuple[Tensor, Tensor, State, Tensor]:  # [B, T, num_choices], [B, T], ..., [B, T, hidden]
        check_shape("observations", observations, (None, None, self.observation_dim))
        batch_size = observations.shape[0]
        if state is None:
            state = self.initial_state(batch_size)
        else:
            check_state(self.spec, state, batch_size)
        y, state = self.lstm(self.features(observations, blueprint_index), state)
        logits, value, y = self._decode(y)
        return logits, value, state, y

    def features(self, observation: Tensor, blueprint_index: Tensor | None) -> Tensor:
        """What the recurrence reads: `[..., feature]` of `observation` `[..., D]`."""
        x = observation
        if self.blueprint_embedding is not None:
            shape = (*observation.shape[:-1], self.spec.num_slots)
            if blueprint_index is None:
                like = self.heads.forced_index  # int64, on the module's device
                blueprint_index = like.new_full(shape, NO_BLUEPRINT)
            check_blueprints(self.spec, blueprint_index, shape)
            x = torch.cat([x, self.blueprint_embedding(blueprint_index).to(x.dtype)], dim=-1)
        elif blueprint_index is not None:
            raise ValueError("blueprint_index is given, and this policy reads none")
        features: Tensor = self.feature_net(x)
        return features

    def _decode(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.lstm_ln(y)
        logits = torch.cat([mlp(y) for mlp in self.head_mlps()], dim=-1)
        return logits, self.value_network(y).squeeze(-1).float(), y


def _mlp(hidden_dim: int, size: int, hidden_layers: int) -> nn.Sequential:
    widths = [hidden_dim] * hidden_layers + [hidden_dim // 2]
    layers: list[nn.Module] = []
    for width, next_width in pairwise(widths):
        layers += [Linear(width, next_width), nn.ReLU()]
    return nn.Sequential(*layers, Linear(widths[-1], size))
