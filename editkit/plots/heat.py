"""Any table as a heat map in one file."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.errors import EditkitError
from editkit.files import whole
from editkit.plots import register
from editkit.plots.shared.canvas import blank

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["heat_map"]


def heat_map(
    values: "Tensor",
    rows: Sequence[str],
    columns: Sequence[str],
    path: str | Path,
    *,
    title: str = "",
    label: str = "",
    log: bool = False,
) -> Path:
    """Draw a table as a heat map and write it to one file; returns `path`.

    - `values`: [rows, columns], the first row on top. `rows`, `columns`: as many names.
    - `path`: the file, whose suffix (.png, .svg, .pdf) chooses the format.
    - `title`: above the map. `label`: what the values are, with the unit. `log`: colours by ratio.

    Raises EditkitError without matplotlib, for a wrong number of names or another suffix; OutputError when `path`
    cannot be written.
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
    # 1) a figure as large as its table
    figure = blank(2.6 + 0.42 * len(columns), 1.6 + 0.28 * len(rows))
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator

    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix[1:] not in kinds:
        raise EditkitError(f"heat_map cannot write '{path.name}': end the name in one of .{', .'.join(sorted(kinds))}.")
    # 2) cells and their names
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


register("heat_map", heat_map)
