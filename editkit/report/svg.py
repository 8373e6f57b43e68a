"""SVG drawings: axes, ticks and labels that do not overlap.

Colours are CSS classes (`s0`, `s1`, … for series; `muted`, `grid`), so that light and dark themes colour the same
drawing. All text is escaped here, because prompts and names are untrusted. Lengths are in units, about one pixel on a
phone.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from editkit.numbers import number

WIDTH = 360  # units; where there is more room, charts stand side by side
SIZE = 11  # of text
SERIES = 8  # colours; a ninth series has the first colour again, with another dash
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def clean(text: object) -> str:
    """Replace what XML cannot hold (control characters, single surrogates) by U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", str(text))


def text_width(text: str, size: float = SIZE) -> float:
    """Estimated width of `text` at font size `size`, in the unit of `size`."""
    return size * sum(_advance(c) for c in text)


def _advance(character: str) -> float:
    if unicodedata.combining(character):
        return 0.0
    if unicodedata.east_asian_width(character) in "WF":
        return 1.05
    if character in "iljtf.,:;'|!()[] ":
        return 0.36
    return 0.74 if character.isupper() or character in "mw→…—%" else 0.58


def clip(text: str, width: float, size: float = SIZE, *, keep_end: bool = False) -> str:
    """Shorten `text` with … to at most `width` units; `keep_end` drops the beginning: prompts differ at the end."""
    if text_width(text, size) <= width:
        return text
    room, kept = width - text_width("…", size), ""
    for character in reversed(text) if keep_end else text:
        if text_width(kept + character, size) > room:
            break
        kept = character + kept if keep_end else kept + character
    return "…" + kept.lstrip() if keep_end else kept.rstrip() + "…"


@dataclass(frozen=True)
class Chart:
    """A drawing with the numbers it shows, as a table."""

    title: str
    svg: Markup
    columns: tuple[str, ...]
    rows: list[tuple[object, ...]]
    note: str = ""


class Scale:
    """Map values from `low` to `high` onto units from `start` to `end`; values outside are put at the ends.

    `log`: a logarithmic axis, for positive values.
    """

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, 1e-300))
        part = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(max(part, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, room: float = 44) -> list[float]:
        """Round values, neighbours at least `room` units apart."""
        count = max(1, int(abs(self.end - self.start) // room))
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, math.ceil((last - first) / count))
            return [10.0**power for power in range(first, last + 1, step)]
        return [tick for tick in _round_steps(self.low, self.high, count) if self.low <= tick <= self.high]


def _round_steps(low: float, high: float, count: int) -> list[float]:
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def covering(values: Sequence[float], *, log: bool = False, share: bool = False) -> tuple[float, float]:
    """The ends of an axis that shows all `values`: powers of ten if `log`, else multiples of a round step.

    `share`: from 0 to 1 where all values are between.
    """
    low, high = min(values), max(values)
    if share and low >= 0 and high <= 1:
        return 0.0, 1.0
    if log:
        return 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high) + 1e-9)
    if low >= 0 and low < 0.6 * high:
        low = 0.0
    if high == low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    step = _round_steps(0, high - low, 4)[1] if high > low else 1.0
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


