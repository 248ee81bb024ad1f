"""A Tamiyo's step, in few and wide products.

Its parameters are packed so that a step is few, wide products: one for both halves of an LSTM
layer, one for all heads' first layers and the value's, one block-diagonal for all last layers, and
one with zeros and ones that lays the choices out as a table of heads.
"""

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from export.manifest import Precision
from export.packed_step import (
    Layers,
    PackedStep,
    StepOutput,
    block_diagonal,
    packed_linear,
    parameters_of,
    side_by_side,
)
from model.normalizer import CLIP, VARIANCE_EPSILON, ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.recurrence import LSTM, ResidualLSTM, State, cell_update
from model.spec import PolicySpec


class TamiyoStep(PackedStep):
    """A Tamiyo's."""

    spec: PolicySpec
    value_scale: Tensor

    def __init__(
        self,
        policy: FactoredRecurrentActorCritic,
        normalizer: ObservationNormalizer | None,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__(policy.spec, precision, policy.heads.valid.device)
        # Copies: a learner that goes on with its policy changes nothing here, nor a caller's cast.
        policy, normalizer = copy.deepcopy((policy, normalizer))
        dtype = self.product_dtype
        self.features = _Features(policy, normalizer, dtype)
        self.recurrence = _Recurrence(policy, dtype)
        is_deep = any(head.hidden_layers > 1 for head in self.spec.heads)
        is_deep |= self.spec.critic != "value"
        self.outputs = (_DeepOutputs if is_deep else _Outputs)(policy, dtype)
        self.extras = nn.ModuleDict(
            {name: EXTRAS[name](policy, dtype) for name in self.spec.extra_outputs}
        )
        self.register_buffer("value_scale", self.padding.new_tensor([self.spec.value_scale]))

    def forward(
        self,
        observation: Tensor,
        action_mask: Tensor,
        noise: Tensor,
        state_h_in: Tensor,
        state_c_in: Tensor,
        blueprint_index: Tensor | None = None,
        slot_by_op_mask: Tensor | None = None,
    ) -> StepOutput:
        x = self.features(observation, blueprint_index)
        y, (h, c) = self.recurrence(x, (state_h_in, state_c_in))
        logits, value = self.outputs(y)
        action, log_prob = self.decide(logits, action_mask, noise, slot_by_op_mask)
        op = action[:, self.heads.op_index]
        extras = {name: extra(y, op) for name, extra in self.extras.items()}
        if "q_value" in extras:
            extras["q_value"] = extras["q_value"] * self.value_scale
        return action, log_prob, value * self.value_scale, h, c, *extras.values()


class _Features(nn.Module):
    """Raw observation, and which blueprints the slots hold, to float32 `[B, feature]`."""

    mean: Tensor | None
    scale: Tensor | None
    blueprints: Tensor
    first_row: Tensor

    def __init__(
        self,
        policy: FactoredRecurrentActorCritic,
        normalizer: ObservationNormalizer | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", None if normalizer is None else normalizer.mean)
        scale = None if normalizer is None else torch.rsqrt(normalizer.var + VARIANCE_EPSILON)
        self.register_buffer("scale", scale)
        weight, bias = parameters_of(policy.feature_net[0])
        observation_dim = policy.spec.observation_dim
        self.linear = packed_linear(weight[:, :observation_dim], bias, dtype)
        self.norm = policy.feature_net[1]
        self.null_index = 0
        if policy.blueprint_embedding is not None:
            self.null_index = policy.spec.num_blueprints
            embedding = policy.blueprint_embedding.embedding.weight.detach()
            by_slot = torch.split(weight[:, observation_dim:], embedding.shape[1], dim=1)
            # What each blueprint in each slot adds to the features: products that need no batch. In
            # float64, so that every machine rounds to the same table: it names the version too.
            wide = embedding.double()
            table = torch.cat([wide @ columns.double().t() for columns in by_slot])
            self.register_buffer("blueprints", table.to(dtype))  # [slots * rows, feature]
            rows = torch.arange(0, len(table), len(embedding), device=table.device)
            self.register_buffer("first_row", rows, persistent=False)  # [slots]

    def forward(self, observation: Tensor, blueprint_index: Tensor | None) -> Tensor:
        x = observation
        if self.mean is not None and self.scale is not None:
            x = ((x - self.mean) * self.scale).clamp(-CLIP, CLIP)
        x = self.linear(x.to(self.linear.weight.dtype)).float()
        if blueprint_index is not None:
            index = torch.where(blueprint_index < 0, self.null_index, blueprint_index)
            rows = nn.functional.embedding(index + self.first_row, self.blueprints)
            x = x + rows.float().sum(dim=1)
        return torch.relu(self.norm(x))


class _Recurrence(nn.Module):
    """`[B, feature]` and the state to what heads and critic read, `[B, hidden]`, and the state."""

    def __init__(self, policy: FactoredRecurrentActorCritic, dtype: torch.dtype) -> None:
        super().__init__()
        lstm = policy.lstm
        self.dtype = dtype
        self.projection: nn.Linear | None = None
        if isinstance(lstm, ResidualLSTM):
            if isinstance(lstm.input_proj, nn.Linear):
                self.projection = packed_linear(*parameters_of(lstm.input_proj), dtype)
            self.layer_norms = lstm.layer_norms
            layers = [
                layer for each in lstm.layers for layer in cast(LSTM, each).layer_parameters()
            ]
        else:
            layers = lstm.layer_parameters()
        self.is_residual = isinstance(lstm, ResidualLSTM)
        self.output_norm = policy.lstm_ln
        self.cells = nn.ModuleList(
            packed_linear(torch.cat([w_ih, w_hh], dim=1), b_ih + b_hh, dtype)
            for w_ih, w_hh, b_ih, b_hh in layers
        )

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if self.projection is not None:
            x = self.projection(x.to(self.dtype)).float()
        hs: list[Tensor] = []
        cs: list[Tensor] = []
        for layer, cell in enumerate(self.cells):
            gates = cell(torch.cat([x.to(self.dtype), state[0][:, layer].to(self.dtype)], dim=-1))
            h, c = cell_update(gates.float(), state[1][:, layer])
            x = self.layer_norms[layer](h) + x if self.is_residual else h
            hs.append(h)
            cs.append(c)
        return self.output_norm(x), (torch.stack(hs, dim=1), torch.stack(cs, dim=1))


class _Outputs(nn.Module):
    """Logits `[B, num_choices]` and V(s) `[B]`: the value is one more head of the same depth."""

    def __init__(self, policy: FactoredRecurrentActorCritic, dtype: torch.dtype) -> None:
        super().__init__()
        mlps = [*policy.head_mlps(), policy.value_network]
        self.dtype = dtype
        self.hidden_layers = side_by_side([mlp[0] for mlp in mlps], dtype)
        self.output_layers = block_diagonal([mlp[-1] for mlp in mlps], dtype)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.hidden_layers(y.to(self.dtype)))
        packed = self.output_layers(hidden).float()
        return packed[:, :-1], packed[:, -1]


class _DeepOutputs(nn.Module):
    """Logits and V(s), where heads differ in depth and the value has a network of its own."""

    def __init__(self, policy: FactoredRecurrentActorCritic, dtype: torch.dtype) -> None:
        super().__init__()
        mlps = policy.head_mlps()
        self.dtype = dtype
        first = [mlp[0] for mlp in mlps]
        self.widths = [len(layer.bias) for layer in cast(list[nn.Linear], first)]
        value = list(policy.value_network)
        self.widths.append(len(cast(nn.Linear, value[0]).bias))
        self.hidden_layers = side_by_side([*first, value[0]], dtype)
        self.deeper = nn.ModuleList(
            packed_linear(*parameters_of(mlp[2]), dtype) if len(mlp) > 3 else nn.Identity()
            for mlp in mlps
        )
        self.output_layers = block_diagonal([mlp[-1] for mlp in mlps], dtype)
        self.value = Layers(value[1:], dtype)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        *by_head, value = torch.split(self.hidden_layers(y.to(self.dtype)), self.widths, dim=-1)
        hidden = [
            torch.relu(x) if isinstance(deeper, nn.Identity) else torch.relu(deeper(torch.relu(x)))
            for x, deeper in zip(by_head, self.deeper, strict=True)
        ]
        logits = self.output_layers(torch.cat(hidden, dim=-1)).float()
        return logits, self.value(value.float()).squeeze(-1)


class _QValue(nn.Module):
    """Q(s, op) in the network's own units, `[B]`."""

    ops: Tensor

    def __init__(self, policy: FactoredRecurrentActorCritic, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = Layers(policy.get_submodule("q_head").children(), dtype)
        ops = torch.arange(policy.spec.num_ops, device=policy.heads.valid.device)
        self.register_buffer("ops", ops, persistent=False)

    def forward(self, y: Tensor, op: Tensor) -> Tensor:
        one_hot = torch.eq(op[:, None], self.ops).float()
        q_value: Tensor = self.layers(torch.cat([y, one_hot], dim=-1))
        return q_value.squeeze(-1)


class _Contribution(nn.Module):
    """What each slot is predicted to contribute, `[B, slots]`."""

    def __init__(self, policy: FactoredRecurrentActorCritic, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = Layers(policy.get_submodule("contribution_predictor").children(), dtype)

    def forward(self, y: Tensor, op: Tensor) -> Tensor:
        contribution: Tensor = self.layers(y)
        return contribution


EXTRAS: dict[str, Callable[[FactoredRecurrentActorCritic, torch.dtype], nn.Module]] = {
    "q_value": _QValue,
    "contribution": _Contribution,
}
