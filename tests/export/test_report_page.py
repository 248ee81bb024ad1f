import itertools
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from html.parser import HTMLParser
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from export.manifest import FormatParity, Parity, Source
from export.report import FormatReport, Latency, Machine, Report
from export.report_page import render

VOID = {"meta", "br", "hr", "link", "img", "input"}
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BASES = {"torchscript": 120.0, "pt2": 500.0, "aoti": 60.0, "onnx": 90.0}
TEXT_HEIGHT = 12


def latencies(base: float, sizes: tuple[int, ...]) -> tuple[Latency, ...]:
    return tuple(
        Latency(
            batch_size=size,
            median_us=base + 9 * size,
            lower_us=(base + 9 * size) * 0.9,
            upper_us=(base + 9 * size) * 1.2,
        )
        for size in sizes
    )


def report(
    bases: Mapping[str, float] = BASES,
    *,
    name: str = "tiny",
    source: str = "tiny",
    sizes: tuple[int, ...] = SIZES,
    error: float = 9.5e-6,
    agreement: float = 1.0,
    gpu: str | None = None,
    least: float = 0.995,
) -> Report:
    errors = tuple(error * (1 + n % 7) / 7 for n in range(50))
    return Report(
        name=name,
        policy_version="sha256:" + "0123456789abcdef" * 4,
        source=Source(kind="preset", name=source, seed=3),
        precision="fp32",
        device="cuda" if gpu else "cpu",
        max_batch_size=sizes[-1],
        measured_at=datetime(2026, 2, 3, 4, 5, tzinfo=UTC),
        machine=Machine(
            cpu="Some CPU", cores=2, gpu=gpu, vector_isa="AVX2", threads=1, torch="2.13.0"
        ),
        parity=Parity(
            atol=2e-5,
            rtol=1e-5,
            min_greedy_agreement=least,
            batch_sizes=sizes,
            steps=50,
            formats={
                each: FormatParity(
                    rows=26050,
                    action_agreement=agreement,
                    greedy_agreement=(1 + agreement) / 2,
                    max_error={"value": error, "log_prob": error / 2},
                )
                for each in bases
            },
        ),
        eager=latencies(1000, sizes),
        formats={
            each: FormatReport(
                export_seconds=3.2,
                check_seconds=6.5,
                latency=latencies(base, sizes),
                error_by_step=errors,
                row_difference={size: 3e-7 if size == 2 else 0.0 for size in sizes},
            )
            for each, base in bases.items()
        },
    )


ODD_REPORTS = {
    "one format": report({"onnx": 90}),
    "two formats": report({"pt2": 500, "aoti": 60}),
    "small batches": report(sizes=(1, 2, 4, 6)),
    "one batch size": report(sizes=(1,)),
    "close batch sizes": report(sizes=(*(2**n for n in range(16)), 33000)),
    "a GPU": report(gpu="NVIDIA H100 80GB HBM3"),
    "no error at all": report(error=0.0),
    "little agreement": report(agreement=0.4),
    "no least agreement": report(least=0.0),
    "equal latencies": report(dict.fromkeys(BASES, 1000.0)),
}
odd_reports = pytest.mark.parametrize("odd", ODD_REPORTS.values(), ids=ODD_REPORTS.keys())


class Page(HTMLParser):
    """Checks that every element is closed in turn; keeps the elements and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag in ("td", "th", "dd"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        self.text += data
        if {"td", "th", "dd"} & {*self.open}:
            self.cells[-1] += data


def plots(page: str) -> tuple[Element, Element, Element]:
    latency, error, agreement = (
        ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    )
    return latency, error, agreement


def lines(plot: Element) -> dict[str, list[tuple[float, float]]]:
    """The points of every line, by the name that is written at its end."""
    found = {}
    for group in plot.iter("g"):
        name, line = group.find("text"), group.find("polyline")
        assert name is not None
        assert line is not None
        pairs = [pair.split(",") for pair in line.attrib["points"].split()]
        found[name.text or ""] = [(float(x), float(y)) for x, y in pairs]
    return found


def labels(plot: Element, axis: str) -> list[tuple[float, float, str]]:
    """Where an axis' labels stand, and what they say; for "x" the axis title comes last."""
    return [
        (float(text.attrib["x"]), float(text.attrib["y"]), text.text or "")
        for text in plot.iter("text")
        if text.get("class") == axis
    ]


