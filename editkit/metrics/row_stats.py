"""Means over a case's rows, for all protocols."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def of_kind(rows: Sequence[Row], kind: str, group: str | None = None) -> list[Row]:
    """The rows of a kind; of one group where it is given."""
    return [row for row in rows if row["kind"] == kind and (group is None or row["group"] == group)]


def mean(rows: Iterable[Row], value: Callable[[Row], float | bool | None]) -> float | None:
    """The mean of `value` over the rows that have one; None without any."""
    found = [float(v) for v in map(value, rows) if v is not None]
    return sum(found) / len(found) if found else None
