"""Linear layers of one precision, in autocast or out of it.

Under autocast the products alone are in its dtype: their results go on in the parameters' own, and
so does all that lies between two products. What is rounded then depends neither on whether a step
or a sequence computes it nor on what a compiler fuses; how is the product's own: one of other rows
may sum in another order and fall to the neighbouring number (V1's 140 features, in 2 of 100,000).
"""

from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` `[..., input]` times `weight` `[output, input]`, plus `bias`; of the weight's dtype."""
    if x.ndim > 2:
        x = x.contiguous()  # or torch adds the bias to a product that is rounded already
    product = nn.functional.linear(x, weight, bias)
    # A branch on dtypes is settled while tracing, so without autocast no cast is in a graph.
    return product if product.dtype == weight.dtype else product.to(weight.dtype)


class Linear(nn.Linear):
    """`nn.Linear` with its result in the weight's dtype, under autocast too."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
