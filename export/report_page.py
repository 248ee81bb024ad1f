"""`report.html`: the report as one page that needs nothing but itself, on a screen of any size.

Data flows one way: report -> geometry -> template, and the template escapes all it is given.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC
from functools import cache
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from export.report import Latency, Report

Scale = Callable[[float], float]
Point = tuple[float, float]

# In the units of the viewBox, which are about a phone's pixels.
LEFT, RIGHT, TOP, BOTTOM = 50, 280, 26, 196
TEXT_HEIGHT, TEXT_WIDTH = 14, 7
BAR_LEFT, BAR_RIGHT, ROW_HEIGHT = 76, 236, 38

SPEED_BATCH_SIZES = (1, 32, 256)
STYLES = 4
SMALLEST_SHARE_OF_ATOL = 1e-4
AGREEMENT_STARTS = (0.999, 0.998, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.5, 0.0)


class Line(NamedTuple):
    """A line, the outline of the band around it, and the height its name stands at."""

    name: str
    style: str
    points: Sequence[Point]
    band: Sequence[Point] = ()
    label_y: float = 0


class Tick(NamedTuple):
    at: float
    label: str


class Chart(NamedTuple):
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    is_clamped: bool = False


class Bar(NamedTuple):
    """One share of one format, `width` wide from the axis' start."""

    what: str
    y: float
    width: float
    value: str


class Agreement(NamedTuple):
    """The bars of every format, on an axis from `start` to 100 %."""

    rows: list[tuple[str, str, list[Bar]]]
    start: str
    limit: Tick | None
    bottom: float


