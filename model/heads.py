"""The heads side by side in one padded table, and the rule between them.

Heads have different sizes; everything here works on `[..., heads, width]`, `width` being the
largest head. One layout means one log-softmax and one argmax for all heads, in the eager policy
and in every exported format, and one place that knows which head matters for which op.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.step_spec import StepSpec

LARGEST_FLOORED_SHARE = 0.99
SMALLEST_PROBABILITY = 1e-8
"""Of all probability, floors leave at least a hundredth to the logits; its logarithm is finite."""


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
    floor: Tensor
    takes_first_allowed: Tensor
    countdown: Tensor
    is_slot: Tensor

    def __init__(self, spec: StepSpec) -> None:
        super().__init__()
        self.names = spec.head_names
        self.sizes = list(spec.head_sizes)
        self.width = max(spec.head_sizes)
        self.op_index = spec.op_index
        self.masked_logit = spec.masked_logit

        column = torch.zeros(len(spec.heads), self.width, dtype=torch.int64)
        valid = torch.zeros(len(spec.heads), self.width, dtype=torch.bool)
        relevance = torch.ones(spec.heads[spec.op_index].size, len(spec.heads), dtype=torch.bool)
        forced_index = torch.zeros(len(spec.heads), dtype=torch.int64)
        takes_first_allowed = torch.zeros(len(spec.heads), dtype=torch.bool)
        start = 0
        for row, head in enumerate(spec.heads):
            column[row, : head.size] = torch.arange(start, start + head.size)
            valid[row, : head.size] = True
            start += head.size
            if head.relevant_ops is not None and head.forced_index is not None:
                relevance[:, row] = False
                relevance[list(head.relevant_ops), row] = True
                if head.forced_index == "first_allowed":
                    takes_first_allowed[row] = True
                else:
                    forced_index[row] = head.forced_index
        self.register_buffer("column", column.flatten(), persistent=False)  # [heads * width]
        self.register_buffer("valid", valid, persistent=False)  # [heads, width]
        self.register_buffer("relevance", relevance, persistent=False)  # [ops, heads]
        self.register_buffer("forced_index", forced_index, persistent=False)  # [heads]
        floor = torch.tensor([[head.probability_floor] for head in spec.heads])
        self.has_floors = any(head.probability_floor > 0 for head in spec.heads)
        self.register_buffer("floor", floor, persistent=False)  # [heads, 1]
        self.has_first_allowed = any(head.forced_index == "first_allowed" for head in spec.heads)
        self.register_buffer("takes_first_allowed", takes_first_allowed, persistent=False)
        countdown = torch.arange(self.width, 0, -1)
        self.register_buffer("countdown", countdown, persistent=False)  # [width]
        self.slot_index = spec.head_names.index("slot") if spec.has_slot_by_op else None
        is_slot = torch.tensor([[name == "slot"] for name in spec.head_names])
        self.register_buffer("is_slot", is_slot, persistent=False)  # [heads, 1]

    def spread(self, packed: Tensor) -> Tensor:
        """Lays packed columns out as the table: `[..., num_choices]` to `[..., heads, width]`.

        Padding cells repeat column 0; they are never valid, so no result depends on them.
        """
        cells = packed.index_select(-1, self.column)
        return cells.view(*packed.shape[:-1], len(self.sizes), self.width)

    def by_name(self, packed: Tensor) -> dict[str, Tensor]:
        """`[..., heads]` as `{head: [...]}`."""
        return dict(zip(self.names, packed.unbind(-1), strict=True))

    def log_probs(self, logits: Tensor, allowed: Tensor) -> Tensor:
        """Log-probabilities of every choice, float32 whatever the logits' dtype.

        `logits` and `allowed` are `[..., heads, width]`. Half-precision log-probs break the heads'
        gradients (esper-lite B11-PT-01), hence the cast before the softmax.
        """
        return self._log_probs(logits, allowed & self.valid, self.floor)

    def choices(self, logits: Tensor, allowed: Tensor, slot_by_op: Tensor | None) -> "Choices":
        """What can be chosen, by logits and mask `[..., heads, width]`.

        `slot_by_op` `[..., ops, slots]`, where there is one, is the slot head's mask for each op.
        """
        allowed = allowed & self.valid
        log_probs = self.log_probs(logits, allowed)
        if slot_by_op is None or self.slot_index is None:
            return Choices(self, logits, log_probs, allowed)
        missing = self.width - slot_by_op.shape[-1]
        slot_allowed = nn.functional.pad(slot_by_op, (0, missing))
        slot_logits = logits[..., self.slot_index, :].unsqueeze(-2)
        floor = self.floor[self.slot_index]
        slot_log_probs = self._log_probs(slot_logits, slot_allowed, floor)
        return Choices(self, logits, log_probs, allowed, slot_log_probs, slot_allowed)

    def _log_probs(self, logits: Tensor, allowed: Tensor, floor: Tensor) -> Tensor:
        masked = torch.where(allowed, logits.float(), self.masked_logit)
        log_probs = torch.log_softmax(masked, dim=-1)
        if not self.has_floors:
            return log_probs
        return raised(log_probs, allowed, floor, self.masked_logit)

    def slot_of(self, by_op: Tensor, op: Tensor) -> Tensor:
        """The row of `op` `[...]` in `[..., ops, width]`, as `[..., 1, width]`."""
        return by_op.gather(-2, op[..., None, None].expand(*op.shape, 1, self.width))

    def choose(
        self, log_probs: Tensor, noise: Tensor, forced_index: Tensor | None = None
    ) -> Decision:
        """Gumbel-max per head: the largest `log_probs + noise`; zero noise is the most likely."""
        action = (log_probs + noise).argmax(dim=-1)
        relevant = self.relevant(action[..., self.op_index])
        forced_index = self.forced_index if forced_index is None else forced_index
        action = torch.where(relevant, action, forced_index)
        return Decision(action, torch.where(relevant, _taken(log_probs, action), 0.0))

    def forced(self, allowed: Tensor) -> Tensor:
        """The index each head is forced to where it does not matter, given its mask."""
        if not self.has_first_allowed:
            return self.forced_index
        first = (allowed * self.countdown).argmax(-1)
        return torch.where(self.takes_first_allowed, first, self.forced_index)

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


@dataclass(frozen=True)
class Choices:
    """What the heads may choose, and how likely each choice is, before an op is taken.

    `log_probs` float32 and `allowed` bool `[..., heads, width]`; where slots are allowed by op, the
    slot head's own are `slot_log_probs` and `slot_allowed`, `[..., ops, width]`. `logits` are what
    they come from.
    """

    heads: HeadTable
    logits: Tensor
    log_probs: Tensor
    allowed: Tensor
    slot_log_probs: Tensor | None = None
    slot_allowed: Tensor | None = None

    def given(self, op: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs and mask `[..., heads, width]` once `op` `[...]` is known."""
        if self.slot_log_probs is None or self.slot_allowed is None:
            return self.log_probs, self.allowed
        is_slot = self.heads.is_slot
        log_probs = self.heads.slot_of(self.slot_log_probs, op)
        allowed = self.heads.slot_of(self.slot_allowed, op)
        return (
            torch.where(is_slot, log_probs, self.log_probs),
            (is_slot & allowed) | (~is_slot & self.allowed),  # ONNX Runtime has no `where` of bools
        )

    def choose(self, noise: Tensor) -> Decision:
        """The op first, then every head given it; `noise` as `HeadTable.choose` has it."""
        at = self.heads.op_index
        op = (self.log_probs[..., at, :] + noise[..., at, :]).argmax(-1)
        log_probs, allowed = self.given(op)
        return self.heads.choose(log_probs, noise, self.heads.forced(allowed))

    def log_prob_of(self, action: Tensor) -> Tensor:
        """Log-prob of each head's `action` `[..., heads]`; 0 where the head does not matter."""
        log_probs, _ = self.given(action[..., self.heads.op_index])
        return self.heads.log_prob_of(log_probs, action)

    def entropy(self, op: Tensor) -> Tensor:
        """Each head's entropy given `op` `[...]`, as `HeadTable.entropy` has it."""
        log_probs, allowed = self.given(op)
        return self.heads.entropy(log_probs, allowed, op)


