"""Between what an artifact's log-probs may be, where that is more than one number.

Where probability floors jump: a choice just below its floor is raised to it; one just above it
keeps its share of what the raised ones leave. On which side of its floor a choice falls that is as
likely as that, but for the tolerance, is rounding's to say, and it moves every choice that is not
raised. The more choices are raised, the less the others keep, so the two extremes bound them all.

And where logits are as far off as `export.float_error` says.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.heads import SMALLEST_PROBABILITY, effective_floor


class LogProbBounds(NamedTuple):
    """The least and the most that each choice's log-prob may be, float32 `[..., heads, width]`."""

    lower: Tensor
    upper: Tensor


def floor_bounds(
    log_probs: Tensor, allowed: Tensor, floor: Tensor, margin: Tensor
) -> LogProbBounds:
    """Bounds of the floored log-probs, given those without floors `[..., heads, width]`.

    `floor` `[heads, 1]` is 0 for a head without one; `margin` is how far a log-prob may be off.
    Where no choice is that near its floor, both bounds are the floored log-prob.
    """
    limit = effective_floor(floor, allowed)
    is_near = allowed & ((log_probs - limit.log()).abs() <= margin)
    is_low = allowed & (log_probs.exp() < limit) & ~is_near
    most = _kept(log_probs, allowed, limit, is_low)
    least = torch.minimum(most, _kept(log_probs, allowed, limit, is_low | is_near))
    lower, upper = log_probs + least, log_probs + most
    lower = torch.where(is_near, torch.minimum(lower, limit.log()), lower)
    upper = torch.where(is_near, torch.maximum(upper, limit.log()), upper)
    lower, upper = (torch.where(is_low, limit.log(), bound) for bound in (lower, upper))
    return LogProbBounds(
        torch.where(allowed, lower, log_probs), torch.where(allowed, upper, log_probs)
    )


def _kept(log_probs: Tensor, allowed: Tensor, limit: Tensor, is_low: Tensor) -> Tensor:
    """By how much the log-probs change of those that are not raised, where `is_low` are."""
    left = 1.0 - is_low.sum(-1, keepdim=True) * limit
    high = torch.where(allowed & ~is_low, log_probs.exp(), 0.0).sum(-1, keepdim=True)
    return left.log() - high.clamp(min=SMALLEST_PROBABILITY).log()


def logit_bounds(log_probs: Tensor, allowed: Tensor, margin: Tensor) -> LogProbBounds:
    """Bounds of the log-probs `[..., heads, width]` of logits that may be off by `margin` each.

    A log-prob is off by its logit's own, and by what the sum of all is: their mean, by likelihood.
    """
    likely = torch.where(allowed, log_probs.exp(), 0.0)
    of_sum = (likely * margin).sum(-1, keepdim=True)
    return LogProbBounds(log_probs - margin - of_sum, log_probs + margin + of_sum)
