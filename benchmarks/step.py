"""The packed step in every format against the policy written the usual way, one thread.

`python -m benchmarks.step` prints tables for each policy; fp32 and bf16 are timed in one run.
The usual way is `nn.LSTM`, one module a head, a loop over them, and boolean-index assignment for
forced heads, in eager PyTorch. Every format is loaded from its file, compared with it, and timed in
turn with it. The naive policy is given tensors, the formats the host's arrays, as the service binds
them: what each takes.
"""

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from export.formats import FORMATS, StepSource
from export.loaders.load import RUNTIME_OF, load_step
from export.loaders.protocol import LoadedStep
from export.manifest import FormatFile, Precision, step_inputs, step_outputs
from export.packed_step import StepInput, StepOutput
from export.parity import TOLERANCES
from export.report import Latency
from export.tamiyo_step import TamiyoStep
from export.timing import Call, latencies, this_machine
from model.policy import FactoredRecurrentActorCritic
from model.recurrence import ResidualLSTM
from model.spec import PolicySpec

BATCH_SIZES = (1, 8, 32, 64, 256)
POLICIES = {
    "v1": PolicySpec.tamiyo_v1(),
    "v1-512": PolicySpec.tamiyo_v1(hidden_dim=512),
    "v2": PolicySpec.tamiyo_v2(),
}


