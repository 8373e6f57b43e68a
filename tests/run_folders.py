"""Run folders for the tests of reports: every task really run once on the atlas model, a few seconds each.

Faults and other settings are made on copies (`copied`), so no test invents a name that no task writes.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from editkit.config import _composed, prepare, to_config
from editkit.runs.kinds import get_task

FAST = ("method.steps=4", "method.contexts.counts=[1,1]", "moments.tokens=2000")
TRACED = ("task.trace.samples=1", "task.trace.kinds=[state,mlp]")
TASKS: dict[str, tuple[str, ...]] = {
    "edit": ("edit=gpt2_fact", *FAST),
    "benchmark": ("task=benchmark", "data.limit=3", "task.measure.fluency=20", *FAST),
    "lifelong": (
        "task=lifelong",
        "data.limit=6",
        "task.every=2",
        "task.retention=3",
        "task.untouched=2",
        "task.judge=exact",
        *FAST,
    ),
    "trace": ("task=trace", "edit=gpt2_fact", *TRACED),
    "average": ("task=trace", "data=atlas", "data.limit=3", *TRACED),
}


def really_run(folder: Path, *overrides: str) -> Path:
    """Run a task in `folder` as `editkit.run` does, without a process of its own."""
    folder.mkdir(parents=True)
    asked = dict(text.split("=", 1) for text in prepare(list(overrides)))
    config = to_config(_composed(asked))
    get_task(config.task.name).load()(config, folder, say=lambda text: None)
    return folder


def copied(source: Path, target: Path, change: Callable[[dict[str, Any]], object] | None = None) -> dict[str, Any]:
    """Copy a run's folder; `change` may alter its record. Returns the record."""
    shutil.copytree(source, target)
    (target / "report.html").unlink(missing_ok=True)
    found = record_of(target)
    if change is not None:
        change(found)
        (target / "record.json").write_text(json.dumps(found), encoding="utf-8")
    return found


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return found


def setting(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """A change of a record: the value at a dotted path."""

    def change(record: dict[str, Any]) -> None:
        *parts, last = path.split(".")
        for part in parts:
            record = record[part]
        record[last] = value

    return change


def score_of(record: dict[str, Any], metric: str, when: str = "after", asked: str = "") -> dict[str, Any]:
    """A score of a record."""
    found: dict[str, Any] = next(
        s
        for s in record["scores"]
        if (s["metric"], s["when"], s.get("asked", ""), s.get("part", "")) == (metric, when, asked, "")
    )
    return found
