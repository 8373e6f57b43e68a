"""Heat maps side by side with one colour bar."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from editkit.numbers import number
from editkit.plots.shared.canvas import SIZE, SMALL, blank, every, headed, label, wrapped
from editkit.report.svg import text_width

if TYPE_CHECKING:
    from torch import Tensor

ROW = 0.165  # inches
PANEL = 1.9  # inches, the least width of one
LABEL = 1.6  # inches, the widest name of a row
A_LINE = 3  # panels side by side


@dataclass(frozen=True)
class Panel:
    """One heat map: its values [rows, columns], and the cells (row, column) with a frame around them."""

    title: str
    values: "Tensor"
    framed: Sequence[tuple[int, int]] = field(default_factory=tuple)


def panels(
    maps: Sequence[Panel],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    x_name: str,
    quantity: str,
    low: float,
    high: float,
    y_name: str = "",
    title: str = "",
    log: bool = False,
) -> Any:
    """A figure of heat maps with the same rows and columns, in the same colours; the first row is on top.

    - `maps`: one or more, each [rows, columns]. NaN is grey.
    - `rows`, `columns`: names. Every row is named; of columns that are numbers as many as fit, other names upright.
    - `x_name`, `y_name`: what runs along the axes. `quantity`: what the values are.
    - `low`, `high`: the values where colours begin and end.
    - `title`: above all maps. `log`: colours by ratio, for positive values.
    """
    layout = _layout([panel.title for panel in maps], rows, columns, y_name, title)
    figure = blank(layout.width, layout.height)
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    # 1) the maps
    norm = (LogNorm if log else Normalize)(low, high)
    colours = colormaps["viridis"].with_extremes(bad="0.85")
    flat = [axes for line in figure.subplots(layout.down, layout.across, squeeze=False) for axes in line]
    image = None
    for i, (axes, panel) in enumerate(zip(flat, maps, strict=False)):
        values = panel.values.detach().double().cpu().numpy()
        image = axes.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
        axes.set_title(layout.titles[i], fontsize=SIZE, parse_math=False)
        lowest, leftmost = i + layout.across >= len(maps), i % layout.across == 0
        _name_cells(axes, layout, lowest=lowest, leftmost=leftmost)
        axes.set_xlabel(x_name if lowest else "", fontsize=SIZE, parse_math=False)
        axes.set_ylabel(y_name if leftmost else "", fontsize=SIZE, parse_math=False)
        axes.spines[:].set_visible(False)
        _frames(axes, panel.framed)
    for axes in flat[len(maps) :]:
        axes.set_visible(False)
    # 2) the colour bar, with an arrow at an end that values pass
    bar = figure.colorbar(image, ax=flat[: len(maps)], extend=_extend(maps, low, high), pad=0.02, aspect=25)
    bar.set_ticks(ticks := _ticks(low, high, log=log), labels=[number(tick, 2) for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=SMALL, length=2)
    bar.set_label(label(quantity, layout.tall * layout.down), fontsize=SIZE, parse_math=False)
    bar.outline.set_visible(False)
    headed(figure, title)
    return figure


@dataclass(frozen=True)
class _Layout:
    """Sizes in inches, and texts that fit them."""

    across: int  # panels side by side
    down: int  # lines of panels
    tall: float  # of one panel
    width: float  # of the figure
    height: float
    titles: list[str]
    rows: list[str]
    columns: list[str]
    shown: range  # the columns that are named
    upright: bool  # whether names of columns stand upright


def _layout(titles: Sequence[str], rows: Sequence[str], columns: Sequence[str], y_name: str, title: str) -> _Layout:
    """Panels wide enough for their columns, at most A_LINE in a line, with room for every text.

    - `titles`: of the panels. `rows`, `columns`: names along a panel.
    - `y_name`: of the y axis, may be "". `title`: of the figure, may be "".
    """
    across = min(len(titles), A_LINE)
    down = -(-len(titles) // across)
    names, heads = [label(row, LABEL) for row in rows], [label(column, LABEL, SMALL) for column in columns]
    upright = not all(head.isdecimal() for head in heads)
    wide = max(PANEL if len(titles) > 1 else 1.6 * PANEL, (0.14 if upright else 0.055) * len(columns))
    step = 1 if upright else every(heads, wide)
    below = max(text_width(head, SMALL) for head in heads) / 72 if upright else 0.0
    margin = max(text_width(name, SIZE) for name in names) / 72 + (0.2 if y_name else 0.0)
    tall = max(1.25, ROW * len(rows))
    width = margin + 0.35 + across * (wide + 0.12) + 0.85
    wraps = [wrapped(each, wide, SIZE) for each in titles]
    above = 0.16 * max(text.count("\n") + 1 for text in wraps) + 0.25
    heading = 0.17 * (wrapped(title, width - 0.3, SIZE + 1).count("\n") + 2) if title else 0.1
    height = heading + 0.4 + below + down * (tall + above)
    return _Layout(across, down, tall, width, height, wraps, names, heads, range(0, len(columns), step), upright)


def _name_cells(axes: Any, layout: _Layout, *, lowest: bool, leftmost: bool) -> None:
    """Names of columns below the lowest panels, names of rows left of the leftmost."""
    turned = {"rotation": 90} if layout.upright else {}
    heads = [layout.columns[j] for j in layout.shown]
    axes.set_xticks(layout.shown, heads, fontsize=SMALL, parse_math=False, **turned)
    axes.set_yticks(range(len(layout.rows)), layout.rows, fontsize=SIZE, parse_math=False)
    axes.tick_params(length=2, labelbottom=lowest, left=leftmost, labelleft=leftmost)


def _extend(maps: Sequence[Panel], low: float, high: float) -> str:
    """Which ends of the colours are passed by a value, as matplotlib names it."""
    known = [panel.values[~panel.values.isnan()] for panel in maps]
    under = any(bool((values < low - 1e-9).any()) for values in known)
    over = any(bool((values > high + 1e-9).any()) for values in known)
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[under, over]


def _ticks(low: float, high: float, *, log: bool) -> list[float]:
    """`low`, `high`, and round values between them that are not close to either."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    place = math.log if log else float
    start, end = place(low), place(high)
    locator = LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)) if log else MaxNLocator(4)
    between = [float(tick) for tick in locator.tick_values(low, high) if low < tick < high]
    room = 0.12 * (end - start)
    return [low, *(tick for tick in between if start + room < place(tick) < end - room), high]


def _frames(axes: Any, cells: Sequence[tuple[int, int]]) -> None:
    from matplotlib.patches import Rectangle

    for row, column in cells:
        for colour, line in (("black", 2.4), ("white", 1.0)):  # seen on dark and on light cells
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=line))
