"""A heat map as SVG: a row a token, a column a block, each value in its colour and in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from editkit.numbers import number
from editkit.report.svg import WIDTH, Chart, Drawing, clip, text_width

ROW_NAME = 130  # units: the widest name of a row
RIGHT = WIDTH - 6  # where the cells end
TOP = 46.0  # where they begin, below the colour bar


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
    """A table of values in the colours of cividis, the first row on top.

    Pointing at a cell shows its value; moving to a row by keyboard shows the row's greatest value.

    - `title`, `note`: printed above and below the chart.
    - `values`: [rows, columns]; None and NaN have no cell.
    - `rows`, `columns`: their names, one each or more.
    - `x_name`: what runs along x. `quantity`: what the values are, with the unit.
    - `starred`: numbers of rows whose names get a *.
    - `low`, `high`: the values where colours begin and end. If None, the least and the greatest value.
    """
    # 1) layout
    known = [v for line in values for v in line if v is not None and math.isfinite(v)] or [0.0]
    low, high = min(known) if low is None else low, max(known) if high is None else high
    names = [f"{name}*" if i in starred else name for i, name in enumerate(rows)]
    grid = _layout(names, columns)
    description = f"{title}: {quantity} by row and {x_name}, {number(low)} to {number(high)}"
    drawing = Drawing(grid.bottom + grid.below + 24, description)
    drawing.role = "group"  # its rows can be reached by keyboard
    # 2) marks
    readout = _colour_bar(drawing, quantity, low, high)
    for i, line in enumerate(values):
        cells = [(j, v, _colour(v, low, high)) for j, v in enumerate(line) if v is not None and math.isfinite(v)]
        _draw_row(drawing, grid, _Row(rows[i], names[i], TOP + i * grid.tall, cells), columns, x_name, readout)
    _draw_columns(drawing, grid, columns)
    drawing.x_name(grid.left + grid.wide * len(columns) / 2, grid.bottom + grid.below + 16, x_name)
    # 3) the numbers as a table
    table: list[tuple[object, ...]] = [(name, *line) for name, line in zip(rows, values, strict=True)]
    return Chart(title, drawing.svg(), ("", *columns), table, note)


@dataclass(frozen=True)
class _Grid:
    """Where the cells stand, and how their columns are named."""

    left: float
    bottom: float
    wide: float  # of a cell
    tall: float
    tilted: bool  # whether names of columns are turned
    every: int  # each so many-th column is named
    below: float  # height of the names of columns


@dataclass(frozen=True)
class _Row:
    name: str
    starred: str  # the name, with a * where it has one
    y: float
    cells: list[tuple[int, float, str]]  # (column, value, colour)


def _layout(names: Sequence[str], columns: Sequence[str]) -> _Grid:
    """Room for the names of rows at the left and of columns below; names that would not fit side by side are turned."""
    left = max(text_width(clip(name, ROW_NAME)) for name in names) + 8
    wide = (RIGHT - left) / len(columns)
    tall = max(15.0, min(24.0, 280 / len(names)))
    widest = max(map(text_width, columns)) + 4
    tilted = widest > 2 * wide and wide >= 12
    every = 1 if tilted else max(1, math.ceil(widest / wide))
    below = min(widest, 70) if tilted else 12
    return _Grid(left, TOP + tall * len(names), wide, tall, tilted, every, below)


def _colour_bar(drawing: Drawing, quantity: str, low: float, high: float) -> float:
    """Draw the bar of colours with its ends; returns the width left beside it, for values pointed at."""
    drawing.text(2, 11, clip(quantity, WIDTH - 4), "muted")
    for i in range(60):
        drawing.box(40 + i * 2, 18, 2.4, 10, fill=_cividis(i / 59))
    drawing.text(36, 27, number(low, 3), "muted", anchor="end")
    drawing.text(166, 27, number(high, 3), "muted")
    return WIDTH - 2 - (172 + text_width(number(high, 3)))


def _draw_row(drawing: Drawing, grid: _Grid, row: _Row, columns: Sequence[str], x_name: str, readout: float) -> None:
    """The cells of one row; a page shows the text of class "readout" of the cell or row that is active.

    - `drawing`, `grid`: where to draw. `row`: what to draw.
    - `columns`, `x_name`: names of the columns and of what runs along x.
    - `readout`: units, the width of the text.
    """

    def read_out(text: str) -> None:
        drawing.text(WIDTH - 2, 27, clip(text, readout), "readout", anchor="end")

    most = max(row.cells, key=lambda cell: cell[1], default=None)
    greatest = f"most {number(most[1], 3)}, {x_name} {columns[most[0]]}" if most else "no value"
    drawing.begin("row", f"{row.starred}: {greatest}")
    drawing.text(grid.left - 6, row.y + grid.tall / 2 + 4, clip(row.starred, ROW_NAME), anchor="end", tip=row.starred)
    for j, value, colour in row.cells:
        place = f"{x_name} {columns[j]}"
        drawing.begin("cell")
        drawing.box(grid.left + j * grid.wide, row.y, grid.wide + 0.3, grid.tall + 0.3,
                    tip=f"{row.name}, {place}: {number(value)}", fill=colour)  # fmt: skip
        read_out(f"{clip(row.name, 70)}, {place}: {number(value, 3)}")
        drawing.end()
    drawing.box(grid.left, row.y, RIGHT - grid.left, grid.tall, "edge")
    read_out(f"{clip(row.starred, 50)}: {greatest}")
    drawing.end()


def _draw_columns(drawing: Drawing, grid: _Grid, columns: Sequence[str]) -> None:
    for j in range(0, len(columns), grid.every):
        x, name = grid.left + (j + 0.5) * grid.wide, columns[j]
        if grid.tilted:
            drawing.text(x + 3, grid.bottom + 10, clip(name, 66), "muted", anchor="end", tilt=-55, tip=name)
        else:
            room = grid.wide * grid.every
            drawing.text(x, grid.bottom + 13, clip(name, room), "muted", anchor="middle", tip=name)


def _colour(value: float, low: float, high: float) -> str:
    return _cividis((value - low) / (high - low) if high > low else 0.5)


# Cividis at eighths (Nunez, Anderton and Renslow 2018): even in lightness, the same to colour-blind eyes.
_CIVIDIS = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#fee838")


def _cividis(part: float) -> str:
    """The colour at `part` of the scale, 0 to 1."""
    place = min(max(part, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    i = min(int(place), len(_CIVIDIS) - 2)
    a, b = (tuple(int(_CIVIDIS[k][c : c + 2], 16) for c in (1, 3, 5)) for k in (i, i + 1))
    return "#" + "".join(f"{round(u + (v - u) * (place - i)):02x}" for u, v in zip(a, b, strict=True))
