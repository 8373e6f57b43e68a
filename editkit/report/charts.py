"""The report's charts: an SVG drawing, the numbers in it as a table, and a description for screen readers.

Colours are Okabe and Ito's; shapes and dashes tell the series apart as well. A chart is as wide as a phone; on a wider
screen charts stand side by side. Names stand above their bars, so that long names need no margin.

Here are charts of named quantities; `curves.py` draws quantities over steps, `heat.py` tables. All are called as
`charts.<name>`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from editkit.metrics.metric import Average
from editkit.numbers import number
from editkit.report.curves import Line, lines, spectrum
from editkit.report.heat import heat_map
from editkit.report.svg import SERIES, WIDTH, Chart, Drawing, Scale, clip, covering, text_width

__all__ = [
    "Chart",
    "Line",
    "Pair",
    "bars",
    "dumbbells",
    "heat_map",
    "histogram",
    "lines",
    "spectrum",
    "whiskers",
]

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
LABEL = 100  # units: the widest name that stands left of its mark
STEP = 15  # units from one whisker to the next


@dataclass(frozen=True)
class Pair:
    """One quantity before and after an edit; None where it was not measured."""

    label: str
    before: float | None
    after: float | None
    series: int = 0  # chooses the colour
    heading: str = ""  # printed above this pair, the first of its group


def dumbbells(title: str, pairs: Sequence[Pair], axis: str = "probability", note: str = "") -> Chart:
    """Each quantity before (hollow) and after (filled) on one line; all values are between 0 and 1.

    `title`, `note`: printed above and below the chart. `axis`: what the values are.
    """
    # 1) layout: labels at `places`, each with its line 12 units below
    left, right = 6, WIDTH - 92
    scale = Scale(0, 1, left, right)
    places = _label_places(pairs)
    height = places[-1] + 26 + 34
    drawing = Drawing(height, f"{title}: {axis} before and after. " + _pairs_described(pairs))
    # 2) marks
    used = drawing.legend([("hollow", "before"), (f"s{pairs[0].series}", "after")])
    drawing.x_axis(scale, used, height - 34, axis, SHARES)
    for pair, y in zip(pairs, places, strict=True):
        if pair.heading:
            drawing.text(2, y - 14, clip(pair.heading, WIDTH), "strong")
        drawing.text(left, y, clip(pair.label, right - left, keep_end=True), "halo", tip=pair.label)
        _draw_pair(drawing, scale, y + 12, pair)
    # 3) the numbers as a table
    rows: list[tuple[object, ...]] = [(p.label, p.before, p.after) for p in pairs]
    return Chart(title, drawing.svg(), ("", "before", "after"), rows, note)


def _label_places(pairs: Sequence[Pair]) -> list[float]:
    """The y of each pair's label: below the legend, with room for headings."""
    places, y = [], 22.0
    for pair in pairs:
        y += 14 + (18 if pair.heading else 0)
        places.append(y)
        y += 16
    return places


def _draw_pair(drawing: Drawing, scale: Scale, y: float, pair: Pair) -> None:
    """A line from before to after, a dot at either end, and both values at the right."""
    kind = f"s{pair.series % SERIES}"
    if pair.before is not None and pair.after is not None:
        drawing.line(scale(pair.before), y, scale(pair.after), y, f"{kind} line thick")
    if pair.before is not None:
        drawing.dot(scale(pair.before), y, "hollow", f"before {number(pair.before)}")
    if pair.after is not None:
        drawing.dot(scale(pair.after), y, kind, f"after {number(pair.after)}", 4.5)
    drawing.text(WIDTH - 2, y + 4, f"{_brief(pair.before)} → {_brief(pair.after)}", "value", anchor="end")


def _pairs_described(pairs: Sequence[Pair]) -> str:
    return _listed([f"{p.label}: {_brief(p.before)} to {_brief(p.after)}" for p in pairs], 6)


def _listed(texts: Sequence[str], shown: int) -> str:
    """The first `shown` texts, and how many more there are."""
    more = f"; and {len(texts) - shown} more" if len(texts) > shown else ""
    return "; ".join(texts[:shown]) + more


