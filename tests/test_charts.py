"""Charts: marks stand where the numbers say, labels do not overlap, nothing is left out in silence."""

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from editkit.metrics.metric import Average
from editkit.report import charts, svg

NS = "{http://www.w3.org/2000/svg}"


def drawn(chart: charts.Chart) -> ET.Element:
    root = ET.fromstring(str(chart.svg))  # well-formed
    assert root.get("role") in ("img", "group") and root.get("aria-label")
    return root


def has(element: ET.Element, kind: str) -> bool:
    """Whether a class of the element has `kind` in it."""
    return kind in element.get("class", "")


def at(element: ET.Element, name: str) -> float:
    """A number among the attributes."""
    return float(element.attrib[name])


def circles(root: ET.Element, kind: str) -> list[ET.Element]:
    dots = [c for c in root.iter(f"{NS}circle") if c.find(f"{NS}title") is not None]
    return [c for c in dots if kind in c.get("class", "").split()]


def labels(root: ET.Element) -> list[tuple[float, float, float, str]]:
    """(left, right, baseline, text) of level labels."""
    found: list[tuple[float, float, float, str]] = []
    for t in root.iter(f"{NS}text"):
        if t.get("transform") or t.get("class") == "readout":  # of which one is shown at a time
            continue
        wide, x = svg.text_width(t.text or ""), at(t, "x")
        left = {"start": x, "middle": x - wide / 2, "end": x - wide}[t.attrib["text-anchor"]]
        found.append((left, left + wide, at(t, "y"), t.text or ""))
    return found


def overlapping(root: ET.Element) -> list[tuple[str, str]]:
    found = labels(root)
    return [
        (a[3], b[3])
        for i, a in enumerate(found)
        for b in found[i + 1 :]
        if abs(a[2] - b[2]) < 9 and min(a[1], b[1]) - max(a[0], b[0]) > 1
    ]


LONG = "a relation whose name is far longer than any chart on a phone is wide, 東京タワーを含む"


def test_a_dumbbell_s_ends_are_the_probabilities() -> None:
    root = drawn(charts.dumbbells("p", [charts.Pair("prompt", 0.25, 1.0)]))
    (before,), (after,) = circles(root, "hollow"), circles(root, "s0")
    ticks = {t.text: at(t, "x") for t in root.iter(f"{NS}text") if t.text in ("0.25", "1")}
    assert at(before, "cx") == pytest.approx(ticks["0.25"], abs=0.11)
    assert at(after, "cx") == pytest.approx(ticks["1"], abs=0.11)


def test_a_whisker_spans_the_interval() -> None:
    chart = charts.whiskers("ES", [("a", [Average(0.5, 9, 0.25, 0.75)])], ["ES"])
    root = drawn(chart)
    ticks = {t.text: at(t, "x") for t in root.iter(f"{NS}text") if t.get("class") == "muted"}
    line = next(e for e in root.iter(f"{NS}line") if has(e, "s0") and e.get("y1") == e.get("y2"))
    assert [at(line, "x1"), at(line, "x2")] == pytest.approx([ticks["0.25"], ticks["0.75"]], abs=0.11)
    assert "0.500 [0.250, 0.750], n = 9" in "".join(root.itertext())
    assert chart.rows == [("a", "ES", Average(0.5, 9, 0.25, 0.75))]


def test_a_curve_goes_through_its_points_and_marks_its_collapse() -> None:
    curve = charts.Line("rome", [0, 50, 100], [1.0, None, 0.5], [0.9, None, 0.4], [1.0, None, 0.6], marks=[100])
    root = drawn(charts.lines("ES", [curve], "edits", "ES", share=True))
    first, last = circles(root, "s0")  # the missing point is no zero
    assert at(first, "cx") < at(last, "cx") and at(first, "cy") < at(last, "cy")
    mark = next(e for e in root.iter(f"{NS}line") if has(e, "mark"))
    assert mark.get("x1") == last.get("cx")
    band = next(e for e in root.iter(f"{NS}path") if has(e, "band"))
    assert band.attrib["d"].count(",") == 4


def test_a_log_axis_spaces_by_ratio() -> None:
    root = drawn(charts.spectrum("w", [100.0, 10.0, 1.0]))
    heights = [at(c, "cy") for c in circles(root, "s0")]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)


