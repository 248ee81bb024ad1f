import pytest
import torch
from torch import Tensor, nn

from model.recurrence import LSTM, State

INPUT_DIM, HIDDEN_DIM, BATCH, LENGTH = 7, 5, 3, 6
FLOAT64_ATOL = 1e-12
"""Two ways to the same sums: in float64 only the last digits may differ."""


def random_lstm(num_layers: int) -> LSTM:
    torch.manual_seed(num_layers)
    lstm = LSTM(INPUT_DIM, HIDDEN_DIM, num_layers).double()
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return lstm


def torch_lstm(lstm: LSTM) -> nn.LSTM:
    theirs = nn.LSTM(INPUT_DIM, HIDDEN_DIM, lstm.num_layers, batch_first=True).double()
    theirs.load_state_dict(lstm.state_dict(), strict=True)
    return theirs


def random_sequence(num_layers: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    x = torch.randn(BATCH, LENGTH, INPUT_DIM, dtype=torch.float64)
    h, c = torch.randn(2, BATCH, num_layers, HIDDEN_DIM, dtype=torch.float64)
    return x, (h, c)


def run_by_steps(lstm: LSTM, x: Tensor, state: State) -> tuple[Tensor, ...]:
    outputs = []
    for t in range(x.shape[1]):
        y, state = lstm.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), *state


def run_by_sequence(lstm: LSTM, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    y, state = lstm(x, state)
    return y, *state


def run_torch(lstm: nn.LSTM, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    layer_first = (state[0].transpose(0, 1).contiguous(), state[1].transpose(0, 1).contiguous())
    y, (h, c) = lstm(x, layer_first)
    return y, h.transpose(0, 1), c.transpose(0, 1)


def gradients(
    outputs: tuple[Tensor, ...], module: nn.Module, inputs: list[Tensor]
) -> dict[str, Tensor]:
    """Of a sum that weighs every output element differently, by parameter and input name."""
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64)
        loss = loss + (output.reshape(-1) * weight).sum()
    named = dict(module.named_parameters()) | dict(zip(("x", "h", "c"), inputs, strict=True))
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_parameters_are_named_and_shaped_as_torchs(num_layers: int) -> None:
    ours = LSTM(INPUT_DIM, HIDDEN_DIM, num_layers).state_dict()
    theirs = nn.LSTM(INPUT_DIM, HIDDEN_DIM, num_layers, batch_first=True).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert list(ours) == list(theirs)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_steps_and_sequence_give_torchs_values_and_gradients(num_layers: int) -> None:
    lstm = random_lstm(num_layers)
    theirs = torch_lstm(lstm)
    x, (h, c) = random_sequence(num_layers)
    inputs = [x.requires_grad_(), h.requires_grad_(), c.requires_grad_()]
    expected = run_torch(theirs, x, (h, c))
    expected_gradients = gradients(expected, theirs, inputs)

    for run in (run_by_steps, run_by_sequence):
        outputs = run(lstm, x, (h, c))
        torch.testing.assert_close(outputs, expected, atol=FLOAT64_ATOL, rtol=0.0)
        found = gradients(outputs, lstm, inputs)
        assert found.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(found[name], gradient, atol=FLOAT64_ATOL, rtol=1e-10)


def test_sequence_can_be_cut_anywhere() -> None:
    lstm = random_lstm(2)
    x, state = random_sequence(2)
    whole, *end = run_by_sequence(lstm, x, state)
    first, h, c = run_by_sequence(lstm, x[:, :2], state)
    second, *second_end = run_by_sequence(lstm, x[:, 2:], (h, c))
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, atol=FLOAT64_ATOL, rtol=0)
    torch.testing.assert_close(second_end, end, atol=FLOAT64_ATOL, rtol=0.0)


def test_state_handed_in_is_not_written_to() -> None:
    lstm = random_lstm(2)
    x, (h, c) = random_sequence(2)
    before = h.clone(), c.clone()
    lstm.step(x[:, 0], (h, c))
    lstm(x, (h, c))
    assert torch.equal(h, before[0])
    assert torch.equal(c, before[1])


def test_rows_do_not_see_each_other() -> None:
    lstm = random_lstm(2)
    x, (h, c) = random_sequence(2)
    y, (new_h, new_c) = lstm.step(x[:, 0], (h, c))
    for row in range(BATCH):
        one = slice(row, row + 1)
        alone, (alone_h, alone_c) = lstm.step(x[one, 0], (h[one], c[one]))
        torch.testing.assert_close(alone, y[one], atol=FLOAT64_ATOL, rtol=0.0)
        torch.testing.assert_close(alone_h, new_h[one], atol=FLOAT64_ATOL, rtol=0.0)
        torch.testing.assert_close(alone_c, new_c[one], atol=FLOAT64_ATOL, rtol=0.0)


def test_fresh_lstm_is_orthogonal_with_open_forget_gates() -> None:
    lstm = LSTM(INPUT_DIM, HIDDEN_DIM, 2)
    for w_ih, w_hh, b_ih, b_hh in lstm.layer_parameters():
        for weight in (w_ih, w_hh):  # taller than wide: its columns are orthonormal
            torch.testing.assert_close(weight.T @ weight, torch.eye(weight.shape[1]))
        forget_only = torch.zeros(4, HIDDEN_DIM)
        forget_only[1] = 1.0
        assert torch.equal(b_ih.view(4, HIDDEN_DIM), forget_only)
        assert torch.equal(b_hh.view(4, HIDDEN_DIM), forget_only)
