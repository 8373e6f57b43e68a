"""Averages by group of values that a run has written: a report divides cases, and measures nothing."""

from collections.abc import Iterable, Sequence
from typing import Any

from editkit.report.read import Average, finite

HEADLINE = ("counterfact.ES", "counterfact.PS", "counterfact.NS")
RESAMPLES = 1000


def average(values: Iterable[object], seed: int = 0) -> Average | None:
    """The mean of the numbers among `values` and its 95 % percentile bootstrap interval; None without any."""
    import numpy

    found = numpy.array([v for v in map(finite, values) if v is not None])
    if not len(found):
        return None
    generator = numpy.random.default_rng(seed)
    means = [found[generator.integers(len(found), size=len(found))].mean() for _ in range(RESAMPLES)]
    low, high = numpy.quantile(means, [0.025, 0.975])
    return Average(float(found.mean()), len(found), float(low), float(high))


def by(rows: Sequence[dict[str, Any]], name: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of each value of `name`, the largest group first, equal ones in order of first appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row.get(name) or "(none)"), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def headline(names: Iterable[str]) -> list[str]:
    """The metrics to show first: ES, PS and NS where they are, else the first three of the first protocol."""
    known = list(names)
    found = [name for name in HEADLINE if name in known]
    if found or not known:
        return found
    protocol = known[0].rpartition(".")[0]
    return [name for name in known if name.rpartition(".")[0] == protocol][:3]


def score(row: dict[str, Any], names: Sequence[str]) -> float | None:
    """What worst cases are ordered by: the mean of the case's values of `names` after the edit."""
    found = [v for v in (finite(row.get(f"{name}_after")) for name in names) if v is not None]
    return sum(found) / len(found) if found else None


def worst(rows: Sequence[dict[str, Any]], names: Sequence[str], count: int) -> list[tuple[float, dict[str, Any]]]:
    """(score, row) of the `count` cases of lowest score, equal ones in the order of the data."""
    scored = [(s, row) for row in rows if (s := score(row, names)) is not None]
    return sorted(scored, key=lambda item: item[0])[:count]
