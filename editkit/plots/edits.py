"""Pictures of edits from inside (editkit.lenses, edits.spectra, cases.parquet)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.errors import EditkitError
from editkit.numbers import finite
from editkit.plots.canvas import COLOURS, SIZE, blank, done, every, headed, label, legend, plain, series, token
from editkit.plots.heat import Panel, panels
from editkit.report import aggregate, glossary
from editkit.report.svg import text_width

if TYPE_CHECKING:
    from editkit.lenses import Attention, Lens, StreamChange


def lens_lines(
    before: "Lens", after: "Lens | None" = None, *, title: str | None = None, path: str | Path | None = None
) -> Any:
    """P(word) at the prompt's last token over depth, a panel before and, where given, one after an edit.

    Depth 0 is the embedding, depth i the stream behind block i − 1. Raises EditkitError when the two looks are not of
    the same prompt, words and depth.
    """
    from pandas import concat

    looks = {"before": before} | ({"after": after} if after is not None else {})
    if after is not None and (after.words, after.text, len(after.said)) != (
        before.words,
        before.text,
        len(before.said),
    ):
        raise EditkitError("The two lenses are of different prompts, words or depths: look twice with the same ones.")
    wide = 3.4
    figure = blank(wide * len(looks), 3.0)
    grid = figure.subplots(1, len(looks), squeeze=False, sharey=True)[0]
    handles: list[Any] = []
    for axes, (when, look) in zip(grid, looks.items(), strict=True):
        plain(axes)
        for w in range(len(look.words)):
            (line,) = axes.plot(range(len(look.said)), look.probability[:, w].tolist(), **series(w))
            handles += [line] if axes is grid[0] else []
        depths = [str(i) for i in range(len(look.said))]
        shown = range(0, len(depths), every(depths, wide - 0.8))
        axes.set_xticks(shown, [depths[i] for i in shown])
        axes.set_xlabel("depth (blocks passed)", fontsize=SIZE)
        axes.set_ylim(-0.03, 1.03)
        said = f"{when}: says {token(look.said[-1], 1.2)}" if len(looks) > 1 else f"says {token(look.said[-1], 1.2)}"
        axes.set_title(label(said, wide - 0.5), fontsize=SIZE + 1, parse_math=False)
    grid[0].set_ylabel("P(word), first token", fontsize=SIZE)
    legend(figure, handles, [f"“{word.strip()}”" for word in before.words])
    headed(figure, f"Logit lens: “{before.text}”" if title is None else title)
    frames = [look.to_frame().assign(when=when) for when, look in looks.items()]
    return done(figure, concat(frames, ignore_index=True), path)


def attention_map(attention: "Attention", *, title: str | None = None, path: str | Path | None = None) -> Any:
    """The share of the last token's attention that goes to the subject, by head and block."""
    from pandas import DataFrame

    share = attention.to_subject  # [blocks, heads]
    first, last = attention.subject
    subject = "".join(attention.tokens[first : last + 1]).strip()
    if title is None:
        title = f"Attention of the last token to “{subject}”"
    figure = panels(
        [Panel("", share.T)],
        [str(head) for head in range(share.shape[1])],
        [str(block) for block in range(share.shape[0])],
        x_name="block",
        y_name="head",
        quantity="share of attention",
        low=0.0,
        high=max(float(share.max()), 1e-6),
        title=title,
    )
    rows = [(b, h, share[b, h].item()) for b in range(share.shape[0]) for h in range(share.shape[1])]
    return done(figure, DataFrame(rows, columns=["block", "head", "attention_to_subject"]), path)


