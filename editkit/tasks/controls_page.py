"""What a page shows of a benchmark's null controls. No torch."""

from collections.abc import Sequence
from typing import Any

from editkit.metrics.metric import ABILITY, Metric
from editkit.numbers import finite
from editkit.report.html import Fold, Table, Text
from editkit.runs.pairs import differences, headline
from editkit.runs.read import Run
from editkit.settings import CONTROLS

NOTE = (
    "In place of each edit stands what ought to do less than it, on the same cases. In brackets: the 95 % bootstrap "
    "interval over cases; of a difference the same cases are drawn for both (paired). P: the share of resamples in "
    "which the edit is better, ties counted half; each is of one comparison alone."
)


def blocks(run: Run) -> list[Any]:
    """The section of the null controls; [] for a run without them. Raises RecordError."""
    described = [each for each in run.record["controls"] if each.get("name") in CONTROLS]
    if not described:
        return []
    names = [each["name"] for each in described if "skipped" not in each]
    first = headline(run.sides())
    others = [
        metric
        for metric, sides in run.sides().items()
        if metric not in first and sides.after and metric.protocol.name != ABILITY
    ]
    tables: list[Any] = [Text(NOTE, "note"), _about(run, described), _means(run, names, first, "Headline metrics")]
    found = {name: differences(first, run.edits, run.control_edits.get(name, [])) for name in names}
    rows = [
        (f"{metric.protocol.name}.{metric.label}", *(found[name].get(metric) for name in names)) for metric in first
    ]
    if any(found.values()):
        shown = [(label, *(None if each is None else str(each) for each in values)) for label, *values in rows]
        tables.append(
            Table(("metric", *(CONTROLS[name] for name in names)), shown, "The edit minus the control", stacked=True)
        )
    if others:
        tables.append(Fold("Every other metric", [_means(run, names, others, "")]))
    return tables


def _about(run: Run, described: Sequence[dict[str, Any]]) -> Table:
    """What each control is, or why it is not there, with the size of its edits."""
    rows: list[Any] = [("the edit", run.method, finite(run.record["edit"].get("relative_norm")), None)]
    for each in described:
        how = f"skipped: {each['skipped']}" if "skipped" in each else each.get("how")
        failed = each.get("failed")
        rows.append((CONTROLS[each["name"]], how, finite(each.get("relative_norm")), len(failed) if failed else None))
    return Table(("", "what it is", "‖ΔW‖/‖W‖", "cases it failed on"), rows, stacked=True)


def _means(run: Run, names: Sequence[str], metrics: Sequence[Metric], caption: str) -> Table:
    """Metrics as rows: under the edit and under each control."""
    sides = [run.sides(), *(run.sides(control=name) for name in names)]
    rows = [(f"{m.protocol.name}.{m.label}", *(own[m].after if m in own else None for own in sides)) for m in metrics]
    return Table(("metric", "the edit", *(CONTROLS[name] for name in names)), rows, caption)
