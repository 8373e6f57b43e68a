"""What lasts: every method, one definition, one stream of edits, one table. See README.md.

    python experiments/lasting/lasting.py run RUNS --hours 2        # the cells in order; each goes on where it stopped
    python experiments/lasting/lasting.py run RUNS --methods memit memit_seq --batches 100 --most 1000
    python experiments/lasting/lasting.py run RUNS --model FOLDER --name deep       # another organism
    python experiments/lasting/lasting.py table RUNS                # results.json and README.md's table, from the runs
    python experiments/lasting/lasting.py table                     # README.md's table again, from results.json

A cell is a method and a number of facts an edit. It is one `task=lifelong` over a stream of facts, measured at 100,
1,000, 2,000 and 10,000 edits. A cell whose alarm calls it broken ends there: what comes later can be no better.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from editkit.data.kinds import NEIGHBORHOOD, PARAPHRASE, REWRITE, SAME_SUBJECT
from editkit.files import write_text
from editkit.metrics.drift import PERPLEXITY
from editkit.metrics.metric import RETENTION, UNTOUCHED, Average
from editkit.metrics.natural import RIGHT
from editkit.runs.names import COSTS, RECORD
from editkit.runs.read import Run
from editkit.tasks.costs import read_costs

HERE = Path(__file__).parent
# The quick ones first, so that a time limit leaves whole rows.
METHODS = (
    "ultraedit", "stableedit", "ft_bf", "ft", "ft_l", "crispedit", "mend", "memit", "memit_seq", "emmet", "pmet",
    "alphaedit", "betaedit", "encore", "r_rome", "rome", "lora", "kn", "anyedit", "grace", "ike",
)  # fmt: skip
BATCHES = (100, 10, 1)
POINTS = (100, 1_000, 2_000, 10_000)
FACTS = 1_000  # that the stream edits again and again
ASKED = (
    "task=lifelong", "data=atlas", "device=cpu", "task.retention=100", "task.untouched=100",
    "task.measure.distracted=false", "task.on_collapse=stop", "task.save=1000",
)  # fmt: skip
COLUMNS = {
    "written": (RIGHT[REWRITE], RETENTION),
    "paraphrase": (RIGHT[PARAPHRASE], RETENTION),
    "neighborhood": (RIGHT[NEIGHBORHOOD], RETENTION),
    "same subject": (RIGHT[SAME_SUBJECT], RETENTION),
    "untouched": (RIGHT[NEIGHBORHOOD], UNTOUCHED),
    "perplexity": (PERPLEXITY, ""),
}
BEGIN, END = "<!-- table -->", "<!-- /table -->"


def cells(methods: Sequence[str], batches: Sequence[int]) -> Iterator[tuple[str, int]]:
    """(method, facts an edit), in the order they are run."""
    for batch in batches:
        for method in methods:
            yield method, batch


def command(folder: Path, model: str, method: str, batch: int, most: int) -> list[str]:
    """What runs a cell, or goes on with it."""
    asked = [*ASKED, f"model={model}", f"method={method}", f"task.step={batch}", f"data.stream={most}"]
    points = ",".join(str(point) for point in POINTS if point <= most)
    asked += [
        f"data.limit={min(FACTS, most)}",
        f"task.at=[{points}]",
        f"task.every={most}",
        f"task.alarm.every={max(1, 100 // batch)}",
    ]
    begun = ["resume=true"] if folder.exists() else []
    return [sys.executable, "-m", "editkit.run", *asked, *begun, f"hydra.run.dir={folder}"]


def run(options: argparse.Namespace) -> None:
    """Run each cell that has no record yet, until the time is over."""
    end = time.monotonic() + 3600 * options.hours
    for method, batch in cells(options.methods, options.batches):
        folder = options.runs / options.name / f"{method}-{batch}"
        if (folder / RECORD).exists():
            continue
        left = end - time.monotonic()
        if left <= 0:
            print("the time is over; the same command goes on")
            return
        print(f"{options.name}: {method}, {batch} an edit", flush=True)
        try:
            done = subprocess.run(
                command(folder, options.model, method, batch, options.most),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=min(left, 60 * options.minutes),
            )
        except subprocess.TimeoutExpired:
            print("  not done in its time; the same command goes on with it")
            continue
        if done.returncode:
            print("  " + (done.stderr.strip().splitlines() or ["it failed without a word"])[-1])


def read(folder: Path) -> list[dict[str, Any]]:
    """One row a cell and point, of the cells that have ended."""
    rows = []
    for organism in sorted(path for path in folder.iterdir() if path.is_dir()):
        for method, batch in cells(METHODS, BATCHES):
            own = organism / f"{method}-{batch}"
            if (own / RECORD).exists():
                rows += _of_run(Run.at(own), organism.name, method, batch)
    return rows


def _of_run(found: Run, organism: str, method: str, batch: int) -> list[dict[str, Any]]:
    costs = read_costs(found.folder / COSTS)
    first = found.series[0]
    rows = []
    for point in found.series:
        steps = [cost for cost in costs if cost.step < -(-point.edits // batch)]
        if not point.edits or not steps:
            continue
        scores = {name: point.average(metric, asked) for name, (metric, asked) in COLUMNS.items()}
        began = first.average(PERPLEXITY, "")
        rows.append(
            {
                "organism": organism,
                "method": method,
                "batch": batch,
                "edits": point.edits,
                "scores": {name: asdict(average) for name, average in scores.items() if average},
                "perplexity_before": None if began is None else began.mean,
                "relative_norm": point.relative_norm,
                "collapsed": point.collapsed,
                "seconds_an_edit": sum(cost.cpu for cost in steps) / point.edits,
                "bytes_an_edit": (steps[-1].anonymous - steps[0].anonymous) / point.edits,
                "failed": len(found.record["data"].get("failed") or ()),
                "commit": found.record["environment"].get("commit"),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each method, batch and point."""
    titles = ["organism", "method", "batch", "edits", *COLUMNS, "‖ΔW‖/‖W‖", "CPU s an edit", "kB an edit", ""]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for row in rows:
        cells = [row["organism"], row["method"], str(row["batch"]), f"{row['edits']:,}"]
        for name in COLUMNS:
            average = Average.of(row["scores"].get(name))
            if average is None:
                cells.append("")
            elif name == "perplexity":
                cells.append(f"{average.mean / row['perplexity_before']:.2f} ×")
            else:
                low, high = average.interval or (average.mean, average.mean)
                cells.append(f"{average.mean:.2f} [{low:.2f}, {high:.2f}]")
        cells += [f"{row['relative_norm']:.2f}", f"{row['seconds_an_edit']:.3f}", f"{row['bytes_an_edit'] / 1e3:.1f}"]
        cells.append("broken" if row["collapsed"] else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", required=True)
    running = ways.add_parser("run", help="run the cells that have not ended")
    running.add_argument("runs", type=Path, metavar="RUNS")
    running.add_argument(
        "--methods", nargs="+", default=METHODS, choices=METHODS, metavar="METHOD", help="default: all"
    )
    running.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="facts an edit; default: 100 10 1")
    running.add_argument("--most", type=int, default=POINTS[-1], help="edits of a cell; default: 10,000")
    running.add_argument("--model", default="atlas", help="the organism: a folder, or atlas")
    running.add_argument("--name", default="atlas", help="what the table calls it")
    running.add_argument("--hours", type=float, default=24.0, help="in all")
    running.add_argument("--minutes", type=float, default=24 * 60.0, help="of one cell in one go")
    showing = ways.add_parser("table", help="write results.json and the table in README.md")
    showing.add_argument("runs", type=Path, metavar="RUNS", nargs="?")
    options = parser.parse_args()
    if options.way == "run":
        run(options)
        return
    results = HERE / "results.json"
    if options.runs is not None:
        write_text(results, json.dumps(read(options.runs), indent=1) + "\n")
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    write_text(readme, "\n".join([before + BEGIN, table(json.loads(results.read_text(encoding="utf-8"))), after]))


if __name__ == "__main__":
    main()
