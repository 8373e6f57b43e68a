"""What may be chance, of several runs: paired differences on the same cases, and null controls."""

from collections.abc import Sequence
from typing import Any

from editkit.report.html import Table, Text
from editkit.runs.pairs import headline, pairs
from editkit.runs.read import Run
from editkit.settings import CONTROLS


def paired_blocks(runs: Sequence[Run], names: Sequence[str]) -> list[Any]:
    """Every two runs on the same cases: the first minus the second, and P(the first is better)."""
    found = pairs(runs)
    if not found:
        return []
    note = "The first run minus the second on the same cases, with the 95 % interval of a paired bootstrap: each "
    note += "resample draws the same cases for both. P: the share of resamples in which the first is better, ties "
    note += "counted half. Each P is of one comparison alone: of many, some are near 0 or 1 by chance."
    metrics = list(dict.fromkeys(metric for pair in found for metric in pair.values))
    rows = []
    for pair in found:
        values = [pair.values.get(metric) for metric in metrics]
        n = max(each.difference.n or 0 for each in values if each is not None)
        cells = [None if each is None else str(each) for each in values]
        rows.append([names[pair.first], names[pair.second], n, *cells])
    return [Text(note, "note"), Table(["first", "second", "n", *(m.label for m in metrics)], rows, stacked=True)]


def control_blocks(runs: Sequence[Run], names: Sequence[str]) -> list[Any]:
    """Headline metrics of each run that has null controls, under its edit and under each control."""
    rows: list[list[Any]] = []
    metrics = list(dict.fromkeys(metric for run in runs for metric in headline(run.sides())))
    for run, name in zip(runs, names, strict=True):
        described = [each for each in run.record["controls"] if each.get("name") in CONTROLS]
        shown = [("", name), *((each["name"], f"{name}, {CONTROLS[each['name']]}") for each in described)]
        for control, label in shown if described else ():
            sides = run.sides(control=control)
            why = next((str(e["skipped"]) for e in described if e["name"] == control and "skipped" in e), None)
            rows.append([label, *(sides[metric].after if metric in sides else None for metric in metrics), why])
    return [Table(["run", *(metric.label for metric in metrics), "skipped because"], rows)] if rows else []
