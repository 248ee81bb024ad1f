"""What was measured on a GPU, and the page that shows it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Point:
    """A runtime's figures at one number of rows; `http_p50_ms` is one environment's client's."""

    policy: str
    precision: str
    runtime: str
    device: str
    rows: int
    eager_us: float
    step_us: float | None
    batch_us: float
    engine_rows_per_s: float = 0.0
    http_rows_per_s: float = 0.0
    http_p50_ms: float | None = None


def page(machine: str, points: Sequence[Point], failed: Sequence[str]) -> str:
    """The figures as Markdown, a table a policy and precision, and what has not all of them."""
    lines = [f"# {machine}", ""]
    if failed:
        lines += [f"Failed, and not measured to the end: {', '.join(failed)}.", ""]
    columns = ["runtime", "rows", "eager µs", "step µs", "batch µs", "engine rows/s", "of step"]
    columns += ["HTTP rows/s", "p50 ms, 1 client"]
    for case in dict.fromkeys((point.policy, point.precision) for point in points):
        lines += [f"## {' '.join(case)}", "", "| " + " | ".join(columns) + " |"]
        lines.append("|---" * len(columns) + "|")
        for at in points:
            if (at.policy, at.precision) != case:
                continue
            alone_us = at.step_us or at.batch_us
            cells = [f"{at.runtime} on {at.device}", str(at.rows), f"{at.eager_us:.0f}"]
            cells += [f"{at.step_us:.0f}" if at.step_us else "", f"{at.batch_us:.0f}"]
            cells += [f"{at.engine_rows_per_s:.0f}"]
            cells += [f"{at.engine_rows_per_s * alone_us / at.rows / 1e6:.2f}"]
            cells += [f"{at.http_rows_per_s:.0f}"]
            cells += [f"{at.http_p50_ms:.2f}" if at.http_p50_ms else ""]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)
