"""The step of two MLPs, and of the LSTMs before them where there are any."""

import copy

import torch
from torch import Tensor, nn

from export.manifest import Precision
from export.packed_step import Layers, PackedStep, StepOutput, packed_linear
from model.recurrence import LayerParameters, cell_update
from model.sb3.normalizer import VecNormalizer
from model.sb3.policy import SB3Policy
from model.sb3.spec import SB3Spec


class SB3Step(PackedStep):
    """A Stable-Baselines3 policy's. Its states go in and out as the spec has them, if any."""

    spec: SB3Spec

    def __init__(
        self, policy: SB3Policy, normalizer: VecNormalizer | None, precision: Precision = "fp32"
    ) -> None:
        super().__init__(policy.spec, precision, policy.heads.valid.device)
        policy, normalizer = copy.deepcopy((policy, normalizer))
        dtype = self.product_dtype
        self.normalizer = None if normalizer is None else _Normalizer(normalizer)
        self.recurrences = nn.ModuleList(_Recurrence(of, dtype) for of in policy.recurrences())
        self.critic = None if policy.critic is None else Layers([policy.critic], dtype)
        actor, critic = (policy.mlp_extractor[name] for name in ("policy_net", "value_net"))
        self.action = Layers([*actor.children(), policy.action_net], dtype)
        self.value = Layers([*critic.children(), policy.value_net], dtype)

    def forward(
        self,
        observation: Tensor,
        action_mask: Tensor,
        noise: Tensor,
        state_h_in: Tensor | None = None,
        state_c_in: Tensor | None = None,
        state_critic_h_in: Tensor | None = None,
        state_critic_c_in: Tensor | None = None,
    ) -> StepOutput:
        x = observation if self.normalizer is None else self.normalizer(observation)
        states: list[Tensor] = []
        outputs = []
        given = [(state_h_in, state_c_in), (state_critic_h_in, state_critic_c_in)]
        for recurrence, (h, c) in zip(self.recurrences, given, strict=False):
            y, h, c = recurrence(x, h, c)
            outputs.append(y)
            states += [h, c]
        actor = outputs[0] if outputs else x
        critic = outputs[-1] if outputs else x
        if self.critic is not None:
            critic = self.critic(x)
        value = self.value(critic).squeeze(-1)
        action, log_prob = self.decide(self.action(actor), action_mask, noise)
        return action, log_prob, value, *states


class _Normalizer(nn.Module):
    """As `VecNormalizer`, whose bounds are infinite where it leaves a feature as it is."""

    mean: Tensor
    mean_rest: Tensor
    scale: Tensor
    clip: Tensor

    def __init__(self, normalizer: VecNormalizer) -> None:
        super().__init__()
        self.register_buffer("mean", normalizer.mean)
        self.register_buffer("mean_rest", normalizer.mean_rest)
        self.register_buffer("scale", normalizer.scale().reciprocal())
        clip = torch.where(normalizer.is_normalized, normalizer.normalization.clip, torch.inf)
        self.register_buffer("clip", clip, persistent=False)

    def forward(self, observation: Tensor) -> Tensor:
        x = ((observation - self.mean) - self.mean_rest) * self.scale
        return torch.maximum(torch.minimum(x, self.clip), -self.clip)


class _Recurrence(nn.Module):
    """One LSTM: `[B, input]`, h and c `[B, layers, hidden]`, to `[B, hidden]`, h and c."""

    def __init__(self, layers: list[LayerParameters], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.cells = nn.ModuleList(
            packed_linear(torch.cat([w_ih, w_hh], dim=1), b_ih + b_hh, dtype)
            for w_ih, w_hh, b_ih, b_hh in layers
        )

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hs: list[Tensor] = []
        cs: list[Tensor] = []
        for layer, cell in enumerate(self.cells):
            gates = cell(torch.cat([x.to(self.dtype), h[:, layer].to(self.dtype)], dim=-1))
            x, new = cell_update(gates.float(), c[:, layer])
            hs.append(x)
            cs.append(new)
        return x, torch.stack(hs, dim=1), torch.stack(cs, dim=1)
