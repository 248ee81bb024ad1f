"""The packed step in every format against the policy written the usual way, one thread.

`python -m benchmarks.step` prints tables for each hidden size; fp32 and bf16 are timed in one run.
The usual way is `nn.LSTM`, one module a head, a loop over them, and boolean-index assignment for
forced heads, in eager PyTorch. Every format is loaded from its file, compared with it, and timed in
turn with it. ONNX Runtime is given NumPy arrays and the others tensors: what each takes without
conversion.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from export.formats import (
    FORMATS,
    LoadedStep,
    StepInput,
    StepSource,
    native_call,
)
from export.manifest import Precision
from export.parity import TOLERANCES
from export.report import Latency
from export.step import PolicyStep, StepOutput
from export.timing import Call, latencies, this_machine
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec

BATCH_SIZES = (1, 8, 32, 64, 256)
HIDDEN_DIMS = (128, 512)


class NaivePolicy(nn.Module):
    """The policy as most would write it first. Takes and gives what the exported step does."""

    def __init__(self, policy: FactoredRecurrentActorCritic) -> None:
        super().__init__()
        self.spec = policy.spec
        self.feature_net = policy.feature_net
        self.lstm = nn.LSTM(
            self.spec.feature_dim, self.spec.hidden_dim, self.spec.num_layers, batch_first=True
        )
        self.lstm.load_state_dict(policy.lstm.state_dict())
        self.lstm_ln = policy.lstm_ln
        self.heads = nn.ModuleDict(
            dict(zip(self.spec.head_names, policy.head_mlps(), strict=True))
        )  # fmt: skip
        self.value_head = policy.value_network

    def forward(
        self, observation: Tensor, action_mask: Tensor, noise: Tensor, h: Tensor, c: Tensor
    ) -> StepOutput:
        x = self.feature_net(observation).unsqueeze(1)
        state = (h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous())
        y, (h, c) = self.lstm(x, state)
        y = self.lstm_ln(y.squeeze(1))
        masks = dict(zip(self.spec.head_names, self._columns(action_mask), strict=True))
        noises = dict(zip(self.spec.head_names, self._columns(noise), strict=True))
        actions: dict[str, Tensor] = {}
        log_probs: dict[str, Tensor] = {}
        op = self.spec.heads[self.spec.op_index]
        for head in (op, *(head for head in self.spec.heads if head is not op)):
            mask = masks[head.name]
            if head.relevant_ops is not None:
                irrelevant = torch.ones_like(actions[op.name], dtype=torch.bool)
                for other in head.relevant_ops:
                    irrelevant &= actions[op.name] != other
                mask = mask.clone()
                mask[irrelevant] = False
                mask[irrelevant, head.forced_index] = True
            logits = self.heads[head.name](y).masked_fill(~mask, -1e4)
            scores = torch.log_softmax(logits, dim=-1)
            action = (scores + noises[head.name]).argmax(dim=-1)
            actions[head.name] = action
            log_probs[head.name] = scores.gather(1, action.unsqueeze(1)).squeeze(1)
        names = self.spec.head_names
        return (
            torch.stack([actions[name] for name in names], dim=1),
            torch.stack([log_probs[name] for name in names], dim=1),
            self.value_head(y).squeeze(-1),
            h.transpose(0, 1),
            c.transpose(0, 1),
        )

    def _columns(self, packed: Tensor) -> tuple[Tensor, ...]:
        return torch.split(packed, list(self.spec.head_sizes), dim=-1)


def random_inputs(spec: PolicySpec, batch_size: int, device: torch.device) -> StepInput:
    generator = torch.Generator().manual_seed(batch_size)
    mask = torch.rand(batch_size, spec.num_choices, generator=generator) < 0.9
    start = 0
    for size in spec.head_sizes:
        mask[:, start] = True
        start += size
    state = (batch_size, spec.num_layers, spec.hidden_dim)
    uniform = torch.rand(batch_size, spec.num_choices, generator=generator).clamp(min=1e-20)
    observation = torch.randn(batch_size, spec.observation_dim, generator=generator)
    h = torch.rand(state, generator=generator) * 2 - 1
    c = torch.randn(state, generator=generator)
    noise = -torch.log(-torch.log(uniform))
    return (
        observation.to(device),
        mask.to(device),
        noise.to(device),
        h.to(device),
        c.to(device),
    )


def loaded(format_name: str, step: PolicyStep, device: torch.device) -> LoadedStep:
    written = FORMATS[format_name]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / written.file
        written.write(StepSource(step, max(BATCH_SIZES)), path)
        return written.load(path.read_bytes(), device)


def check(name: str, got: StepOutput, expected: StepOutput, precision: Precision) -> None:
    """Both must decide alike, up to near ties, or their times are not comparable."""
    tolerance = TOLERANCES[precision]
    agreement = (got[0] == expected[0]).float().mean().item()
    assert agreement >= 0.98, f"{name} takes {agreement:.1%} of the naive policy's actions"
    for have, want in zip(got[2:], expected[2:], strict=True):
        torch.testing.assert_close(have, want, atol=tolerance.atol, rtol=tolerance.rtol)


Runner = tuple[str, Precision]
Row = dict[Runner, Latency]


def measure(
    hidden_dim: int,
    precisions: Sequence[Precision],
    formats: Sequence[str],
    device: torch.device,
    seconds: float,
) -> Iterator[tuple[int, Latency, Row]]:
    """By batch size: the naive policy's latency, and that of every format in every precision."""
    torch.manual_seed(0)
    spec = PolicySpec.tamiyo_v1(hidden_dim=hidden_dim)
    policy = FactoredRecurrentActorCritic(spec).to(device).eval()
    naive = NaivePolicy(policy).eval()
    steps: dict[Runner, LoadedStep] = {}
    for precision in precisions:
        source = PolicyStep(policy, None, precision).eval()
        for name in formats:
            if precision in FORMATS[name].precisions:
                steps[name, precision] = loaded(name, source, device)
    for batch_size in BATCH_SIZES:
        inputs = random_inputs(spec, batch_size, device)
        expected = naive(*inputs)
        for (name, precision), step in steps.items():
            check(name, step(*inputs), expected, precision)
        calls: dict[str, Call] = {"naive": partial(naive, *inputs)}
        calls |= {"-".join(runner): native_call(step, inputs) for runner, step in steps.items()}
        timed = latencies(calls, batch_size=batch_size, seconds=seconds, device=device)
        yield batch_size, timed["naive"], {runner: timed["-".join(runner)] for runner in steps}


