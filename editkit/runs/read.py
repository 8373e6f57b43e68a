"""Run folders as the report sees them: the record, the tables, and which folders hold a run. Reads only; no torch.

Records come from other people's runs too: any part may be missing.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError, RecordError
from editkit.numbers import finite, mean
from editkit.runs.record import CASES, CONFIG, EDITS, FAILED, RECORD

# A folder that holds one of these is a run's, begun or finished.
_OURS = {RECORD, CONFIG, FAILED, CASES, EDITS, "cases.jsonl", "edits.jsonl"}


@dataclass(frozen=True)
class Average:
    """A mean, over how many, and its 95 % interval where there is one."""

    mean: float | None
    n: int | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, found: object) -> "Average | None":
        """From a record: an object with `mean`, or a plain number."""
        if isinstance(found, dict):
            n = found.get("n")
            return cls(finite(found.get("mean")), n if isinstance(n, int) else None, finite(found.get("low")),
                       finite(found.get("high")))  # fmt: skip
        return None if finite(found) is None else cls(finite(found))

    def __str__(self) -> str:
        text = mean(self.mean)
        if self.low is not None and self.high is not None:
            text += f" [{mean(self.low)}, {mean(self.high)}]"
        return text + (f", n = {self.n:,}" if self.n is not None else "")


@dataclass(frozen=True)
class Metric:
    """One metric of a run. One that is not taken before and after (KL) has only `after`."""

    name: str  # PROTOCOL.NAME
    before: Average | None
    after: Average | None

    @property
    def protocol(self) -> str:
        return self.name.rpartition(".")[0]


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
        """Raises RecordError naming the file."""
        path = folder / RECORD
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecordError(f"No {RECORD} in '{folder}': no run has finished there.") from None
        except (OSError, ValueError) as error:
            raise RecordError(
                f"'{path}' cannot be read ({error}): it is damaged. Run it again or remove it."
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("task"), str):
            raise RecordError(
                f"'{path}' is no record of editkit: it names no task. Remove it or choose another folder."
            )
        for name in (
            "config",
            "model",
            "edit",
            "metrics",
            "reversal",
            "timings",
            "texts",
            "environment",
            "data",
            "trace",
        ):
            if not isinstance(record.get(name), dict):
                if record.get(name) is not None:
                    raise RecordError(f"'{path}' is damaged: its '{name}' is no object. Run it again or remove it.")
                record[name] = {}
        series = record.get("series") or []
        if not isinstance(series, list) or not all(isinstance(point, dict) for point in series):
            raise RecordError(f"'{path}' is damaged: its 'series' is no list of objects. Run it again or remove it.")
        return cls(folder, record | {"series": series})

    @property
    def task(self) -> str:
        return self.record["task"]

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
    def metrics(self) -> dict[str, Metric]:
        """By name, in the record's order."""
        return metrics_of(self.record["metrics"], "counterfact" if self.task == "edit" else "")

    @cached_property
    def cases(self) -> list[dict[str, Any]]:
        """cases.parquet, one row a probe; [] where there is none. Raises RecordError."""
        return self.rows(CASES)

    @cached_property
    def edits(self) -> list[dict[str, Any]]:
        """edits.parquet, one row a case; [] where there is none. Raises RecordError."""
        return self.rows(EDITS)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A table of the run folder. Raises RecordError."""
        path = self.folder / name
        if not path.is_file():
            return []
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:  # read_table would import pandas
                return file.read().to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            why = str(error).splitlines()[0]
            raise RecordError(f"'{path}' cannot be read ({why}): it is damaged. Run it again or remove it.") from error


def metrics_of(found: dict[str, Any], protocol: str = "") -> dict[str, Metric]:
    """Metrics from {NAME_before: …, NAME_after: …, NAME_n: …}, the values averages or plain numbers."""
    names: dict[str, None] = {}
    for key in found:
        base = key.removesuffix("_before").removesuffix("_after")
        if not (key.endswith("_n") and f"{key.removesuffix('_n')}_after" in found):
            names[base] = None
    metrics = {}
    for base in names:
        sides = []
        for key in (f"{base}_before", f"{base}_after" if f"{base}_after" in found else base):
            average, n = Average.of(found.get(key)), found.get(f"{base}_n")
            if average is not None and average.n is None and isinstance(n, int):
                average = Average(average.mean, n, average.low, average.high)
            sides.append(average)
        name = f"{protocol}.{base}" if protocol and "." not in base else base
        metrics[name] = Metric(name, *sides)
    return metrics


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
        inside = [Path(path) for path, _, files in os.walk(folder) if not _OURS.isdisjoint(files)]
        for path in sorted(inside, key=_in_order):
            if (path / RECORD).exists():
                runs.setdefault(path.resolve(), Run.at(path))
            else:
                unfinished.setdefault(path.resolve(), Unfinished(path, _why(path)))
    if not runs:
        where = ", ".join(f"'{folder}'" for folder in folders)
        begun = f" {len(unfinished)} began and did not finish." if unfinished else ""
        raise RecordError(f"No {RECORD} in {where}: no run has finished there.{begun}")
    return list(runs.values()), list(unfinished.values())


def _in_order(path: Path) -> list[tuple[int, int, str]]:
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
