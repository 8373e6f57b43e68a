"""The page of task=trace: where the answer comes back, and which blocks that proposes to edit. No torch.

It shows what the tracer wrote: trace.npz and trace.json of one fact, average.npz and average.json of many
(`editkit.tracing.files`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from editkit.errors import EditkitError, RecordError
from editkit.numbers import finite, number
from editkit.report import charts
from editkit.report.html import Body, Charts, Fold, Section, Table, Text
from editkit.runs import names
from editkit.runs.read import Run
from editkit.tracing.files import AVERAGE_AXES, AVERAGE_FIELDS, ONE_AXES, ONE_FIELDS, place_kind, read_arrays

LINES = ("last subject token", "last token")  # drawn; all kinds of token are in the maps
SHOWN_SKIPPED = 100


@dataclass(frozen=True)
class Arrays:
    """What a trace's two files hold."""

    values: dict[str, Any]  # numpy, by what is put back: [tokens, blocks], or [facts, parts, blocks]
    about: dict[str, Any]

    @property
    def window(self) -> int:
        return int(self.about["window"])

    def along(self, axis: str) -> list[str]:
        """The names along an axis."""
        return [str(name) for name in self.about["along"][axis]]


def body(run: Run) -> Body:
    """What a page shows of a trace. Raises RecordError when the arrays are not there or damaged."""
    if run.record["trace"].get("kind") == "average":
        found = _arrays(run, names.AVERAGE, AVERAGE_AXES, AVERAGE_FIELDS)
        title = f"Where {run.model} recalls facts" + (f" (data: {run.data})" if run.data else "")
        return Body(title, _average_tiles(run, found), _averaged(run, found))
    found = _arrays(run, names.TRACE, ONE_AXES, ONE_FIELDS)
    how = found.about["how"]
    title = f"Trace: {str(how.get('prompt', '')).replace('{}', str(how.get('subject', '{}')))}"
    return Body(title, _tiles(found), _prompt(found))


def _tiles(found: Arrays) -> list[tuple[str, str, str]]:
    clean, corrupted = float(found.about["clean"]), float(found.about["corrupted"])
    return [
        ("answer", str(found.about["answer"]).strip(), "what the model says"),
        ("P, clean", number(clean, 3), "of the answer"),
        ("P, corrupted", number(corrupted, 3), "with the subject's embeddings corrupted"),
        ("total effect", number(clean - corrupted, 3), "what the corruption takes"),
    ]


def _average_tiles(run: Run, found: Arrays) -> list[tuple[str, str, str]]:
    lost = found.values["clean"] - found.values["corrupted"]
    skipped = len(found.about["skipped"])
    tiles = [
        ("facts", f"{len(lost):,}", f"traced; {skipped:,} left out" if skipped else "traced"),
        ("total effect", number(float(lost.mean()), 3), "of P(answer), mean over facts"),
    ]
    proposal = run.record["trace"].get("proposal") or {}
    if proposal.get("layers"):
        tiles.append(("proposed", ", ".join(map(str, proposal["layers"])), "blocks to edit"))
    return tiles


def _prompt(found: Arrays) -> list[Section]:
    """One prompt's maps."""
    tokens, blocks = found.along("token"), found.along("block")
    first, last = found.about["subject"]
    answer, corrupted = str(found.about["answer"]).strip(), float(found.about["corrupted"])
    text = f"P({answer}) when one clean place is put back into the corrupted run. Colours begin at the corrupted run's "
    text += f"{number(corrupted, 3)}; the clean run has {number(float(found.about['clean']), 3)}. "
    text += "The subject's tokens have a star. Point at a cell for its value, or step through rows with the Tab key."
    drawn, rows = [], []
    high = max([v for table in found.values.values() for v in table.ravel().tolist() if finite(v) is not None],
               default=corrupted)  # fmt: skip
    for kind, table in found.values.items():
        title = place_kind(kind, found.window)
        starred = range(first, last + 1)
        values = [[finite(float(value)) for value in line] for line in table]
        drawn.append(
            charts.heat_map(title, values, [_token(t) for t in tokens], blocks, "block", f"P({answer})",
                            starred=starred, low=corrupted, high=high)
        )  # fmt: skip
        rows += [(title, i, _token(tokens[i]), int(b), v, None if v is None else v - corrupted)
                 for i, line in enumerate(values) for b, v in zip(blocks, line, strict=True)]  # fmt: skip
    others = found.about.get("others") or []
    note = [Text(f"In the subject's place: {', '.join(map(str, others))}.", "note")] if others else []
    columns = ("put back", "position", "token", "block", "probability", "indirect effect")
    blocks_ = [Text(text, "note"), *note, Charts(drawn), Fold("All numbers as one table", [Table(columns, rows)])]
    return [Section("trace", "Where the answer comes back", blocks_)]