def render(report: Report) -> str:
    """The page: whole, offline, and with every name in it escaped."""
    median_us = {
        name: {latency.batch_size: latency.median_us for latency in latencies}
        for name, latencies in _timed(report).items()
    }
    sizes = median_us["eager"]
    return _template().render(
        report=report,
        measured=report.measured_at.astimezone(UTC),
        rows=min(parity.rows for parity in report.parity.formats.values()),
        largest_error={
            name: max(parity.max_error.values(), default=0.0)
            for name, parity in report.parity.formats.items()
        },
        latency=_latency_chart(report),
        errors=_error_chart(report),
        agreement=_agreement(report),
        median_us=median_us,
        speed_sizes=sorted({*SPEED_BATCH_SIZES, max(sizes)} & {*sizes}),
        row_sizes=sorted({size for of in report.formats.values() for size in of.row_difference}),
        frame={"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        bars={"left": BAR_LEFT, "right": BAR_RIGHT},
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "times": _times, "microseconds": _microseconds, "difference": _difference,
    }  # fmt: skip
    return environment.get_template("report_page.html.jinja")


def _latency_chart(report: Report) -> Chart:
    styles = _styles(report)
    timed = _timed(report)
    every = [latency for latencies in timed.values() for latency in latencies]
    lines = [
        Line(
            name,
            styles.get(name, "eager"),
            [(each.batch_size, each.median_us) for each in latencies],
            [(each.batch_size, each.lower_us) for each in latencies]
            + [(each.batch_size, each.upper_us) for each in reversed(latencies)],
        )
        for name, latencies in timed.items()
    ]
    sizes = sorted({each.batch_size for each in every})
    ticks = _log_ticks(min(each.lower_us for each in every), max(each.upper_us for each in every))
    return _chart(
        lines,
        {size: str(size) for size in sizes},
        _scale(sizes[0], sizes[-1], LEFT + 6, RIGHT - 6),
        {tick: f"{tick / 1000:g}k" if tick >= 1000 else f"{tick:g}" for tick in ticks},
        _scale(ticks[0], ticks[-1], BOTTOM, TOP),
    )


def _error_chart(report: Report) -> Chart:
    atol, styles = report.parity.atol, _styles(report)
    errors = {name: of.error_by_step for name, of in report.formats.items()}
    every = [atol, *(error for each in errors.values() for error in each)]
    smallest = max(min(error for error in every if error > 0), atol * SMALLEST_SHARE_OF_ATOL)
    is_clamped = min(every) < smallest
    ticks = _log_ticks(smallest / 10 if is_clamped else smallest, max(every))
    steps = max(map(len, errors.values()))
    stride = next(s for k in range(9) for s in (10**k, 2 * 10**k, 5 * 10**k) if steps <= 6 * s)
    lines = [Line(f"atol {atol:g}", "limit", [(1, atol), (steps, atol)])] + [
        Line(name, styles[name], [(n, max(e, ticks[0])) for n, e in enumerate(each, start=1)])
        for name, each in errors.items()
    ]
    labels = {tick: f"{tick:.0e}" for tick in ticks}
    if is_clamped:
        labels[ticks[0]] = f"≤{ticks[0]:.0e}"
    return _chart(
        lines,
        {n: str(n) for n in (1, *range(stride, steps + 1, stride)) if n <= steps},
        _scale(1, steps, LEFT, RIGHT, of=float),
        labels,
        _scale(ticks[0], ticks[-1], BOTTOM, TOP),
    )._replace(is_clamped=is_clamped)


def _chart(
    lines: Sequence[Line], x_labels: Mapping[int, str], x: Scale,
    y_labels: Mapping[float, str], y: Scale,
) -> Chart:  # fmt: skip
    """The lines, given in the data's own units, where the scales put them."""

    def drawn(points: Sequence[Point]) -> list[Point]:
        return [(round(x(a), 1), round(y(b), 1)) for a, b in points]

    label_ys = _spread([y(line.points[-1][1]) for line in lines])
    return Chart(
        _readable([Tick(x(at), label) for at, label in x_labels.items()]),
        [Tick(y(at), label) for at, label in y_labels.items()],
        [
            Line(line.name, line.style, drawn(line.points), drawn(line.band), label_y)
            for line, label_y in zip(lines, label_ys, strict=True)
        ],
    )


def _agreement(report: Report) -> Agreement:
    limit = report.parity.min_greedy_agreement  # 0 where there is none
    shares = {
        name: {"all": parity.action_agreement, "greedy": parity.greedy_agreement}
        for name, parity in report.parity.formats.items()
    }
    smallest = min(limit or 1.0, *(share for each in shares.values() for share in each.values()))
    start = next(s for s in AGREEMENT_STARTS if s == 0 or 1 - s > 2 * (1 - smallest) - 1e-9)
    x, styles = _scale(start, 1, BAR_LEFT, BAR_RIGHT, of=float), _styles(report)
    rows = [
        (
            name,
            styles[name],
            [
                Bar(what, TOP + row * ROW_HEIGHT + bar * 15, x(share) - BAR_LEFT, _percent(share))
                for bar, (what, share) in enumerate(each.items())
            ],
        )
        for row, (name, each) in enumerate(shares.items())
    ]
    limit_tick = Tick(x(limit), f"greedy: at least {_percent(limit)}") if limit else None
    return Agreement(rows, _percent(start), limit_tick, TOP + len(rows) * ROW_HEIGHT)


def _timed(report: Report) -> dict[str, tuple[Latency, ...]]:
    return {"eager": report.eager} | {name: of.latency for name, of in report.formats.items()}


def _styles(report: Report) -> dict[str, str]:
    return {name: f"s{n % STYLES}" for n, name in enumerate(report.formats)}


def _scale(
    low: float, high: float, start: float, end: float, of: Callable[[float], float] = math.log
) -> Scale:
    """From [low, high] to [start, end], even in `of`; to the middle where low is high."""
    span = of(high) - of(low)
    return lambda value: start + (end - start) * ((of(value) - of(low)) / span if span else 0.5)


def _log_ticks(low: float, high: float) -> list[float]:
    """At least two round numbers, the first not above `low` and the last not below `high`."""
    steps = (1, 2, 5) if high / low < 300 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
    candidates = [float(f"{step}e{exponent}") for exponent in exponents for step in steps]
    first = max(tick for tick in candidates if tick <= low * (1 + 1e-9))
    last = min(tick for tick in candidates if tick >= high and tick > first)
    return [tick for tick in candidates if first <= tick <= last]


def _readable(ticks: list[Tick]) -> list[Tick]:
    """The ticks, less the labels that would run into the one to their right."""
    kept: list[Tick] = []
    free_until = math.inf
    for at, label in reversed(ticks):
        half = len(label) * TEXT_WIDTH / 2
        fits = at + half + 3 <= free_until
        kept.append(Tick(at, label if fits else ""))
        free_until = at - half if fits else free_until
    return kept[::-1]


def _spread(ys: Sequence[float]) -> list[float]:
    """Heights near `ys`, in their order, a line of text apart and inside the frame."""
    order = sorted(range(len(ys)), key=ys.__getitem__)
    placed = list(ys)
    for above, below in itertools.pairwise(order):
        placed[below] = max(placed[below], placed[above] + TEXT_HEIGHT)
    floor = float(BOTTOM)
    for n in reversed(order):
        placed[n] = min(placed[n], floor)
        floor = placed[n] - TEXT_HEIGHT
    return placed


def _percent(share: float) -> str:
    """At most two decimals, and 100 % for nothing less than all."""
    return "> 99.99 %" if 0.9999 < share < 1 else f"{round(100 * share, 2):g} %"


def _times(factor: float) -> str:
    return f"{factor:.1f} x" if factor >= 1 else f"{factor:.2f} x"


def _microseconds(time: float) -> str:
    return f"{time:,.0f}" if time >= 100 else f"{time:.3g}"


def _difference(difference: float | None) -> str:
    if difference is None:
        return "-"
    return "=" if difference == 0 else f"{difference:.1e}"
