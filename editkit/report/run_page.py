"""The page of one run: what was asked, what came of it, and where it went worst."""

from collections.abc import Sequence
from typing import Any

from editkit.numbers import finite, mean, number
from editkit.report import aggregate, charts, glossary, reproduce
from editkit.report.compare import published_blocks
from editkit.report.edit_parts import edit_sections, probe_table, spectra
from editkit.report.html import Charts, Fold, Page, Pairs, Section, Table, Text, Tiles, cell
from editkit.report.lifelong_parts import lifelong_sections
from editkit.report.trace_parts import trace_sections, trace_tiles, trace_title
from editkit.runs.read import Average, Metric, Run

WORST = 10
SHOWN_REJECTED = 100
RELATIONS_A_CHART, RELATION_CHARTS = 10, 3


def page_of(run: Run) -> Page:
    """Raises RecordError for a table that cannot be read."""
    if run.task == "trace":
        sections = trace_sections(run)
    else:
        sections = edit_sections(run) if run.task == "edit" else _measured(run)
        sections.append(Section("published", "Beside published numbers", published_blocks([run], [run.method])))
    sections += [Section("restored", "Restored", _restored(run))] if run.record["reversal"] else []
    sections.append(Section("settings", "Settings", [*_data(run), *reproduce.settings(run)]))
    sections.append(Section("time", "Time", [_timings(run)]))
    return Page(
        _title(run), _subtitle(run), [Tiles(_tiles(run))], [s for s in sections if s.blocks], reproduce.footer(run)
    )


def _title(run: Run) -> str:
    if run.task == "trace":
        return trace_title(run)
    edit = run.record["config"].get("edit")
    if run.task == "edit" and isinstance(edit, dict) and edit.get("subject"):
        return f"{edit['subject']} → {edit.get('target_new', '?')}"
    return f"{run.task}: {run.method} on {run.model}" + (f" (data: {run.data})" if run.data else "")


