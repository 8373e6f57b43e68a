"""Charts of curves: quantities over steps or edits with their bands, and spectra.

Each chart is made in three steps: layout (which points are drawn, and where the axes stand), marks, table.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from editkit.numbers import number
from editkit.report.svg import SERIES, WIDTH, Chart, Drawing, Scale, covering, text_width

PLOT = 170  # units: the height between the axes' ends
DOTTED = 60  # points: a longer curve is drawn without a dot at each


@dataclass(frozen=True)
class Line:
    """One curve.

    - `x`, `y`: its points; a y of None or NaN has no point.
    - `low`, `high`: the ends of a band around it, at each x; empty for no band.
    - `marks`: values of x where something happened, such as a collapse.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    marks: Sequence[float] = ()


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
    """Curves with bands and dots at their points, and a dashed vertical line at each mark.

    - `title`, `note`: printed above and below the chart.
    - `curves`: one or more; with two or more there is a legend.
    - `x_name`, `y_name`: what runs along the axes, with the unit.
    - `log`: a logarithmic y axis; values that are not positive are left out.
    - `share`: the y axis goes from 0 to 1 where all values are between 0 and 1.
    """
    # 1) layout
    shown = _shown(curves, log)
    drawing = Drawing(0, _description(title, shown, x_name, y_name))
    legend = drawing.legend([(f"{c.kind} line", c.line.name) for c in shown]) if len(shown) > 1 else 0.0
    plot = _plot(shown, legend, log=log, share=share)
    drawing.height = plot.bottom + 36
    # 2) axes and marks; bands go under all curves
    drawing.y_axis(plot.y, plot.left, WIDTH - 4, y_name)
    drawing.x_axis(plot.x, plot.bottom, plot.bottom, x_name)
    for curve in shown:
        _draw_band(drawing, plot, curve)
    for curve in shown:
        _draw_curve(drawing, plot, curve, x_name)
    # 3) the numbers as a table
    banded = any(curve.band for curve in shown)
    columns = ("", x_name, y_name, *(("low", "high") if banded else ()))
    return Chart(title, drawing.svg(), columns, _table(shown, banded), note)


@dataclass(frozen=True)
class _Curve:
    """What is drawn of one line."""

    line: Line
    kind: str  # CSS classes: colour and dash
    points: list[tuple[float, float]]  # (x, y)
    band: list[tuple[float, float, float]]  # (x, low, high)


@dataclass(frozen=True)
class _Plot:
    """Where the axes stand."""

    x: Scale
    y: Scale
    left: float
    top: float
    bottom: float


def _shown(curves: Sequence[Line], log: bool) -> list[_Curve]:
    """The points and bands that have a place on the axes, and a style for each curve."""
    shown = []
    for i, line in enumerate(curves):
        dash = i // SERIES % 3 if len(curves) > SERIES else i % 3
        known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None and math.isfinite(y)]
        points = [(x, y) for x, y in known if y > 0 or not log]
        shown.append(_Curve(line, f"s{i % SERIES} d{dash}", points, _band(line, log)))
    return shown


def _band(line: Line, log: bool) -> list[tuple[float, float, float]]:
    """(x, low, high) where both ends are known."""
    if not line.low:
        return []
    band = []
    for x, low, high in zip(line.x, line.low, line.high, strict=True):
        if low is not None and high is not None and math.isfinite(low + high) and (low > 0 or not log):
            band.append((x, low, high))
    return band


def _plot(shown: Sequence[_Curve], legend: float, *, log: bool, share: bool) -> _Plot:
    """Axes that cover every point and band, below a legend of height `legend`."""
    xs = [x for curve in shown for x, _ in curve.points]
    ys = [y for curve in shown for _, y in curve.points]
    ys += [end for curve in shown for _, low, high in curve.band for end in (low, high)]
    if not ys:  # empty axes
        ys, xs = ([1.0, 10.0] if log else [0.0, 1.0]), [0.0, 1.0]
    top, bottom = legend + 26, legend + 26 + PLOT
    y = Scale(*covering(ys, log=log, share=share), bottom, top, log=log)
    left = 14 + max(text_width(number(tick)) for tick in [*y.ticks(26), 0])
    return _Plot(Scale(min(xs), max(xs), left + 6, WIDTH - 10), y, left, top, bottom)


def _draw_band(drawing: Drawing, plot: _Plot, curve: _Curve) -> None:
    if curve.band:
        below = [(plot.x(x), plot.y(low)) for x, low, _ in curve.band]
        above = [(plot.x(x), plot.y(high)) for x, _, high in curve.band]
        drawing.path(below + above[::-1], f"{curve.kind} band", closed=True)


def _draw_curve(drawing: Drawing, plot: _Plot, curve: _Curve, x_name: str) -> None:
    """The marks, the line, and a dot with its values at each point."""
    for mark in curve.line.marks:
        drawing.line(plot.x(mark), plot.top, plot.x(mark), plot.bottom, f"{curve.kind} line mark")
    if len(curve.points) > 1:
        drawing.path([(plot.x(x), plot.y(y)) for x, y in curve.points], f"{curve.kind} line")
    for x, y in curve.points if len(curve.points) <= DOTTED else ():
        tip = f"{curve.line.name}, {x_name} {number(x)}: {number(y)}"
        drawing.dot(plot.x(x), plot.y(y), curve.kind, tip, 2.6)


def _description(title: str, shown: Sequence[_Curve], x_name: str, y_name: str) -> str:
    """The chart in words, for a screen reader: where each curve begins and ends."""
    ends = [(c.line.name, *c.points[0], *c.points[-1]) for c in shown if c.points]
    return f"{title}: {y_name} over {x_name}. " + "; ".join(
        f"{name} from {number(y0)} at {number(x0)} to {number(y1)} at {number(x1)}" for name, x0, y0, x1, y1 in ends
    )


def _table(shown: Sequence[_Curve], banded: bool) -> list[tuple[object, ...]]:
    """A row for each point given: name, x, y and, where a curve has a band, its ends."""
    rows: list[tuple[object, ...]] = []
    for curve in shown:
        ends = {x: (low, high) for x, low, high in curve.band}
        for x, y in zip(curve.line.x, curve.line.y, strict=True):
            rows.append((curve.line.name, x, y, *(ends.get(x, (None, None)) if banded else ())))
    return rows


def spectrum(parameter: str, change: Sequence[float], base: Sequence[float] = ()) -> Chart:
    """Singular values of one ΔW on a log axis, largest first, beside those of the weight.

    `parameter`: the weight's name. `change`, `base`: singular values of ΔW and of W, in descending order.
    """
    top = max([*change, *base], default=1.0)

    def curve(name: str, values: Sequence[float]) -> Line:
        kept = [v if v > 1e-9 * top else None for v in values]  # a zero singular value, after rounding
        return Line(name, list(range(1, len(values) + 1)), kept)

    curves = [curve("update ΔW", change)] + ([curve("weight W", base)] if base else [])
    note = "Values below a billionth of the largest are rounding and are left out."
    return lines(parameter, curves, "number of the singular value", "singular value", note, log=True)