def fastest(row: Row, precision: Precision) -> tuple[str, float]:
    """The format with the smallest median, and its microseconds."""
    of_precision = {name: row[name, other] for name, other in row if other == precision}
    name = min(of_precision, key=lambda name: of_precision[name].median_us)
    return name, of_precision[name].median_us


def print_tables(rows: list[tuple[int, Latency, Row]], hidden_dim: int) -> None:
    precisions = dict.fromkeys(precision for _, precision in rows[0][2])
    for precision in precisions:
        names = [name for name, other in rows[0][2] if other == precision]
        print(f"\nhidden {hidden_dim}, {precision}: µs a step (times as fast as naive)\n")
        print("| B | naive | " + " | ".join(names) + " | fastest |")
        print("|---" * (len(names) + 3) + "|")
        for batch_size, naive, row in rows:
            cells = [
                f"{row[name, precision].median_us:.0f} "
                f"({naive.median_us / row[name, precision].median_us:.1f} x)"
                for name in names
            ]
            best, best_us = fastest(row, precision)
            cells.append(f"{best} {naive.median_us / best_us:.1f} x")
            print(f"| {batch_size} | {naive.median_us:.0f} | " + " | ".join(cells) + " |")
    if len(precisions) == 2:
        print(f"\nhidden {hidden_dim}: fastest bf16 against fastest fp32\n")
        print("| B | fp32 µs | bf16 µs | fp32 / bf16 |\n|---|---|---|---|")
        for batch_size, _, row in rows:
            single, half = fastest(row, "fp32"), fastest(row, "bf16")
            print(
                f"| {batch_size} | {single[1]:.0f} {single[0]} | {half[1]:.0f} {half[0]} "
                f"| {single[1] / half[1]:.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", default=",".join(FORMATS), help="which, by commas")
    parser.add_argument("--hidden", type=int, nargs="*", default=HIDDEN_DIMS)
    parser.add_argument(
        "--precision", nargs="*", choices=get_args(Precision), default=get_args(Precision)
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row of the tables")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    machine = this_machine(device)
    print(f"{machine.gpu or machine.cpu}, {machine.vector_isa}, torch {machine.torch}, 1 thread")
    formats = options.formats.split(",")
    for hidden_dim in options.hidden:
        with torch.inference_mode():
            rows = list(measure(hidden_dim, options.precision, formats, device, options.seconds))
        print_tables(rows, hidden_dim)


if __name__ == "__main__":
    main()
