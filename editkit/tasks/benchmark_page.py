"""The page of task=benchmark and task=batch: scores, answers, relations, sizes of updates, worst cases. No torch."""

from typing import Any

from editkit.data.kinds import HEADINGS, heading
from editkit.metrics.metric import Metric
from editkit.numbers import finite, mean, number
from editkit.report import aggregate, charts
from editkit.report.html import Body, Charts, Fold, Section, Table, Text
from editkit.report.parts import judge, plain_title, probe_table, score_tiles, scores, shares, spectra
from editkit.runs.read import Run
from editkit.tasks import controls_page

WORST = 10
SHOWN_REJECTED = 100
RELATIONS_A_CHART, RELATION_CHARTS = 10, 3


def body(run: Run) -> Body:
    """What a page shows of a run over many cases. Raises RecordError for a table that cannot be read."""
    sections = [
        Section("scores", "Scores", [*scores(run), *judge(run)]),
        Section("controls", "Null controls", controls_page.blocks(run)),
        Section("probabilities", "Before and after", _probabilities(run)),
        Section("relations", "By relation", _relations(run)),
        Section("update", "Size of the updates", _sizes(run)),
        Section("worst", "Worst cases", _worst(run)),
        Section("rejected", "Rejected records", rejected(run)),
    ]
    return Body(plain_title(run), score_tiles(run), sections)


def _probabilities(run: Run) -> list[Any]:
    """Mean probability of the new and of the old answer by kind of probe."""
    rows = run.cases
    kinds = aggregate.by(rows, "kind")
    ordered = [k for k in HEADINGS if k in kinds] + [k for k in kinds if k not in HEADINGS]
    drawn = []
    for which, title, series in (("new", "The new answer", 1), ("true", "The old answer", 0)):
        pairs = []
        for kind in ordered:
            sides = [_mean(r.get(f"probability_{which}_{when}") for r in kinds[kind]) for when in ("before", "after")]
            if any(side is not None for side in sides):
                pairs.append(charts.Pair(f"{heading(kind)} (n = {len(kinds[kind]):,})", sides[0], sides[1], series))
        if pairs:
            note = "Mean over prompts; the probability of all tokens of the answer."
            drawn.append(charts.dumbbells(title, pairs, note=note))
    return [Charts(drawn)] if drawn else []


def _mean(values: Any) -> float | None:
    found = [v for v in map(finite, values) if v is not None]
    return sum(found) / len(found) if found else None


def _relations(run: Run) -> list[Any]:
    """The headline metrics after the edit, by relation, with intervals over its cases."""
    relations = aggregate.by(run.edits, "relation") if any(r.get("relation") for r in run.edits) else {}
    metrics = _shown(run)
    if not relations or not metrics:
        return []
    found = {
        relation: [aggregate.average(row.get(metric.column()) for row in rows) for metric in metrics]
        for relation, rows in relations.items()
    }
    short = [metric.label for metric in metrics]
    labelled = [(f"{relation} (n = {len(relations[relation]):,})", averages) for relation, averages in found.items()]
    parts = [labelled[i : i + RELATIONS_A_CHART] for i in range(0, len(labelled), RELATIONS_A_CHART)][:RELATION_CHARTS]
    title = "By relation" if len(parts) == 1 else "By relation, {} of {}"
    drawn = [charts.whiskers(title.format(i + 1, len(parts)), part, short) for i, part in enumerate(parts)]
    left = len(labelled) - sum(map(len, parts))
    note = "After the edit; intervals are 95 % bootstrap over the relation's cases. One case has no width."
    note += f" The {left} smallest relations are in the table alone." if left else ""
    rows = [(relation, len(relations[relation]), *averages) for relation, averages in found.items()]
    table = Table(("relation", "cases", *short), rows)
    return [Text(note, "note"), Charts(drawn), Fold(f"All {len(rows)} relations as a table", [table])]


def _shown(run: Run) -> list[Metric]:
    """The headline metrics that each case has a value of."""
    return aggregate.headline(shares(list(run.sides()), run.edits[0])) if run.edits else []


def _sizes(run: Run) -> list[Any]:
    drawn = []
    for name, label in (
        ("relative_norm", "‖ΔW‖ / ‖W‖"),
        ("norm", "‖ΔW‖ (Frobenius)"),
        ("seconds", "seconds for one edit"),
    ):
        values = [v for v in (finite(row.get(name)) for row in run.edits) if v is not None]
        if len(values) > 1:
            middle = sorted(values)[len(values) // 2]
            note = f"Median {number(middle)}, least {number(min(values))}, greatest {number(max(values))}."
            drawn.append(charts.histogram(label, values, label, note))
    drawn += spectra(run)
    return [Charts(drawn)] if drawn else []


def _worst(run: Run) -> list[Any]:
    metrics = _shown(run)
    found = aggregate.worst(run.edits, metrics, WORST)
    if not found:
        return []
    wanted = {str(row.get("case")) for _, row in found}
    probes = aggregate.by([row for row in run.cases if str(row.get("case")) in wanted], "case")
    short = ", ".join(metric.label for metric in metrics)
    about = f"The {len(found)} of {len(run.edits):,} cases with the lowest mean of {short} after the edit."
    blocks: list[Any] = [Text(about, "note")]
    for i, (score, row) in enumerate(found):
        values = [f"{m.label} {mean(finite(row.get(m.column())))}" for m in metrics]
        rows = probes.get(str(row.get("case")), [])
        first = rows[0] if rows else {}
        told = f"{row.get('subject') or ''}: {first.get('target_true') or '?'} → {first.get('target_new') or '?'}"
        parts = [f"case {row.get('case')}", str(row.get("relation") or ""), *values]
        parts.append(f"‖ΔW‖/‖W‖ {number(finite(row.get('relative_norm')), 3)}")
        inside: list[Any] = [Text(" · ".join(part for part in parts if part), "note")]
        inside.append(probe_table(rows) if rows else Text("The table of prompts does not hold this case.", "note"))
        blocks.append(Fold(f"{mean(score)}  {told}", inside, open=i < 2))
    return blocks


def rejected(run: Run) -> list[Any]:
    found = run.record["data"].get("rejected")
    if not isinstance(found, list) or not found:
        return []
    shown = [Table(("record",), [(str(text),) for text in found[:SHOWN_REJECTED]])]
    more = [Text(f"… and {len(found) - SHOWN_REJECTED:,} more: record.json names all.", "note")]
    blocks = [*shown, *(more if len(found) > SHOWN_REJECTED else [])]
    total = run.record["data"].get("found")
    of = f" of {total:,} records" if isinstance(total, int) else " records"
    return [Text(f"{len(found):,}{of} of the data could not be used and are in no average."), Fold("Which", blocks)]