class NaivePolicy(nn.Module):
    """The policy as most would write it first. Takes and gives what the exported step does."""

    def __init__(self, policy: FactoredRecurrentActorCritic) -> None:
        super().__init__()
        self.spec = policy.spec
        self.blueprint_embedding = policy.blueprint_embedding
        self.feature_net = policy.feature_net
        self.is_residual = isinstance(policy.lstm, ResidualLSTM)
        if isinstance(policy.lstm, ResidualLSTM):
            self.input_proj = policy.lstm.input_proj
            self.layers = nn.ModuleList(
                self._lstm(layer, self.spec.hidden_dim, 1) for layer in policy.lstm.layers
            )
            self.layer_norms = policy.lstm.layer_norms
        else:
            self.lstm = self._lstm(policy.lstm, self.spec.feature_dim, self.spec.num_layers)
        self.lstm_ln = policy.lstm_ln
        self.heads = nn.ModuleDict(
            dict(zip(self.spec.head_names, policy.head_mlps(), strict=True))
        )  # fmt: skip
        self.value_head = policy.value_network

    def _lstm(self, same: nn.Module, input_dim: int, num_layers: int) -> nn.LSTM:
        lstm = nn.LSTM(input_dim, self.spec.hidden_dim, num_layers, batch_first=True)
        lstm.load_state_dict(same.state_dict())
        return lstm

    def _recur(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.unsqueeze(1)
        h, c = h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()
        if not self.is_residual:
            y, (h, c) = self.lstm(x, (h, c))
            return y.squeeze(1), h, c
        x = self.input_proj(x)
        states = []
        for at, (lstm, norm) in enumerate(zip(self.layers, self.layer_norms, strict=True)):
            y, state = lstm(x, (h[at : at + 1], c[at : at + 1]))
            x = norm(y) + x
            states.append(state)
        return x.squeeze(1), torch.cat([h for h, _ in states]), torch.cat([c for _, c in states])

    def forward(
        self,
        observation: Tensor,
        action_mask: Tensor,
        noise: Tensor,
        h: Tensor,
        c: Tensor,
        blueprint_index: Tensor | None = None,
        slot_by_op_mask: Tensor | None = None,
    ) -> StepOutput:
        x = observation
        if self.blueprint_embedding is not None:
            x = torch.cat([x, self.blueprint_embedding(blueprint_index)], dim=-1)
        y, h, c = self._recur(self.feature_net(x), h, c)
        y = self.lstm_ln(y)
        masks = dict(zip(self.spec.head_names, self._columns(action_mask), strict=True))
        noises = dict(zip(self.spec.head_names, self._columns(noise), strict=True))
        actions: dict[str, Tensor] = {}
        log_probs: dict[str, Tensor] = {}
        op = self.spec.heads[self.spec.op_index]
        for head in (op, *(head for head in self.spec.heads if head is not op)):
            mask = masks[head.name]
            if head.name == "slot" and slot_by_op_mask is not None:
                mask = slot_by_op_mask[torch.arange(len(y), device=y.device), actions[op.name]]
            if head.relevant_ops is not None:
                irrelevant = torch.ones_like(actions[op.name], dtype=torch.bool)
                for other in head.relevant_ops:
                    irrelevant &= actions[op.name] != other
                mask = mask.clone()
                if head.forced_index == "first_allowed":
                    first = mask[irrelevant].int().argmax(dim=1)
                    mask[irrelevant] = nn.functional.one_hot(first, head.size).bool()
                else:
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
    inputs = [observation, mask, noise, h, c]
    if spec.blueprint_embedding_dim is not None:
        shape = (batch_size, spec.num_slots)
        inputs.append(torch.randint(-1, spec.num_blueprints, shape, generator=generator))
    if spec.has_slot_by_op:
        slots = torch.rand(batch_size, spec.num_ops, spec.num_slots, generator=generator) < 0.5
        slots[..., 0] = True
        inputs.append(slots)
    return tuple(array.to(device) for array in inputs)


def loaded(format_name: str, step: TamiyoStep, device: torch.device) -> LoadedStep:
    written = FORMATS[format_name]
    content = written.write(StepSource(step, max(BATCH_SIZES)))
    sha256 = hashlib.sha256(content).hexdigest()
    return load_step(
        content,
        name=RUNTIME_OF[format_name],
        file=FormatFile(file=written.file, sha256=sha256, bytes=len(content)),
        inputs=step_inputs(step.spec),
        outputs=step_outputs(step.spec),
        device="cuda" if device.type == "cuda" else "cpu",
        num_threads=torch.get_num_threads(),
    )


def bound(step: LoadedStep, spec: PolicySpec, inputs: StepInput) -> tuple[Call, StepOutput]:
    """The step's call on these inputs, and the tensors, on the host, it writes to."""
    given = {
        array.name: tensor.cpu().numpy()
        for array, tensor in zip(step_inputs(spec), inputs, strict=True)
    }
    wanted = {
        array.name: np.zeros(
            [size if isinstance(size, int) else len(inputs[0]) for size in array.shape],
            dtype=array.dtype,
        )
        for array in step_outputs(spec)
    }
    return step.bind(given, wanted), tuple(map(torch.from_numpy, wanted.values()))


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
    spec: PolicySpec,
    precisions: Sequence[Precision],
    formats: Sequence[str],
    device: torch.device,
    seconds: float,
) -> Iterator[tuple[int, Latency, Row]]:
    """By batch size: the naive policy's latency, and that of every format in every precision."""
    torch.manual_seed(0)
    policy = FactoredRecurrentActorCritic(spec).to(device).eval()
    naive = NaivePolicy(policy).eval()
    steps: dict[Runner, LoadedStep] = {}
    for precision in precisions:
        source = TamiyoStep(policy, None, precision).eval()
        for name in formats:
            if precision in FORMATS[name].precisions:
                steps[name, precision] = loaded(name, source, device)
    for batch_size in BATCH_SIZES:
        inputs = random_inputs(spec, batch_size, device)
        expected = tuple(output.cpu() for output in naive(*inputs))
        calls: dict[str, Call] = {"naive": partial(naive, *inputs)}
        for (name, precision), step in steps.items():
            call, got = bound(step, spec, inputs)
            call()
            check(name, got, expected, precision)
            calls[f"{name}-{precision}"] = call
        timed = latencies(calls, batch_size=batch_size, seconds=seconds, device=device)
        yield batch_size, timed["naive"], {runner: timed["-".join(runner)] for runner in steps}


def fastest(row: Row, precision: Precision) -> tuple[str, float]:
    """The format with the smallest median, and its microseconds."""
    of_precision = {name: row[name, other] for name, other in row if other == precision}
    name = min(of_precision, key=lambda name: of_precision[name].median_us)
    return name, of_precision[name].median_us


def print_tables(rows: list[tuple[int, Latency, Row]], policy: str) -> None:
    precisions = dict.fromkeys(precision for _, precision in rows[0][2])
    for precision in precisions:
        names = [name for name, other in rows[0][2] if other == precision]
        print(f"\n{policy}, {precision}: µs a step (times as fast as naive)\n")
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
        print(f"\n{policy}: fastest bf16 against fastest fp32\n")
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
    parser.add_argument("--policies", nargs="*", choices=POLICIES, default=list(POLICIES))
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
    for name in options.policies:
        spec = POLICIES[name]
        with torch.inference_mode():
            rows = list(measure(spec, options.precision, formats, device, options.seconds))
        print_tables(rows, name)


if __name__ == "__main__":
    main()
