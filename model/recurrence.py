"""Stacked LSTMs whose single step every compiler and exporter takes whole.

`nn.LSTM` neither compiles (Dynamo refuses the module) nor exports well (ONNX gets a Loop). One
step of it is two matrix products and six pointwise operations, written out here. Sequences, which
only training needs, go through torch's fused kernel on the same parameters.

Under autocast that kernel would cast cells and state as well as products, and so score another
policy than the one that acted. There a sequence takes the steps that acting takes, one by one, with
its input's products in one: cells, states and outputs are of the parameters' dtype on both ways.
"""

import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from model.linear import Linear, linear

LayerParameters = tuple[Tensor, Tensor, Tensor, Tensor]
"""weight_ih, weight_hh, bias_ih, bias_hh; the gates in rows i, f, g, o."""

State = tuple[Tensor, ...]
"""An LSTM's `(h, c)`, each `[B, layers, hidden]`: batch-first, unlike `nn.LSTM`'s own state. A
policy's: that of each of its LSTMs, one after the other.

What a recurrence returns has its parameters' dtype, under autocast too.
"""


def cell_update(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
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

    def reset_parameters(self, forget_bias: float = 1.0) -> None:
        """esper-lite's initialisation: orthogonal weights, forget gates open, other biases 0.

        The forget quarter of both bias vectors is `forget_bias`, so twice that is in effect.
        """
        for name, parameter in self.named_parameters():
            if name.startswith("weight"):
                nn.init.orthogonal_(parameter)
            else:
                quarter = len(parameter) // 4
                nn.init.zeros_(parameter)
                nn.init.constant_(parameter.detach()[quarter : 2 * quarter], forget_bias)

    def layer_parameters(self) -> list[LayerParameters]:
        """Of each layer."""
        flat = [self.get_parameter(name) for name in self.parameter_names]
        return list(zip(flat[0::4], flat[1::4], flat[2::4], flat[3::4], strict=True))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Advances by one step: `x` `[B, input]` to the top layer's `[B, hidden]` and the state."""
        hs: list[Tensor] = []
        cs: list[Tensor] = []
        for layer, (w_ih, w_hh, b_ih, b_hh) in enumerate(self.layer_parameters()):
            gates = linear(x, w_ih, b_ih) + linear(state[0][:, layer], w_hh, b_hh)
            x, c = cell_update(gates, state[1][:, layer])
            hs.append(x)
            cs.append(c)
        return x, (torch.stack(hs, dim=1), torch.stack(cs, dim=1))

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Runs a sequence: `x` `[B, T, input]` to `[B, T, hidden]` and the state after it."""
        if torch.is_autocast_enabled(x.device.type):
            return self._forward_by_steps(x, state)
        layer_first = [part.transpose(0, 1).contiguous() for part in state]
        parameters = [tensor for layer in self.layer_parameters() for tensor in layer]
        y, h, c = torch.lstm(
            x, layer_first, parameters, True, self.num_layers, 0.0, self.training, False, True
        )
        return y, (h.transpose(0, 1), c.transpose(0, 1))

    def _forward_by_steps(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        hs: list[Tensor] = []
        cs: list[Tensor] = []
        for layer, (w_ih, w_hh, b_ih, b_hh) in enumerate(self.layer_parameters()):
            h, c = state[0][:, layer], state[1][:, layer]
            outputs: list[Tensor] = []
            for gates in linear(x, w_ih, b_ih).unbind(dim=1):
                h, c = cell_update(gates + linear(h, w_hh, b_hh), c)
                outputs.append(h)
            x = torch.stack(outputs, dim=1)
            hs.append(h)
            cs.append(c)
        return x, (torch.stack(hs, dim=1), torch.stack(cs, dim=1))


class ResidualLSTM(nn.Module):
    """One LSTM after the other, each one's output normalised and added to what went into it.

    The input is projected first where its width is another. There is no norm after the last sum.
    State and parameter names are esper-lite's V2 (commit 9b2926b1).
    """

    def __init__(self, input_dim: int, hidden_dim: int, num_layers: int) -> None:
        super().__init__()
        same = input_dim == hidden_dim
        self.input_proj = nn.Identity() if same else Linear(input_dim, hidden_dim)
        self.layers = nn.ModuleList(LSTM(hidden_dim, hidden_dim, 1) for _ in range(num_layers))
        self.layer_norms = nn.ModuleList(nn.LayerNorm(hidden_dim) for _ in range(num_layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the LSTM's, with the forget gates opened further the more layers there are."""
        for lstm in self._lstms():
            lstm.reset_parameters(forget_bias=1.0 + math.log(len(self.layers)))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Advances by one step: `x` `[B, input]` to `[B, hidden]` and the state."""
        return self._run(x, state, [lstm.step for lstm in self._lstms()])

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Runs a sequence: `x` `[B, T, input]` to `[B, T, hidden]` and the state after it."""
        return self._run(x, state, self._lstms())

    def _run(
        self,
        x: Tensor,
        state: State,
        lstms: Iterable[Callable[[Tensor, State], tuple[Tensor, State]]],
    ) -> tuple[Tensor, State]:
        x = self.input_proj(x)
        states: list[State] = []
        for layer, (lstm, norm) in enumerate(zip(lstms, self.layer_norms, strict=True)):
            own: State = (state[0][:, layer : layer + 1], state[1][:, layer : layer + 1])
            y, own = lstm(x, own)
            x = norm(y) + x
            states.append(own)
        return x, (
            torch.cat([own[0] for own in states], dim=1),
            torch.cat([own[1] for own in states], dim=1),
        )

    def _lstms(self) -> list[LSTM]:
        return [cast(LSTM, lstm) for lstm in self.layers]


RECURRENCES: dict[str, Callable[[int, int, int], LSTM | ResidualLSTM]] = {
    "lstm": LSTM,
    "residual_lstm": ResidualLSTM,
}
"""`PolicySpec.recurrence` to what is built from (input_dim, hidden_dim, num_layers)."""
