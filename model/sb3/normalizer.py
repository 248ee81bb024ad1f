"""VecNormalize's frozen observation statistics."""

import torch
from torch import Tensor, nn

from model.sb3.spec import Normalization, ObservationPart


class VecNormalizer(nn.Module):
    """`clip((x - mean) / sqrt(var + epsilon), -clip, clip)` of some parts, the rest left alone.

    `mean` and `var` are float64 `[observation_dim]`, finite, `var` not negative nor, with epsilon,
    below float32's; raises ValueError otherwise, naming the first bad feature. The trainer computes
    in float64: the mean is kept as the sum of two float32, so that a mean far from 0 costs no
    digits of what is left of it.
    """

    mean: Tensor
    mean_rest: Tensor
    var: Tensor
    is_normalized: Tensor

    def __init__(
        self,
        mean: Tensor,
        var: Tensor,
        normalization: Normalization,
        observation: tuple[ObservationPart, ...] = (),
    ) -> None:
        super().__init__()
        if mean.ndim != 1 or mean.shape != var.shape:
            raise ValueError(
                "normaliser mean and variance must be two vectors of one length, "
                f"not {tuple(mean.shape)} and {tuple(var.shape)}"
            )
        wide, var = mean.detach().double(), var.detach().double()
        mean = wide.float()
        bad = ~(mean.isfinite() & var.float().isfinite() & (var >= 0))
        bad |= var + normalization.epsilon < torch.finfo(torch.float32).tiny
        if bad.any():
            index = int(bad.int().argmax())
            raise ValueError(
                f"normaliser statistics of feature {index} are mean {float(wide[index])}, "
                f"variance {float(var[index])}, epsilon {normalization.epsilon}"
            )
        self.normalization = normalization
        self.register_buffer("mean", mean)
        self.register_buffer("mean_rest", (wide - mean.double()).float())
        self.register_buffer("var", var.float())
        keys = normalization.keys
        parts = [torch.full((part.size,), keys is None or part.key in keys) for part in observation]
        is_normalized = torch.cat(parts) if parts else torch.ones(len(mean), dtype=torch.bool)
        self.register_buffer("is_normalized", is_normalized, persistent=False)

    def scale(self) -> Tensor:
        """What one unit of the normalised observation is worth, per feature."""
        scale = torch.sqrt(self.var + self.normalization.epsilon)
        return torch.where(self.is_normalized, scale, 1.0)

    def forward(self, observation: Tensor) -> Tensor:
        scaled = ((observation - self.mean) - self.mean_rest) / self.scale()
        clip = self.normalization.clip
        return torch.where(self.is_normalized, scaled.clamp(-clip, clip), observation)
