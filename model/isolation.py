"""Joins a growing module (the seed) to a trained network (the host) without letting it do harm.

Knows the straight-through join, the three blends and how loudly each side's gradient speaks.
Does not know a seed's life cycle, which blend a slot uses or who moves alpha, and nothing of
policies, artifacts or HTTP. Source of its rules: github.com/tachyon-beep/esper-lite, Kasmina.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

_RATIO_EPSILON = 1e-8
_SMALLEST_SQUARE = 1e-30


class GradientHealth(TypedDict):
    """Global L2 norms of both sides' gradients, and the seed's norm as a share of the host's."""

    host_grad_norm: float
    seed_grad_norm: float
    seed_gradient_ratio: float


@dataclass(frozen=True, slots=True)
class PendingGradientHealth:
    """Squared norms, float64, still on their device; None where a side has no gradient at all."""

    host_norm_sq: Tensor | None
    seed_norm_sq: Tensor | None


def ste_forward(host: Tensor, seed: Tensor) -> Tensor:
    """Gives exactly the host's values, while the seed receives the whole gradient too.

    Both are of one shape, floating point; the result is a tensor of its own with the host's
    dtype and memory format. d/dhost = d/dseed = 1 for every element, whatever value the seed
    has there, NaN included; the seed's gradient comes in the seed's dtype.

    PERF: with equal dtypes nothing is cast, and only the result is allocated. Where they differ,
    the gradient is cast on its way back, a tensor of the seed's size (and an exported graph casts
    the seed too): each side needs its own dtype. Compute both in one dtype or one autocast region
    to be rid of it.

    Raises ValueError if the shapes differ. Source: esper-lite, Kasmina isolation, B3-DRL-12.
    """
    _require_same_shape(host, "seed", seed)
    if torch.compiler.is_compiling():
        return _traceable_straight_through(host, seed)
    # Torch has no types for it.
    result: Tensor = _StraightThrough.apply(host, seed)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(host: Tensor, seed: Tensor) -> Tensor:
        return host.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.seed_dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, _cast(gradient, ctx.seed_dtype)


def _traceable_straight_through(host: Tensor, seed: Tensor) -> Tensor:
    # torch.export drops a Function's backward, silently. This sum keeps both gradients and loses
    # its value, overwritten where autograd does not look; a compiler then never computes it.
    if 0 in host.stride():
        host = host.clone()  # an expanded host says nothing of the sum's layout, the seed would
    out = host + _cast(seed, host.dtype)
    out.detach().copy_(host.detach())
    return out


def blend_add(host: Tensor, seed: Tensor, alpha: Tensor) -> Tensor:
    """Moves from host to seed by alpha: lerp(host, seed, alpha), alpha clamped to [0, 1].

    `seed` has the host's shape, `alpha` broadcasts to it ([], [B, 1, 1] or [B, 1, 1, 1]); both
    are cast to the host's dtype, alpha after its clamp. Outside [0, 1] alpha has no gradient.
    The result has the host's dtype and memory format; a NaN in the seed shows in it.

    Raises ValueError if the shapes do not fit. Source: esper-lite, Kasmina blend operators.
    """
    _require_same_shape(host, "seed", seed)
    _require_broadcastable(host, "alpha", alpha)
    weight = _cast(alpha.clamp(0.0, 1.0), host.dtype)
    return torch.lerp(host, _cast(seed, host.dtype), weight)


def blend_multiply(
    host: Tensor, seed: Tensor, alpha: Tensor, seed_input: Tensor | None = None
) -> Tensor:
    """Scales the host by 1 + alpha * tanh(seed - seed_input), alpha clamped to [0, 1].

    `seed_input` is what the seed was given, of its shape, the host itself if None; passed detached
    it keeps the tanh's gradient out of the host. Otherwise as `blend_add`, but alpha is cast
    before its clamp.

    Raises ValueError if the shapes do not fit. Source: esper-lite, Kasmina blend operators.
    """
    seed_input = host if seed_input is None else seed_input
    _require_same_shape(host, "seed", seed)
    _require_same_shape(host, "seed_input", seed_input)
    _require_broadcastable(host, "alpha", alpha)
    weight = _cast(alpha, host.dtype).clamp(0.0, 1.0)
    modulation = torch.tanh(_cast(seed, host.dtype) - _cast(seed_input, host.dtype))
    return host * (1.0 + weight * modulation)