def test_names_are_text_whatever_is_in_them() -> None:
    hostile = "<script>alert(1)</script>\"'>&amp;<img src=x>"

    page = render(report({"onnx": 90, hostile: 100}, name=hostile, source=hostile, gpu=hostile))

    parsed = Page(page)
    assert not {"script", "img"} & {tag for tag, _ in parsed.seen}
    assert "<script" not in page
    assert parsed.text.count(hostile) >= 6
    assert hostile in lines(plots(page)[0])


def test_the_page_needs_nothing_but_itself() -> None:
    page = render(report())

    for word in ("http://", "https://", "src=", "href=", "<script", "<link", "url(", "@import"):
        assert word not in page
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in Page(page).seen}


@odd_reports
def test_every_report_makes_a_well_formed_page_with_every_format_in_every_plot(odd: Report) -> None:
    page = render(odd)

    Page(page)
    assert page.startswith("<!doctype html>")
    latency, error, agreement = plots(page)
    assert lines(latency).keys() == {"eager", *odd.formats}
    assert lines(error).keys() == {"atol 2e-05", *odd.formats}
    names = {text.text for text in agreement.iter("text") if text.get("class") == "name"}
    assert names == {*odd.formats}
    for plot in (latency, error, agreement):
        assert plot.find("title") is not None
        assert (plot.findtext("desc") or "").strip()


@odd_reports
def test_nothing_is_drawn_outside_the_picture_or_over_another_label(odd: Report) -> None:
    for plot in plots(render(odd)):
        width, height = map(float, plot.attrib["viewBox"].split()[2:])
        for line in (*plot.iter("polyline"), *plot.iter("polygon")):
            for pair in line.attrib["points"].split():
                x, y = map(float, pair.split(","))
                assert 0 <= x <= width
                assert 0 <= y <= height
        names = sorted(y for _, y, _ in labels(plot, "name"))
        assert len(names) >= len(odd.formats)
        assert all(below - above >= TEXT_HEIGHT for above, below in itertools.pairwise(names))
        for text in plot.iter("text"):
            assert TEXT_HEIGHT - 2 <= float(text.attrib["y"]) <= height - 2


def test_tick_labels_that_would_collide_are_left_out_and_the_largest_batch_is_not() -> None:
    crowded = labels(plots(render(ODD_REPORTS["close batch sizes"]))[0], "x")[:-1]

    shown = [(x, text) for x, _, text in crowded if text]
    assert len(crowded) == 17
    assert shown[0][1] == "1"
    assert shown[-1][1] == "33000"
    for (left, text), (right, next_text) in itertools.pairwise(shown):
        assert right - left > (len(text) + len(next_text)) / 2 * 6.5


def test_every_batch_size_has_its_tick_under_its_points() -> None:
    latency = plots(render(report(sizes=(1, 2, 4, 6))))[0]

    ticks = [(x, text) for x, _, text in labels(latency, "x")[:-1]]
    assert [text for _, text in ticks] == ["1", "2", "4", "6"]
    assert [x for x, _ in ticks] == [x for x, _ in lines(latency)["onnx"]]


def test_a_larger_latency_is_higher_up() -> None:
    figures = report()

    drawn = lines(plots(render(figures))[0])

    timed = {"eager": figures.eager} | {k: of.latency for k, of in figures.formats.items()}
    pairs = sorted(
        (latency.median_us, -y)
        for name, of in timed.items()
        for latency, (_, y) in zip(of, drawn[name], strict=True)
    )
    heights = [height for _, height in pairs]
    assert heights == sorted(heights)
    assert heights[-1] - heights[0] > 80


def test_the_band_reaches_from_the_lower_to_the_upper_quartile() -> None:
    plot = plots(render(report({"onnx": 90})))[0]

    group = list(plot.iter("g"))[-1]
    band = group.find("polygon")
    assert band is not None
    outline = [float(pair.split(",")[1]) for pair in band.attrib["points"].split()]
    lower, upper = outline[: len(SIZES)], outline[: len(SIZES) - 1 : -1]
    medians = [y for _, y in lines(plot)["onnx"]]
    for low, median, high in zip(lower, medians, upper, strict=True):
        assert low > median > high
        ratio = (median - high) / (low - median)
        assert ratio == pytest.approx(math.log(1.2) / -math.log(0.9), rel=0.1)


def test_the_atol_line_is_where_the_scale_puts_it() -> None:
    plot = plots(render(report(error=7e-7)))[1]

    ticks = [(float(text), y - 4) for _, y, text in labels(plot, "y")]
    (low, low_y), (high, high_y) = ticks[0], ticks[-1]
    share = math.log(2e-5 / low) / math.log(high / low)
    (_, left_y), (_, right_y) = lines(plot)["atol 2e-05"]
    assert left_y == right_y == pytest.approx(low_y + share * (high_y - low_y), abs=0.2)
    assert all(y > left_y for _, y in lines(plot)["onnx"])


