"""The one-step function that every format exports: a pure function of named arrays.

What all families' steps have in common: names, packed parameters, and how an action is drawn. What
a family computes of an observation is its own, in few and wide products.
"""

from collections.abc import Iterable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.manifest import Precision, step_inputs
from model.heads import Decision, HeadTable
from model.step_spec import StepSpec

StepInput = tuple[Tensor, ...]
StepOutput = tuple[Tensor, ...]

PRODUCT_DTYPE: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PackedStep(nn.Module):
    """Inputs to outputs, names, dtypes and shapes as `export.manifest` has them for the spec.

    `observation` is raw: the normaliser, where the policy has one, is inside; the value is in
    returns. All rows are independent; nothing is random, and no shape depends on data. `precision`
    is that of weights and products; everything between them, the state included, is float32.

    `state_dict` is the packed parameters: all that depends on the policy's weights, by name, and
    nothing else. What a spec alone decides is in buffers that are no part of it.
    """

    placement: Tensor
    padding: Tensor

    def __init__(self, spec: StepSpec, precision: Precision, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.product_dtype = PRODUCT_DTYPE[precision]
        self.heads = HeadTable(spec).to(device)
        valid = self.heads.valid.flatten()
        padding = torch.where(valid, 0.0, self.heads.masked_logit)
        self.register_buffer("padding", padding, persistent=False)
        self._is_ragged = len(set(self.heads.sizes)) > 1
        if self._is_ragged:  # or it is the identity, as large as the choices squared
            columns = torch.eye(spec.num_choices, device=device)
            placement = self.heads.spread(columns).flatten(1) * valid  # [choices, heads * width]
            self.register_buffer("placement", placement.t().contiguous(), persistent=False)

    def packed(self) -> dict[str, NDArray[Any]]:
        """Copies of the parameters, in order; bfloat16, which NumPy has not, as its 16 bits."""
        arrays = {}
        for name, parameter in self.state_dict().items():
            host = parameter.detach().to("cpu", copy=True).contiguous()
            is_wide = host.dtype != torch.bfloat16
            arrays[name] = (host if is_wide else host.view(torch.uint16)).numpy()
        return arrays

    def example(self, batch_size: int) -> StepInput:
        """Inputs of the right names' shapes and dtypes: zeros, with everything allowed."""
        inputs = []
        for array in step_inputs(self.spec):
            shape = (batch_size, *map(int, array.shape[1:]))
            dtype = getattr(torch, array.dtype)
            fill = self.padding.new_ones if dtype == torch.bool else self.padding.new_zeros
            inputs.append(fill(shape, dtype=dtype))
        return tuple(inputs)

    def decide(
        self,
        logits: Tensor,
        action_mask: Tensor,
        noise: Tensor,
        slot_by_op_mask: Tensor | None = None,
    ) -> Decision:
        """The policy's own rules; the shorter way where no rule needs the mask as a table."""
        if slot_by_op_mask is None and not (self.heads.has_floors or self.heads.has_first_allowed):
            masked = torch.where(action_mask, logits, self.heads.masked_logit)
            log_probs = torch.log_softmax(self._table(masked, self.padding), dim=-1)
            return self.heads.choose(log_probs, self._table(noise))
        allowed = self.heads.spread(action_mask)
        choices = self.heads.choices(self._table(logits), allowed, slot_by_op_mask)
        return choices.choose(self._table(noise))

    def _table(self, packed: Tensor, padding: Tensor | None = None) -> Tensor:
        """`HeadTable.spread`; where heads differ in size as a product, which every runtime is
        faster at, exact in float32: each cell is one column times 1, the others times 0. `packed`
        must be finite then.
        """
        if self._is_ragged:
            packed = nn.functional.linear(packed, self.placement, padding)
        return packed.view(-1, len(self.heads.names), self.heads.width)


class Layers(nn.Module):
    """Layers in a row, for acting: products in their own dtype, what is between in float32."""

    def __init__(self, layers: Iterable[nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.layers = nn.ModuleList(
            packed_linear(*parameters_of(layer), dtype) if isinstance(layer, nn.Linear) else layer
            for layer in layers
            if not isinstance(layer, nn.Dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x.to(self.dtype)).float() if isinstance(layer, nn.Linear) else layer(x)
        return x


def side_by_side(layers: list[nn.Module], dtype: torch.dtype) -> nn.Linear:
    """One product for layers that read the same."""
    weights, biases = zip(*map(parameters_of, layers), strict=True)
    return packed_linear(torch.cat(weights), torch.cat(biases), dtype)


def block_diagonal(layers: list[nn.Module], dtype: torch.dtype) -> nn.Linear:
    """One product for layers that each read a stretch of their own, in order."""
    weights, biases = zip(*map(parameters_of, layers), strict=True)
    # torch has no types for it.
    weight: Tensor = torch.block_diag(*weights)  # type: ignore[no-untyped-call]
    return packed_linear(weight, torch.cat(biases), dtype)


def packed_linear(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> nn.Linear:
    """A layer of these numbers in `dtype`, without gradient."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer


def parameters_of(linear: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias."""
    return linear.get_parameter("weight").detach(), linear.get_parameter("bias").detach()
