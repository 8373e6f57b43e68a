"""Record: one result, with what is needed to run it again; written, and read with its format checked."""

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
from editkit.errors import RecordError
from editkit.files import write_bytes, write_text
from editkit.runs.names import FORMAT, RECORD
from editkit.shown import Rows, Shown

if TYPE_CHECKING:  # a report reads folders without torch and pandas, whose import takes seconds
    from editkit.models.load import LanguageModel

PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "datasets", "hydra-core", "einops", "numpy"),
    *("bitsandbytes", "torchao", "lm_eval"),
)


@dataclass(frozen=True, repr=False)
class Record(Shown):
    """What one run came to. Everything is JSON."""

    task: str
    config: dict[str, Any]
    model: dict[str, Any]
    edit: dict[str, Any]
    scores: list[dict[str, Any]]  # metrics.Score as JSON; of a lifelong run, those at the end
    reversal: dict[str, Any]
    timings: dict[str, float]  # seconds
    texts: dict[str, Any] = field(default_factory=dict)
    series: list[dict[str, Any]] = field(default_factory=list)  # the points of a lifelong run, each with its scores
    verdict: dict[str, Any] | None = None  # of one edit: landed, summary, reasons, try_ (metrics.verdict)
    trace: dict[str, Any] | None = None  # of a trace: kind (one, average), the proposal
    judge: dict[str, Any] | None = None  # of free answers: who, how it was asked, how many verdicts, their cost
    protocol: dict[str, Any] = field(default_factory=dict)  # how it edits and asks (runs.protocol); of a trace, none
    data: dict[str, Any] = field(default_factory=dict)  # source, digest, and what was left out
    # General ability: preset, and the harness's own figures before and after (they are among the scores too).
    ability: dict[str, Any] = field(default_factory=dict)
    # The null controls of a benchmark: what each does and the size of its edits, or why it is skipped.
    controls: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)  # what the scores' metrics mean, as declared
    format: int = FORMAT

    def shown(self) -> tuple[str, Rows]:
        """The task, model and method, how many figures, and whether the weights came back."""
        method = (self.config.get("method") or {}).get("name", "?")
        back = {True: "bit for bit", False: "NOT EQUAL", None: "not compared"}[self.reversal.get("exact")]
        rows = [("model", str(self.model.get("name"))), ("method", str(method)), ("scores", f"{len(self.scores):,}")]
        rows += [("points", f"{len(self.series):,}")] if self.series else []
        return f"Record of task={self.task}", [*rows, ("restored", back)]

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


def read_record(path: Path) -> dict[str, Any]:
    """record.json at `path`. Raises RecordError where it is missing, damaged, foreign or of another format."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"No {path.name} in '{path.parent}': no run has finished there.") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"'{path}' cannot be read ({error}): it is damaged. Run it again or remove it.") from error
    if not isinstance(record, dict) or not isinstance(record.get("task"), str):
        raise RecordError(f"'{path}' is no record of editkit: it names no task. Remove it or choose another folder.")
    found = record.get("format", record.get("schema"))  # format 1 called it schema
    if found != FORMAT:
        written_by = record.get("environment")
        by = written_by.get("editkit") if isinstance(written_by, dict) else None
        raise RecordError(
            f"'{path}' was written in format {found or '?'} by editkit {by or '?'}; this version ({__version__}) reads "
            f"format {FORMAT}. Run it again, or use that version."
        )
    return record
