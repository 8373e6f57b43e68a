"""The report's charts: SVG, the numbers they show, and a sentence that says it without eyes.

Okabe and Ito's colours, told apart by shape and dash as well. A chart is as wide as a phone: where there is room,
charts stand side by side. Names stand above their bars, so that long ones need no margin.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from editkit.metrics.metric import Average
from editkit.numbers import number
from editkit.report.svg import SERIES, WIDTH, Drawing, Scale, clip, covering, text_width

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
ROW_NAME = 130  # units: the widest name of a heat map's row
LABEL = 100  # units: the widest name that stands left of what it names


@dataclass(frozen=True)
class Chart:
    """A drawing and the table behind it."""

    title: str
    svg: Markup
    columns: tuple[str, ...]
    rows: list[tuple[object, ...]]
    note: str = ""


@dataclass(frozen=True)
class Pair:
    """One quantity before and after; `series` chooses the colour."""

    label: str
    before: float | None
    after: float | None
    series: int = 0
    heading: str = ""  # printed above the first of its kind


@dataclass(frozen=True)
class Line:
    """One curve; `low` and `high`, where given, are the ends of a band."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    marks: Sequence[float] = ()  # x where something happened: a collapse


def dumbbells(title: str, pairs: Sequence[Pair], axis: str = "probability", note: str = "") -> Chart:
    """Each quantity before (hollow) and after (full) on one track; values of shares or probabilities, 0 to 1."""
    left, right = 6, WIDTH - 92
    scale = Scale(0, 1, left, right)
    top = _named(pairs)
    height = top[-1] + 26 + 34
    drawing = Drawing(height, f"{title}: {axis} before and after. " + _spoken(pairs))
    used = drawing.legend([("hollow", "before"), (f"s{pairs[0].series}", "after")])
    drawing.x_axis(scale, used, height - 34, axis, SHARES)
    for pair, y in zip(pairs, top, strict=True):
        kind = f"s{pair.series % SERIES}"
        if pair.heading:
            drawing.text(2, y - 14, clip(pair.heading, WIDTH), "strong")
        drawing.text(left, y, clip(pair.label, right - left, keep_end=True), "halo", tip=pair.label)
        line = y + 12
        if pair.before is not None and pair.after is not None:
            drawing.line(scale(pair.before), line, scale(pair.after), line, f"{kind} line thick")
        if pair.before is not None:
            drawing.dot(scale(pair.before), line, "hollow", f"before {number(pair.before)}")
        if pair.after is not None:
            drawing.dot(scale(pair.after), line, kind, f"after {number(pair.after)}", 4.5)
        drawing.text(WIDTH - 2, line + 4, f"{_brief(pair.before)} → {_brief(pair.after)}", "value", anchor="end")
    rows: list[tuple[object, ...]] = [(p.label, p.before, p.after) for p in pairs]
    return Chart(title, drawing.svg(), ("", "before", "after"), rows, note)


def _named(pairs: Sequence[Pair]) -> list[float]:
    """Where each pair's label stands: below the legend, with room for headings."""
    places, y = [], 22.0
    for pair in pairs:
        y += 14 + (18 if pair.heading else 0)
        places.append(y)
        y += 16
    return places


def _spoken(pairs: Sequence[Pair]) -> str:
    shown = [f"{p.label}: {_brief(p.before)} to {_brief(p.after)}" for p in pairs[:6]]
    return "; ".join(shown) + (f"; and {len(pairs) - 6} more" if len(pairs) > 6 else "")


