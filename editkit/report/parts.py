"""What the pages of several tasks share: tiles, tables of scores, of prompts, and the spectra of an update."""

from collections.abc import Sequence
from typing import Any

from editkit.data.kinds import heading
from editkit.metrics.metric import ABILITY, ASKED, SHARE, WHEN, Metric
from editkit.numbers import finite, mean, number
from editkit.report import aggregate, charts
from editkit.report.html import Body, Charts, Section, Table, Text
from editkit.runs.read import Run, Sides


def plain_title(run: Run) -> str:
    """The task, the method, the model and the data."""
    return f"{run.task}: {run.method} on {run.model}" + (f" (data: {run.data})" if run.data else "")


def plain_body(run: Run) -> Body:
    """The page of a task that brings none of its own: its scores."""
    return Body(plain_title(run), score_tiles(run), [Section("scores", "Scores", scores(run))])


def score_tiles(run: Run) -> list[tuple[str, str, str]]:
    """The headline metrics: the average after the edit, its interval, and what it was before."""
    tiles = []
    found = run.sides()
    for metric in aggregate.headline(found):
        shown, before = found[metric].shown, found[metric].before
        if shown is None:
            continue
        small = [f"[{mean(shown.low)}, {mean(shown.high)}]"] if shown.interval else []
        small += [f"before {mean(before.mean)}"] if before is not None and before is not shown else []
        small += [f"n = {shown.n:,}"] if shown.n is not None and shown.n > 1 else []
        tiles.append((metric.label, mean(shown.mean), ", ".join(small)))
    return tiles


def scores(run: Run, asked: str = "", *, drawn: bool = True) -> list[Any]:
    """Every metric, a table for each protocol: before and after with intervals. `drawn`: shares as charts too."""
    protocols: dict[str, tuple[str, list[Sides]]] = {}
    for metric, sides in run.sides(asked).items():
        if sides.shown is not None and metric.protocol.name != ABILITY:
            protocols.setdefault(metric.protocol.name, (metric.protocol.title, []))[1].append(sides)
    pictures, tables = [], []
    for name, (title, members) in protocols.items():
        title = title or name or "Others"
        pictures += _pictures(title, [sides for sides in members if sides.metric.unit == SHARE]) if drawn else []
        tables.append(metric_table(members, f"{title} · {ASKED.get(asked, asked)}" if asked else title))
    note = "Means over cases; in brackets the 95 % bootstrap interval over cases; n cases have the value."
    return [Text(note, "note"), *([Charts(pictures)] if pictures else []), *tables] if tables else []


def judge(run: Run) -> list[Any]:
    """Who judged the free answers, and how many have no verdict; [] where nobody did."""
    found = run.record["judge"]
    if not found:
        return []
    counts = {name: finite(found.get(name)) or 0 for name in ("asked", "unclear", "unjudged")}
    told = f"{number(counts['asked'])} free answers were judged by {found.get('name')}"
    told += f" (prompt version {found.get('version')}); judged.jsonl holds each question, verdict and cost."
    for name, what in (("unclear", "replies were neither yes nor no"), ("unjudged", "answers found the judge away")):
        told += f" {number(counts[name])} {what}, and are in no figure." if counts[name] else ""
    return [Text(told, "note")]


def ability(run: Run) -> list[Any]:
    """General ability before and after; [] where it was not asked."""
    about = run.record["ability"]
    members = [sides for metric, sides in run.sides().items() if metric.protocol.name == ABILITY and sides.shown]
    taken = [(when, about[when]) for when in WHEN if isinstance(about.get(when), dict)]
    skipped = [
        Text(f"Not asked {when} the edits: {found['skipped']}.", "bad") for when, found in taken if "skipped" in found
    ]
    if not members and not skipped:
        return []
    seconds = [f"{number(finite(found['seconds']))} s {when}" for when, found in taken if "seconds" in found]
    note = f"Preset {about.get('preset')}; {', '.join(seconds)}. Examples in lm-evaluation-harness's own form; in "
    note += "brackets ± 1.96 of its standard errors, of each side alone."
    return [Text(note, "note"), *skipped, *([metric_table(members)] if members else [])]


def metric_table(members: Sequence[Sides], caption: str = "") -> Table:
    """Metrics as rows: before, after, n, and what the metric is."""
    rows = [
        (s.metric.label, s.before, s.after, s.shown.n if s.shown else None, s.metric.meaning) for s in members
    ]  # fmt: skip
    return Table(("metric", "before", "after", "n", "what it is"), rows, caption, stacked=True)


def _pictures(title: str, members: Sequence[Sides]) -> list[charts.Chart]:
    if not members:
        return []
    if not any(sides.before for sides in members):
        return [charts.whiskers(title, [(s.metric.label, (s.after,)) for s in members], ("after",))]
    rows = [(s.metric.label, (s.before, s.after)) for s in members]
    return [charts.whiskers(title, rows, ("before", "after"), hollow=("before",))]


def probe_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The prompts of a case: which answer was wanted, both probabilities, and what the model goes on to say."""
    continued = any(row.get("said_after") is not None for row in rows)
    columns = ["kind", "prompt", "old → new", "p(old)", "p(new)"]
    columns += ["continues before", "continues after"] if continued else []
    cells = []
    for row in rows:
        arrows = [
            f"{_p(row.get(f'probability_{w}_before'))} → {_p(row.get(f'probability_{w}_after'))}"
            for w in ("true", "new")
        ]
        answers = f"{row.get('target_true') or '–'} → {row.get('target_new') or '–'}"
        line: list[Any] = [heading(str(row.get("kind") or "?")), row.get("prompt"), answers, *arrows]
        cells.append(line + ([row.get("said_before"), row.get("said_after")] if continued else []))
    return Table(columns, cells, stacked=True)


def _p(value: object) -> str:
    found = finite(value)
    return "–" if found is None else f"{found:.4f}" if found >= 5e-5 or found == 0 else "<0.0001"


def spectra(run: Run) -> list[charts.Chart]:
    """Spectra of the update's weights, where the record holds them."""
    drawn = []
    for found in run.record["edit"].get("spectra") or []:
        if not isinstance(found, dict):
            continue
        change, base = (
            [v for v in map(finite, found.get(name) or []) if v is not None]
            for name in ("singular_values", "base_singular_values")
        )
        if change:
            drawn.append(charts.spectrum(str(found.get("parameter") or "?"), change, base))
    return drawn


def shares(metrics: Sequence[Metric], row: dict[str, Any]) -> list[Metric]:
    """The metrics that are shares and have a column in a row of edits.parquet."""
    return [metric for metric in metrics if metric.unit == SHARE and metric.column() in row]
