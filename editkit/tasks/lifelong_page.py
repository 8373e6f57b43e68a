"""The page of task=lifelong: what is left of the edits, other facts, drift, growth, collapse. No torch."""

from typing import Any

from editkit.metrics.counterfact import ES, NS, PS
from editkit.metrics.metric import ASKED, RECENT, RETENTION, UNTOUCHED, WHEN, Metric
from editkit.numbers import mean, number
from editkit.report import series
from editkit.report.html import Body, Charts, Fold, Section, Table, Text
from editkit.report.parts import judge, plain_title, scores
from editkit.report.series import LIFELONG
from editkit.runs.read import Run


def body(run: Run) -> Body:
    """What a page shows of a lifelong run."""
    if not run.series:
        return Body(plain_title(run), [], [])
    drawn = [chart for chosen in LIFELONG if (chart := series.drawn(run, chosen))]
    first = series.collapses(run)
    verdict = (
        Text(f"Collapsed: first called so at {number(first[0])} edits (the upright dashed line).", "bad")
        if first
        else Text(f"Not collapsed up to {number(max(point.edits for point in run.series))} edits.", "good")
    )
    ended = run.record["data"].get("collapse")
    ended = [Text(str(ended["collapse"]), "bad")] if isinstance(ended, dict) and "collapse" in ended else []
    note = "Means over cases; bands are 95 % bootstrap intervals over cases (of drift: over blocks of text)."
    sections = [
        Section("curves", "Along the edits", [verdict, *ended, Text(note, "note"), Charts(drawn)]),
        Section("points", "Every point", _points(run)),
        Section("end", "Every metric at the end", _end(run)),
    ]
    return Body(plain_title(run), _tiles(run), sections)


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The end of the run: of all edits so far ES, PS and NS; of facts never edited, how many still hold."""
    last = run.series[-1]
    shown = [(metric.label, metric, RETENTION) for metric in (ES, PS, NS)] + [("untouched", NS, UNTOUCHED)]
    tiles = []
    for name, metric, asked in shown:
        found = last.average(metric, asked)
        if found is None:
            continue
        small = [f"[{mean(found.low)}, {mean(found.high)}]"] if found.interval else []
        small.append(f"{ASKED[asked]}, n = {found.n:,}" if found.n is not None else ASKED[asked])
        tiles.append((f"{name} at the end", mean(found.mean), ", ".join(small)))
    return tiles


def _points(run: Run) -> list[Any]:
    """The curves' numbers, a row a point; then every metric, a row a metric."""
    columns = ["edits"]
    cells: list[list[Any]] = [[point.edits] for point in run.series]
    for chosen in LIFELONG:
        for curve in chosen.curves:
            found = [curve.value(point) for point in run.series]
            if any(found):
                columns.append(f"{chosen.short}, {curve.name}" if len(chosen.curves) > 1 else chosen.short)
                for row, value in zip(cells, found, strict=True):
                    row.append(value)
    columns.append("collapsed")
    for row, point in zip(cells, run.series, strict=True):
        row.append(point.collapsed)
    blocks: list[Any] = [Fold(f"The curves' numbers at all {len(cells)} points", [Table(columns, cells)])]
    for asked, title in ASKED.items():
        if table := _along(run, asked):
            blocks.append(Fold(f"Every metric at every point: {title}", [table]))
    return blocks


def _along(run: Run, asked: str) -> Table | None:
    """Metrics of those asked as rows, points as columns."""
    named: dict[tuple[Metric, str], None] = {}
    for point in run.series:
        named |= dict.fromkeys((s.metric, s.when) for s in point.scores if s.asked == asked and s.average)
    rows = []
    for metric, when in sorted(named, key=lambda key: WHEN.index(key[1]) if key[1] in WHEN else 0, reverse=True):
        values = [point.average(metric, asked, when) for point in run.series]
        rows.append((f"{metric.protocol.name}.{metric.label}", when, *values, metric.meaning))
    columns = ("metric", "", *(f"{number(point.edits)} edits" for point in run.series), "what it is")
    return Table(columns, rows) if rows else None


def _end(run: Run) -> list[Any]:
    blocks = judge(run)
    for asked in (RETENTION, RECENT, UNTOUCHED):
        if found := scores(run, asked, drawn=False):
            blocks.append(Fold(f"Of {ASKED[asked]}", found))
    return blocks
