"""`python -m service.bench`: how fast a running service answers, and whether it answers rightly.

Exit codes: 0 no failed request and no differing answer; 1 there were some; 2 no server there, or
bad arguments.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table

from export.manifest import ArtifactError, Manifest, Spec
from model.step_spec import StepSpec
from service.bench.batch_sizes import batch_sizes, ranges
from service.bench.load import Load, LoadGenerator, end_sessions, new_sessions
from service.bench.pool import Pool
from service.bench.replay import Differences, replay
from service.bench.wire import Wire, wire_of
from service.runtime.load import load_runtime
from tamiyo_client import AsyncPolicyClient, PolicyError

BAR_WIDTH = 40
PERCENTILES = (50, 90, 99, 99.9)

EPILOG = """examples:
  python -m service.bench --envs 64 --seconds 10
  python -m service.bench --envs 256 --rate 2000 --artifact artifacts/tamiyo-v1
  python -m service.bench --envs 128 --rows 64 --wire safetensors
"""


def main() -> int:
    options = _parser().parse_args()
    try:
        load, sizes, served = uvloop.run(_drive(options))
        differences = None
        if options.artifact is not None:
            differences = _replay(options.artifact, load, served, options)
    except (PolicyError, OSError) as error:
        sys.stderr.write(f"bench: {options.url} does not answer ({error}); is `make serve` up?\n")
        return 2
    except ArtifactError as error:
        sys.stderr.write(f"bench: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    if options.json:
        summary = _summary(load, sizes, differences, _rows(options) or 1)
        sys.stdout.write(json.dumps(summary) + "\n")
    else:
        _show(load, sizes, differences, _rows(options) or 1)
    is_wrong = differences is not None and differences.differing > 0
    return 1 if load.errors or is_wrong or not load.latencies_ms else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m service.bench",
        description="Loads a running service with environments, and checks its answers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the service (%(default)s)")
    parser.add_argument(
        "--envs", type=_positive, default=64, help="environments at once (%(default)s)"
    )
    parser.add_argument(
        "--rows",
        type=_positive,
        help="environments in one request, as vector sessions; without it, a session for each",
    )
    parser.add_argument(
        "--wire",
        choices=["json", "safetensors"],
        default="json",
        help="the form of requests and answers (%(default)s); safetensors is for vectors",
    )
    parser.add_argument(
        "--sessions",
        type=_positive,
        help="live sessions where there are to be more than connections, which take them in turn",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of load (%(default)s)")
    parser.add_argument(
        "--rate",
        type=float,
        help="open loop: so many requests a second fall due in all, however the server keeps up; "
        "without it every connection waits for its answer",
    )
    parser.add_argument(
        "--artifact",
        type=Path,
        help="the artifact that is served: every trajectory is stepped again on it, alone, and "
        "answers that differ in any bit are counted",
    )
    parser.add_argument("--seed", type=int, default=0, help="of observations and sampling")
    parser.add_argument("--json", action="store_true", help="print the figures for a machine")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


async def _drive(
    options: argparse.Namespace,
) -> tuple[Load, Mapping[str, float], Mapping[str, Any]]:
    """The load, the batches the server made of it by size, and what it says it serves."""
    progress = Progress(
        SpinnerColumn(),
        "{task.completed:.0f} answers",
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    async with AsyncPolicyClient(options.url, retries=0) as client:
        served = await client.policy()
    spec: StepSpec = TypeAdapter(Spec).validate_python(served["spec"])
    number = -(-options.envs // (_rows(options) or 1))
    generator = LoadGenerator(options.url, _wire(options, spec), num_connections=number)
    sessions = new_sessions(max(number, options.sessions or 0), options.seed, _rows(options))
    before = await batch_sizes(options.url)
    with progress:
        task = progress.add_task("", total=None)

        def on_answer() -> None:
            progress.advance(task)

        if options.rate is None:
            load = await generator.closed(sessions, options.seconds, on_answer)
        else:
            load = await generator.open(sessions, options.seconds, options.rate, on_answer)
    after = await batch_sizes(options.url)
    await end_sessions(options.url, load.sessions)
    return load, {bound: after[bound] - before.get(bound, 0.0) for bound in after}, served


def _rows(options: argparse.Namespace) -> int | None:
    """Of each session; None is a single environment."""
    rows: int | None = options.rows
    return 1 if rows is None and options.wire != "json" else rows


def _wire(options: argparse.Namespace, spec: StepSpec) -> Wire:
    return wire_of(options.wire, spec, Pool.random(spec, options.seed), _rows(options))


def _replay(
    directory: Path, load: Load, served: Mapping[str, Any], options: argparse.Namespace
) -> Differences:
    manifest = Manifest.read(directory)
    if manifest.policy_version != served["policy_version"]:
        raise ArtifactError(
            f"{directory}: is {manifest.policy_version[:19]}, and the server has "
            f"{served['policy_version'][:19]}"
        )
    runtime = load_runtime(
        directory, manifest, name=served["runtime"], device=served["device"], num_threads=1
    )
    spec = manifest.spec
    pool = Pool.random(spec, options.seed)
    loaded = {manifest.policy_version: runtime}
    try:
        return replay(load.sessions, pool, _wire(options, spec), loaded, spec)
    except KeyError as error:
        raise ArtifactError(
            f"{directory}: the server took other weights meanwhile, {error.args[0][:19]}"
        ) from error


def _summary(
    load: Load, sizes: Mapping[str, float], differences: Differences | None, num_rows: int
) -> dict[str, Any]:
    latencies = load.latencies_ms or [math.nan]
    return {
        "answers": load.num_answers,
        "answers_per_s": load.num_answers / load.elapsed_s,
        "rows_per_s": load.num_answers * num_rows / load.elapsed_s,
        "latency_ms": {
            **{f"p{p:g}": float(np.percentile(latencies, p)) for p in PERCENTILES},
            "max": max(latencies),
        },
        "batches_by_size": dict(sizes),
        "errors": dict(load.errors),
        "differences": None if differences is None else differences._asdict(),
    }


def _show(
    load: Load, sizes: Mapping[str, float], differences: Differences | None, num_rows: int
) -> None:
    console = Console(highlight=False)
    latencies = np.array(load.latencies_ms or [math.nan])
    console.print(
        f"[bold]{load.num_answers}[/] answers in {load.elapsed_s:.1f} s: "
        f"[bold]{load.num_answers / load.elapsed_s:.0f}[/] per second"
        + (f", {num_rows * load.num_answers / load.elapsed_s:.0f} rows" if num_rows > 1 else "")
    )
    percentiles = Table(*(f"p{p:g}" for p in PERCENTILES), "max", box=None, pad_edge=False)
    percentiles.add_row(
        *(f"{value:.2f} ms" for value in np.percentile(latencies, PERCENTILES)),
        f"{latencies.max():.2f} ms",
    )
    console.print(percentiles)
    if load.latencies_ms:
        console.print(_bars("latency", _histogram(latencies)))
    if sizes:
        console.print(_bars("batch size", ranges(sizes)))
    for kind, count in load.errors.items():
        console.print(f"[red]{count} requests failed: {kind}")
    if differences is None:
        console.print("answers not checked; --artifact DIR steps every trajectory again")
    elif differences.differing == 0:
        console.print(
            f"[green]all {differences.answers} answers are the artifact's own, bit for bit"
        )
    else:
        console.print(
            f"[red]{differences.differing} of {differences.answers} answers differ from the "
            f"artifact's own, {differences.other_actions} in an action; the largest difference of "
            f"a number is {differences.largest:.2g}"
        )


def _histogram(latencies_ms: "np.ndarray[Any, np.dtype[np.float64]]") -> dict[str, float]:
    """Counts between bounds that double; the first and the last hold something."""
    first = math.floor(math.log2(max(latencies_ms.min(), 1e-3)))
    last = max(first + 1, math.ceil(math.log2(max(latencies_ms.max(), 1e-3))))
    bounds = [2.0**n for n in range(first, last + 1)]
    counts, _ = np.histogram(latencies_ms, [0.0, *bounds[1:-1], math.inf])
    return {
        f"< {bound:g} ms": float(count) for bound, count in zip(bounds[1:], counts, strict=True)
    }


def _bars(title: str, counts: Mapping[str, float]) -> Table:
    table = Table(title, "", "", box=None, pad_edge=False)
    most = max(counts.values(), default=1.0)
    for name, count in counts.items():
        table.add_row(name, "█" * math.ceil(BAR_WIDTH * count / most), f"{count:.0f}")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
