"""What the rule between heads costs per step: rewriting copies of masks, or choosing results.

`python -m benchmarks.mask_override` prints a table for ticket B9-PT-01: allocations and time of
the rule alone, one thread, both forms in turn so that a noisy machine is noisy for both. The rest
of a step (network, softmax, argmax) is the same for both and is left out.

Ours covers every head, and the log-probs too, at a cost that does not depend on how many heads
have a rule; the original's grows with each. V1 has one such head, V2 has seven, of which six (all
but slot) are forced to a fixed index as here.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from export.timing import this_machine
from model.heads import HeadTable
from model.spec import PolicySpec
from model.step_spec import HeadSpec

BATCH_SIZES = (1, 32, 256)
CALLS_PER_SAMPLE = 50
SAMPLES = 300

V1 = PolicySpec.tamiyo_v1()
V2_RULES: dict[str, tuple[tuple[int, ...], int]] = {  # head: (relevant ops, forced index)
    "blueprint": ((1,), 0),
    "style": ((1, 2), 2),
    "tempo": ((1,), 1),
    "alpha_target": ((1, 2), 2),
    "alpha_speed": ((2, 3), 0),
    "alpha_curve": ((2, 3), 0),
}


def ruled(head: HeadSpec) -> HeadSpec:
    """The head under V2's rule, if it has one."""
    relevant_ops, forced_index = V2_RULES.get(head.name, (None, None))
    return HeadSpec(
        name=head.name, size=head.size, relevant_ops=relevant_ops, forced_index=forced_index
    )


V2 = V1.model_copy(update={"heads": tuple(ruled(head) for head in V1.heads)})

Rule = Callable[[], object]


def rewritten(mask: Tensor, op: Tensor, relevant_ops: tuple[int, ...], forced: int) -> Tensor:
    """esper-lite's form, one head: a copy of its mask, with the forced choice in some rows."""
    irrelevant = op != relevant_ops[0]
    for other in relevant_ops[1:]:
        irrelevant = irrelevant & (op != other)
    mask = mask.clone()
    mask[irrelevant] = False
    mask[irrelevant, forced] = True
    return mask


def chosen(table: HeadTable, action: Tensor, log_prob: Tensor) -> tuple[Tensor, Tensor]:
    """Ours, all heads: action and log-prob, kept where the head matters and forced elsewhere."""
    relevant = table.relevant(action[..., table.op_index])
    action = torch.where(relevant, action, table.forced_index)
    return action, torch.where(relevant, log_prob, 0.0)


def forms(spec: PolicySpec, batch_size: int) -> tuple[Rule, Rule]:
    """Both forms on the same rows, after a check that they decide alike."""
    table = HeadTable(spec)
    generator = torch.Generator().manual_seed(batch_size)
    logits = table.spread(torch.randn(batch_size, spec.num_choices, generator=generator))
    best = table.log_probs(logits, table.valid).max(-1)
    op = best.indices[:, table.op_index].contiguous()
    heads = [
        (index, torch.ones(batch_size, head.size, dtype=torch.bool), head)
        for index, head in enumerate(spec.heads)
        if head.relevant_ops is not None
    ]

    def before() -> list[Tensor]:
        return [
            rewritten(mask, op, head.relevant_ops or (), head.forced_index or 0)
            for _, mask, head in heads
        ]

    def after() -> tuple[Tensor, Tensor]:
        return chosen(table, best.indices, best.values)

    for (index, _, head), mask in zip(heads, before(), strict=True):
        action = logits[:, index, : head.size].where(mask, -1e4).argmax(-1)
        assert torch.equal(action, after()[0][:, index])
    return before, after


def allocations(rule: Rule) -> tuple[int, int]:
    """How many blocks one call takes from the allocator, and their bytes."""
    rule()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        rule()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events = seen.profiler.kineto_results.events()
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=SAMPLES, help="timed pairs per row")
    samples = parser.parse_args().samples
    torch.set_num_threads(1)
    machine = this_machine(torch.device("cpu"))
    print(f"{machine.cpu}, torch {machine.torch}, 1 thread, median of {samples} pairs\n")
    print(
        "| heads with a rule | B | allocations before | after | bytes before | after "
        "| µs before | after | before / after |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        for label, spec in (("1 (V1)", V1), ("6 (V2, without slot)", V2)):
            for batch_size in BATCH_SIZES:
                before, after = forms(spec, batch_size)
                blocks_before, bytes_before = allocations(before)
                blocks_after, bytes_after = allocations(after)
                slow, fast, ratio = interleaved(before, after, samples)
                print(
                    f"| {label} | {batch_size} | {blocks_before} | {blocks_after} "
                    f"| {bytes_before:,} | {bytes_after:,} "
                    f"| {slow * 1e6:.1f} | {fast * 1e6:.1f} | {ratio:.2f} |"
                )


if __name__ == "__main__":
    main()