def test_an_error_of_zero_is_drawn_at_the_bottom_and_the_axis_says_so() -> None:
    figures = report({"onnx": 90, "pt2": 500})
    exact = figures.formats["onnx"].model_copy(update={"error_by_step": (0.0,) * 50})
    figures = figures.model_copy(update={"formats": figures.formats | {"onnx": exact}})

    page = render(figures)

    plot = plots(page)[1]
    _, bottom, text = labels(plot, "y")[0]
    assert {y for _, y in lines(plot)["onnx"]} == {bottom - 4}
    assert all(y < bottom - 4 for _, y in lines(plot)["pt2"])
    assert text.startswith("≤")
    assert "0 drawn at the bottom" in page
    assert "0 drawn at the bottom" not in render(report())


def test_bars_are_as_long_as_their_share_of_an_axis_that_names_its_start() -> None:
    page = render(report({"onnx": 90}, agreement=0.996))

    plot = plots(page)[2]
    all_bar, greedy_bar = (float(bar.attrib["width"]) for bar in plot.iter("rect"))
    start, end = ((x, float(text.rstrip("% ")) / 100) for x, _, text in labels(plot, "x")[:2])

    def share(width: float) -> float:
        return start[1] + width / (end[0] - start[0]) * (end[1] - start[1])

    assert share(all_bar) == pytest.approx(0.996, abs=1e-5)
    assert share(greedy_bar) == pytest.approx(0.998, abs=1e-5)
    limit = next(line for line in plot.iter("line") if line.get("class") == "limit")
    assert share(float(limit.attrib["x1"]) - start[0]) == pytest.approx(0.995, abs=1e-5)
    assert 0.98 <= start[1] < 0.995
    assert f"the axis starts at {100 * start[1]:g} %, not at 0" in page
    assert "99.6 % all" in page
    assert "99.8 % greedy" in page


def test_an_agreement_short_of_all_is_not_rounded_to_all() -> None:
    assert "> 99.99 % all" in Page(render(report(agreement=1 - 1e-6))).text


def test_the_verdict_gives_rows_steps_and_the_largest_error_beside_what_is_allowed() -> None:
    verdict = (
        "what the policy does: 26,050 rows each, 50 carried steps, largest error 9.5e-06, "
        "allowed 2e-05 + 1e-05 x |expected|."
    )
    assert f"Every format does {verdict}" in " ".join(Page(render(report())).text.split())
    alone = " ".join(Page(render(report({"onnx": 90}))).text.split())
    assert f"onnx does {verdict.replace(' each', '')}" in alone


def test_the_tables_give_speed_seconds_and_row_differences() -> None:
    cells = Page(render(report({"onnx": 90}))).cells

    at = cells.index("format")
    assert cells[at : at + 6] == ["format", "B = 1", "B = 32", "B = 256", "export s", "check s"]
    row = cells[at + 6 : at + 12]
    assert row == ["onnx", "10.2 x 99 µs", "3.4 x 378 µs", "1.4 x 2,394 µs", "3.2", "6.5"]
    at = cells.index("batch size")
    assert cells[at : at + 8] == ["batch size", "onnx", "1", "=", "2", "3.0e-07", "4", "="]


def test_speed_is_given_at_the_largest_batch_where_32_and_256_were_not_run() -> None:
    headings = [cell for cell in Page(render(report(sizes=(1, 2, 4, 6)))).cells if "B =" in cell]

    assert headings == ["B = 1", "B = 6"]


def test_the_page_says_what_was_measured_when_and_where() -> None:
    page = render(report(gpu="NVIDIA H100 80GB HBM3"))

    parsed = Page(page)
    for fact in ("Some CPU", "2", "NVIDIA H100 80GB HBM3", "AVX2", "1", "2.13.0"):
        assert fact in parsed.cells
    assert "preset tiny, seed 3" in parsed.cells
    assert "fp32 on cuda, batches up to 256" in parsed.cells
    assert "2026-02-03 04:05 UTC" in parsed.cells
    titles = {attributes.get("title") for tag, attributes in parsed.seen if tag == "code"}
    assert "sha256:" + "0123456789abcdef" * 4 in titles
    assert "0123456789abcdef" not in parsed.text
