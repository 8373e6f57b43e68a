"""Plots of activations and gradients by module (editkit.activations.probes, nethook's GradientFlow)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.errors import EditkitError
from editkit.plots import register
from editkit.plots.shared.canvas import SIZE, SMALL, blank, done, headed, label, legend, plain, series, token
from editkit.plots.shared.panels import Panel, panels
from editkit.report.svg import text_width

if TYPE_CHECKING:
    from pandas import DataFrame

    from editkit.activations.probes import Norms

__all__ = ["gradient_lines", "norm_map"]

FLOWS = {"forward": "outputs", "backward": "gradients at outputs", "parameter": "gradients of parameters"}


def norm_map(
    norms: "Norms", *, title: str = "L2 norm of the output", log: bool = True, path: str | Path | None = None
) -> Any:
    """Norms of activations: a row for each token, a column for each module.

    `norms`: from `activations.probes.activation_norms`. `log`: colours by ratio. Raises EditkitError if `log` is true
    and a norm is 0.
    """
    from pandas import DataFrame

    values = norms.values.double()  # [sites, tokens]
    if log and not (values > 0).all():
        raise EditkitError(f"A log scale was asked for and the least norm is {values.min():g}: give log=False.")
    figure = panels(
        [Panel("", values.T)],
        [token(t, 1.5) for t in norms.tokens],
        list(norms.sites),
        x_name="",
        quantity="L2 norm" + (", log scale" if log else ""),
        low=float(values.min()) if log else 0.0,
        high=max(float(values.max()), float(values.min()) * (1 + 1e-6) + 1e-12),
        title=title,
        log=log,
    )
    rows = [
        (site, t, text, norms.values[s, t].item())
        for s, site in enumerate(norms.sites)
        for t, text in enumerate(norms.tokens)
    ]
    return done(figure, DataFrame(rows, columns=["site", "position", "token", "norm"]), path)


def gradient_lines(
    table: Sequence[Mapping[str, Any]], *, title: str = "Flow through the modules", path: str | Path | None = None
) -> Any:
    """Root mean square of outputs, gradients and parameters' gradients by module: GradientFlow's `table()`.

    A line for each kind shows the mean over calls, its band the least and the largest call; a cross marks a fault.
    Modules are in the order of the forward pass. Raises EditkitError for an empty table.
    """
    from pandas import DataFrame

    rows = [dict(row) for row in table]
    if not rows:
        raise EditkitError("GradientFlow has seen nothing yet: run a step with it first.")
    frame: Any = DataFrame(rows).assign(faults=[" ".join(row["faults"]) for row in rows])
    kinds = [k for k in FLOWS if k in set(frame.kind)] + [k for k in frame.kind.unique() if k not in FLOWS]
    sites = list(dict.fromkeys(row["site"] for kind in kinds for row in rows if row["kind"] == kind))
    # 1) layout: a row for each module, on a logarithmic x axis
    shown = [label(site, 2.4, SMALL) for site in sites]
    margin = max(text_width(name, SMALL) for name in shown) / 72
    figure = blank(margin + 3.8, max(1.2, 0.15 * len(sites)) + 1.25)
    axes = figure.subplots()
    plain(axes)
    axes.set_xscale("log")
    # 2) a line with its band for each kind, and crosses at the right edge
    handles = [_flow_line(axes, frame[frame.kind == kind], sites, i) for i, kind in enumerate(kinds)]
    bad = [sites.index(site) for site, faults in zip(frame.site, frame.faults, strict=True) if faults]
    if bad:
        ends = axes.get_xlim()
        handles += axes.plot([ends[1]] * len(bad), bad, "x", color="black", markersize=5, clip_on=False)
        axes.set_xlim(ends)
    # 3) names
    axes.set_yticks(range(len(sites)), shown, fontsize=SMALL, parse_math=False)
    axes.set_ylim(len(sites) - 0.5, -0.5)
    axes.minorticks_off()
    axes.set_xlabel("root mean square", fontsize=SIZE)
    legend(figure, handles, [str(FLOWS.get(kind, kind)) for kind in kinds] + (["fault"] if bad else []))
    headed(figure, title)
    return done(figure, frame, path)


def _flow_line(axes: Any, rows: "DataFrame", sites: Sequence[str], number_of: int) -> Any:
    """One kind's root mean squares, in the `number_of`-th style; returns the line for the legend."""
    places = [sites.index(site) for site in rows.site]
    good = [0 < value < float("inf") for value in rows.rms_mean]  # the others have no place on a log axis
    low, high = rows.rms_min.where(good), rows.rms_max.where(good)
    style = series(number_of)
    (line,) = axes.plot(rows.rms_mean.where(good), places, **style)
    axes.fill_betweenx(places, low, high, color=style["color"], alpha=0.2, linewidth=0)
    return line


register("gradient_lines", gradient_lines)
register("norm_map", norm_map)
