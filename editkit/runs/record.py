"""Record: one result, with what is needed to run it again. The run folder, and one table over many runs."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit import __version__
from editkit.errors import OutputError
from editkit.files import write_bytes, write_text

if TYPE_CHECKING:  # a report reads folders without torch and pandas, whose import takes seconds
    import pandas

    from editkit.models.load import LanguageModel

SCHEMA = 1
RECORD, CONFIG, EDIT, CASES, TABLE = "record.json", "config.yaml", "edit.safetensors", "cases.parquet", "table.csv"
AUDIT = "audit.parquet"
EDITS, REPORT, FAILED = "edits.parquet", "report.html", "failed.txt"
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "hydra-core", "einops", "numpy")


@dataclass(frozen=True)
class Record:
    """What one run found. Everything is JSON."""

    task: str
    config: dict[str, Any]
    model: dict[str, Any]
    edit: dict[str, Any]
    metrics: dict[str, Any]
    reversal: dict[str, Any]
    timings: dict[str, float]  # seconds
    texts: dict[str, Any] = field(default_factory=dict)
    series: list[dict[str, Any]] = field(default_factory=list)  # the points of a lifelong run
    trace: dict[str, Any] | None = None  # of a trace: kind (one, average), the proposal
    data: dict[str, Any] = field(default_factory=dict)  # source, digest, and what was left out
    environment: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def environment(lm: "LanguageModel") -> dict[str, Any]:
    """Versions, commit, device and command of this process."""
    import torch

    device = lm.device
    return {
        "editkit": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this package runs from, "-dirty" appended when files differ; None in a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("-dirty" if changed.strip() else "")


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as Parquet."""
    import pandas

    return write_bytes(path, pandas.DataFrame(rows).to_parquet(index=False))


def write_record(folder: Path, record: Record) -> Path:
    """record.json: written last, so a folder that has one is complete."""
    return write_text(folder / RECORD, record.to_json())


def collect(folder: Path) -> "pandas.DataFrame":
    """One row for each complete run in `folder` (at any depth): settings that differ, then metrics.

    Shards of one run are put together first (`merge`), and then the run stands for them. Raises OutputError when there
    is no record.
    """
    import pandas

    merge(folder)
    records = _records(folder)
    if not records:
        raise OutputError(f"No {RECORD} in '{folder}': no run has finished there.")
    whole = {_without_shard(record) for record in records.values() if "shards" in record["data"]}
    rows, configured = [], dict[str, None]()
    for path, record in records.items():
        if _shards(record) > 1 and _without_shard(record) in whole:
            continue
        settings = _flat(record["config"])
        configured |= dict.fromkeys(settings)
        row = {"run": str(path.parent.relative_to(folder))} | settings
        row |= {k: v["mean"] if isinstance(v, dict) else v for k, v in record["metrics"].items()}
        row |= {name: record["edit"].get(name) for name in ("rank", "norm", "relative_norm")}
        row |= {"reversal_exact": record["reversal"]["exact"], "seconds": round(record["timings"]["total"], 2)}
        rows.append(row)
    table = pandas.DataFrame(rows)
    # A method brings its own settings: they are a difference only among the runs of one method.
    by_method = table.astype(str).groupby(table["method.name"])
    differ = [
        c for c in configured if (c == "method.name" and table[c].nunique() > 1) or by_method[c].nunique().max() > 1
    ]
    return table[["run", *differ, *(c for c in table.columns[1:] if c not in configured)]]


def merge(folder: Path) -> list[Path]:
    """Put the shards in `folder` together: a run folder `merged-N` for each set that is whole.

    Its tables are those of one run over all of the data, byte for byte. A set that lacks a shard is left as it is.
    """
    from editkit.runs.tables import JOURNAL, Tables

    sets: dict[str, dict[str, Path]] = {}
    for path, record in _records(folder).items():
        if _shards(record) > 1:
            sets.setdefault(_without_shard(record), {})[record["config"]["data"]["shard"]] = path
    written: list[Path] = []
    for shards in sets.values():
        records = [json.loads(path.read_text(encoding="utf-8")) for path in shards.values()]
        first = records[0]
        if len(shards) < _shards(first):
            continue
        lines = []
        for path in shards.values():
            lines += [json.loads(line) for line in (path.parent / JOURNAL).read_text(encoding="utf-8").splitlines()[1:]]
        tables = Tables(lines)
        target = folder / f"merged-{len(written)}"
        tables.write(target)
        config = first["config"] | {"data": first["config"]["data"] | {"shard": "0/1"}}
        left_out = {"rejected": sorted({text for record in records for text in record["data"]["rejected"]})}
        values = first | {
            "config": config,
            "edit": tables.edit(),
            "metrics": tables.metrics(),
            "reversal": first["reversal"] | {"exact": all(record["reversal"]["exact"] for record in records)},
            "timings": {"total": sum(record["timings"]["total"] for record in records)},
            "data": first["data"] | left_out | {"shard": "0/1", "shards": len(shards), "failed": tables.failed},
        }
        write_record(target, Record(**values))
        written.append(target)
    return written


def _records(folder: Path) -> dict[Path, dict[str, Any]]:
    """Every record.json under `folder`, by its path, in the order of their numbers."""
    paths = sorted(
        folder.rglob(RECORD), key=lambda path: [(not s.isdigit(), int(s) if s.isdigit() else 0, s) for s in path.parts]
    )
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def _shards(record: dict[str, Any]) -> int:
    """How many shards the run of this record is one of; 1 for a run over all of its data."""
    return int(record["data"].get("shard", "0/1").split("/")[1])


def _without_shard(record: dict[str, Any]) -> str:
    """The same text for shards of one run: everything that decides its results, but the shard."""
    config = {key: value for key, value in record["config"].items() if key != "resume"}
    config["data"] = config["data"] | {"shard": None}
    return json.dumps([record["task"], config, record["model"]["digest"], record["data"].get("digest")], sort_keys=True)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