def _brief(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def bars(title: str, items: Sequence[tuple[str, float | None]], axis: str, note: str = "", series: int = 0) -> Chart:
    """A bar from 0 for each item.

    - `title`, `note`: printed above and below the chart.
    - `items`: (short name, value between 0 and 1, or None for no bar).
    - `axis`: what the values are. `series`: chooses the colour.
    """
    left = 12 + max(text_width(clip(name, LABEL)) for name, _ in items)
    scale, step, top = Scale(0, 1, left, WIDTH - 58), 20, 6.0
    bottom = top + step * len(items)
    described = "; ".join(f"{name} {_brief(value)}" for name, value in items)
    drawing = Drawing(bottom + 36, f"{title}: {axis}. {described}")
    drawing.x_axis(scale, top, bottom, axis, SHARES)
    for i, (name, value) in enumerate(items):
        y = top + i * step
        drawing.text(left - 6, y + 14, clip(name, LABEL), anchor="end", tip=name)
        if value is not None:
            wide = max(scale(value) - left, 1)
            drawing.box(left, y + 4, wide, step - 8, f"s{series % SERIES}", f"{name}: {number(value)}")
        drawing.text(WIDTH - 2, y + 14, _brief(value), "value", anchor="end")
    rows: list[tuple[object, ...]] = list(items)
    return Chart(title, drawing.svg(), ("", axis), rows, note)


Group = tuple[str, Sequence[Average | None]]  # a name, and an average for each series


def whiskers(
    title: str,
    groups: Sequence[Group],
    series: Sequence[str],
    axis: str = "",
    note: str = "",
    *,
    share: bool = True,
    hollow: Sequence[str] = (),
) -> Chart:
    """Averages with their intervals: for each group (a relation, a run), one mark for each series.

    - `title`, `note`: printed above and below the chart.
    - `groups`: (name, an average or None for each of `series`); a group without any average is left out.
    - `series`: their names. `hollow`: those of them that are drawn hollow, such as "before".
    - `axis`: what the values are; by default the mean, with its interval where one is given.
    - `share`: the axis goes from 0 to 1 where all values are between 0 and 1.
    """
    # 1) layout
    groups = [(g, averages) for g, averages in groups if any(a is not None and a.mean is not None for a in averages)]
    known = [a for _, averages in groups for a in averages if a is not None and a.mean is not None]
    axis = axis or ("mean over cases, with its 95 % interval" if any(a.low is not None for a in known) else "mean")
    widest = max((text_width(label) for label, _ in groups), default=0)
    aside = widest <= LABEL  # short names stand left of their marks, long ones above
    ends = [v for a in known for v in (a.mean, a.low, a.high) if v is not None] or [0.0, 1.0]
    scale = Scale(*covering(ends, share=share), widest + 14 if aside else 8, WIDTH - 58)
    drawing = Drawing(0, f"{title}: {axis}. {_groups_described(groups, series)}")
    # 2) marks
    kinds = ["hollow" if name in hollow else f"s{i % SERIES}" for i, name in enumerate(series)]
    begin = 6 + (drawing.legend(list(zip(kinds, series, strict=True))) if len(series) > 1 else 2.0)
    end = begin
    for group in groups:
        end = _draw_group(drawing, scale, end, group, list(zip(kinds, series, strict=True)), aside=aside)
    drawing.x_axis(scale, begin, end, axis, SHARES if (scale.low, scale.high) == (0, 1) else None)
    drawing.height = end + 36
    # 3) the numbers as a table
    rows: list[tuple[object, ...]] = [
        (g, s, a) for g, averages in groups for s, a in zip(series, averages, strict=True) if a is not None
    ]
    return Chart(title, drawing.svg(), ("", "series", "mean"), rows, note)


def _draw_group(
    drawing: Drawing, scale: Scale, y: float, group: Group, series: Sequence[tuple[str, str]], *, aside: bool
) -> float:
    """A group's name and its whiskers, from `y` down; returns the y where the next group begins.

    - `drawing`, `scale`: where to draw. `group`: its name and averages.
    - `series`: (kind of mark, name) of each.
    - `aside`: the name stands left of the first whisker, otherwise above it.
    """
    name, averages = group
    if aside:
        drawing.text(scale.start - 8, y + STEP + 4, name, anchor="end")
    else:
        y += 12
        drawing.text(scale.start, y, clip(name, scale.end - scale.start), "halo", tip=name)
    for (kind, called), average in zip(series, averages, strict=True):
        if average is not None and average.mean is not None:
            y += STEP
            _draw_whisker(drawing, scale, y, kind, average, called if len(series) > 1 else name)
    return y + (5 if aside else 8)


def _draw_whisker(drawing: Drawing, scale: Scale, y: float, kind: str, average: Average, name: str) -> None:
    """One mean: its interval, a dot, and the value at the right.

    - `drawing`, `scale`, `y`: where to draw. `average`: the mean and its interval.
    - `kind`: CSS class of the mark. `name`: shown with the values where the dot is pointed at.
    """
    assert average.mean is not None
    if average.low is not None and average.high is not None:
        low, high = scale(average.low), scale(average.high)
        drawing.line(low, y, high, y, f"{kind} line")
        for end in (low, high):
            drawing.line(end, y - 3, end, y + 3, f"{kind} line")
    drawing.dot(scale(average.mean), y, kind, f"{name}: {average}", 3.6)
    value = f"{average.mean:.3f}" if abs(average.mean) < 10 else number(average.mean)
    drawing.text(WIDTH - 2, y + 4, value, "value", anchor="end")


def _groups_described(groups: Sequence[Group], series: Sequence[str]) -> str:
    means = [f"{g} {s} {_brief(a.mean)}" for g, averages in groups for s, a in zip(series, averages, strict=True) if a]
    return _listed(means, 8)


def histogram(title: str, values: Sequence[float], x_name: str, note: str = "", bins: int = 20) -> Chart:
    """How many of `values` fall into each of `bins` equal intervals.

    `title`, `note`: printed above and below the chart. `values`: one or more. `x_name`: what they are, with the unit.
    """
    # 1) layout
    low, high = covering(values)
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    occupied = [(a, b, count) for count, a, b in zip(counts, edges, edges[1:], strict=False) if count]
    top, bottom = 26, 176
    y_scale = Scale(0, covering([0, max(counts)])[1], bottom, top)
    left = 14 + max(text_width(number(t)) for t in y_scale.ticks(26))
    x_scale = Scale(low, high, left + 2, WIDTH - 10)
    # 2) marks
    described = f"{title}: {len(values)} values from {number(min(values))} to {number(max(values))}"
    drawing = Drawing(bottom + 36, described)
    drawing.y_axis(y_scale, left, WIDTH - 4, f"cases (n = {len(values):,})")
    drawing.x_axis(x_scale, bottom, bottom, x_name)
    for a, b, count in occupied:
        y, tip = y_scale(count), f"{number(a)} to {number(b)}: {count}"
        drawing.box(x_scale(a) + 0.7, y, x_scale(b) - x_scale(a) - 1.4, bottom - y, "s0", tip)
    # 3) the numbers as a table
    return Chart(title, drawing.svg(), ("from", "to", "cases"), list(occupied), note)
