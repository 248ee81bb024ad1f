"""The policy with every product in bf16, plainly written: what a bf16 artifact is compared with.

An artifact's precision is that of weights and products, and so is this: each product's input,
weights, bias and result are rounded to bf16, what is summed in it is not, and everything between is
float32. The packed step says the same in fewer and wider products; nothing of it is used here.
"""

from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from model.actor_critic import ActorCritic
from model.policy import FactoredRecurrentActorCritic
from model.recurrence import LSTM, State, cell_update

Policy = TypeVar("Policy", bound=ActorCritic)


class RoundedLinear(nn.Module):
    """`[..., in]` to `[..., out]`, float32 that bf16 can hold."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(_rounded(weight.detach()), requires_grad=False)
        self.bias = nn.Parameter(_rounded(bias.detach()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return _rounded(nn.functional.linear(_rounded(x), self.weight, self.bias))


class BackwardLinear(RoundedLinear):
    """The same, summed from the last input to the first: as right, and rounded elsewhere at times.

    A sum that lies between two bf16 numbers falls to the one or the other with its last bits, and
    those are the order's. How often shows in how far two such policies are apart.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _rounded(nn.functional.linear(_rounded(x).flip(-1), self.weight.flip(-1), self.bias))


def round_products(policy: Policy, linear: type[RoundedLinear] = RoundedLinear) -> Policy:
    """Turns every product of `policy` into one in bf16, in place; it can act, and not learn."""
    if isinstance(policy, FactoredRecurrentActorCritic):
        first = cast(nn.Linear, policy.feature_net[0])
        policy.feature_net[0] = _RoundedFeatures(
            first, linear, policy.spec.observation_dim, _slots(policy)
        )
    for module in list(policy.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, linear(child.weight, child.bias))
            elif isinstance(child, LSTM):
                setattr(module, name, _RoundedLSTM(child, linear))
    return policy


def _slots(policy: FactoredRecurrentActorCritic) -> int:
    return 0 if policy.blueprint_embedding is None else policy.spec.num_slots


class _RoundedFeatures(nn.Module):
    """The first layer: the observation's product, and what each slot's blueprint adds to it.

    What a blueprint in a slot adds is a product of weights, rounded as one.
    """

    def __init__(
        self, first: nn.Linear, linear: type[RoundedLinear], observation_dim: int, num_slots: int
    ) -> None:
        super().__init__()
        weight = first.weight.detach()
        self.observation_dim = observation_dim
        self.num_slots = num_slots
        self.observation = linear(weight[:, :observation_dim], first.bias)
        self.register_buffer("by_slot", weight[:, observation_dim:].clone())
        self.by_slot: Tensor

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.observation(x[..., : self.observation_dim])
        if self.num_slots == 0:
            return features
        embedded = x[..., self.observation_dim :].chunk(self.num_slots, dim=-1)
        weights = self.by_slot.chunk(self.num_slots, dim=-1)
        for embedding, weight in zip(embedded, weights, strict=True):
            features = features + _rounded(nn.functional.linear(embedding, weight))
        return features


class _RoundedLSTM(nn.Module):
    """One product for each layer's gates, of input and hidden state together."""

    def __init__(self, lstm: LSTM, linear: type[RoundedLinear]) -> None:
        super().__init__()
        self.gates = nn.ModuleList(
            linear(torch.cat([w_ih, w_hh], dim=-1), b_ih + b_hh)
            for w_ih, w_hh, b_ih, b_hh in lstm.layer_parameters()
        )

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        hs, cs = [], []
        for layer, gates in enumerate(self.gates):
            x, c = cell_update(
                gates(torch.cat([x, state[0][:, layer]], dim=-1)), state[1][:, layer]
            )
            hs.append(x)
            cs.append(c)
        return x, (torch.stack(hs, dim=1), torch.stack(cs, dim=1))


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()