def stream_map(
    change: "StreamChange", *, relative: bool = True, title: str | None = None, path: str | Path | None = None
) -> Any:
    """How far an edit moves the residual stream, by token and block; `relative`: over the stream's own norm."""
    from pandas import DataFrame

    table = change.relative if relative else change.norm  # [blocks, tokens]
    quantity = "‖Δh‖ / ‖h‖" if relative else "‖Δh‖"
    figure = panels(
        [Panel("", table.T)],
        [token(t, 1.5) for t in change.tokens],
        [str(block) for block in range(table.shape[0])],
        x_name="block",
        quantity=quantity,
        low=0.0,
        high=max(float(table.max()), 1e-6),
        title="Change of the residual stream by the edit" if title is None else title,
    )
    rows = [
        (t, text, b, change.norm[b, t].item(), change.relative[b, t].item())
        for t, text in enumerate(change.tokens)
        for b in range(table.shape[0])
    ]
    return done(figure, DataFrame(rows, columns=["position", "token", "block", "norm", "relative"]), path)


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
    """Predicted against measured side effects, a point a prompt, with Spearman's ρ and its 95 % interval in the title.

    `edits`: the edit that each point belongs to; the interval is then over edits. Points of which a value is not finite
    are left out and counted. `log`: both axes by ratio, for values that are all positive. Raises EditkitError for
    lists of different length, fewer than three points, or `log` with a value that is not positive.
    """
    from pandas import DataFrame

    from editkit.metrics.correlation import rank_correlation

    x, y = [float(v) for v in predicted], [float(v) for v in measured]
    owners = list(range(len(x))) if edits is None else list(edits)
    if not len(x) == len(y) == len(owners):
        raise EditkitError(
            f"{len(x)} predicted and {len(y)} measured values of {len(owners)} edits: give as many of each."
        )
    kept = [i for i in range(len(x)) if math.isfinite(x[i]) and math.isfinite(y[i])]
    if log and any(min(x[i], y[i]) <= 0 for i in kept):
        raise EditkitError("A log scale was asked for and a value is not positive: leave log out.")
    rho, low, high = rank_correlation([x[i] for i in kept], [y[i] for i in kept], [owners[i] for i in kept])
    if title is None:
        left = f" ({len(x) - len(kept)} without a value left out)" if len(kept) < len(x) else ""
        title = f"Spearman's ρ = {rho:.2f} [{low:.2f}, {high:.2f}], {len(kept)} prompts"
        title += f" of {len({owners[i] for i in kept})} edits" if edits is not None else ""
        title += left
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
    """Singular values of each ΔW, largest first, against the weight's own, by ratio.

    `spectra`: as in a record's edit.spectra, each with parameter, singular_values and, where known,
    base_singular_values. Those below a billionth of the largest are rounding and are not drawn. Raises EditkitError
    for none.
    """
    from pandas import DataFrame

    if not spectra:
        raise EditkitError("No spectrum was given: the edit changes no weight, or its record holds none.")
    across = min(3, len(spectra))
    down = -(-len(spectra) // across)
    figure = blank(max(3.4, 2.6 * across), 2.3 * down + 0.8)
    flat = [axes for line in figure.subplots(down, across, squeeze=False, sharey=True) for axes in line]
    rows: list[tuple[Any, ...]] = []
    handles: dict[str, Any] = {}
    for axes, found in zip(flat, spectra, strict=False):
        plain(axes)
        axes.set_yscale("log")
        named = {"weight W": found.get("base_singular_values") or [], "update ΔW": found["singular_values"]}
        top = max((max(values, default=0.0) for values in named.values()), default=0.0)
        most = 1
        for i, (name, values) in enumerate(named.items()):
            rows += [(found["parameter"], name, n, value) for n, value in enumerate(values, 1)]
            shown = [(n, value) for n, value in enumerate(values, 1) if value > 1e-9 * top]
            if shown:
                most = max(most, shown[-1][0])
                style = series(i) | ({"marker": ""} if len(shown) > 60 else {})
                (handles[name],) = axes.plot(*zip(*shown, strict=True), **style)
        axes.set_xlim(0.5 if most < 10 else 0, most + (0.5 if most < 10 else 0.02 * most))
        axes.locator_params(axis="x", nbins=4, integer=True)
        axes.minorticks_off()
        axes.set_title(label(found["parameter"], 2.2), fontsize=SIZE, parse_math=False)
        axes.set_xlabel("number of the singular value", fontsize=SIZE)
    for axes in flat[len(spectra) :]:
        axes.set_visible(False)
    for i in range(0, len(flat), across):
        flat[i].set_ylabel("singular value", fontsize=SIZE)
    if handles:
        legend(figure, list(handles.values()), list(handles))
    headed(figure, title)
    return done(figure, DataFrame(rows, columns=["parameter", "of", "number", "singular_value"]), path)


def probe_bars(rows: Any, *, title: str = "Probability of the answers", path: str | Path | None = None) -> Any:
    """Mean probability of the new and of the old answer before and after the edit, by kind of probe.

    `rows`: cases.parquet, as a DataFrame or a list of its rows. Whiskers are 95 % bootstrap intervals over the kind's
    cases. Raises EditkitError when no probe has a probability.
    """
    from pandas import DataFrame

    listed = rows.to_dict("records") if isinstance(rows, DataFrame) else [dict(row) for row in rows]
    kinds = aggregate.by(listed, "kind")
    ordered = [k for k in glossary.KINDS if k in kinds] + [k for k in kinds if k not in glossary.KINDS]
    found = []
    for which in ("new", "true"):
        for kind in ordered:
            for when in ("before", "after"):
                if average := _mean(kinds[kind], f"probability_{which}_{when}"):
                    found.append((which, kind, when, average.mean, average.low, average.high, average.n))
    if not found:
        raise EditkitError("No probe has a probability: give the rows of a run's cases.parquet.")
    frame = DataFrame(found, columns=["answer", "kind", "when", "mean", "low", "high", "cases"])
    ordered = [kind for kind in ordered if kind in set(frame.kind)]
    names = [label(glossary.kind(kind), 2.6) for kind in ordered]
    margin = max(text_width(name, SIZE) for name in names) / 72
    figure = blank(margin + 4.9, 0.42 * len(ordered) + 1.35)
    both = figure.subplots(1, 2, sharey=True)
    for axes, (which, called) in zip(both, (("new", "new answer"), ("true", "old answer")), strict=True):
        plain(axes)
        axes.grid(False, axis="y")
        handles = []
        for side, (when, colour, hatch) in enumerate((("before", "0.75", "///"), ("after", COLOURS[0], ""))):
            some = frame[(frame.answer == which) & (frame.when == when)]
            places = [ordered.index(kind) + (side - 0.5) * 0.38 for kind in some.kind]
            around = [(some["mean"] - some.low).clip(lower=0), (some.high - some["mean"]).clip(lower=0)]
            edge = {"edgecolor": "0.45" if hatch else colour, "hatch": hatch, "linewidth": 0.6}
            handles.append(axes.barh(places, some["mean"], 0.36, color=colour, **edge))
            axes.errorbar(some["mean"], places, xerr=around, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_xlabel("mean probability", fontsize=SIZE)
        axes.set_title(called, fontsize=SIZE + 1)
    both[0].set_yticks(range(len(ordered)), names, fontsize=SIZE, parse_math=False)
    both[0].set_ylim(len(ordered) - 0.5, -0.5)
    legend(figure, handles, ["before", "after"])
    headed(figure, title)
    return done(figure, frame, path)


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> Any:
    """Over the cases of the mean over a case's probes."""
    cases: dict[str, list[float]] = {}
    for i, row in enumerate(rows):
        if (value := finite(row.get(name))) is not None:
            cases.setdefault(str(row.get("case", i)), []).append(value)
    return aggregate.average(sum(values) / len(values) for values in cases.values()) if cases else None