def _brief(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def bars(title: str, items: Sequence[tuple[str, float | None]], axis: str, note: str = "", series: int = 0) -> Chart:
    """One bar from 0 for each short name; values of shares or probabilities, 0 to 1."""
    left = 12 + max(text_width(clip(name, LABEL)) for name, _ in items)
    scale, step, top = Scale(0, 1, left, WIDTH - 58), 20, 6.0
    bottom = top + step * len(items)
    said = "; ".join(f"{name} {_brief(value)}" for name, value in items)
    drawing = Drawing(bottom + 36, f"{title}: {axis}. {said}")
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


def whiskers(
    title: str,
    groups: Sequence[tuple[str, Sequence[Average | None]]],
    series: Sequence[str],
    axis: str = "",
    note: str = "",
    *,
    share: bool = True,
    hollow: Sequence[str] = (),
) -> Chart:
    """Averages with their intervals: for each group (a relation, a run) one mark a series.

    Series named in `hollow` are drawn hollow ("before").
    """
    groups = [(g, averages) for g, averages in groups if any(a is not None and a.mean is not None for a in averages)]
    widest = max((text_width(label) for label, _ in groups), default=0)
    aside = widest <= LABEL  # short names stand left of their marks, long ones above
    left, right, step = (widest + 14 if aside else 8), WIDTH - 58, 15
    found = [a for _, averages in groups for a in averages if a is not None and a.mean is not None]
    axis = axis or ("mean over cases, with its 95 % interval" if any(a.low is not None for a in found) else "mean")
    ends = [v for a in found for v in (a.mean, a.low, a.high) if v is not None] or [0.0, 1.0]
    scale = Scale(*covering(ends, share=share), left, right)
    several = len(series) > 1
    kinds = ["hollow" if name in hollow else f"s{i % SERIES}" for i, name in enumerate(series)]
    drawing = Drawing(0, "")
    used = drawing.legend(list(zip(kinds, series, strict=True))) if several else 2.0
    y = begin = used + 6
    for label, averages in groups:
        if aside:
            drawing.text(left - 8, y + step + 4, label, anchor="end")
        else:
            y += 12
            drawing.text(left, y, clip(label, right - left), "halo", tip=label)
        for kind, name, average in zip(kinds, series, averages, strict=True):
            if average is None or average.mean is None:
                continue
            y += step
            _whisker(drawing, scale, y, kind, average, name if several else label)
        y += 5 if aside else 8
    drawing.height = y + 36
    drawing.x_axis(scale, begin, y, axis, SHARES if (scale.low, scale.high) == (0, 1) else None)
    said = [f"{g} {s} {_brief(a.mean)}" for g, averages in groups for s, a in zip(series, averages, strict=True) if a]
    drawing.label = (
        f"{title}: {axis}. " + "; ".join(said[:8]) + (f"; and {len(said) - 8} more" if len(said) > 8 else "")
    )
    rows: list[tuple[object, ...]] = [
        (g, s, a) for g, averages in groups for s, a in zip(series, averages, strict=True) if a is not None
    ]
    return Chart(title, drawing.svg(), ("", "series", "mean"), rows, note)


def _whisker(drawing: Drawing, scale: Scale, y: float, kind: str, average: Average, name: str) -> None:
    assert average.mean is not None
    if average.low is not None and average.high is not None:
        low, high = scale(average.low), scale(average.high)
        drawing.line(low, y, high, y, f"{kind} line")
        for end in (low, high):
            drawing.line(end, y - 3, end, y + 3, f"{kind} line")
    drawing.dot(scale(average.mean), y, kind, f"{name}: {average}", 3.6)
    drawing.text(WIDTH - 2, y + 4, f"{average.mean:.3f}" if abs(average.mean) < 10 else number(average.mean), "value",
                 anchor="end")  # fmt: skip


def lines(
    title: str,
    curves: Sequence[Line],
    x_name: str,
    y_name: str,
    note: str = "",
    *,
    log: bool = False,
    share: bool = False,
) -> Chart:
    """Curves with bands, their points marked; a dashed upright line and a cross where a curve has a mark.

    `log`: by ratio (values that are not positive are left out). `share`: from 0 to 1.
    """
    kept = [[(x, y) for x, y in zip(c.x, c.y, strict=True) if y is not None and math.isfinite(y) and (y > 0 or not log)]
            for c in curves]  # fmt: skip
    bands = [_band(c, log) for c in curves]
    ys = [y for points in kept for _, y in points] + [v for band in bands for _, a, b in band for v in (a, b)]
    xs = [x for points in kept for x, _ in points]
    kinds = [f"s{i % SERIES} d{i // SERIES % 3 if len(curves) > SERIES else i % 3}" for i in range(len(curves))]
    drawing = Drawing(0, "")
    used = (
        drawing.legend([(f"{k} line", c.name) for k, c in zip(kinds, curves, strict=True)]) if len(curves) > 1 else 0.0
    )
    top, bottom = used + 26, used + 196
    drawing.height = bottom + 36
    if not ys:
        ys, xs = ([1.0, 10.0] if log else [0.0, 1.0]), [0.0, 1.0]
    y_scale = Scale(*covering(ys, log=log, share=share), bottom, top, log=log)
    left = 14 + max(text_width(number(t)) for t in [*y_scale.ticks(26), 0])
    x_scale = Scale(min(xs), max(xs), left + 6, WIDTH - 10)
    drawing.y_axis(y_scale, left, WIDTH - 4, y_name)
    drawing.x_axis(x_scale, bottom, bottom, x_name)
    for kind, band in zip(kinds, bands, strict=True):
        if band:
            edge = [(x_scale(x), y_scale(a)) for x, a, _ in band] + [(x_scale(x), y_scale(b)) for x, _, b in band[::-1]]
            drawing.path(edge, f"{kind} band", closed=True)
    for kind, curve, points in zip(kinds, curves, kept, strict=True):
        for mark in curve.marks:
            drawing.line(x_scale(mark), top, x_scale(mark), bottom, f"{kind} line mark")
        if len(points) > 1:
            drawing.path([(x_scale(x), y_scale(y)) for x, y in points], f"{kind} line")
        for x, y in points if len(points) <= 60 else ():
            drawing.dot(x_scale(x), y_scale(y), kind, f"{curve.name}, {x_name} {number(x)}: {number(y)}", 2.6)
    drawing.label = f"{title}: {y_name} over {x_name}. " + "; ".join(
        f"{c.name} from {number(p[0][1])} at {number(p[0][0])} to {number(p[-1][1])} at {number(p[-1][0])}"
        for c, p in zip(curves, kept, strict=True) if p
    )  # fmt: skip
    banded = any(bands)
    rows: list[tuple[object, ...]] = []
    for curve, band in zip(curves, bands, strict=True):
        ends = {x: (a, b) for x, a, b in band}
        rows += [
            (curve.name, x, y, *(ends.get(x, (None, None)) if banded else ()))
            for x, y in zip(curve.x, curve.y, strict=True)
        ]
    return Chart(title, drawing.svg(), ("", x_name, y_name, *(("low", "high") if banded else ())), rows, note)


def _band(curve: Line, log: bool) -> list[tuple[float, float, float]]:
    """(x, low, high) where both ends are known."""
    if not curve.low:
        return []
    found = []
    for x, low, high in zip(curve.x, curve.low, curve.high, strict=True):
        if low is not None and high is not None and math.isfinite(low + high) and (low > 0 or not log):
            found.append((x, low, high))
    return found


def spectrum(parameter: str, change: Sequence[float], base: Sequence[float] = ()) -> Chart:
    """Singular values of one ΔW, largest first, against the weight's own, on a log axis."""
    top = max([*change, *base], default=1.0)

    def shown(name: str, values: Sequence[float]) -> Line:
        kept = [v if v > 1e-9 * top else None for v in values]  # what rounding leaves of a zero
        return Line(name, list(range(1, len(values) + 1)), kept)

    curves = [shown("update ΔW", change)] + ([shown("weight W", base)] if base else [])
    note = "Values below a billionth of the largest are rounding and are left out."
    return lines(parameter, curves, "number of the singular value", "singular value", note, log=True)


def histogram(title: str, values: Sequence[float], x_name: str, note: str = "", bins: int = 20) -> Chart:
    """How often each stretch of a quantity occurs."""
    low, high = covering(values)
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    top, bottom = 26, 176
    y_scale = Scale(0, covering([0, max(counts)])[1], bottom, top)
    left = 14 + max(text_width(number(t)) for t in y_scale.ticks(26))
    x_scale = Scale(low, high, left + 2, WIDTH - 10)
    said = f"{title}: {len(values)} values from {number(min(values))} to {number(max(values))}"
    drawing = Drawing(bottom + 36, said)
    drawing.y_axis(y_scale, left, WIDTH - 4, f"cases (n = {len(values):,})")
    drawing.x_axis(x_scale, bottom, bottom, x_name)
    for count, a, b in zip(counts, edges, edges[1:], strict=False):
        if count:
            tip = f"{number(a)} to {number(b)}: {count}"
            y = y_scale(count)
            drawing.box(x_scale(a) + 0.7, y, x_scale(b) - x_scale(a) - 1.4, bottom - y, "s0", tip)
    rows: list[tuple[object, ...]] = [(a, b, c) for c, a, b in zip(counts, edges, edges[1:], strict=False) if c]
    return Chart(title, drawing.svg(), ("from", "to", "cases"), rows, note)


def heat_map(
    title: str,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    x_name: str,
    quantity: str,
    note: str = "",
    starred: Sequence[int] = (),
    low: float | None = None,
    high: float | None = None,
) -> Chart:
    """`values` [rows, columns], the first row on top, in the colours of cividis; starred rows get a *.

    A cell's value is shown where it is pointed at, a row's greatest where the keyboard has come to the row. `low`,
    `high`: where colours begin and end; None: the least and the greatest value.
    """
    named = [f"{name}*" if i in starred else name for i, name in enumerate(rows)]
    left = max(text_width(clip(name, ROW_NAME)) for name in named) + 8
    cell = (WIDTH - 6 - left) / len(columns)
    tall = max(15.0, min(24.0, 280 / len(rows)))
    top, bottom = 46.0, 46.0 + tall * len(rows)
    widest = max(map(text_width, columns)) + 4
    tilted = widest > 2 * cell and cell >= 12
    every = 1 if tilted else max(1, math.ceil(widest / cell))
    room = min(widest, 70) if tilted else 12
    known = [v for line in values for v in line if v is not None and math.isfinite(v)] or [0.0]
    low, high = min(known) if low is None else low, max(known) if high is None else high
    drawing = Drawing(bottom + room + 24, f"{title}: {quantity} by row and {x_name}, {number(low)} to {number(high)}")
    drawing.text(2, 11, clip(quantity, WIDTH - 4), "muted")
    for i in range(60):
        drawing.box(40 + i * 2, 18, 2.4, 10, fill=_cividis(i / 59))
    drawing.text(36, 27, number(low, 3), "muted", anchor="end")
    drawing.text(166, 27, number(high, 3), "muted")
    drawing.role = "group"
    aside = 172 + text_width(number(high, 3))

    def told(text: str) -> None:
        drawing.text(WIDTH - 2, 27, clip(text, WIDTH - 2 - aside), "readout", anchor="end")

    for i, (name, line) in enumerate(zip(named, values, strict=True)):
        y = top + i * tall
        held = [(j, value) for j, value in enumerate(line) if value is not None and math.isfinite(value)]
        most = max(held, key=lambda each: each[1], default=None)
        summed = f"{name}: " + (f"most {number(most[1], 3)}, {x_name} {columns[most[0]]}" if most else "no value")
        drawing.begin("row", summed)
        drawing.text(left - 6, y + tall / 2 + 4, clip(name, ROW_NAME), anchor="end", tip=name)
        for j, value in held:
            part = (value - low) / (high - low) if high > low else 0.5
            drawing.begin("cell")
            tip = f"{rows[i]}, {x_name} {columns[j]}: {number(value)}"
            drawing.box(left + j * cell, y, cell + 0.3, tall + 0.3, tip=tip, fill=_cividis(part))
            told(f"{clip(rows[i], 70)}, {x_name} {columns[j]}: {number(value, 3)}")
            drawing.end()
        drawing.box(left, y, WIDTH - 6 - left, tall, "edge")
        told(f"{clip(name, 50)}: {summed[len(name) + 2 :]}")
        drawing.end()
    for j in range(0, len(columns), every):
        x = left + (j + 0.5) * cell
        if tilted:
            drawing.text(x + 3, bottom + 10, clip(columns[j], 66), "muted", anchor="end", tilt=-55, tip=columns[j])
        else:
            drawing.text(x, bottom + 13, clip(columns[j], cell * every), "muted", anchor="middle", tip=columns[j])
    drawing.x_name(left + cell * len(columns) / 2, bottom + room + 16, x_name)
    table: list[tuple[object, ...]] = [(name, *line) for name, line in zip(rows, values, strict=True)]
    return Chart(title, drawing.svg(), ("", *columns), table, note)


# Cividis at eighths (Nunez, Anderton and Renslow 2018): even in lightness, the same to colour-blind eyes.
_CIVIDIS = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#fee838")


def _cividis(part: float) -> str:
    place = min(max(part, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    i = min(int(place), len(_CIVIDIS) - 2)
    a, b = (tuple(int(_CIVIDIS[k][c : c + 2], 16) for c in (1, 3, 5)) for k in (i, i + 1))
    return "#" + "".join(f"{round(u + (v - u) * (place - i)):02x}" for u, v in zip(a, b, strict=True))