def effective_floor(floor: Tensor, allowed: Tensor) -> Tensor:
    """The floor that `floor` is where so many choices are allowed: `[..., 1]`."""
    num_allowed = allowed.sum(-1, keepdim=True).clamp(min=1)
    return torch.minimum(floor, LARGEST_FLOORED_SHARE / num_allowed)


def raised(log_probs: Tensor, allowed: Tensor, floor: Tensor, masked_logit: float) -> Tensor:
    """Log-probs with the choices below `floor`, which broadcasts to `[..., 1]`, raised to it.

    The others give way in proportion, and may end below it. Where floors for all would take more
    than 0.99 of the probability, they share 0.99 (esper-lite V2).
    """
    prob = log_probs.exp()
    floor = effective_floor(floor, allowed)
    is_low = allowed & (prob < floor)
    is_high = allowed & ~is_low
    left = 1.0 - is_low.sum(-1, keepdim=True) * floor
    high = torch.where(is_high, prob, 0.0).sum(-1, keepdim=True).clamp(min=SMALLEST_PROBABILITY)
    prob = torch.where(is_low, floor, prob * (left / high))
    logits = torch.where(allowed, prob.clamp(min=SMALLEST_PROBABILITY).log(), masked_logit)
    return torch.where(floor > 0, torch.log_softmax(logits, dim=-1), log_probs)


def _taken(log_probs: Tensor, action: Tensor) -> Tensor:
    return log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
