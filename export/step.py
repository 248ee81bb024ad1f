"""The one-step function that every format exports: a pure function of named arrays.

Packs a policy's parameters so that a step is few, wide products: one for both halves of an LSTM
layer, one for all heads' first layers and the value's, one block-diagonal for all second layers.
"""

import torch
from torch import Tensor, nn

from model.normalizer import CLIP, VARIANCE_EPSILON, ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.recurrence import cell_update

StepOutput = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class PolicyStep(nn.Module):
    """`(observation, action_mask, noise, state_h_in, state_c_in)` to `(action, log_prob, value,
    state_h_out, state_c_out)`, dtypes and shapes as `export.manifest` names them.

    `observation` is raw: the normaliser, where the policy has one, is inside. All rows are
    independent; nothing is random, and no shape depends on data.
    """

    mean: Tensor | None
    scale: Tensor | None

    def __init__(
        self, policy: FactoredRecurrentActorCritic, normalizer: ObservationNormalizer | None
    ) -> None:
        super().__init__()
        self.spec = policy.spec
        self.heads = policy.heads
        self.feature_net = policy.feature_net
        self.lstm_ln = policy.lstm_ln
        self.num_heads = len(policy.heads.names)
        self.register_buffer("mean", None if normalizer is None else normalizer.mean)
        scale = None if normalizer is None else torch.rsqrt(normalizer.var + VARIANCE_EPSILON)
        self.register_buffer("scale", scale)
        self.cells = nn.ModuleList(
            _linear(torch.cat([w_ih, w_hh], dim=1), b_ih + b_hh)
            for w_ih, w_hh, b_ih, b_hh in policy.lstm.layer_parameters()
        )
        mlps = [*policy.head_mlps(), policy.value_head]
        self.hidden_layers = _linear(
            torch.cat([mlp[0].get_parameter("weight") for mlp in mlps]),
            torch.cat([mlp[0].get_parameter("bias") for mlp in mlps]),
        )
        self.output_layers = _linear(*_block_diagonal(mlps, policy.heads.width))

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
        x = observation
        if self.mean is not None and self.scale is not None:
            x = ((x - self.mean) * self.scale).clamp(-CLIP, CLIP)
        x = self.feature_net(x)
        hs: list[Tensor] = []
        cs: list[Tensor] = []
        for layer, cell in enumerate(self.cells):
            gates = cell(torch.cat([x, state_h_in[:, layer]], dim=-1))
            x, c = cell_update(gates, state_c_in[:, layer])
            hs.append(x)
            cs.append(c)
        packed = self.output_layers(torch.relu(self.hidden_layers(self.lstm_ln(x))))
        logits, value = packed[:, :-1], packed[:, -1]  # [B, heads * width], [B]
        logits = logits.reshape(-1, self.num_heads, self.heads.width)
        log_probs = self.heads.log_probs(logits, self.heads.spread(action_mask))
        action, log_prob = self.heads.choose(log_probs, self.heads.spread(noise))
        return action, log_prob, value, torch.stack(hs, dim=1), torch.stack(cs, dim=1)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _block_diagonal(mlps: list[nn.Sequential], width: int) -> tuple[Tensor, Tensor]:
    """All second layers as one matrix: `width` rows a head, the unused ones zero; the value last.

    A head reads only its own block of hidden units; the zeros elsewhere leave its sums unchanged.
    """
    inner = mlps[0][0].get_parameter("weight").shape[0]
    rows = (len(mlps) - 1) * width + 1
    weight = mlps[0][0].get_parameter("weight").new_zeros(rows, len(mlps) * inner)
    bias = weight.new_zeros(rows)
    for index, mlp in enumerate(mlps):
        block = mlp[-1].get_parameter("weight").detach()
        at = slice(index * width, index * width + len(block))
        weight[at, index * inner : (index + 1) * inner] = block
        bias[at] = mlp[-1].get_parameter("bias").detach()
    return weight, bias
