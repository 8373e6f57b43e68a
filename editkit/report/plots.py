"""Pictures, drawn with matplotlib (the extra `plots`) straight to a file: no window, no global state."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from editkit.errors import EditkitError
from editkit.files import whole


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
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError as error:
        raise EditkitError('Pictures need matplotlib, which is not installed: pip install "editkit[plots]"') from error
    path = Path(path)
    if list(values.shape) != [len(rows), len(columns)] or not values.numel():
        raise EditkitError(
            f"heat_map: values of {list(values.shape)}, {len(rows)} row and {len(columns)} column names."
        )
    if log and not (values > 0).all():
        raise EditkitError(
            f"heat_map: a log scale was asked for and the least value is {values.min():g}: leave log out."
        )
    figure = Figure(figsize=(2.6 + 0.42 * len(columns), 1.6 + 0.28 * len(rows)), dpi=120, layout="constrained")
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