def _subtitle(run: Run) -> str:
    seed = run.record["config"].get("seed")
    parts = [
        f"task {run.task}",
        f"method {run.method}" if run.task != "trace" else "",
        f"model {run.model}",
        str(run.record["model"].get("dtype", "")),
    ]
    alone = run.task == "trace" and run.record["trace"].get("kind") == "one"
    parts += [f"data {run.data}"] if run.data and not alone else []
    parts += [] if seed is None else [f"seed {seed}"]
    return " · ".join(part for part in parts if part)


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The headline metrics, the size of the change, whether all was put back."""
    tiles = trace_tiles(run) if run.task == "trace" else []
    names = [n for n in ("counterfact.S",) if n in run.metrics] + aggregate.headline(_shares(run))
    for name in names:
        found = run.metrics[name].after or run.metrics[name].before
        if found is None or found.mean is None:
            continue
        parts = [f"[{mean(found.low)}, {mean(found.high)}]"] if found.low is not None else []
        before = run.metrics[name].before
        parts += [f"before {mean(before.mean)}"] if before and run.metrics[name].after else []
        parts += [f"n = {found.n:,}"] if found.n is not None else []
        tiles.append((name.rpartition(".")[2], mean(found.mean), ", ".join(parts)))
    if run.record["series"]:
        last = run.record["series"][-1]
        for name in ("ES", "PS", "NS"):
            found = Average.of((last.get("metrics") or {}).get(f"retention.{name}"))
            if found is not None and found.mean is not None:
                small = f"[{mean(found.low)}, {mean(found.high)}], of all {number(finite(last.get('edits')))} edits"
                tiles.append((f"{name} at the end", mean(found.mean), small))
    relative = finite(run.record["edit"].get("relative_norm"))
    if relative is not None:
        tiles.append(("‖ΔW‖ / ‖W‖", number(relative), "size of the update"))
    if "exact" in run.record["reversal"]:
        exact = bool(run.record["reversal"]["exact"])
        tiles.append(("restored", "exactly" if exact else "NOT EQUAL", "compared bit for bit"))
    total = finite(run.record["timings"].get("total"))
    if total is not None:
        tiles.append(("time", f"{number(total, 3)} s", "in all"))
    return tiles


def _shares(run: Run) -> list[str]:
    return [n for n, m in run.metrics.items() if glossary.meaning(n).unit == glossary.SHARE and (m.after or m.before)]


def _measured(run: Run) -> list[Section]:
    """The sections of a run over many cases."""
    return [
        *lifelong_sections(run),
        Section("scores", "Scores", scores(run)),
        Section("probabilities", "Before and after", _probabilities(run)),
        Section("relations", "By relation", _relations(run)),
        Section("update", "Size of the updates", _sizes(run)),
        Section("worst", "Worst cases", _worst(run)),
        Section("rejected", "Rejected records", _rejected(run)),
    ]


def scores(run: Run) -> list[Any]:
    """Every metric, by protocol: before and after with intervals; shares as a chart."""
    protocols: dict[str, list[Metric]] = {}
    for metric in run.metrics.values():
        protocols.setdefault(metric.protocol, []).append(metric)
    drawn, tables = [], []
    for protocol, metrics in protocols.items():
        title = glossary.protocol(protocol)
        drawn += _score_charts(title, [m for m in metrics if glossary.meaning(m.name).unit == glossary.SHARE])
        rows = [(m.name.rpartition(".")[2], m.before, m.after, _n(m), glossary.meaning(m.name).text) for m in metrics]
        tables.append(Table(("metric", "before", "after", "n", "what it is"), rows, title, stacked=True))
    if not tables:
        return []
    note = "Means over cases; in brackets the 95 % bootstrap interval over cases; n cases have the value."
    return [Text(note, "note"), *([Charts(drawn)] if drawn else []), *tables]


def _score_charts(title: str, metrics: Sequence[Metric]) -> list[charts.Chart]:
    rows = [(m.name.rpartition(".")[2], (m.before, m.after)) for m in metrics if m.before or m.after]
    if not rows:
        return []
    both = any(before for _, (before, _) in rows)
    if not both:
        return [charts.whiskers(title, [(name, (after,)) for name, (_, after) in rows], ("after",))]
    return [charts.whiskers(title, rows, ("before", "after"), hollow=("before",))]


def _n(metric: Metric) -> int | None:
    found = metric.after or metric.before
    return found.n if found else None


def _probabilities(run: Run) -> list[Any]:
    """Mean probability of the new and of the old answer by kind of probe."""
    rows = run.cases
    kinds = aggregate.by(rows, "kind")
    ordered = [k for k in glossary.KINDS if k in kinds] + [k for k in kinds if k not in glossary.KINDS]
    drawn = []
    for which, title, series in (("new", "The new answer", 1), ("true", "The old answer", 0)):
        pairs = []
        for kind in ordered:
            sides = [_mean(r.get(f"probability_{which}_{when}") for r in kinds[kind]) for when in ("before", "after")]
            if any(side is not None for side in sides):
                pairs.append(
                    charts.Pair(f"{glossary.kind(kind)} (n = {len(kinds[kind]):,})", sides[0], sides[1], series)
                )
        if pairs:
            note = "Mean over probes; the whole answer's probability."
            drawn.append(charts.dumbbells(title, pairs, note=note))
    return [Charts(drawn)] if drawn else []


def _mean(values: Any) -> float | None:
    found = [v for v in map(finite, values) if v is not None]
    return sum(found) / len(found) if found else None


def _relations(run: Run) -> list[Any]:
    """The headline metrics after the edit, by relation, with intervals over its cases."""
    relations = aggregate.by(run.edits, "relation") if any(r.get("relation") for r in run.edits) else {}
    names = aggregate.headline(n for n in _shares(run) if any(f"{n}_after" in row for row in run.edits[:1]))
    if not relations or not names:
        return []
    found = {
        relation: [aggregate.average(row.get(f"{name}_after") for row in rows) for name in names]
        for relation, rows in relations.items()
    }
    short = [name.rpartition(".")[2] for name in names]
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
    names = aggregate.headline(n for n in _shares(run) if any(f"{n}_after" in row for row in run.edits[:1]))
    found = aggregate.worst(run.edits, names, WORST)
    if not found:
        return []
    wanted = {str(row.get("case")) for _, row in found}
    probes = aggregate.by([row for row in run.cases if str(row.get("case")) in wanted], "case")
    short = ", ".join(name.rpartition(".")[2] for name in names)
    about = f"The {len(found)} of {len(run.edits):,} cases with the lowest mean of {short} after the edit."
    blocks: list[Any] = [Text(about, "note")]
    for i, (score, row) in enumerate(found):
        values = [f"{n.rpartition('.')[2]} {mean(finite(row.get(f'{n}_after')))}" for n in names]
        rows = probes.get(str(row.get("case")), [])
        first = rows[0] if rows else {}
        told = f"{row.get('subject') or ''}: {first.get('target_true') or '?'} → {first.get('target_new') or '?'}"
        parts = [f"case {row.get('case')}", str(row.get("relation") or ""), *values]
        parts.append(f"‖ΔW‖/‖W‖ {number(finite(row.get('relative_norm')), 3)}")
        inside: list[Any] = [Text(" · ".join(part for part in parts if part), "note")]
        inside.append(probe_table(rows) if rows else Text("The table of probes does not hold this case.", "note"))
        blocks.append(Fold(f"{mean(score)}  {told}", inside, open=i < 2))
    return blocks


def _rejected(run: Run) -> list[Any]:
    found = run.record["data"].get("rejected")
    if not isinstance(found, list) or not found:
        return []
    shown = [Table(("record",), [(str(text),) for text in found[:SHOWN_REJECTED]])]
    more = [Text(f"… and {len(found) - SHOWN_REJECTED:,} more: record.json names all.", "note")]
    blocks = [*shown, *(more if len(found) > SHOWN_REJECTED else [])]
    total = run.record["data"].get("found")
    of = f" of {total:,} records" if isinstance(total, int) else " records"
    return [Text(f"{len(found):,}{of} of the data could not be used and are in no average."), Fold("Which", blocks)]


def _restored(run: Run) -> list[Any]:
    found = run.record["reversal"]
    exact = found.get("exact")
    verdict = "Every compared bit is what it was before." if exact else "NOT EQUAL to what it was before."
    items = [(name, cell(found[name])) for name in ("tensors", "bytes", "digested", "touched") if name in found]
    unequal = found.get("unequal") or []
    blocks: list[Any] = [Text(verdict, "good" if exact else "bad"), Pairs(items)]
    return blocks + ([Table(("not equal",), [(str(name),) for name in unequal])] if unequal else [])


def _data(run: Run) -> list[Any]:
    found = run.record["data"]
    items = [
        (name, cell(found[name])) for name in ("source", "found", "shard", "digest") if found.get(name) is not None
    ]
    return [Fold("data as read", [Pairs(items)], open=True)] if items else []


def _timings(run: Run) -> Any:
    found = {name: finite(value) for name, value in run.record["timings"].items()}
    total = found.get("total")
    rows = [(n.replace("_", " "), v, f"{v / total:.0%}" if v is not None and total else "–") for n, v in found.items()]
    return Table(("stretch", "seconds", "of the whole"), rows)
