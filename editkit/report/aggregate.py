"""Which metrics to show first, and values that a run has written divided into groups. Nothing is measured here."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy

from editkit.metrics import summary
from editkit.metrics.metric import SHARE, Average, Metric
from editkit.numbers import finite


def average(values: Iterable[object]) -> Average | None:
    """The mean of the numbers among `values` with the interval of `metrics.summary`; None without any."""
    found = [value for value in map(finite, values) if value is not None]
    return summary.average(numpy.array(found)) if found else None


def by(rows: Sequence[dict[str, Any]], name: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of each value of `name`, the largest group first, equal ones in order of first appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row.get(name) or "(none)"), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def headline(metrics: Iterable[Metric]) -> list[Metric]:
    """The metrics to show first: those declared so, combined ones in front; else the first three shares."""
    known = list(metrics)
    first = [metric for metric in known if metric.headline]
    if first:
        return sorted(first, key=lambda metric: not metric.combines)
    return [metric for metric in known if metric.unit == SHARE][:3]


def score(row: dict[str, Any], metrics: Sequence[Metric]) -> float | None:
    """What worst cases are ordered by: the mean of the case's values of `metrics` after the edit."""
    found = [v for v in (finite(row.get(metric.column())) for metric in metrics) if v is not None]
    return sum(found) / len(found) if found else None


def worst(rows: Sequence[dict[str, Any]], metrics: Sequence[Metric], count: int) -> list[tuple[float, dict[str, Any]]]:
    """(score, row) of the `count` cases of lowest score, equal ones in the order of the data."""
    scored = [(s, row) for row in rows if (s := score(row, metrics)) is not None]
    return sorted(scored, key=lambda item: item[0])[:count]
