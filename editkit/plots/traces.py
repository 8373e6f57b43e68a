"""Pictures of causal traces (editkit.tracing): one prompt's, and the average over many facts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.errors import EditkitError
from editkit.numbers import number
from editkit.plots.canvas import SIZE, blank, done, every, headed, label, legend, plain, series, token
from editkit.plots.heat import Panel, panels
from editkit.tracing.files import place_kind

if TYPE_CHECKING:
    from editkit.tracing import AverageTrace, Proposal, Traced

BOTH = ("last subject token", "last token")


def trace_map(
    traced: "Traced", kinds: Sequence[str] | None = None, *, title: str | None = None, path: str | Path | None = None
) -> Any:
    """One prompt: P(answer) with one place put back, by token and block (ROME's figure 1), a map for each of `kinds`.

    The first token is on top and the subject's have a star. Colours begin at the corrupted run's probability, and are
    the same in all maps. `kinds`: None for all that were traced. Raises EditkitError for a kind that was not.
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
    frame = traced.to_frame()
    return done(figure, frame[frame.kind.isin(kinds)].reset_index(drop=True), path)


def average_map(
    average: "AverageTrace",
    kinds: Sequence[str] | None = None,
    *,
    proposal: "Proposal | None" = None,
    title: str | None = None,
    path: str | Path | None = None,
) -> Any:
    """Many facts: the average indirect effect by kind of token and block (ROME's figure 2), a map for each of `kinds`.

    A kind of token that no prompt has is grey. `proposal`: its blocks get a frame, where they were found.
    """
    kinds = _kinds(kinds, average.effect)
    frame = average.to_frame()
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
    """Many facts: the average indirect effect over blocks with 95 % bands (ROME's figure 3), a panel for each part.

    `parts`: kinds of token, of tracing.PARTS. `proposal`: its blocks are shaded. Raises EditkitError for a kind or
    part that was not traced.
    """
    kinds = _kinds(kinds, average.effect)
    frame = average.to_frame()
    frame = frame[frame.kind.isin(kinds) & frame.part.isin(parts)].reset_index(drop=True)
    if missing := [part for part in parts if part not in set(frame.part)]:
        raise EditkitError(
            f"The trace has no part '{missing[0]}'. It has: {', '.join(average.to_frame().part.unique())}."
        )
    if title is None:
        title = f"Average indirect effect, {len(average.texts)} facts, with 95 % bootstrap bands"
    across = min(3, len(parts))
    down = -(-len(parts) // across)
    wide = max(2.9, 6.75 / across)
    figure = blank(wide * across, 2.35 * down + 0.75)
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    flat = [axes for line in grid for axes in line]
    handles, names = [], []
    for axes, part in zip(flat, parts, strict=False):
        plain(axes)
        axes.axhline(0, color="0.4", linewidth=0.8)
        if proposal is not None:
            begin, end = proposal.layers[0] - 0.5, proposal.layers[-1] + 0.5
            shade = axes.axvspan(begin, end, facecolor="0.88", edgecolor="0.78", hatch="///", linewidth=0)
        for i, kind in enumerate(kinds):
            some = frame[(frame.kind == kind) & (frame.part == part)]
            style = series(i)
            (line,) = axes.plot(some.block, some.effect, **style)
            axes.fill_between(some.block, some.low, some.high, color=style["color"], alpha=0.2, linewidth=0)
            if axes is flat[0]:
                handles.append(line)
                names.append(place_kind(kind, average.window))
        facts = int(frame[frame.part == part].facts.max())
        about = part if facts == len(average.texts) else f"{part} ({facts} facts have one)"
        axes.set_title(label(about, wide - 0.6), fontsize=SIZE + 1)
        axes.set_xlabel("block", fontsize=SIZE)
        axes.set_xlim(-0.5, average.layers - 0.5)
        blocks = range(0, average.layers, every([str(b) for b in range(average.layers)], wide - 0.8))
        axes.set_xticks(blocks, [str(block) for block in blocks])
    for axes in flat[len(parts) :]:
        axes.set_visible(False)
    for line in grid:
        line[0].set_ylabel("indirect effect on P(answer)", fontsize=SIZE)
    if proposal is not None:
        handles.append(shade)
        names.append(f"proposed: {_named(proposal.layers)}")
    legend(figure, handles, names)
    headed(figure, title)
    return done(figure, frame, path)


def _kinds(asked: Sequence[str] | None, traced: Any) -> list[str]:
    kinds = list(traced) if asked is None else list(asked)
    missing = [kind for kind in kinds if kind not in traced]
    if missing or not kinds:
        what = f"kind '{missing[0]}'" if missing else "no kind"
        raise EditkitError(f"{what} was asked for; the trace has: {', '.join(traced)}.")
    return kinds


def _blocks(table: Any) -> list[str]:
    return [str(block) for block in range(table.shape[1])]


def _named(layers: Sequence[int]) -> str:
    return f"block {layers[0]}" if len(layers) == 1 else f"blocks {layers[0]} to {layers[-1]}"
