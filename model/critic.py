"""The critic's networks: V(s) alone, or in V2 with Q(s, op) and each slot's contribution.

Names and layers are esper-lite's, so that its state_dict loads with `strict=True`.
"""

from typing import cast

from torch import Tensor, nn

from model.linear import Linear
from model.spec import PolicySpec

CONTRIBUTION_DROPOUT = 0.1


def critic_networks(spec: PolicySpec) -> dict[str, nn.Sequential]:
    """The critic's networks by name; the first is V(s), `[..., hidden]` to `[..., 1]`.

    `q_head` reads the recurrence's output and the op, one-hot; `contribution_predictor` gives
    `[..., slots]`.
    """
    hidden, width = spec.hidden_dim, spec.hidden_dim // 2
    if spec.critic == "value":
        value = nn.Sequential(Linear(hidden, width), nn.ReLU(), Linear(width, 1))
        return {"value_head": value}
    return {
        "state_value_head": _funnel(hidden, width),
        "q_head": _funnel(hidden + spec.num_ops, width),
        "contribution_predictor": nn.Sequential(
            Linear(hidden, width),
            nn.LayerNorm(width),
            nn.ReLU(),
            nn.Dropout(CONTRIBUTION_DROPOUT),
            Linear(width, width // 2),
            nn.ReLU(),
            Linear(width // 2, spec.num_slots),
        ),
    }


def reset_last_layers(networks: dict[str, nn.Sequential]) -> None:
    """esper-lite's initialisation of what the critic begins with: 1 for V1's V(s), 0.1 for V2's."""
    for name, network in networks.items():
        gain = 1.0 if name == "value_head" else 0.1
        nn.init.orthogonal_(cast(Tensor, network[-1].weight), gain)


def _funnel(input_dim: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        Linear(input_dim, width),
        nn.LayerNorm(width),
        nn.ReLU(),
        Linear(width, width // 2),
        nn.LayerNorm(width // 2),
        nn.ReLU(),
        Linear(width // 2, width // 4),
        nn.ReLU(),
        Linear(width // 4, 1),
    )
