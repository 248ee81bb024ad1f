"""The frozen observation statistics a policy was trained with."""

import torch
from torch import Tensor, nn

VARIANCE_EPSILON = 1e-4
CLIP = 10.0


class ObservationNormalizer(nn.Module):
    """`clamp((x - mean) / sqrt(var + 1e-4), -10, 10)` per feature, as esper-lite's RunningMeanStd.

    `mean` and `var` are float32 `[observation_dim]`, finite, `var` not negative.
    Raises ValueError otherwise, naming the first bad feature.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, mean: Tensor, var: Tensor) -> None:
        super().__init__()
        if mean.ndim != 1 or mean.shape != var.shape:
            raise ValueError(
                "normaliser mean and variance must be two vectors of one length, "
                f"not {tuple(mean.shape)} and {tuple(var.shape)}"
            )
        mean = mean.detach().to(torch.float32, copy=True)
        var = var.detach().to(torch.float32, copy=True)
        bad = ~(mean.isfinite() & var.isfinite() & (var >= 0))
        if bad.any():
            index = int(bad.int().argmax())
            raise ValueError(
                f"normaliser statistics of feature {index} are mean {float(mean[index])}, "
                f"variance {float(var[index])}"
            )
        self.register_buffer("mean", mean)
        self.register_buffer("var", var)

    def scale(self) -> Tensor:
        """What one unit of the normalised observation is worth, per feature."""
        return torch.sqrt(self.var + VARIANCE_EPSILON)

    def forward(self, observation: Tensor) -> Tensor:
        scaled = (observation - self.mean) / self.scale()
        return scaled.clamp(-CLIP, CLIP)