def test_a_spectrum_leaves_out_what_is_rounding() -> None:
    chart = charts.spectrum("w", [2.0, 1e-16], [4.0, 3.0])
    assert len(circles(drawn(chart), "s0")) == 1 and ("update ΔW", 2, None) in chart.rows


def test_a_histogram_counts_every_value() -> None:
    values = [0.1 * i for i in range(37)]
    chart = charts.histogram("norm", values, "norm")
    rows: list[Any] = chart.rows
    assert sum(row[2] for row in rows) == 37
    for low, high, count in rows:
        assert count in (sum(low <= v < high for v in values), sum(low <= v <= high for v in values))


def test_a_heat_map_has_a_cell_for_each_value_and_skips_none() -> None:
    values: list[list[float | None]] = [[0.1, 0.2, None], [0.3, 0.4, 0.5]]
    chart = charts.heat_map("trace", values, ["The", " Tower"], ["0", "1", "2"], "layer", "probability", starred=[1])
    cells = [r for r in drawn(chart).iter(f"{NS}rect") if r.find(f"{NS}title") is not None]
    assert len(cells) == 5 and len({c.get("fill") for c in cells}) == 5
    assert "Tower*" in "".join(drawn(chart).itertext())


@pytest.mark.parametrize("count", [1, 3, 40])
def test_labels_never_overlap(count: int) -> None:
    names = [f"{i} {LONG}" for i in range(count)]
    averages = [Average(0.9, 9, 0.1, 1.0), Average(0.901, 9, 0.9, 0.91)]
    made = [
        charts.dumbbells("p", [charts.Pair(n, 0.5, 0.5001, heading="kind") for n in names]),
        charts.whiskers("ES", [(n, averages) for n in names], ["before", LONG]),
        charts.whiskers("ES", [(n[:2], averages[:1]) for n in names], ["x"]),
        charts.bars("next", [(n, 0.1) for n in names], "probability"),
        charts.lines("ES", [charts.Line(n, [1, 100000], [1e-7, 123456.0]) for n in names], LONG, LONG, log=True),
        charts.lines("ES", [charts.Line(n, [7], [0.5]) for n in names], "edits", "ES"),
        charts.histogram("norm", [0.001 * i for i in range(count)], LONG),
        charts.heat_map("t", [[0.5] * count] * count, names, [str(i) for i in range(count)], "layer", LONG),
        charts.heat_map("t", [[0.5] * count] * 3, names[:1] * 3, [str(10**i) for i in range(count)], "layer", "p"),
    ]
    for chart in made:
        root = drawn(chart)
        assert not overlapping(root), chart.title
        assert all(left > -3 and right < svg.WIDTH + 3 for left, right, *_ in labels(root)), chart.title


def test_nothing_to_show_is_still_a_chart() -> None:
    drawn(charts.whiskers("ES", [("a", [None])], ["ES"]))
    drawn(charts.lines("ES", [charts.Line("a", [1, 2], [None, None])], "edits", "ES"))
    drawn(charts.heat_map("t", [[None]], ["a"], ["0"], "layer", "p"))


def test_text_is_escaped_and_shortened_with_its_whole_in_the_tip() -> None:
    chart = charts.dumbbells("<b>", [charts.Pair(f"<script>{LONG}</script>", 0.1, 0.9)])
    assert "<script" not in str(chart.svg)
    root = drawn(chart)
    assert any((t.text or "") == f"<script>{LONG}</script>" for t in root.iter(f"{NS}title"))
    assert re.search("…", "".join(root.itertext()))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 500, [0, 100, 200, 300, 400, 500]), (3, 3, [3])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert svg.Scale(low, high, 0, 250).ticks() == pytest.approx(expected)


def test_an_axis_covers_every_value() -> None:
    for values in ([0.0], [5.0, 5.0], [-3.0, 1e-9], [1e12, 2e12], [0.123, 0.124], [1e-12, 3.0]):
        low, high = svg.covering(values)
        dot = 1e-6 * (high - low)  # far less than a pixel
        assert low <= min(values) + dot and high >= max(values) - dot and low < high


def test_clipping_keeps_the_end_of_a_prompt() -> None:
    assert svg.clip("short", 100) == "short"
    assert svg.clip(LONG, 80).endswith("…") and svg.clip(LONG, 80, keep_end=True).startswith("…")
    assert svg.text_width(svg.clip(LONG, 80)) <= 80 and svg.clip(LONG, 80, keep_end=True).endswith("含む")
