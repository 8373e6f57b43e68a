"""One table over many runs; the shards of a run put together."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.errors import OutputError
from editkit.judges import totals
from editkit.metrics.metric import Score
from editkit.runs.names import CASE_LINES, RECORD
from editkit.runs.pairs import pairs
from editkit.runs.protocol import difference
from editkit.runs.read import Run, in_order
from editkit.runs.record import Record, read_record, write_record

if TYPE_CHECKING:
    import pandas


def collect(folder: Path) -> "pandas.DataFrame":
    """One row for each complete run in `folder` (at any depth): settings that differ, then metrics.

    Shards of one run are put together first (`merge`), and then the run stands for them. The table's `attrs["brief"]`
    names the columns that fit a terminal: those of the headline metrics; `attrs["protocols"]` says how the runs'
    protocols differ, "" where they do not. Raises OutputError when there is no record.
    """
    import pandas

    merge(folder)
    runs = _runs(folder)
    rows, configured, measured, headline = [], dict[str, None](), dict[str, None](), set[str]()
    for run in runs:
        record, settings, scores = run.record, run.settings, run.scores
        configured |= dict.fromkeys(settings)
        row: dict[str, Any] = {"run": _name(run, folder)} | settings
        means = {_column(score): score.average.mean for score in scores if score.average}
        measured |= dict.fromkeys(means)
        headline |= {_column(score) for score in scores if score.metric.headline and not score.control}
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
    found.attrs["protocols"] = difference([run.record["protocol"] for run in runs if run.scores])
    found.attrs["brief"] = [c for c in found.columns if c not in measured or c in headline]
    return found


def paired(folder: Path) -> "pandas.DataFrame":
    """One row for each headline metric and two runs in `folder` on the same cases: the first minus the second with its
    interval, and P(the first is better); see `metrics.paired`. Without such runs the table is empty. Shards count
    where `collect` has put them together.

    Raises OutputError when there is no record, RecordError for a table that cannot be read.
    """
    import pandas

    runs, rows = _runs(folder), []
    for pair in pairs(runs):
        both = [runs[place] for place in (pair.first, pair.second)]
        whose = {"first": _name(both[0], folder), "second": _name(both[1], folder)}
        whose |= {"first_method": both[0].method, "second_method": both[1].method}
        for metric, found in pair.values.items():
            about = asdict(found.difference)
            about["difference"] = about.pop("mean")
            rows.append(whose | {"metric": metric.column()} | about | {"p_first_better": found.probability})
    columns = ["first", "second", "first_method", "second_method", "metric", "difference", "low", "high"]
    return pandas.DataFrame(rows, columns=[*columns, "p_first_better", "n"])


def _runs(folder: Path) -> list[Run]:
    """The complete runs in `folder`; merged shards stand for their parts. Raises OutputError when there is none."""
    records = _records(folder)
    if not records:
        raise OutputError(f"No {RECORD} in '{folder}': no run has finished there.")
    merged = {_without_shard(record) for record in records.values() if "shards" in record["data"]}
    return [
        Run.of(path.parent, record)
        for path, record in records.items()
        if not (_shards(record) > 1 and _without_shard(record) in merged)
    ]


def _name(run: Run, folder: Path) -> str:
    return str(run.folder.relative_to(folder))


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
            "scores": [score.to_json() for score in (*tables.summary, *tables.control_summary)],
            "controls": tables.controls([_described(each) for each in first.get("controls", [])]),
            "reversal": first["reversal"] | {"exact": all(record["reversal"]["exact"] for record in records)},
            "timings": {"total": sum(record["timings"]["total"] for record in records)},
            "judge": asked | totals(judged(tables.asked)) if (asked := first.get("judge")) else None,
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
    """The column of a score; in front, which cases of a lifelong run were asked, or which control was in force."""
    return ".".join(part for part in (score.control, score.asked, score.metric.column(score.when)) if part)


def _described(control: dict[str, Any]) -> dict[str, Any]:
    """What the record of a shard says of a control, without its own figures."""
    return {name: control[name] for name in ("name", "how", "skipped") if name in control}


def _distinct(column: Any) -> int:
    """How many different values a column [runs] holds."""
    return int(column.nunique())  # Any, because by pandas' types table[name] may be a table too
