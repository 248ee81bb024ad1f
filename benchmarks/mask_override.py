"""What the style rule costs per step: rewriting a copy of the mask, or choosing among results.

`python -m benchmarks.mask_override` prints a table for ticket B9-PT-01: allocations and time of
the rule alone, one thread, both forms in turn so that a noisy machine is noisy for both. The rest
of a step (network, softmax, argmax) is the same for both and is left out.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from model.heads import HeadTable
from model.spec import PolicySpec

BATCH_SIZES = (1, 32, 256)
CALLS_PER_SAMPLE = 50
SAMPLES = 300
SPEC = PolicySpec.tamiyo_v1()
TABLE = HeadTable(SPEC)
STYLE = SPEC.head_names.index("style")
GERMINATE, SET_ALPHA_TARGET, SIGMOID_ADD = 1, 2, 2

Rule = Callable[[], object]


def by_rewriting_the_mask(style_mask: Tensor, op: Tensor) -> Tensor:
    """esper-lite's form: a copy of the mask in which irrelevant rows allow the forced style only."""
    irrelevant = (op != GERMINATE) & (op != SET_ALPHA_TARGET)
    mask = style_mask.clone()
    mask[irrelevant] = False
    mask[irrelevant, SIGMOID_ADD] = True
    return mask


def by_choosing_among_results(action: Tensor, log_prob: Tensor) -> tuple[Tensor, Tensor]:
    """Ours: every head's action and log-prob, kept where the head matters and forced elsewhere."""
    op = action[..., TABLE.op_index]
    action = TABLE.keep_relevant(op, action, TABLE.forced_index)
    return action, TABLE.keep_relevant(op, log_prob, 0.0)


def forms(batch_size: int) -> tuple[Rule, Rule]:
    """The two forms on the same rows, after a check that they decide alike."""
    generator = torch.Generator().manual_seed(batch_size)
    logits = torch.randn(batch_size, SPEC.num_choices, generator=generator)
    log_probs = TABLE.log_probs(TABLE.spread(logits), TABLE.valid)
    action = log_probs.argmax(-1)
    log_prob = log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    op = action[:, TABLE.op_index].contiguous()
    style_mask = torch.ones(batch_size, 4, dtype=torch.bool)

    rewritten = by_rewriting_the_mask(style_mask, op)
    chosen, _ = by_choosing_among_results(action, log_prob)
    style_logits = TABLE.spread(logits)[:, STYLE, :4]
    assert torch.equal(style_logits.where(rewritten, -1e4).argmax(-1), chosen[:, STYLE])
    return (
        lambda: by_rewriting_the_mask(style_mask, op),
        lambda: by_choosing_among_results(action, log_prob),
    )


def allocations(rule: Rule) -> tuple[int, int]:
    """How many blocks one call takes from the allocator, and their bytes."""
    rule()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        rule()
    assert seen.profiler is not None
    events = seen.profiler.kineto_results.events()  # type: ignore[no-untyped-call,union-attr]
    blocks = [event.nbytes() for event in events if event.name() == "[memory]"]
    taken = [size for size in blocks if size > 0]
    return len(taken), sum(taken)


def seconds_per_call(rule: Rule) -> float:
    start = time.perf_counter()
    for _ in range(CALLS_PER_SAMPLE):
        rule()
    return (time.perf_counter() - start) / CALLS_PER_SAMPLE


def interleaved(before: Rule, after: Rule, samples: int) -> tuple[float, float, float]:
    """Median seconds of each form, and the median of the ratios of neighbouring samples."""
    pairs = [(seconds_per_call(before), seconds_per_call(after)) for _ in range(samples)]
    return (
        statistics.median(b for b, _ in pairs),
        statistics.median(a for _, a in pairs),
        statistics.median(b / a for b, a in pairs),
    )


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if "model name" in line), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="timed pairs per batch size")
    samples = parser.parse_args().samples
    torch.set_num_threads(1)
    print(f"{cpu_model()}, torch {torch.__version__}, 1 thread, median of {samples} pairs\n")
    print("| B | allocations before | after | bytes before | after | µs before | after | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        for batch_size in BATCH_SIZES:
            before, after = forms(batch_size)
            blocks_before, bytes_before = allocations(before)
            blocks_after, bytes_after = allocations(after)
            slow, fast, ratio = interleaved(before, after, samples)
            print(
                f"| {batch_size} | {blocks_before} | {blocks_after} "
                f"| {bytes_before} | {bytes_after} "
                f"| {slow * 1e6:.1f} | {fast * 1e6:.1f} | {ratio:.2f} |"
            )


if __name__ == "__main__":
    main()
