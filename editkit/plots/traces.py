"""Plots of causal traces (editkit.tracing): of one prompt, and averaged over many facts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.errors import EditkitError
from editkit.numbers import number
from editkit.plots import register
from editkit.plots.shared.canvas import SIZE, blank, done, every, headed, label, legend, plain, series, token
from editkit.plots.shared.panels import Panel, panels
from editkit.tracing.files import place_kind

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor

    from editkit.tracing import AverageTrace, Proposal, Traced

__all__ = ["average_lines", "average_map", "trace_map"]

BOTH = ("last subject token", "last token")


def trace_map(
    traced: "Traced", kinds: Sequence[str] | None = None, *, title: str | None = None, path: str | Path | None = None
) -> Any:
    """P(answer) with one clean activation put back, by token and block (ROME's figure 1), a map for each kind.

    The first token is on top, the subject's tokens have a star. All maps have the same colours, which begin at the
    corrupted run's probability.

    - `traced`: from `editkit.trace`. `kinds`: of activation; if None, all that were traced.
    - `title`: if None, the answer with its clean and corrupted probability. `path`: where to write the figure.

    Raises EditkitError for a kind that was not traced.
    """
    kinds = _kinds(kinds, traced.probability)
    first, last = traced.subject
    names = [token(t, 1.5) + "*" * (first <= i <= last) for i, t in enumerate(traced.tokens)]
    blocks = _blocks(traced.probability[kinds[0]])
    high = max(float(traced.probability[kind].max()) for kind in kinds)
    if high <= traced.corrupted:  # nothing comes back
        high = max(traced.clean, traced.corrupted + 1e-6)
    answer = f"P({token(traced.answer, 1.2)})"
    if title is None:
        title = f"{answer} with one clean place put back; clean {number(traced.clean, 3)}, corrupted "
        title += number(traced.corrupted, 3)
    figure = panels(
        [Panel(place_kind(kind, traced.window), traced.probability[kind]) for kind in kinds],
        names,
        blocks,
        x_name="block",
        quantity=answer,
        low=traced.corrupted,
        high=high,
        title=title,
    )
    frame: Any = traced.to_frame()
    return done(figure, frame[frame.kind.isin(kinds)].reset_index(drop=True), path)


def average_map(
    average: "AverageTrace",
    kinds: Sequence[str] | None = None,
    *,
    proposal: "Proposal | None" = None,
    title: str | None = None,
    path: str | Path | None = None,
) -> Any:
    """The average indirect effect by kind of token and block (ROME's figure 2), a map for each kind of activation.

    - `average`: from `editkit.average_trace`. A kind of token that no prompt has is grey.
    - `kinds`: of activation; if None, all that were traced.
    - `proposal`: its blocks get a frame in the map of MLP outputs, at the last subject token.
    - `title`: if None, the number of facts and the total effect. `path`: where to write the figure.

    Raises EditkitError for a kind that was not traced.
    """
    kinds = _kinds(kinds, average.effect)
    frame: Any = average.to_frame()
    parts = list(dict.fromkeys(frame.part))
    means = {kind: average.mean(kind) for kind in kinds}
    known = [mean[~mean.isnan()] for mean in means.values()]
    high = max(float(values.max()) for values in known)
    low = min(0.0, *(float(values.min()) for values in known)) if len(known) > 1 else min(0.0, float(known[0].min()))
    row = parts.index(BOTH[0])
    framed = [(row, block) for block in proposal.layers] if proposal else []
    if title is None:
        title = f"Average indirect effect on P(answer), {len(average.texts)} facts; "
        title += f"the corruption takes {number(average.total_effect, 3)}"
        title += f"; framed: proposed, {_named(proposal.layers)}" if proposal and "mlp" in kinds else ""
    figure = panels(
        [Panel(place_kind(kind, average.window), means[kind], framed if kind == "mlp" else ()) for kind in kinds],
        parts,
        [str(block) for block in range(average.layers)],
        x_name="block",
        quantity="indirect effect",
        low=low,
        high=high if high > low else low + 1e-6,
        title=title,
    )
    return done(figure, frame[frame.kind.isin(kinds)].reset_index(drop=True), path)


def average_lines(
    average: "AverageTrace",
    kinds: Sequence[str] | None = None,
    *,
    parts: Sequence[str] = BOTH,
    proposal: "Proposal | None" = None,
    title: str | None = None,
    path: str | Path | None = None,
) -> Any:
    """The average indirect effect over blocks with 95 % bands (ROME's figure 3), a panel for each kind of token.

    - `average`: from `editkit.average_trace`.
    - `kinds`: of activation, a line each; if None, all that were traced.
    - `parts`: kinds of token, from tracing.PARTS. `proposal`: its blocks are shaded.
    - `title`: if None, the number of facts. `path`: where to write the figure.

    Raises EditkitError for a kind or part that was not traced.
    """
    kinds = _kinds(kinds, average.effect)
    table: Any = average.to_frame()
    if missing := [part for part in parts if part not in set(table.part)]:
        raise EditkitError(f"The trace has no part '{missing[0]}'. It has: {', '.join(table.part.unique())}.")
    frame = table[table.kind.isin(kinds) & table.part.isin(parts)].reset_index(drop=True)
    # 1) layout: up to three panels in a line
    across = min(3, len(parts))
    down = -(-len(parts) // across)
    wide = max(2.9, 6.75 / across)
    figure = blank(wide * across, 2.35 * down + 0.75)
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    flat = [axes for line in grid for axes in line]
    # 2) panels; all have the same lines, so the first gives the legend
    handles: list[Any] = []
    shade: Any = None
    for axes, part in zip(flat, parts, strict=False):
        plain(axes)
        axes.axhline(0, color="0.4", linewidth=0.8)
        if proposal is not None:
            begin, end = proposal.layers[0] - 0.5, proposal.layers[-1] + 0.5
            shade = axes.axvspan(begin, end, facecolor="0.88", edgecolor="0.78", hatch="///", linewidth=0)
        rows = frame[frame.part == part]
        drawn = [_effect_line(axes, rows[rows.kind == kind], i) for i, kind in enumerate(kinds)]
        handles = handles or drawn
        facts = int(rows.facts.max())
        about = part if facts == len(average.texts) else f"{part} ({facts} facts have one)"
        axes.set_title(label(about, wide - 0.6), fontsize=SIZE + 1)
        _block_axis(axes, average.layers, wide)
    for axes in flat[len(parts) :]:
        axes.set_visible(False)
    for line in grid:
        line[0].set_ylabel("indirect effect on P(answer)", fontsize=SIZE)
    # 3) legend and title
    names = [place_kind(kind, average.window) for kind in kinds]
    if proposal is not None:
        handles, names = [*handles, shade], [*names, f"proposed: {_named(proposal.layers)}"]
    legend(figure, handles, names)
    headed(figure, f"Average indirect effect, {len(average.texts)} facts, with 95 % bootstrap bands" if title is None
           else title)  # fmt: skip
    return done(figure, frame, path)


def _effect_line(axes: Any, rows: "DataFrame", number_of: int) -> Any:
    """One kind's effect over blocks with its band, in the `number_of`-th style; returns the line for the legend."""
    style = series(number_of)
    (line,) = axes.plot(rows.block, rows.effect, **style)
    axes.fill_between(rows.block, rows.low, rows.high, color=style["color"], alpha=0.2, linewidth=0)
    return line


def _block_axis(axes: Any, layers: int, inches: float) -> None:
    """An x axis of blocks, as many named as fit a panel of this width."""
    axes.set_xlabel("block", fontsize=SIZE)
    axes.set_xlim(-0.5, layers - 0.5)
    blocks = range(0, layers, every([str(block) for block in range(layers)], inches - 0.8))
    axes.set_xticks(blocks, [str(block) for block in blocks])


def _kinds(asked: Sequence[str] | None, traced: Mapping[str, Any]) -> list[str]:
    """The kinds asked for, or all that were traced."""
    kinds = list(traced) if asked is None else list(asked)
    missing = [kind for kind in kinds if kind not in traced]
    if missing or not kinds:
        what = f"kind '{missing[0]}'" if missing else "no kind"
        raise EditkitError(f"{what} was asked for; the trace has: {', '.join(traced)}.")
    return kinds


def _blocks(table: "Tensor") -> list[str]:
    """The names of the blocks of a table [tokens, blocks]."""
    return [str(block) for block in range(table.shape[1])]


def _named(layers: Sequence[int]) -> str:
    return f"block {layers[0]}" if len(layers) == 1 else f"blocks {layers[0]} to {layers[-1]}"


register("average_lines", average_lines)
register("average_map", average_map)
register("trace_map", trace_map)
