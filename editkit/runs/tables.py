"""From the lines of a benchmark's journals to its tables; from the journals of its shards to those of the whole.

    cases.parquet    one row a probe
    edits.parquet    one row a case: its edit and the value of every metric, in the columns that `Metric.column` names
    summary.csv      one row a metric and time: mean over cases, n, 95 % interval
    judged.jsonl     with a judge: one line an answer, its question as it was put, the verdict and its cost

With null controls the first two have a twin each, control_cases.parquet and control_edits.parquet, with a column
`control`; the summary has that column too.

The tables are a function of the lines, whatever their order: a run that was killed and gone on with, and shards of it
put together, give the bytes of a run that was not.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from editkit.files import write_bytes, write_text
from editkit.judges import prompt_of
from editkit.metrics.metric import Score
from editkit.metrics.summary import summary
from editkit.runs.names import CASES, CONTROL_CASES, CONTROL_EDITS, EDITS, JUDGED, SUMMARY
from editkit.settings import CONTROLS

Line = dict[str, Any]


class Tables:
    """The tables of a run from the lines of its journal, in the order of the data."""

    def __init__(self, lines: Sequence[Line]) -> None:
        ordered = sorted(lines, key=lambda line: line["index"])
        good = [line for line in ordered if "failed" not in line]
        bad = [line for line in ordered if "failed" in line]
        self.measured = [line for line in good if "control" not in line]
        self.failed = [_why(line) for line in bad if "control" not in line]
        self.scores = [_scores(line) for line in self.measured]
        self.summary: list[Score] = summary(self.scores)
        # Lines of null controls, by control.
        found = sorted({line["control"] for line in ordered if "control" in line}, key=list(CONTROLS).index)
        self.controlled = {name: [line for line in good if line.get("control") == name] for name in found}
        self.controls_failed = {name: [_why(line) for line in bad if line.get("control") == name] for name in found}
        self.control_summary: list[Score] = []
        for name, own in self.controlled.items():
            self.control_summary += summary([_scores(line) for line in own], control=name)

    def edit(self) -> dict[str, Any]:
        """What a record says of the edits: the largest rank, the mean norms, what a quantiser leaves of them on a
        quantised base, the spectra of the first."""
        edits = [line["edit"] for line in self.measured]
        spectra: list[Any] = next((edit["spectra"] for edit in edits if "spectra" in edit), [])
        return _sizes(self.measured) | {"spectra": spectra}

    def controls(self, described: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What a record says of the null controls: for each of `described` its edits and the cases it failed on."""
        return [
            each
            if "skipped" in each
            else each
            | _sizes(self.controlled.get(each["name"], []))
            | {"failed": self.controls_failed.get(each["name"], [])}
            for each in described
        ]

    @property
    def edits(self) -> list[dict[str, Any]]:
        """The rows of edits.parquet."""
        return [_edit_row(line) for line in self.measured]

    def control_rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of control_edits.parquet of one control."""
        return [{"control": name} | _edit_row(line) for line in self.controlled[name]]

    @property
    def asked(self) -> list[Line]:
        """What was measured of the cases: under their edits, then under the null controls."""
        return [*self.measured, *(line for own in self.controlled.values() for line in own)]

    def write(self, folder: Path) -> None:
        """Write all tables. Raises OutputError."""
        self.write_cases(folder)
        write_bytes(folder / EDITS, _parquet(self.edits))
        if self.controlled:
            rows = [{"control": name} | row for name, own in self.controlled.items() for row in _case_rows(own)]
            write_bytes(folder / CONTROL_CASES, _parquet(rows))
            write_bytes(
                folder / CONTROL_EDITS, _parquet([row for name in self.controlled for row in self.control_rows(name)])
            )
        write_text(folder / SUMMARY, self.csv())

    def write_cases(self, folder: Path) -> None:
        """Write cases.parquet alone, and judged.jsonl. Raises OutputError."""
        write_bytes(folder / CASES, _parquet(_case_rows(self.measured)))
        write_judged(folder, self.asked)

    def csv(self) -> str:
        """The summary as text; the same lines give the same bytes."""
        text = io.StringIO()
        rows = [score.to_json() for score in (*self.summary, *self.control_summary)]
        columns = [*(["control"] if self.controlled else []), "metric", "part", "when", "mean", "n", "low", "high"]
        pandas.DataFrame(rows, columns=columns).to_csv(text, index=False)
        return text.getvalue()


def judged(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """What a judge said, an entry an answer; of a lifelong run with the number of edits, of a control with its name."""
    about = [{name: line[name] for name in ("edits", "control") if name in line} for line in lines]
    return [where | entry for where, line in zip(about, lines, strict=True) for entry in line.get("judged", [])]


def write_judged(folder: Path, lines: Sequence[Line]) -> None:
    """Write judged.jsonl, where a judge was asked. Raises OutputError."""
    if found := judged(lines):
        written = (json.dumps(entry | {"prompt": prompt_of(entry)}, ensure_ascii=False) for entry in found)
        write_text(folder / JUDGED, "\n".join(written) + "\n")


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    found: bytes = pandas.DataFrame(rows).to_parquet(index=False)
    return found


def _scores(line: Line) -> list[Score]:
    return [Score.of(found) for found in line["scores"]]


def _why(line: Line) -> str:
    return f"{line['case']}: {line['failed']}"


def _case_rows(lines: Sequence[Line]) -> list[dict[str, Any]]:
    return [_whose(line) | row for line in lines for row in line["rows"]]


def _edit_row(line: Line) -> dict[str, Any]:
    values = {score.metric.column(score.when): score.value for score in _scores(line)}
    return _whose(line) | _scalars(line["edit"]) | values


def _sizes(lines: Sequence[Line]) -> dict[str, Any]:
    """How many edits the lines are of, their largest rank and their mean norms."""
    edits = [line["edit"] for line in lines]
    left = [name for name in (edits[0] if edits else {}) if name.startswith("requantized_")]
    means = {k: _mean([edit[k] for edit in edits]) for k in ("norm", "relative_norm", "seconds", *left)}
    count, rank = len({line["group"] for line in lines}), max((edit["rank"] for edit in edits), default=None)
    return {"count": count, "rank": rank, **means}


def _whose(line: Line) -> dict[str, Any]:
    return {"case": line["case"], "index": line["index"], "subject": line["subject"], "relation": line["relation"]}


def _scalars(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not isinstance(value, list | dict)}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
