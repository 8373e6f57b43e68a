"""Averages by group of values that a run has written: a report divides cases, and measures nothing."""

from collections.abc import Iterable, Sequence
from typing import Any

from editkit.metrics.summary import summary
from editkit.numbers import finite
from editkit.runs.read import Average

HEADLINE = ("ES", "PS", "NS")


def average(values: Iterable[object]) -> Average | None:
    """The mean of the numbers among `values` with the interval of `metrics.summary`; None without any."""
    found = summary([{"value": finite(value)} for value in values]).get("value")
    return None if found is None else Average(found.mean, found.n, found.low, found.high)


def by(rows: Sequence[dict[str, Any]], name: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of each value of `name`, the largest group first, equal ones in order of first appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row.get(name) or "(none)"), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def headline(names: Iterable[str]) -> list[str]:
    """The metrics to show first: ES, PS and NS where they are, else the first three of the first protocol."""
    known = list(names)
    for prefix in ("counterfact.", "retention.counterfact.", "retention."):
        if found := [prefix + name for name in HEADLINE if prefix + name in known]:
            return found
    protocol = known[0].rpartition(".")[0] if known else ""
    return [name for name in known if name.rpartition(".")[0] == protocol][:3]


def score(row: dict[str, Any], names: Sequence[str]) -> float | None:
    """What worst cases are ordered by: the mean of the case's values of `names` after the edit."""
    found = [v for v in (finite(row.get(f"{name}_after")) for name in names) if v is not None]
    return sum(found) / len(found) if found else None


def worst(rows: Sequence[dict[str, Any]], names: Sequence[str], count: int) -> list[tuple[float, dict[str, Any]]]:
    """(score, row) of the `count` cases of lowest score, equal ones in the order of the data."""
    scored = [(s, row) for row in rows if (s := score(row, names)) is not None]
    return sorted(scored, key=lambda item: item[0])[:count]
