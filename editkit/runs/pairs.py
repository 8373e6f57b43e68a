"""Paired differences on the same cases: between runs, and between an edit and its null controls. No torch."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editkit.metrics.metric import Metric
from editkit.metrics.paired import Paired, paired
from editkit.runs.read import Run

Table = Sequence[Mapping[str, Any]]  # rows of edits.parquet


@dataclass(frozen=True)
class Pair:
    """Two runs by their places in a list, and the first minus the second for each metric."""

    first: int
    second: int
    values: dict[Metric, Paired]


def pairs(runs: Sequence[Run]) -> list[Pair]:
    """Every two runs of one task, protocol, model and data that have measured two cases or more both.

    Metrics are the headline ones. Raises RecordError for a table that cannot be read.
    """
    found = []
    for first, run in enumerate(runs):
        for second in range(first + 1, len(runs)):
            other = runs[second]
            if _measures(run) == _measures(other):
                metrics = [metric for metric in headline(run.sides()) if metric in other.sides()]
                if values := differences(metrics, run.edits, other.edits):
                    found.append(Pair(first, second, values))
    return found


def headline(metrics: Iterable[Metric]) -> list[Metric]:
    """The headline metrics, combined ones in front."""
    return sorted((metric for metric in metrics if metric.headline), key=lambda metric: not metric.combines)


def differences(metrics: Iterable[Metric], ours: Table, theirs: Table) -> dict[Metric, Paired]:
    """The paired difference of each metric that at least two cases have in both tables of edits."""
    mine, others = _by_case(ours), _by_case(theirs)
    found = {metric: paired(metric, mine, others) for metric in metrics}
    return {metric: value for metric, value in found.items() if value is not None}


def _by_case(rows: Table) -> dict[Hashable, Mapping[str, Any]]:
    return {(row.get("index"), row.get("case")): row for row in rows}


def _measures(run: Run) -> tuple[str, ...]:
    """What two runs must share for their cases to be compared one by one."""
    digests = run.record["model"].get("digest"), run.record["data"].get("digest")
    return (run.task, *map(str, digests), repr(run.record["protocol"]))
