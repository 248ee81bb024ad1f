"""The one-step function that every format exports: a pure function of named arrays.

Packs a policy's parameters so that a step is few, wide products: one for both halves of an LSTM
layer, one for all heads' first layers and the value's, one block-diagonal for all last layers, and
one with zeros and ones that lays the choices out as a table of heads.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.manifest import Precision
from export.weights import rebuild
from model.heads import Decision, HeadTable
from model.normalizer import CLIP, VARIANCE_EPSILON, ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.recurrence import LSTM, ResidualLSTM, State, cell_update
from model.spec import PolicySpec

StepInput = tuple[Tensor, ...]
StepOutput = tuple[Tensor, ...]

PRODUCT_DTYPE: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pack(weights: bytes, spec: PolicySpec, precision: Precision) -> dict[str, NDArray[Any]]:
    """The packed parameters of an artifact's weights: the same on every machine, to the bit."""
    return PolicyStep(*rebuild(weights, spec, torch.device("cpu")), precision).packed()


class PolicyStep(nn.Module):
    """Inputs to outputs, names, dtypes and shapes as `export.manifest` has them for the spec.

    `observation` is raw: the normaliser, where the policy has one, is inside; the value is in
    returns. All rows are independent; nothing is random, and no shape depends on data. `precision`
    is that of weights and products; everything between them, the state included, is float32.

    `state_dict` is the packed parameters: all that depends on the policy's weights, by name, and
    nothing else. What a spec alone decides is in buffers that are no part of it.
    """

    placement: Tensor
    padding: Tensor
    value_scale: Tensor

    def __init__(
        self,
        policy: FactoredRecurrentActorCritic,
        normalizer: ObservationNormalizer | None,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        # Copies: a learner that goes on with its policy changes nothing here, nor a caller's cast.
        policy, normalizer = copy.deepcopy((policy, normalizer))
        dtype = PRODUCT_DTYPE[precision]
        self.product_dtype = dtype
        self.spec = policy.spec
        self.heads = HeadTable(policy.spec).to(policy.heads.valid.device)
        self.features = _Features(policy, normalizer, dtype)
        self.recurrence = _Recurrence(policy, dtype)
        is_deep = any(head.hidden_layers > 1 for head in self.spec.heads)
        is_deep |= self.spec.critic != "value"
        self.outputs = (_DeepOutputs if is_deep else _Outputs)(policy, dtype)
        self.extras = nn.ModuleDict(
            {name: EXTRAS[name](policy, dtype) for name in self.spec.extra_outputs}
        )
        valid = self.heads.valid.flatten()
        columns = torch.eye(self.spec.num_choices, device=valid.device)
        placement = self.heads.spread(columns).flatten(1) * valid  # [num_choices, heads * width]
        self.register_buffer("placement", placement.t().contiguous(), persistent=False)
        self.register_buffer(
            "padding", torch.where(valid, 0.0, self.heads.masked_logit), persistent=False
        )
        self.register_buffer("value_scale", self.padding.new_tensor([self.spec.value_scale]))

    def packed(self) -> dict[str, NDArray[Any]]:
        """Copies of the parameters, in order; bfloat16, which NumPy has not, as its 16 bits."""
        arrays = {}
        for name, parameter in self.state_dict().items():
            host = parameter.detach().to("cpu", copy=True).contiguous()
            is_wide = host.dtype != torch.bfloat16
            arrays[name] = (host if is_wide else host.view(torch.uint16)).numpy()
        return arrays

    def example(self, batch_size: int) -> StepInput:
        """Inputs of the right names' shapes and dtypes: zeros, with everything allowed."""
        spec, like = self.spec, self.padding
        state = like.new_zeros(batch_size, spec.num_layers, spec.hidden_dim)
        inputs = [
            like.new_zeros(batch_size, spec.observation_dim),
            like.new_ones(batch_size, spec.num_choices, dtype=torch.bool),
            like.new_zeros(batch_size, spec.num_choices),
            state,
            state.clone(),
        ]
        if spec.blueprint_embedding_dim is not None:
            inputs.append(like.new_zeros(batch_size, spec.num_slots, dtype=torch.int64))
        if spec.has_slot_by_op:
            shape = (batch_size, spec.num_ops, spec.num_slots)
            inputs.append(like.new_ones(shape, dtype=torch.bool))
        return tuple(inputs)

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
        action, log_prob = self._decide(logits, action_mask, slot_by_op_mask, noise)
        op = action[:, self.heads.op_index]
        extras = {name: extra(y, op) for name, extra in self.extras.items()}
        if "q_value" in extras:
            extras["q_value"] = extras["q_value"] * self.value_scale
        return action, log_prob, value * self.value_scale, h, c, *extras.values()

    def _decide(
        self, logits: Tensor, action_mask: Tensor, slot_by_op_mask: Tensor | None, noise: Tensor
    ) -> Decision:
        """The policy's own rules; the shorter way where no rule needs the mask as a table."""
        if slot_by_op_mask is None and not (self.heads.has_floors or self.heads.has_first_allowed):
            masked = torch.where(action_mask, logits, self.heads.masked_logit)
            log_probs = torch.log_softmax(self._table(masked, self.padding), dim=-1)
            return self.heads.choose(log_probs, self._table(noise))
        allowed = self.heads.spread(action_mask)
        choices = self.heads.choices(self._table(logits), allowed, slot_by_op_mask)
        return choices.choose(self._table(noise))

    def _table(self, packed: Tensor, padding: Tensor | None = None) -> Tensor:
        """`HeadTable.spread` as a product, which every runtime is faster at; exact in float32.

        Each cell is one column times 1, the others times 0. `packed` must be finite.
        """
        cells = nn.functional.linear(packed, self.placement, padding)
        return cells.view(-1, len(self.heads.names), self.heads.width)


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
        weight, bias = _parameters(policy.feature_net[0])
        observation_dim = policy.spec.observation_dim
        self.linear = _linear(weight[:, :observation_dim], bias, dtype)
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
                self.projection = _linear(*_parameters(lstm.input_proj), dtype)
            self.layer_norms = lstm.layer_norms
            layers = [
                layer for each in lstm.layers for layer in cast(LSTM, each).layer_parameters()
            ]
        else:
            layers = lstm.layer_parameters()
        self.is_residual = isinstance(lstm, ResidualLSTM)
        self.output_norm = policy.lstm_ln
        self.cells = nn.ModuleList(
            _linear(torch.cat([w_ih, w_hh], dim=1), b_ih + b_hh, dtype)
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
        self.hidden_layers = _side_by_side([mlp[0] for mlp in mlps], dtype)
        self.output_layers = _block_diagonal([mlp[-1] for mlp in mlps], dtype)

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
        self.hidden_layers = _side_by_side([*first, value[0]], dtype)
        self.deeper = nn.ModuleList(
            _linear(*_parameters(mlp[2]), dtype) if len(mlp) > 3 else nn.Identity() for mlp in mlps
        )
        self.output_layers = _block_diagonal([mlp[-1] for mlp in mlps], dtype)
        self.value = _Layers(value[1:], dtype)

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
        self.layers = _Layers(policy.get_submodule("q_head").children(), dtype)
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
        self.layers = _Layers(policy.get_submodule("contribution_predictor").children(), dtype)

    def forward(self, y: Tensor, op: Tensor) -> Tensor:
        contribution: Tensor = self.layers(y)
        return contribution


EXTRAS: dict[str, Callable[[FactoredRecurrentActorCritic, torch.dtype], nn.Module]] = {
    "q_value": _QValue,
    "contribution": _Contribution,
}


class _Layers(nn.Module):
    """Layers in a row, for acting: products in their own dtype, what is between in float32."""

    def __init__(self, layers: Iterable[nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.layers = nn.ModuleList(
            _linear(*_parameters(layer), dtype) if isinstance(layer, nn.Linear) else layer
            for layer in layers
            if not isinstance(layer, nn.Dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x.to(self.dtype)).float() if isinstance(layer, nn.Linear) else layer(x)
        return x


def _side_by_side(layers: list[nn.Module], dtype: torch.dtype) -> nn.Linear:
    weights, biases = zip(*map(_parameters, layers), strict=True)
    return _linear(torch.cat(weights), torch.cat(biases), dtype)


def _block_diagonal(layers: list[nn.Module], dtype: torch.dtype) -> nn.Linear:
    weights, biases = zip(*map(_parameters, layers), strict=True)
    weight: Tensor = torch.block_diag(*weights)  # type: ignore[no-untyped-call]
    return _linear(weight, torch.cat(biases), dtype)


def _linear(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer


def _parameters(linear: nn.Module) -> tuple[Tensor, Tensor]:
    return linear.get_parameter("weight").detach(), linear.get_parameter("bias").detach()
