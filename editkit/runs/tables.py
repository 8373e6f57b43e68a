"""From the lines of a benchmark's journals to its tables; from the journals of its shards to those of the whole.

    cases.parquet    one row a probe
    edits.parquet    one row a case: its edit and the value of every metric, in the columns that `Metric.column` names
    summary.csv      one row a metric and time: mean over cases, n, 95 % interval
    judged.jsonl     with a judge: one line an answer, its question as it was put, the verdict and its cost

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
from editkit.runs.names import CASES, EDITS, JUDGED, SUMMARY

Line = dict[str, Any]


class Tables:
    """The tables of a run from the lines of its journal, in the order of the data."""

    def __init__(self, lines: Sequence[Line]) -> None:
        ordered = sorted(lines, key=lambda line: line["index"])
        self.measured = [line for line in ordered if "failed" not in line]
        self.failed = [f"{line['case']}: {line['failed']}" for line in ordered if "failed" in line]
        self.scores = [[Score.of(found) for found in line["scores"]] for line in self.measured]
        self.summary: list[Score] = summary(self.scores)

    def edit(self) -> dict[str, Any]:
        """What a record says of the edits: the largest rank, the mean norms, what a quantiser leaves of them on a
        quantised base, the spectra of the first."""
        edits = [line["edit"] for line in self.measured]
        left = [name for name in (edits[0] if edits else {}) if name.startswith("requantized_")]
        means = {k: _mean([edit[k] for edit in edits]) for k in ("norm", "relative_norm", "seconds", *left)}
        return {"count": len({line["group"] for line in self.measured})} | {
            "rank": max((edit["rank"] for edit in edits), default=None),
            **means,
            "spectra": next((edit["spectra"] for edit in edits if "spectra" in edit), []),
        }

    def write(self, folder: Path) -> None:
        """Write the tables. Raises OutputError."""
        edits = [
            _whose(line) | _scalars(line["edit"]) | {score.metric.column(score.when): score.value for score in scores}
            for line, scores in zip(self.measured, self.scores, strict=True)
        ]
        self.write_cases(folder)
        write_bytes(folder / EDITS, pandas.DataFrame(edits).to_parquet(index=False))
        write_text(folder / SUMMARY, self.csv())

    def write_cases(self, folder: Path) -> None:
        """Write cases.parquet alone, and judged.jsonl. Raises OutputError."""
        rows = [_whose(line) | row for line in self.measured for row in line["rows"]]
        write_bytes(folder / CASES, pandas.DataFrame(rows).to_parquet(index=False))
        write_judged(folder, self.measured)

    def csv(self) -> str:
        """The summary as text; the same lines give the same bytes."""
        text = io.StringIO()
        rows = [score.to_json() for score in self.summary]
        pandas.DataFrame(rows, columns=["metric", "part", "when", "mean", "n", "low", "high"]).to_csv(text, index=False)
        return text.getvalue()


def judged(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """What a judge said, an entry an answer; of a lifelong run with the number of edits."""
    edits = [{"edits": line["edits"]} if "edits" in line else {} for line in lines]
    return [about | entry for about, line in zip(edits, lines, strict=True) for entry in line.get("judged", [])]


def write_judged(folder: Path, lines: Sequence[Line]) -> None:
    """Write judged.jsonl, where a judge was asked. Raises OutputError."""
    if found := judged(lines):
        written = (json.dumps(entry | {"prompt": prompt_of(entry)}, ensure_ascii=False) for entry in found)
        write_text(folder / JUDGED, "\n".join(written) + "\n")


def _whose(line: Line) -> dict[str, Any]:
    return {"case": line["case"], "index": line["index"], "subject": line["subject"], "relation": line["relation"]}


def _scalars(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not isinstance(value, list | dict)}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
