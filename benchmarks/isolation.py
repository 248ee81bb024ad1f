"""Measures the straight-through join against the form it replaces: memory and time, eager.

`python -m benchmarks.isolation [--rounds N]` prints a markdown table. Knows nothing of policies,
artifacts or the service.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from time import perf_counter_ns

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from export.timing import this_machine
from model.isolation import ste_forward

SHAPES = ((32, 64, 16, 16), (8, 128, 512))
MIB = 2**20

Join = Callable[[Tensor, Tensor], Tensor]


def upstream_form(host: Tensor, seed: Tensor) -> Tensor:
    """The textbook straight-through sum, as the original has it: NaN in the seed gets through."""
    if seed.dtype != host.dtype:
        seed = seed.to(host.dtype)
    return host + (seed - seed.detach())


@dataclass(frozen=True, slots=True)
class Case:
    """One pair of inputs and the region it runs in."""

    label: str
    host_dtype: torch.dtype
    seed_dtype: torch.dtype
    autocast: bool

    def region(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.autocast else nullcontext()

    def inputs(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        host = torch.randn(shape).to(self.host_dtype).requires_grad_()
        seed = torch.randn(shape).to(self.seed_dtype).requires_grad_()
        return host, seed, torch.randn(shape).to(self.host_dtype)


CASES = (
    Case("host f32, seed f32", torch.float32, torch.float32, autocast=False),
    Case("host bf16, seed f32", torch.bfloat16, torch.float32, autocast=False),
    # A layer norm's output stays f32 under autocast, a linear's or a convolution's is bf16.
    Case("autocast: host f32, seed bf16", torch.float32, torch.bfloat16, autocast=True),
    Case("autocast: host bf16, seed bf16", torch.bfloat16, torch.bfloat16, autocast=True),
)


def passes(join: Join, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Callable[[], object]]:
    host, seed, gradient = inputs

    def forward() -> Tensor:
        return join(host, seed)

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(join(host, seed), (host, seed), gradient)

    return {"forward": forward, "forward + backward": forward_and_backward}


def allocations(call: Callable[[], object]) -> list[int]:
    """Bytes of each block the tensor allocator handed out during one call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    sizes = [event.self_cpu_memory_usage for event in profiler.events() or []]
    return [size for size in sizes if size > 0]


def interleaved_medians_us(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median time of each call; they take turns, so that a noisy moment meets all of them."""
    times: list[list[int]] = [[] for _ in calls]
    for turn in range(rounds + rounds // 10):
        for call, seen in zip(calls, times, strict=True):
            start = perf_counter_ns()
            call()
            elapsed = perf_counter_ns() - start
            if turn >= rounds // 10:  # the first tenth warms caches and the allocator
                seen.append(elapsed)
    return [median(seen) / 1000 for seen in times]


def rows(rounds: int) -> Iterator[str]:
    for shape in SHAPES:
        for case in CASES:
            inputs = case.inputs(shape)
            before, after = passes(upstream_form, inputs), passes(ste_forward, inputs)
            with case.region():
                for name in before:
                    sizes = [allocations(calls[name]) for calls in (before, after)]
                    times = interleaved_medians_us([before[name], after[name]], rounds)
                    yield row(shape, case.label, name, sizes, times)


def row(
    shape: tuple[int, ...], label: str, name: str, sizes: list[list[int]], times: list[float]
) -> str:
    tensors = " → ".join(str(len(blocks)) for blocks in sizes)
    mib = " → ".join(f"{sum(blocks) / MIB:.1f}" for blocks in sizes)
    memory_ratio = sum(sizes[1]) / sum(sizes[0])
    us = " → ".join(f"{time:.0f}" for time in times)
    cells = (tensors, mib, f"{memory_ratio:.2f}", us, f"{times[1] / times[0]:.2f}")
    return f"| {list(shape)} | {label} | {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1000, help="timed calls of each form")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machine = this_machine(torch.device("cpu"))
    print(f"{machine.cpu}, torch {machine.torch}, 1 thread, median of {rounds} calls, eager\n")
    print("| shape | dtypes | pass | tensors | MiB | ratio | µs | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for line in rows(rounds):
        print(line)


if __name__ == "__main__":
    main()