def blend_gate(host: Tensor, seed: Tensor, alpha: Tensor, gate: Tensor) -> Tensor:
    """Moves from host to seed by alpha * gate, each clamped to [0, 1] first.

    Shapes and dtypes as in `blend_add`; `gate` broadcasts like alpha, one value per sample.

    Raises ValueError if the shapes do not fit. Source: esper-lite, Kasmina blend operators.
    """
    _require_broadcastable(host, "alpha", alpha)
    _require_broadcastable(host, "gate", gate)
    return blend_add(host, seed, alpha.clamp(0.0, 1.0) * gate.clamp(0.0, 1.0))


class GradientHealthMonitor:
    """Compares the gradients that reached a host and its seed. Source: esper-lite, Kasmina."""

    def __init__(self) -> None:
        self._sides: tuple[list[nn.Parameter], list[nn.Parameter]] | None = None

    def register(self, host: nn.Module, seed: nn.Module) -> None:
        """Watches, from now on, the parameters of both that require a gradient at this moment."""
        host_side, seed_side = (
            [parameter for parameter in side.parameters() if parameter.requires_grad]
            for side in (host, seed)
        )
        self._sides = (host_side, seed_side)

    def compute(self) -> GradientHealth:
        """Norms and ratio as numbers, with one read from the device; errors as `compute_async`."""
        return materialise(self.compute_async())

    @torch.no_grad()
    def compute_async(self) -> PendingGradientHealth:
        """Squared norms as 0-dim tensors, without waiting for the device they all lie on.

        Sparse gradients count as the dense ones that they stand for; a GPU is waited for to add up
        their repeated places. The norms stay valid when the gradients are zeroed. Raises
        RuntimeError if nothing is registered.
        """
        if self._sides is None:
            raise RuntimeError("no modules to watch; call register(host, seed) first")
        host, seed = self._sides
        return PendingGradientHealth(_grad_norm_sq(host), _grad_norm_sq(seed))


def materialise(pending: PendingGradientHealth) -> GradientHealth:
    """Reads pending squared norms back in one transfer; on a side stream, synchronise it first.

    A side without gradients has norm 0; the ratio is seed / (host + 1e-8), and 0 if the host's
    norm is 0.
    """
    sides = (pending.host_norm_sq, pending.seed_norm_sq)
    known = [norm_sq for norm_sq in sides if norm_sq is not None]
    values = iter(torch.stack(known).tolist() if known else [])
    host, seed = (0.0 if norm_sq is None else math.sqrt(next(values)) for norm_sq in sides)
    ratio = seed / (host + _RATIO_EPSILON) if host != 0.0 else 0.0
    return GradientHealth(host_grad_norm=host, seed_grad_norm=seed, seed_gradient_ratio=ratio)


def _grad_norm_sq(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    grads = [_dense(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not grads:
        return None
    # At least float32: a squared norm soon overflows float16 and has three digits in bfloat16.
    dtype = reduce(torch.promote_types, {grad.dtype for grad in grads}, torch.float32)
    norm_sq, exact = (
        torch.stack(torch._foreach_norm(grads, 2, dtype=each)).square().sum().double()
        for each in (dtype, torch.float64)
    )
    # Of a norm above 1.8e19, or far below 1, float32 cannot hold the square.
    return torch.where(norm_sq.isfinite() & (norm_sq > _SMALLEST_SQUARE), norm_sq, exact)


def _dense(grad: Tensor) -> Tensor:
    # What a sparse gradient holds, each place once: all else in it is 0.
    return grad.coalesce().values() if grad.is_sparse else grad


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # A branch on dtypes is settled while tracing, so equal dtypes leave no cast in a graph.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _require_same_shape(host: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.shape != host.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, host has {tuple(host.shape)}; they must agree"
        )


def _require_broadcastable(host: Tensor, name: str, tensor: Tensor) -> None:
    fits = zip(reversed(tensor.shape), reversed(host.shape), strict=False)
    if tensor.dim() > host.dim() or any(size not in (1, full) for size, full in fits):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, "
            f"which does not broadcast to host's {tuple(host.shape)}"
        )
