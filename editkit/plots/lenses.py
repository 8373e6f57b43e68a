"""Plots of an edit from inside (editkit.lenses): answers over depth, attention, the residual stream."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.errors import EditkitError
from editkit.plots import register
from editkit.plots.shared.canvas import SIZE, blank, done, every, headed, label, legend, plain, series, token
from editkit.plots.shared.panels import Panel, panels

if TYPE_CHECKING:
    from editkit.lenses import Attention, Lens, StreamChange

__all__ = ["attention_map", "lens_lines", "stream_map"]


def lens_lines(
    before: "Lens", after: "Lens | None" = None, *, title: str | None = None, path: str | Path | None = None
) -> Any:
    """P(word) at the prompt's last token over depth: a panel for the unedited model and, if given, one for the edited.

    Depth 0 is the embedding, depth i the residual stream after block i − 1. `before`, `after`: from
    `editkit.lenses.logit_lens`. Raises EditkitError when their prompts, words or depths differ.
    """
    from pandas import concat

    lenses = {"before": before} | ({"after": after} if after is not None else {})
    if len({(lens.words, lens.text, len(lens.said)) for lens in lenses.values()}) > 1:
        raise EditkitError("The two lenses are of different prompts, words or depths: look twice with the same ones.")
    # 1) a panel for each lens
    wide = 3.4
    figure = blank(wide * len(lenses), 3.0)
    grid = figure.subplots(1, len(lenses), squeeze=False, sharey=True)[0]
    handles: list[Any] = []
    for axes, (when, lens) in zip(grid, lenses.items(), strict=True):
        drawn = _word_lines(axes, lens, wide)
        handles = handles or drawn
        answer = f"says {token(lens.said[-1], 1.2)}"
        heading = f"{when}: {answer}" if len(lenses) > 1 else answer
        axes.set_title(label(heading, wide - 0.5), fontsize=SIZE + 1, parse_math=False)
    # 2) what they share
    grid[0].set_ylabel("P(word), first token", fontsize=SIZE)
    legend(figure, handles, [f"“{word.strip()}”" for word in before.words])
    headed(figure, f"Logit lens: “{before.text}”" if title is None else title)
    frames = [lens.to_frame().assign(when=when) for when, lens in lenses.items()]
    return done(figure, concat(frames, ignore_index=True), path)


def _word_lines(axes: Any, lens: "Lens", inches: float) -> list[Any]:
    """A line for each word over depth, in a panel of this width; returns the lines for the legend."""
    plain(axes)
    depths = [str(i) for i in range(len(lens.said))]
    lines = [
        axes.plot(range(len(depths)), lens.probability[:, w].tolist(), **series(w))[0] for w in range(len(lens.words))
    ]
    shown = range(0, len(depths), every(depths, inches - 0.8))
    axes.set_xticks(shown, [depths[i] for i in shown])
    axes.set_xlabel("depth (blocks passed)", fontsize=SIZE)
    axes.set_ylim(-0.03, 1.03)
    return lines


def attention_map(attention: "Attention", *, title: str | None = None, path: str | Path | None = None) -> Any:
    """The share of the last token's attention that goes to the subject's tokens, by head and block."""
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
    """How far an edit moves the residual stream, by token and block.

    - `change`: from `editkit.stream_change`. `relative`: ‖Δh‖ / ‖h‖ instead of ‖Δh‖.
    - `title`: above the map; if None, what it shows. `path`: where to write the figure.
    """
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


register("attention_map", attention_map)
register("lens_lines", lens_lines)
register("stream_map", stream_map)
