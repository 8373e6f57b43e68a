"""Plots of what edits do: side effects, singular values, and probabilities from a run's cases.parquet."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.data.kinds import HEADINGS, heading
from editkit.errors import EditkitError
from editkit.numbers import finite
from editkit.plots import register
from editkit.plots.shared.canvas import COLOURS, SIZE, blank, done, headed, label, legend, plain, series
from editkit.report import aggregate
from editkit.report.svg import text_width

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["probe_bars", "side_effect_scatter", "spectra_lines"]


def side_effect_scatter(
    predicted: Iterable[float],
    measured: Iterable[float],
    edits: Sequence[Any] | None = None,
    *,
    predicted_name: str = "predicted change",
    measured_name: str = "measured change",
    log: bool = False,
    title: str | None = None,
    path: str | Path | None = None,
) -> Any:
    """Predicted against measured side effects, one point for each prompt, with Spearman's ρ and its 95 % interval.

    - `predicted`, `measured`: [prompts]. Points with a value that is not finite are left out and counted in the title.
    - `edits`: [prompts], the edit that each prompt belongs to; the interval is then over edits, else over prompts.
    - `predicted_name`, `measured_name`: of the axes, with the unit.
    - `log`: both axes logarithmic, for positive values.
    - `title`: if None, ρ, its interval and the counts. `path`: where to write the figure.

    Raises EditkitError for lists of different length, fewer than three points, or `log` with a value that is not
    positive.
    """
    from pandas import DataFrame

    from editkit.metrics.correlation import rank_correlation

    x, y = [float(v) for v in predicted], [float(v) for v in measured]
    owners = list(range(len(x))) if edits is None else list(edits)
    if not len(x) == len(y) == len(owners):
        raise EditkitError(
            f"{len(x)} predicted and {len(y)} measured values of {len(owners)} edits: give as many of each."
        )
    # 1) the points that have both values, and their correlation
    kept = [i for i in range(len(x)) if math.isfinite(x[i]) and math.isfinite(y[i])]
    if log and any(min(x[i], y[i]) <= 0 for i in kept):
        raise EditkitError("A log scale was asked for and a value is not positive: leave log out.")
    rho, low, high = rank_correlation([x[i] for i in kept], [y[i] for i in kept], [owners[i] for i in kept])
    if title is None:
        left = f" ({len(x) - len(kept)} without a value left out)" if len(kept) < len(x) else ""
        title = f"Spearman's ρ = {rho:.2f} [{low:.2f}, {high:.2f}], {len(kept)} prompts"
        title += f" of {len({owners[i] for i in kept})} edits" if edits is not None else ""
        title += left
    # 2) the figure
    figure = blank(3.8, 3.6)
    axes = figure.subplots()
    plain(axes)
    axes.scatter([x[i] for i in kept], [y[i] for i in kept], s=9, color=COLOURS[0], alpha=0.45, linewidths=0,
                 rasterized=len(kept) > 5000)  # fmt: skip
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.minorticks_off()
    else:
        axes.locator_params(nbins=5)
    axes.set_xlabel(label(predicted_name, 3.0), fontsize=SIZE, parse_math=False)
    axes.set_ylabel(label(measured_name, 2.6), fontsize=SIZE, parse_math=False)
    headed(figure, title)
    return done(figure, DataFrame({"edit": owners, "predicted": x, "measured": y}), path)


def spectra_lines(
    spectra: Sequence[Mapping[str, Any]], *, title: str = "Singular values", path: str | Path | None = None
) -> Any:
    """Singular values of each ΔW and of its weight on a log axis, largest first, a panel for each weight.

    `spectra`: a record's edit.spectra, each with parameter, singular_values and, where known, base_singular_values.
    Values below a billionth of the largest are rounding and are not drawn. Raises EditkitError if there is none.
    """
    from pandas import DataFrame

    if not spectra:
        raise EditkitError("No spectrum was given: the edit changes no weight, or its record holds none.")
    # 1) layout: up to three panels in a line
    across = min(3, len(spectra))
    down = -(-len(spectra) // across)
    figure = blank(max(3.4, 2.6 * across), 2.3 * down + 0.8)
    flat = [axes for line in figure.subplots(down, across, squeeze=False, sharey=True) for axes in line]
    # 2) panels
    handles: dict[str, Any] = {}
    for axes, one in zip(flat, spectra, strict=False):
        handles |= _spectrum_lines(axes, _both_spectra(one))
        axes.set_title(label(one["parameter"], 2.2), fontsize=SIZE, parse_math=False)
        axes.set_xlabel("number of the singular value", fontsize=SIZE)
    for axes in flat[len(spectra) :]:
        axes.set_visible(False)
    for i in range(0, len(flat), across):
        flat[i].set_ylabel("singular value", fontsize=SIZE)
    # 3) legend, title, numbers
    if handles:
        legend(figure, list(handles.values()), list(handles))
    headed(figure, title)
    rows = [
        (one["parameter"], name, n, value)
        for one in spectra
        for name, values in _both_spectra(one).items()
        for n, value in enumerate(values, 1)
    ]
    return done(figure, DataFrame(rows, columns=["parameter", "of", "number", "singular_value"]), path)


def _both_spectra(one: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    return {"weight W": one.get("base_singular_values") or [], "update ΔW": one["singular_values"]}


def _spectrum_lines(axes: Any, named: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """A line for each spectrum of one weight; returns the lines by name, for the legend."""
    plain(axes)
    axes.set_yscale("log")
    handles = {}
    top = max((max(values, default=0.0) for values in named.values()), default=0.0)
    most = 1  # the number of the last value drawn
    for i, (name, values) in enumerate(named.items()):
        points = [(n, value) for n, value in enumerate(values, 1) if value > 1e-9 * top]
        if points:
            most = max(most, points[-1][0])
            style = series(i) | ({"marker": ""} if len(points) > 60 else {})
            (handles[name],) = axes.plot(*zip(*points, strict=True), **style)
    axes.set_xlim(0.5 if most < 10 else 0, most + (0.5 if most < 10 else 0.02 * most))
    axes.locator_params(axis="x", nbins=4, integer=True)
    axes.minorticks_off()
    return handles


def probe_bars(rows: Any, *, title: str = "Probability of the answers", path: str | Path | None = None) -> Any:
    """Mean probability of the new and of the old answer before and after an edit, by kind of prompt.

    `rows`: a run's cases.parquet, as a DataFrame or a list of dicts. Whiskers are 95 % bootstrap intervals over cases.
    Raises EditkitError when no row has a probability.
    """
    from pandas import DataFrame

    # 1) means, in the order of the headings
    listed = rows.to_dict("records") if isinstance(rows, DataFrame) else [dict(row) for row in rows]
    by_kind = aggregate.by(listed, "kind")
    ordered = [k for k in HEADINGS if k in by_kind] + [k for k in by_kind if k not in HEADINGS]
    means = []
    for which in ("new", "true"):
        for kind in ordered:
            for when in ("before", "after"):
                if average := _mean(by_kind[kind], f"probability_{which}_{when}"):
                    means.append((which, kind, when, average.mean, average.low, average.high, average.n))
    if not means:
        raise EditkitError("No probe has a probability: give the rows of a run's cases.parquet.")
    frame: Any = DataFrame(means, columns=["answer", "kind", "when", "mean", "low", "high", "cases"])
    kinds = [kind for kind in ordered if kind in set(frame.kind)]
    # 2) layout: a row for each kind, a panel for each answer
    names = [label(heading(kind), 2.6) for kind in kinds]
    margin = max(text_width(name, SIZE) for name in names) / 72
    figure = blank(margin + 4.9, 0.42 * len(kinds) + 1.35)
    both = figure.subplots(1, 2, sharey=True)
    # 3) bars
    handles: list[Any] = []
    for axes, (which, called) in zip(both, (("new", "new answer"), ("true", "old answer")), strict=True):
        handles = _before_and_after_bars(axes, frame[frame.answer == which], kinds)
        axes.set_title(called, fontsize=SIZE + 1)
    both[0].set_yticks(range(len(kinds)), names, fontsize=SIZE, parse_math=False)
    both[0].set_ylim(len(kinds) - 0.5, -0.5)
    legend(figure, handles, ["before", "after"])
    headed(figure, title)
    return done(figure, frame, path)


def _before_and_after_bars(axes: Any, frame: "DataFrame", kinds: Sequence[str]) -> list[Any]:
    """Two bars with whiskers for each kind of prompt; returns those before and those after, for the legend."""
    plain(axes)
    axes.grid(False, axis="y")
    handles = []
    for side, (when, colour, hatch) in enumerate((("before", "0.75", "///"), ("after", COLOURS[0], ""))):
        rows = frame[frame.when == when]
        places = [kinds.index(kind) + (side - 0.5) * 0.38 for kind in rows.kind]
        around = [(rows["mean"] - rows.low).clip(lower=0), (rows.high - rows["mean"]).clip(lower=0)]
        edge = {"edgecolor": "0.45" if hatch else colour, "hatch": hatch, "linewidth": 0.6}
        handles.append(axes.barh(places, rows["mean"], 0.36, color=colour, **edge))
        axes.errorbar(rows["mean"], places, xerr=around, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_xlabel("mean probability", fontsize=SIZE)
    return handles


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> Any:
    """Mean over cases of a case's mean over its prompts, with its interval; None if no row has a value."""
    cases: dict[str, list[float]] = {}
    for i, row in enumerate(rows):
        if (value := finite(row.get(name))) is not None:
            cases.setdefault(str(row.get("case", i)), []).append(value)
    return aggregate.average(sum(values) / len(values) for values in cases.values()) if cases else None


register("probe_bars", probe_bars)
register("side_effect_scatter", side_effect_scatter)
register("spectra_lines", spectra_lines)
