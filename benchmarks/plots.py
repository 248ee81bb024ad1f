"""The plots of docs/performance.md, of what `benchmarks.serving growth` found."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

CLIENTS_PLOT = "growth-clients.svg"
SESSIONS_PLOT = "growth-sessions.svg"


def plot_growth(found: dict[str, Any], directory: Path) -> None:
    """Writes both plots: throughput and p99 over clients, and over live sessions."""
    mpl.rcParams["svg.hashsalt"] = "tamiyo"  # the same figures give the same file
    directory.mkdir(parents=True, exist_ok=True)
    _plot(found["by_clients"], "clients", directory / CLIENTS_PLOT)
    _plot(found["by_sessions"], "sessions", directory / SESSIONS_PLOT)


def _plot(rows: list[dict[str, Any]], by: str, path: Path) -> None:
    figure = Figure(figsize=(8, 3), layout="constrained")
    throughput, latency = figure.subplots(1, 2)
    x = [row[by] for row in rows]
    throughput.plot(x, [row["answers_per_s"] for row in rows], "o-")
    throughput.set_ylabel("answers per second")
    throughput.set_ylim(bottom=0)
    for percentile in ("p50", "p99"):
        y = [row["latency_ms"][percentile] for row in rows]
        latency.plot(x, y, "o-", label=percentile)
    latency.set_ylabel("latency, ms")
    latency.set_yscale("log")
    latency.legend()
    for axes in (throughput, latency):
        axes.set_xscale("log", base=2 if by == "clients" else 10)
        axes.set_xlabel({"clients": "clients", "sessions": "live sessions (64 clients)"}[by])
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
