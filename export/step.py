"""The one-step function that every format exports: a pure function of named arrays.

Packs a policy's parameters so that a step is few, wide products: one for both halves of an LSTM
layer, one for all heads' first layers and the value's, one block-diagonal for all second layers,
and one with zeros and ones that lays the choices out as a table of heads.
"""

import torch
from torch import Tensor, nn

from export.manifest import Precision
from model.heads import MASKED_LOGIT
from model.normalizer import CLIP, VARIANCE_EPSILON, ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.recurrence import cell_update

StepOutput = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

PRODUCT_DTYPE: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PolicyStep(nn.Module):
    """`(observation, action_mask, noise, state_h_in, state_c_in)` to `(action, log_prob, value,
    state_h_out, state_c_out)`, dtypes and shapes as `export.manifest` names them.

    `observation` is raw: the normaliser, where the policy has one, is inside. All rows are
    independent; nothing is random, and no shape depends on data. `precision` is that of weights
    and products; everything between them, the state included, is float32.
    """

    mean: Tensor | None
    scale: Tensor | None
    placement: Tensor
    padding: Tensor

    def __init__(
        self,
        policy: FactoredRecurrentActorCritic,
        normalizer: ObservationNormalizer | None,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        self.spec = policy.spec
        self.heads = policy.heads
        self.product_dtype = PRODUCT_DTYPE[precision]
        self.register_buffer("mean", None if normalizer is None else normalizer.mean)
        scale = None if normalizer is None else torch.rsqrt(normalizer.var + VARIANCE_EPSILON)
        self.register_buffer("scale", scale)
        self.feature = self._linear(*_parameters(policy.feature_net[0]))
        self.feature_ln = policy.feature_net[1]
        self.cells = nn.ModuleList(
            self._linear(torch.cat([w_ih, w_hh], dim=1), b_ih + b_hh)
            for w_ih, w_hh, b_ih, b_hh in policy.lstm.layer_parameters()
        )
        self.lstm_ln = policy.lstm_ln
        mlps = [*policy.head_mlps(), policy.value_head]
        first = [_parameters(mlp[0]) for mlp in mlps]
        second = [_parameters(mlp[-1]) for mlp in mlps]
        self.hidden_layers = self._linear(
            torch.cat([weight for weight, _ in first]), torch.cat([bias for _, bias in first])
        )
        self.output_layers = self._linear(
            torch.block_diag(*(weight for weight, _ in second)),  # type: ignore[no-untyped-call]
            torch.cat([bias for _, bias in second]),
        )
        valid = policy.heads.valid.flatten()
        columns = torch.eye(self.spec.num_choices, device=valid.device)
        placement = policy.heads.spread(columns).flatten(1) * valid  # [num_choices, heads * width]
        self.register_buffer("placement", placement.t().contiguous())
        self.register_buffer("padding", torch.where(valid, 0.0, MASKED_LOGIT))

    def example(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Inputs of the right names' shapes and dtypes: zeros, with everything allowed."""
        spec, like = self.spec, self.lstm_ln.weight
        state = like.new_zeros(batch_size, spec.num_layers, spec.hidden_dim)
        return (
            like.new_zeros(batch_size, spec.observation_dim),
            like.new_ones(batch_size, spec.num_choices, dtype=torch.bool),
            like.new_zeros(batch_size, spec.num_choices),
            state,
            state.clone(),
        )

    def forward(
        self,
        observation: Tensor,
        action_mask: Tensor,
        noise: Tensor,
        state_h_in: Tensor,
        state_c_in: Tensor,
    ) -> StepOutput:
        dtype = self.product_dtype
        x = observation
        if self.mean is not None and self.scale is not None:
            x = ((x - self.mean) * self.scale).clamp(-CLIP, CLIP)
        x = torch.relu(self.feature_ln(self.feature(x.to(dtype)).float()))
        hs: list[Tensor] = []
        cs: list[Tensor] = []
        for layer, cell in enumerate(self.cells):
            gates = cell(torch.cat([x.to(dtype), state_h_in[:, layer].to(dtype)], dim=-1))
            x, c = cell_update(gates.float(), state_c_in[:, layer])
            hs.append(x)
            cs.append(c)
        hidden = torch.relu(self.hidden_layers(self.lstm_ln(x).to(dtype)))
        packed = self.output_layers(hidden).float()
        logits, value = packed[:, :-1], packed[:, -1]  # [B, num_choices], [B]
        masked = torch.where(action_mask, logits, MASKED_LOGIT)
        log_probs = torch.log_softmax(self._table(masked, self.padding), dim=-1)
        action, log_prob = self.heads.choose(log_probs, self._table(noise))
        return action, log_prob, value, torch.stack(hs, dim=1), torch.stack(cs, dim=1)

    def _table(self, packed: Tensor, padding: Tensor | None = None) -> Tensor:
        """`HeadTable.spread` as a product, which every runtime is faster at; exact in float32.

        Each cell is one column times 1, the others times 0. `packed` must be finite.
        """
        cells = nn.functional.linear(packed, self.placement, padding)
        return cells.view(-1, len(self.heads.names), self.heads.width)

    def _linear(self, weight: Tensor, bias: Tensor) -> nn.Linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        layer.weight = nn.Parameter(weight.to(self.product_dtype), requires_grad=False)
        layer.bias = nn.Parameter(bias.to(self.product_dtype), requires_grad=False)
        return layer


def _parameters(linear: nn.Module) -> tuple[Tensor, Tensor]:
    return linear.get_parameter("weight").detach(), linear.get_parameter("bias").detach()
