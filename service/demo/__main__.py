"""`python -m service.demo`: many environments against a running service, and what came of it.

Exit codes: 0 every answer was legal; 1 a mask was broken or a request failed; 2 no server there,
or not one with a policy this demo can play.
"""

import argparse
import asyncio
import json
import sys

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from service.bench.batch_sizes import ranges
from service.demo.client import Tally, run_environments
from tamiyo_client import PolicyError

BAR_WIDTH = 30


def main() -> int:
    options = _parser().parse_args()
    progress = Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    try:
        with progress:
            task = progress.add_task("steps", total=options.envs * options.steps)
            tally, batch_sizes = asyncio.run(
                run_environments(
                    options.url,
                    num_envs=options.envs,
                    num_rows=options.rows or options.envs,
                    steps=options.steps,
                    seed=options.seed,
                    on_step=lambda number: progress.advance(task, number),
                )
            )
    except (PolicyError, OSError) as error:
        sys.stderr.write(f"demo: {options.url} does not answer ({error}); is `make serve` up?\n")
        return 2
    except ValueError as error:
        sys.stderr.write(f"demo: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    summary = _summary(tally, batch_sizes)
    if options.json:
        sys.stdout.write(json.dumps(summary) + "\n")
    else:
        _show(tally, batch_sizes, summary)
    return 1 if tally.broken_masks or tally.errors else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m service.demo",
        description="Drives many toy environments against a running service over HTTP.",
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the service (%(default)s)")
    parser.add_argument("--envs", type=_count, default=64, help="at once (default %(default)s)")
    parser.add_argument(
        "--rows", type=_count, help="environments in one request (default: all of them)"
    )
    parser.add_argument("--steps", type=_count, default=200, help="of each (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of environments and sampling")
    parser.add_argument("--json", action="store_true", help="print the figures for a machine")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _summary(tally: Tally, batch_sizes: dict[str, float]) -> dict[str, object]:
    latencies = tally.latencies_ms or [float("nan")]
    p50, p90, p99 = np.percentile(latencies, (50, 90, 99)).tolist()
    return {
        "actions": sum(tally.ops.values()),
        "actions_per_s": sum(tally.ops.values()) / tally.elapsed_s,
        "latency_ms": {"p50": p50, "p90": p90, "p99": p99, "max": max(latencies)},
        "batches_by_size": batch_sizes,
        "ops": dict(tally.ops),
        "episodes": tally.episodes,
        "errors": dict(tally.errors),
        "broken_masks": tally.broken_masks,
    }


def _show(tally: Tally, batch_sizes: dict[str, float], summary: dict[str, object]) -> None:
    console = Console(highlight=False)
    latencies = np.array(tally.latencies_ms or [np.nan])
    p50, p90, p99 = np.percentile(latencies, (50, 90, 99))
    console.print(
        f"[bold]{summary['actions']}[/] actions in {tally.elapsed_s:.1f} s: "
        f"[bold]{summary['actions_per_s']:.0f}[/] per second; latency p50 {p50:.1f} ms, "
        f"p90 {p90:.1f} ms, p99 {p99:.1f} ms, max {latencies.max():.1f} ms"
    )
    console.print(_bars("batch size", ranges(batch_sizes)))
    console.print(_bars("decided", dict(tally.ops.most_common())))
    if tally.episodes:
        gain = tally.accuracy_gain / tally.episodes
        console.print(f"{tally.episodes} episodes, accuracy {gain:+.1f} points each (a toy's)")
    for kind, count in tally.errors.items():
        console.print(f"[red]{count} requests failed: {kind}")
    for broken in tally.broken_masks[:10]:
        console.print(f"[red]mask broken: {broken}")
    if not tally.errors and not tally.broken_masks:
        console.print("[green]every answer was legal")


def _bars(title: str, counts: dict[str, float] | dict[str, int]) -> Table:
    table = Table(title, "", "", box=None, pad_edge=False)
    most = max(counts.values(), default=1)
    for name, count in counts.items():
        table.add_row(name, "█" * max(1, round(BAR_WIDTH * count / most)), f"{count:.0f}")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
