"""How many wrong steps the gate stops, on which policies, and which it lets pass.

`python -m benchmarks.wrong_steps [CASE ...]` prints a row a policy, and under it those that pass
and how each differs from the right step on rows meant to show it.
"""

import sys

import torch

from tests.export.gate_cases import CASES, case_of
from tests.export.probe import difference
from tests.export.wrong_steps import stopped_by_gate, why_equivalent, wrong_steps


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'policy':50} {'wrong':>6} {'stopped':>8} {'passed':>7} {'equivalent':>11}")
    for name in sys.argv[1:] or CASES:
        case = case_of(name)
        every = list(wrong_steps(case))
        wrong = [step for step in every if why_equivalent(name, step.name) is None]
        passed = [
            step
            for step in wrong
            if stopped_by_gate(
                case.policy, case.normalizer, case.precision, step.make(), case.max_batch_size
            )
            is None
        ]
        count = len(passed)
        print(
            f"{name:50} {len(wrong):6} {len(wrong) - count:8} {count:7} "
            f"{len(every) - len(wrong):11}"
        )
        for step in passed:
            how = difference(case, step.make())
            print(f"  passed: {step.name}: {how or 'no difference on the probe'}", flush=True)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
