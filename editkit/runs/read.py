"""Run folders as a page sees them: the record, the tables, and which folders hold a run. Reads only; no torch.

Records come from other people's runs too: any part may be missing.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError, RecordError
from editkit.metrics.metric import AFTER, BEFORE, Metric, Score
from editkit.metrics.metric import Average as Average
from editkit.numbers import finite
from editkit.runs.names import CASES, CONTROL_EDITS, EDITS, FAILED, OF_A_RUN, RECORD
from editkit.runs.record import read_record

# The parts of a record that a page reads, and the type of each; a part that is missing is an empty one.
_PARTS: dict[str, type] = {
    **dict.fromkeys(("config", "model", "edit", "reversal", "timings", "texts", "environment", "data"), dict),
    **dict.fromkeys(("trace", "verdict", "judge", "protocol", "ability"), dict),
    **dict.fromkeys(("scores", "metrics", "series", "controls"), list),
}


@dataclass(frozen=True)
class Sides:
    """One metric of a run: its average before the edit and after it."""

    metric: Metric
    before: Average | None = None
    after: Average | None = None

    @property
    def shown(self) -> Average | None:
        """After the edit; before it where that is all there is."""
        return self.after or self.before


@dataclass(frozen=True)
class Unfinished:
    """A run that has begun and has no record."""

    folder: Path
    why: str  # its error, where it failed


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what record.json holds."""

    folder: Path
    record: dict[str, Any]

    @classmethod
    def at(cls, folder: Path) -> "Run":
        """The run in a folder. Raises RecordError naming the file."""
        return cls.of(folder, read_record(folder / RECORD))

    @classmethod
    def of(cls, folder: Path, record: dict[str, Any]) -> "Run":
        """A run from what `read_record` gives. Raises RecordError where a part is of another type."""
        path = folder / RECORD
        found = dict(record)
        for name, kind in _PARTS.items():
            if found.get(name) is None:
                found[name] = kind()
            listed = kind is not list or all(isinstance(each, dict) for each in found[name])
            if not isinstance(found[name], kind) or not listed:
                what = "object" if kind is dict else "list of objects"
                raise RecordError(f"'{path}' is damaged: its '{name}' is no {what}. Run it again or remove it.")
        return cls(folder, found)

    @property
    def task(self) -> str:
        return str(self.record["task"])

    @property
    def method(self) -> str:
        return str(_of(self.record["config"], "method").get("name") or "?")

    @property
    def model(self) -> str:
        return str(self.record["model"].get("name") or "?")

    @property
    def data(self) -> str:
        """The name of the data set, "" where one fact is edited."""
        return "" if self.task == "edit" else str(_of(self.record["config"], "data").get("name") or "")

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration, flat: {"method.layer": 4, …}."""
        return flat(self.record["config"])

    @cached_property
    def declared(self) -> dict[str, Metric]:
        """The metrics that the record declares, by name."""
        metrics = [(str(found.get("name")), Metric.of(found)) for found in self.record["metrics"]]
        return dict(metrics)

    @cached_property
    def scores(self) -> list[Score]:
        """Everything measured, in the record's order; of a lifelong run, at its end."""
        return [Score.of(found, self.declared) for found in self.record["scores"]]

    @cached_property
    def series(self) -> list["Point"]:
        """The points of a lifelong run."""
        return [Point.of(found, self.declared) for found in self.record["series"]]

    def sides(self, asked: str = "", control: str = "") -> dict[Metric, Sides]:
        """Each metric before and after the edit; `asked`: of which cases of a lifelong run; `control`: under which
        null control in place of the edit."""
        return sides_of(self.scores, asked, control)

    @cached_property
    def cases(self) -> list[dict[str, Any]]:
        """cases.parquet, one row a probe; [] where there is none. Raises RecordError."""
        return self.rows(CASES)

    @cached_property
    def edits(self) -> list[dict[str, Any]]:
        """edits.parquet, one row a case; [] where there is none. Raises RecordError."""
        return self.rows(EDITS)

    @cached_property
    def control_edits(self) -> dict[str, list[dict[str, Any]]]:
        """control_edits.parquet by control, one row a case; {} where there is none. Raises RecordError."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows(CONTROL_EDITS):
            found.setdefault(str(row.get("control")), []).append(row)
        return found

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A table of the run folder. Raises RecordError."""
        path = self.folder / name
        if not path.is_file():
            return []
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:  # read_table would import pandas
                rows: list[dict[str, Any]] = file.read().to_pylist()
                return rows
        except (OSError, pyarrow.ArrowException) as error:
            why = str(error).splitlines()[0]
            raise RecordError(f"'{path}' cannot be read ({why}): it is damaged. Run it again or remove it.") from error


@dataclass(frozen=True)
class Point:
    """One measurement of a lifelong run, after so many edits."""

    edits: float
    scores: list[Score]
    relative_norm: float | None
    collapsed: bool

    @classmethod
    def of(cls, found: dict[str, Any], declared: dict[str, Metric]) -> "Point":
        listed = found.get("scores")
        scores = [Score.of(each, declared) for each in listed if isinstance(each, dict)] if listed else []
        return cls(
            finite(found.get("edits")) or 0.0, scores, finite(found.get("relative_norm")), bool(found.get("collapsed"))
        )

    def average(self, metric: Metric, asked: str = "", when: str = AFTER) -> Average | None:
        """The average of a metric of those asked, None where it was not measured."""
        found = (s for s in self.scores if (s.metric, s.asked, s.when) == (metric, asked, when))
        return next((score.average for score in found), None)


def sides_of(scores: Iterable[Score], asked: str = "", control: str = "") -> dict[Metric, Sides]:
    """Scores of the same metric side by side, before and after."""
    found: dict[Metric, dict[str, Average | None]] = {}
    for score in scores:
        if (score.asked, score.control) == (asked, control):
            found.setdefault(score.metric, {})[score.when] = score.average
    return {metric: Sides(metric, both.get(BEFORE), both.get(AFTER)) for metric, both in found.items()}


def find(folders: Iterable[Path]) -> tuple[list[Run], list[Unfinished]]:
    """Every run in the folders, at any depth, in the order of their paths, numbers as numbers.

    Raises RecordError for a damaged record or where no run has finished, ConfigError where a folder is none.
    """
    runs: dict[Path, Run] = {}
    unfinished: dict[Path, Unfinished] = {}
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"'{folder}' is no folder. Name a run's folder, or one that holds several.")
        inside = [Path(path) for path, _, files in os.walk(folder) if not OF_A_RUN.isdisjoint(files)]
        for path in sorted(inside, key=in_order):
            if (path / RECORD).exists():
                runs.setdefault(path.resolve(), Run.at(path))
            else:
                unfinished.setdefault(path.resolve(), Unfinished(path, _why(path)))
    if not runs:
        where = ", ".join(f"'{folder}'" for folder in folders)
        begun = f" {len(unfinished)} began and did not finish." if unfinished else ""
        raise RecordError(f"No {RECORD} in {where}: no run has finished there.{begun}")
    return list(runs.values()), list(unfinished.values())


def in_order(path: Path) -> list[tuple[int, int, str]]:
    """A key that sorts paths with numbers as numbers."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in path.parts]


def _why(folder: Path) -> str:
    try:
        return (folder / FAILED).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _of(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}
