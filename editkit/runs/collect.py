"""One table over many runs; the shards of a run put together."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.errors import OutputError
from editkit.judges import totals
from editkit.metrics.metric import Score
from editkit.runs.names import CASE_LINES, RECORD
from editkit.runs.read import Run, flat, in_order
from editkit.runs.record import Record, read_record, write_record

if TYPE_CHECKING:
    import pandas


def collect(folder: Path) -> "pandas.DataFrame":
    """One row for each complete run in `folder` (at any depth): settings that differ, then metrics.

    Shards of one run are put together first (`merge`), and then the run stands for them. The table's `attrs["brief"]`
    names the columns that fit a terminal: those of the headline metrics. Raises OutputError when there is no record.
    """
    import pandas

    merge(folder)
    records = _records(folder)
    if not records:
        raise OutputError(f"No {RECORD} in '{folder}': no run has finished there.")
    merged = {_without_shard(record) for record in records.values() if "shards" in record["data"]}
    rows, configured, measured, headline = [], dict[str, None](), dict[str, None](), set[str]()
    for path, record in records.items():
        if _shards(record) > 1 and _without_shard(record) in merged:
            continue
        settings = flat(record["config"])
        configured |= dict.fromkeys(settings)
        row: dict[str, Any] = {"run": str(path.parent.relative_to(folder))} | settings
        scores = Run.of(path.parent, record).scores
        means = {_column(score): score.average.mean for score in scores if score.average}
        measured |= dict.fromkeys(means)
        headline |= {_column(score) for score in scores if score.metric.headline}
        row |= means
        row |= {name: record["edit"].get(name) for name in ("rank", "norm", "relative_norm")}
        row |= {"reversal_exact": record["reversal"]["exact"], "seconds": round(record["timings"]["total"], 2)}
        rows.append(row)
    table = pandas.DataFrame(rows)
    # A method brings its own settings: they are a difference only among the runs of one method.
    by_method = table.astype(str).groupby(table["method.name"])
    differ = []
    for name in configured:
        within = max(_distinct(group[name]) for _, group in by_method)
        if within > 1 or (name == "method.name" and len(by_method) > 1):
            differ.append(name)
    found = table.loc[:, ["run", *differ, *(c for c in table.columns[1:] if c not in configured)]]
    found.attrs["brief"] = [c for c in found.columns if c not in measured or c in headline]
    return found


def merge(folder: Path) -> list[Path]:
    """Put the shards in `folder` together: a run folder `merged-N` for each set that is complete.

    Its tables are those of one run over all of the data, byte for byte. A set that lacks a shard is left as it is.
    """
    from editkit.runs.tables import Tables, judged

    sets: dict[str, dict[str, Path]] = {}
    for path, record in _records(folder).items():
        if _shards(record) > 1:
            sets.setdefault(_without_shard(record), {})[record["config"]["data"]["shard"]] = path
    written: list[Path] = []
    for shards in sets.values():
        records = [read_record(path) for path in shards.values()]
        first = records[0]
        if len(shards) < _shards(first):
            continue
        lines = []
        for path in shards.values():
            lines += [
                json.loads(line) for line in (path.parent / CASE_LINES).read_text(encoding="utf-8").splitlines()[1:]
            ]
        tables = Tables(lines)
        target = folder / f"merged-{len(written)}"
        tables.write(target)
        config = first["config"] | {"data": first["config"]["data"] | {"shard": "0/1"}}
        left_out = {"rejected": sorted({text for record in records for text in record["data"]["rejected"]})}
        values = first | {
            "config": config,
            "edit": tables.edit(),
            "scores": [score.to_json() for score in tables.summary],
            "reversal": first["reversal"] | {"exact": all(record["reversal"]["exact"] for record in records)},
            "timings": {"total": sum(record["timings"]["total"] for record in records)},
            "judge": asked | totals(judged(tables.measured)) if (asked := first.get("judge")) else None,
            "data": first["data"] | left_out | {"shard": "0/1", "shards": len(shards), "failed": tables.failed},
        }
        write_record(target, Record(**values))
        written.append(target)
    return written


def _records(folder: Path) -> dict[Path, dict[str, Any]]:
    """Every record.json under `folder`, by its path, in the order of their numbers."""
    return {path: read_record(path) for path in sorted(folder.rglob(RECORD), key=in_order)}


def _shards(record: dict[str, Any]) -> int:
    """How many shards the run of this record is one of; 1 for a run over all of its data."""
    return int(record["data"].get("shard", "0/1").split("/")[1])


def _without_shard(record: dict[str, Any]) -> str:
    """The same text for shards of one run: everything that decides its results, but the shard."""
    config = {key: value for key, value in record["config"].items() if key != "resume"}
    config["data"] = config["data"] | {"shard": None}
    return json.dumps([record["task"], config, record["model"]["digest"], record["data"].get("digest")], sort_keys=True)


def _column(score: Score) -> str:
    """The column of a score; of a lifelong run, with which cases were asked in front."""
    return ".".join(part for part in (score.asked, score.metric.column(score.when)) if part)


def _distinct(column: Any) -> int:
    """How many different values a column [runs] holds."""
    return int(column.nunique())  # Any, because by pandas' types table[name] may be a table too