def _averaged(run: Run, found: Arrays) -> list[Section]:
    """The average over facts: the proposal, curves over blocks, maps by kind of token."""
    parts, blocks = found.along("part"), [int(block) for block in found.along("block")]
    proposal = run.record["trace"].get("proposal") or {}
    proposed = [Text(str(proposal["text"]))] if proposal.get("text") else []
    marks = [float(block) for block in proposal.get("layers") or []]
    kinds = [kind for kind in found.values if kind not in ("clean", "corrupted")]
    means = {kind: _means(found.values[kind]) for kind in kinds}
    counts = (~numpy.isnan(found.values[kinds[0]][:, :, 0])).sum(0).tolist()
    bounds = {kind: _bounds(found.about, kind, len(parts)) for kind in kinds}
    lines = []
    for p, part in enumerate(parts):
        curves = [
            charts.Line(place_kind(kind, found.window), blocks, means[kind][p], bounds[kind][0][p], bounds[kind][1][p],
                        marks if kind == "mlp" else ())
            for kind in kinds
        ]  # fmt: skip
        if part in LINES:
            lines.append(charts.lines(f"{part} (n = {counts[p]:,})", curves, "block", "average indirect effect"))
    known = [v for kind in kinds for line in means[kind] for v in line if v is not None] or [0.0]
    drawn = [
        charts.heat_map(place_kind(kind, found.window), means[kind], parts, list(map(str, blocks)), "block",
                        "average indirect effect", low=min(0.0, *known), high=max(known))
        for kind in kinds
    ]  # fmt: skip
    rows = [
        (place_kind(kind, found.window), part, b, means[kind][p][b], bounds[kind][0][p][b], bounds[kind][1][p][b],
         counts[p])
        for kind in kinds for p, part in enumerate(parts) for b in blocks
    ]  # fmt: skip
    columns = ("put back", "token", "block", "effect", "low", "high", "facts")
    note = (
        "The average indirect effect: how much of P(answer) comes back when one clean place is put into the corrupted "
    )
    note += "run, mean over facts; bands are 95 % bootstrap intervals over facts."
    note += " Upright dashed: the blocks proposed." if marks else ""
    unfinished = [] if found.about.get("complete", True) else [Text("It was interrupted: not all facts are in.", "bad")]
    skipped = found.about.get("skipped") or []
    left: list[Any] = [
        Table(("fact", "why"), [tuple(map(str, each)) for each in skipped[:SHOWN_SKIPPED]], stacked=True)
    ]
    more = len(skipped) - SHOWN_SKIPPED
    left += [Text(f"… and {more:,} more: average.json names all.", "note")] if more > 0 else []
    return [
        Section("proposal", "Blocks to edit", proposed),
        Section("blocks", "Over blocks", [*unfinished, Text(note, "note"), Charts(lines)]),
        Section("parts", "By kind of token", [Charts(drawn), Fold("All numbers as one table", [Table(columns, rows)])]),
        Section("skipped", f"Facts left out: {len(skipped):,}", left if skipped else []),
    ]


def _arrays(run: Run, name: str, axes: Sequence[str], fields: Sequence[str]) -> Arrays:
    """What the tracer wrote. Raises RecordError naming the file."""
    try:
        return Arrays(*read_arrays(run.folder / name, axes, fields))
    except EditkitError as error:
        raise RecordError(f"{error} Or run the trace again.") from error


def _means(table: Any) -> list[list[float | None]]:
    """[parts, blocks] from [facts, parts, blocks], over the facts that have the part."""
    known = ~numpy.isnan(table)
    total = numpy.where(known, table, 0.0).sum(0)
    count = known.sum(0)
    return [
        [float(t / n) if n else None for t, n in zip(sums, counts, strict=True)]
        for sums, counts in zip(total, count, strict=True)
    ]


def _bounds(about: dict[str, Any], kind: str, parts: int) -> tuple[Sequence[Sequence[Any]], Sequence[Sequence[Any]]]:
    """The ends of the bands, each [parts, blocks]; none where an older file has none."""
    blocks = len(about["along"]["block"])
    found = (about.get("intervals") or {}).get(kind) or {}
    empty = [[None] * blocks for _ in range(parts)]
    return found.get("low") or empty, found.get("high") or empty


def _token(text: str) -> str:
    """A token as a name: blanks and ends of lines that show."""
    shown = text.replace("\n", "↵").replace("\t", "⇥").strip(" ")
    return shown or "␣"