class Drawing:
    """A list of SVG elements; `svg()` gives the drawing.

    `kind` is always a string of CSS classes, `tip` a text shown where the element is pointed at.

    - `height`, `width`: of the drawing, in units.
    - `label`: its description for screen readers.
    """

    def __init__(self, height: float, label: str, width: float = WIDTH) -> None:
        self.width, self.height, self.label = width, height, label
        self.role = "img"  # "group" where parts have their own labels
        self._parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """A straight line from (`x1`, `y1`) to (`x2`, `y2`), of CSS classes `kind`."""
        self._parts.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def path(self, points: Sequence[tuple[float, float]], kind: str, *, closed: bool = False) -> None:
        """Straight lines from point to point; `closed`: an area."""
        steps = "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(f'<path class="{kind}" d="M{steps}{"Z" if closed else ""}"/>')

    def dot(self, x: float, y: float, kind: str, tip: str = "", radius: float = 4) -> None:
        """A circle around (`x`, `y`); `radius` in units."""
        inside = f"<title>{escape(clean(tip))}</title>" if tip else ""
        self._parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{inside}</circle>')

    def box(self, x: float, y: float, w: float, h: float, kind: str = "", tip: str = "", fill: str = "") -> None:
        """A rectangle `w` by `h` units, its top left corner at (`x`, `y`), in a CSS class or in the colour `fill`."""
        inside = f"<title>{escape(clean(tip))}</title>" if tip else ""
        colour = f' fill="{fill}"' if fill else ""
        place = f'x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{max(h, 0):.1f}"'
        self._parts.append(f'<rect class="{kind}"{colour} {place}>{inside}</rect>')

    def text(
        self, x: float, y: float, text: str, kind: str = "", *, anchor: str = "start", tip: str = "", tilt: float = 0
    ) -> None:
        """One line of text.

        - `x`, `y`: its place; `anchor`: which part of the text is at `x` ("start", "middle", "end").
        - `text`, `kind`: what is written, and its CSS classes.
        - `tip`: the full text, where `text` is shortened. `tilt`: degrees, clockwise.
        """
        inside = f"<title>{escape(clean(tip))}</title>" if tip and tip != text else ""
        turned = f' transform="rotate({tilt:g} {x:.1f} {y:.1f})"' if tilt else ""
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}'
        self._parts.append(f'<text class="{kind}" {place}>{escape(clean(text))}{inside}</text>')

    def begin(self, kind: str, label: str = "") -> None:
        """Begin a group, which `end` closes. With a `label` it can be reached by keyboard."""
        named = f' tabindex="0" role="img" aria-label="{escape(clean(label))}"' if label else ""
        self._parts.append(f'<g class="{kind}"{named}>')

    def end(self) -> None:
        self._parts.append("</g>")

    def legend(self, entries: Sequence[tuple[str, str]], top: float = 0) -> float:
        """Draw a legend from `top` down, in as many rows as it needs; returns its height.

        `entries`: (CSS classes of the marker, name). A class "line" gives a line, otherwise the marker is a dot.
        """
        x, y = 2.0, top + 11
        for kind, name in entries:
            short = clip(name, self.width - 26)
            if x > 2 and x + 20 + text_width(short) > self.width:
                x, y = 2.0, y + 16
            if "line" in kind:
                self.line(x, y - 4, x + 14, y - 4, kind)
            else:
                self.dot(x + 6, y - 4, kind)
            self.text(x + 18, y, short, tip=name)
            x += 18 + text_width(short) + 14
        return y + 7 - top

    def x_axis(self, scale: Scale, top: float, bottom: float, name: str, ticks: Sequence[float] | None = None) -> None:
        """Grid lines with numbers and a name below them.

        - `scale`: of the axis. `top`, `bottom`: ends of the grid lines.
        - `name`: of the quantity. `ticks`: values of the grid lines; if None, round values that fit.
        """
        if ticks is None:
            widest = max((text_width(number(tick)) for tick in scale.ticks()), default=0)
            ticks = scale.ticks(max(44, widest + 16))
        for tick in ticks:
            x, half = scale(tick), text_width(number(tick)) / 2
            self.line(x, top, x, bottom, "grid")
            self.text(min(x, self.width - half), bottom + 14, number(tick), "muted", anchor="middle")
        self.x_name((scale.start + scale.end) / 2, bottom + 29, name)

    def x_name(self, middle: float, y: float, name: str) -> None:
        """The name of the x axis, centred at `middle` and shortened to fit the drawing."""
        self.text(middle, y, clip(name, 2 * min(middle, self.width - middle)), "muted", anchor="middle", tip=name)

    def y_axis(self, scale: Scale, left: float, right: float, name: str) -> None:
        """Grid lines from `left` to `right`, numbers left of them, `name` above."""
        for tick in scale.ticks(26):
            y = scale(tick)
            self.line(left, y, right, y, "grid")
            self.text(left - 6, y + 4, number(tick), "muted", anchor="end")
        self.text(2, min(scale.start, scale.end) - 10, clip(name, self.width - 8), "muted")

    def svg(self) -> Markup:
        size = f'viewBox="0 0 {self.width:g} {self.height:.0f}"'
        about = f'role="{self.role}" aria-label="{escape(clean(self.label))}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {about} {size}>'
        return Markup(head + "".join(self._parts) + "</svg>")
