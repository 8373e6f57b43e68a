"""Heat maps: any table to a file, and panels of them side by side with one bar of colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from editkit.errors import EditkitError
from editkit.files import whole
from editkit.numbers import number
from editkit.plots.canvas import SIZE, SMALL, blank, every, headed, label, wrapped
from editkit.report.svg import text_width

ROW = 0.165  # inches
PANEL = 1.9  # inches, the least width of one
LABEL = 1.6  # inches, the widest name of a row
A_LINE = 3  # panels side by side


@dataclass(frozen=True)
class Panel:
    """One map: values [rows, columns], and cells (row, column) with a frame around them."""

    title: str
    values: Tensor
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
    """Maps of the same rows and columns in one scale of colours from `low` to `high`; the first row is on top.

    Every row is named. Columns that are numbers have as many as fit, others all of their names, upright. NaN is grey.
    """

    across = min(len(maps), A_LINE)
    down = -(-len(maps) // across)
    names, heads = [label(row, LABEL) for row in rows], [label(column, LABEL, SMALL) for column in columns]
    upright = not all(head.isdecimal() for head in heads)
    wide = max(PANEL if len(maps) > 1 else 1.6 * PANEL, (0.14 if upright else 0.055) * len(columns))
    step = 1 if upright else every(heads, wide)
    below = max(text_width(head, SMALL) for head in heads) / 72 if upright else 0.0
    margin = max(text_width(name, SIZE) for name in names) / 72 + (0.2 if y_name else 0.0)
    tall = max(1.25, ROW * len(rows))
    width = margin + 0.35 + across * (wide + 0.12) + 0.85
    titles = [wrapped(panel.title, wide, SIZE) for panel in maps]
    above = 0.16 * max(text.count("\n") + 1 for text in titles) + 0.25
    heading = 0.17 * (wrapped(title, width - 0.3, SIZE + 1).count("\n") + 2) if title else 0.1
    figure = blank(width, heading + 0.4 + below + down * (tall + above))
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    norm = (LogNorm if log else Normalize)(low, high)
    colours = colormaps["viridis"].with_extremes(bad="0.85")
    flat = [axes for line in figure.subplots(down, across, squeeze=False) for axes in line]
    shown = range(0, len(columns), step)
    image = None
    for i, (axes, panel) in enumerate(zip(flat, maps, strict=False)):
        values = panel.values.detach().double().cpu().numpy()
        image = axes.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
        axes.set_title(titles[i], fontsize=SIZE, parse_math=False)
        turned = {"rotation": 90} if upright else {}
        axes.set_xticks(shown, [heads[j] for j in shown], fontsize=SMALL, parse_math=False, **turned)
        axes.set_yticks(range(len(rows)), names, fontsize=SIZE, parse_math=False)
        lowest, leftmost = i + across >= len(maps), i % across == 0
        axes.tick_params(length=2, labelbottom=lowest, left=leftmost, labelleft=leftmost)
        axes.set_xlabel(x_name if lowest else "", fontsize=SIZE, parse_math=False)
        axes.set_ylabel(y_name if leftmost else "", fontsize=SIZE, parse_math=False)
        axes.spines[:].set_visible(False)
        _frames(axes, panel.framed)
    for axes in flat[len(maps) :]:
        axes.set_visible(False)
    found = [panel.values[~panel.values.isnan()] for panel in maps]
    under = any(bool((values < low - 1e-9).any()) for values in found)
    over = any(bool((values > high + 1e-9).any()) for values in found)
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[under, over]
    bar = figure.colorbar(image, ax=flat[: len(maps)], extend=extend, pad=0.02, aspect=25)
    bar.set_ticks(ticks := _ticks(low, high, log=log), labels=[number(tick, 2) for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=SMALL, length=2)
    bar.set_label(label(quantity, tall * down), fontsize=SIZE, parse_math=False)
    bar.outline.set_visible(False)
    headed(figure, title)
    return figure


def _ticks(low: float, high: float, *, log: bool) -> list[float]:
    """Both ends, and round values between that are not close to them."""
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


def heat_map(
    values: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    path: str | Path,
    *,
    title: str = "",
    label: str = "",
    log: bool = False,
) -> Path:
    """Draw `values` [rows, columns], the first row on top, and write the picture to `path` (.png, .svg, .pdf).

    `label` names the colours' quantity and unit; `log` spaces them by ratio. Raises EditkitError without
    matplotlib, or when there are not as many names as values; OutputError when `path` cannot be written.
    """
    path = Path(path)
    if list(values.shape) != [len(rows), len(columns)] or not values.numel():
        raise EditkitError(
            f"heat_map: values of {list(values.shape)}, {len(rows)} row and {len(columns)} column names."
        )
    if log and not (values > 0).all():
        raise EditkitError(
            f"heat_map: a log scale was asked for and the least value is {values.min():g}: leave log out."
        )
    figure = blank(2.6 + 0.42 * len(columns), 1.6 + 0.28 * len(rows))
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator

    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix[1:] not in kinds:
        raise EditkitError(f"heat_map cannot write '{path.name}': end the name in one of .{', .'.join(sorted(kinds))}.")
    axes = figure.add_subplot()
    image = axes.imshow(
        values.detach().float().cpu().numpy(), aspect="auto", cmap="viridis", norm=LogNorm() if log else None
    )
    # A token may hold a $, which is not mathematics.
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    axes.set_title(title, parse_math=False)
    ticks: dict[str, Any] = {"ticks": LogLocator(subs=(1, 2, 5)), "format": "%g"} if log else {}
    figure.colorbar(image, ax=axes, label=label, **ticks).ax.minorticks_off()
    with whole(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])
    return path
