"""The heads side by side in one padded table, and the rule between them.

Heads have different sizes; everything here works on `[..., heads, width]`, `width` being the
largest head. One layout means one log-softmax and one argmax for all heads, in the eager policy
and in every exported format, and one place that knows which head matters for which op.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.spec import PolicySpec

MASKED_LOGIT = -1e4
"""What a disallowed choice's logit becomes: finite, so that no NaN can come of it (esper-lite)."""


class Decision(NamedTuple):
    """One choice per head: `action` int64 and `log_prob` float32, both `[..., heads]`."""

    action: Tensor
    log_prob: Tensor


class HeadTable(nn.Module):
    """The padded layout of a spec's heads. Holds constants only, none of them in `state_dict`."""

    column: Tensor
    valid: Tensor
    relevance: Tensor
    forced_index: Tensor

    def __init__(self, spec: PolicySpec) -> None:
        super().__init__()
        self.names = spec.head_names
        self.sizes = list(spec.head_sizes)
        self.width = max(spec.head_sizes)
        self.op_index = spec.op_index

        column = torch.zeros(len(spec.heads), self.width, dtype=torch.int64)
        valid = torch.zeros(len(spec.heads), self.width, dtype=torch.bool)
        relevance = torch.ones(spec.heads[spec.op_index].size, len(spec.heads), dtype=torch.bool)
        forced_index = torch.zeros(len(spec.heads), dtype=torch.int64)
        start = 0
        for row, head in enumerate(spec.heads):
            column[row, : head.size] = torch.arange(start, start + head.size)
            valid[row, : head.size] = True
            start += head.size
            if head.relevant_ops is not None and head.forced_index is not None:
                relevance[:, row] = False
                relevance[list(head.relevant_ops), row] = True
                forced_index[row] = head.forced_index
        self.register_buffer("column", column.flatten(), persistent=False)  # [heads * width]
        self.register_buffer("valid", valid, persistent=False)  # [heads, width]
        self.register_buffer("relevance", relevance, persistent=False)  # [ops, heads]
        self.register_buffer("forced_index", forced_index, persistent=False)  # [heads]

    def spread(self, packed: Tensor) -> Tensor:
        """Lays packed columns out as the table: `[..., num_choices]` to `[..., heads, width]`.

        Padding cells repeat column 0; they are never valid, so no result depends on them.
        """
        cells = packed.index_select(-1, self.column)
        return cells.view(*packed.shape[:-1], len(self.sizes), self.width)

    def log_probs(self, logits: Tensor, allowed: Tensor) -> Tensor:
        """Log-probabilities of every choice, float32 whatever the logits' dtype.

        `logits` and `allowed` are `[..., heads, width]`. Half-precision log-probs break the heads'
        gradients (esper-lite B11-PT-01), hence the cast before the softmax.
        """
        masked = torch.where(allowed & self.valid, logits.float(), MASKED_LOGIT)
        return torch.log_softmax(masked, dim=-1)

    def choose(self, log_probs: Tensor, noise: Tensor) -> Decision:
        """Gumbel-max per head: the largest `log_probs + noise`; zero noise is the most likely."""
        action = (log_probs + noise).argmax(dim=-1)
        relevant = self.relevant(action[..., self.op_index])
        action = torch.where(relevant, action, self.forced_index)
        return Decision(action, torch.where(relevant, _taken(log_probs, action), 0.0))

    def log_prob_of(self, log_probs: Tensor, action: Tensor) -> Tensor:
        """Log-prob of each head's `action` `[..., heads]`; 0 where the head does not matter."""
        relevant = self.relevant(action[..., self.op_index])
        return torch.where(relevant, _taken(log_probs, action), 0.0)

    def entropy(self, log_probs: Tensor, allowed: Tensor, op: Tensor) -> Tensor:
        """Entropy over the allowed choices, divided by its maximum: `[..., heads]` in [0, 1].

        0 where only one choice is allowed, and where the head does not matter for `op`.
        """
        allowed = allowed & self.valid
        surprise = torch.where(allowed, -log_probs, 0.0)
        count = allowed.sum(-1)
        most = count.clamp(min=2).float().log()
        entropy = (surprise * log_probs.exp()).sum(-1) / most
        return torch.where(self.relevant(op) & (count > 1), entropy, 0.0)

    def relevant(self, op: Tensor) -> Tensor:
        """Which heads matter for `op` `[...]`: bool `[..., heads]`. The one place that says so.

        Acting and evaluating both ask here (ticket B9-PT-03) and choose their results by it with
        `torch.where`; no mask is cloned or written to (ticket B9-PT-01).
        """
        return self.relevance[op]


def _taken(log_probs: Tensor, action: Tensor) -> Tensor:
    return log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
