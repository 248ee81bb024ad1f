"""A stacked LSTM whose single step every compiler and exporter takes whole.

`nn.LSTM` neither compiles (Dynamo refuses the module) nor exports well (ONNX gets a Loop). One
step of it is two matrix products and six pointwise operations, written out here. Sequences, which
only training needs, go through torch's fused kernel on the same parameters.
"""

import torch
from torch import Tensor, nn

State = tuple[Tensor, Tensor]
"""`(h, c)`, each `[B, layers, hidden]`: batch-first, unlike `nn.LSTM`'s own state."""


def cell_update(gates: Tensor, c: Tensor) -> State:
    """The LSTM's pointwise half: gates `[B, 4 * hidden]` and `c` to the new `(h, c)`."""
    i, f, g, o = gates.chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


class LSTM(nn.Module):
    """`nn.LSTM(input_dim, hidden_dim, num_layers, batch_first=True)`: its names, its numbers."""

    def __init__(self, input_dim: int, hidden_dim: int, num_layers: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.parameter_names: list[str] = []
        for layer in range(num_layers):
            width = input_dim if layer == 0 else hidden_dim
            for name, shape in (
                ("weight_ih", (4 * hidden_dim, width)),
                ("weight_hh", (4 * hidden_dim, hidden_dim)),
                ("bias_ih", (4 * hidden_dim,)),
                ("bias_hh", (4 * hidden_dim,)),
            ):
                self.parameter_names.append(f"{name}_l{layer}")
                self.register_parameter(f"{name}_l{layer}", nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """esper-lite's initialisation: orthogonal weights, forget gates open, other biases 0.

        The forget quarter of both bias vectors is 1, so the effective forget bias is 2.
        """
        for name, parameter in self.named_parameters():
            if name.startswith("weight"):
                nn.init.orthogonal_(parameter)
            else:
                quarter = len(parameter) // 4
                nn.init.zeros_(parameter)
                nn.init.ones_(parameter.detach()[quarter : 2 * quarter])

    def layer_parameters(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Per layer: weight_ih, weight_hh, bias_ih, bias_hh; the gates in rows i, f, g, o."""
        flat = [self.get_parameter(name) for name in self.parameter_names]
        return list(zip(flat[0::4], flat[1::4], flat[2::4], flat[3::4], strict=True))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Advances by one step: `x` `[B, input]` to the top layer's `[B, hidden]` and the state."""
        hs: list[Tensor] = []
        cs: list[Tensor] = []
        for layer, (w_ih, w_hh, b_ih, b_hh) in enumerate(self.layer_parameters()):
            gates = nn.functional.linear(x, w_ih, b_ih)
            gates = gates + nn.functional.linear(state[0][:, layer], w_hh, b_hh)
            x, c = cell_update(gates, state[1][:, layer])
            hs.append(x)
            cs.append(c)
        return x, (torch.stack(hs, dim=1), torch.stack(cs, dim=1))

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Runs a sequence: `x` `[B, T, input]` to `[B, T, hidden]` and the state after it."""
        layer_first = [part.transpose(0, 1).contiguous() for part in state]
        parameters = [tensor for layer in self.layer_parameters() for tensor in layer]
        y, h, c = torch.lstm(
            x, layer_first, parameters, True, self.num_layers, 0.0, self.training, False, True
        )
        return y, (h.transpose(0, 1), c.transpose(0, 1))
