"""The parts of a page that show edits in sequence: retention, drift, growth, collapse."""

from collections.abc import Sequence
from typing import Any

from editkit.numbers import finite, number
from editkit.report import charts, glossary
from editkit.report.html import Charts, Fold, Section, Table, Text
from editkit.runs.read import Average, Run

DRIFT = {
    "relative_norm": ("Growth of the weights", "‖ΔW‖ / ‖W‖"),
    "kl": ("Drift on unrelated text", "KL(unedited ‖ edited), nats"),
    "perplexity": ("Perplexity on running text", "perplexity"),
}
GROUPS = {"retention": "all edits so far", "recent": "last stretch", "untouched": "never edited"}


def edits_at(run: Run) -> list[float]:
    return [finite(point.get("edits")) or 0.0 for point in run.record["series"]]


def collapses(run: Run) -> list[float]:
    """The first number of edits at which the run is called collapsed; nothing before, nothing after."""
    found = [e for e, p in zip(edits_at(run), run.record["series"], strict=True) if p.get("collapsed")]
    return found[:1]


def metric_line(run: Run, metric: str, name: str) -> charts.Line | None:
    """One metric of a run over the number of edits, with its intervals."""
    averages = [Average.of((point.get("metrics") or {}).get(metric)) for point in run.record["series"]]
    if not any(a is not None and a.mean is not None for a in averages):
        return None
    blank = Average(None)
    kept = [a or blank for a in averages]
    return charts.Line(
        name, edits_at(run), [a.mean for a in kept], [a.low for a in kept], [a.high for a in kept], collapses(run)
    )


def drift_line(run: Run, quantity: str, name: str) -> charts.Line | None:
    values = [finite(point.get(quantity)) for point in run.record["series"]]
    if all(value is None for value in values):
        return None
    return charts.Line(name, edits_at(run), values, marks=collapses(run))


def series_metrics(runs: Sequence[Run]) -> list[str]:
    """Names of the metrics measured along the way, in the order of first appearance."""
    names: dict[str, None] = {}
    for run in runs:
        for point in run.record["series"]:
            names |= dict.fromkeys(point.get("metrics") or {})
    return list(names)


def lifelong_sections(run: Run) -> list[Section]:
    """Retention curves and drift; nothing for a run without a series."""
    if not run.record["series"]:
        return []
    endings: dict[str, list[str]] = {}
    for name in series_metrics([run]):
        endings.setdefault(name.rpartition(".")[2], []).append(name)
    drawn = []
    for ending, names in endings.items():
        curves = [line for n in names if (line := metric_line(run, n, GROUPS.get(n.rpartition(".")[0], n)))]
        if curves:
            share = glossary.meaning(names[0]).unit == glossary.SHARE
            drawn.append(charts.lines(ending, curves, "edits", f"{ending}, mean over cases", share=share))
    first = collapses(run)
    verdict = (
        Text(f"Collapsed: first called so at {number(first[0])} edits (the upright dashed line).", "bad")
        if first
        else Text(f"Not collapsed up to {number(max(edits_at(run)))} edits.", "good")
    )
    sections = [Section("retention", "Retention", [verdict, Charts(drawn), _points(run)])]
    drift = []
    for quantity, (title, label) in DRIFT.items():
        if line := drift_line(run, quantity, title):
            drift.append(charts.lines(title, [line], "edits", label + _log_note(line), log=_wide(line)))
    return sections + ([Section("drift", "Drift", [Charts(drift)])] if drift else [])


def _wide(line: charts.Line) -> bool:
    """A log axis where values differ by more than fiftyfold."""
    found = [y for y in line.y if y is not None and y > 0]
    return len(found) > 1 and max(found) > 50 * min(found)


def _log_note(line: charts.Line) -> str:
    return " (log scale)" if _wide(line) else ""


def _points(run: Run) -> Any:
    names = series_metrics([run])
    quantities = [q for q in DRIFT if any(q in point for point in run.record["series"])]
    rows = []
    for edits, point in zip(edits_at(run), run.record["series"], strict=True):
        averages = [Average.of((point.get("metrics") or {}).get(name)) for name in names]
        rows.append((edits, *averages, *(finite(point.get(q)) for q in quantities), bool(point.get("collapsed"))))
    columns = ("edits", *names, *(DRIFT[q][1] for q in quantities), "collapsed")
    return Fold(f"All {len(rows)} points as a table", [Table(columns, rows)])
