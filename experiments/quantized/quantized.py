"""Quantised bases: the same benchmark on the atlas model in float32 and by each scheme and way.

    python experiments/quantized/quantized.py run RUNS             # every cell, each as its own process; goes on
    python experiments/quantized/quantized.py table RUNS           # results.json and README.md's table, from the runs
    python experiments/quantized/quantized.py table                # README.md's table again, from results.json

The two ways share their edits: those that were computed with the adapter way are given to the wide way (`RUN/edits`),
so that the two rows differ by the way alone.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from marked import between

from editkit.files import write_text
from editkit.metrics.counterfact import ES, NS, PS, SAME_SUBJECT_KEPT, UNSEEN_PS
from editkit.metrics.metric import AFTER, BEFORE
from editkit.models.quantization import SCHEMES
from editkit.models.quantized import WAYS
from editkit.runs.names import CASE_LINES, EDIT_FILES, RECORD
from editkit.runs.tables import Tables

HERE = Path(__file__).parent
METHODS = ("r_rome", "memit")
COLUMNS = {"ES": ES, "PS": PS, "unseen": UNSEEN_PS, "NS": NS, "same subject": SAME_SUBJECT_KEPT}
ASKED = ("task.measure.fluency=0", "task.measure.generate=0", "task.keep_edits=true", "device=cpu")


def cells(method: str, schemes: Sequence[str] = tuple(SCHEMES)) -> dict[str, list[str]]:
    """{name of a cell: what is asked of the command}, the float32 model first."""
    found = {"float32": ["model.quantization=null"]}
    for scheme in schemes:
        for way in WAYS:
            found[f"{scheme}, {way}"] = [f"model.quantization={scheme}", f"model.edited={way}"]
    return {name: [f"method={method}", *asked] for name, asked in found.items()}


def run(folder: Path, limit: int, methods: Sequence[str], schemes: Sequence[str]) -> None:
    """Run each cell that has no record yet."""
    for method in methods:
        for name, asked in cells(method, schemes).items():
            own = folder / method / name.replace(", ", "-")
            if (own / RECORD).exists():
                continue
            first = folder / method / name.replace(", ", "-").replace("wide", "adapter") / EDIT_FILES
            if name.endswith("wide") and first.is_dir() and not (own / EDIT_FILES).exists():
                shutil.copytree(first, own / EDIT_FILES)
            command = ["task=benchmark", "data=atlas", f"data.limit={limit}", *asked, *ASKED]
            print(method, name, flush=True)
            begun = ["resume=true"] if own.exists() else []
            subprocess.run(
                [sys.executable, "-m", "editkit.run", *command, *begun, f"hydra.run.dir={own}"],
                check=True,
                stdout=subprocess.DEVNULL,
            )


def read(folder: Path) -> dict[str, Any]:
    """{method: {cell: what its run found and was made with}} of the cells that have been run.

    Means are over the cases that all cells of a method have measured.
    """
    found: dict[str, Any] = {}
    for method in METHODS:
        folders = {name: folder / method / name.replace(", ", "-") for name in cells(method)}
        done = {name: own for name, own in folders.items() if (own / RECORD).exists()}
        lines = {name: _lines(own) for name, own in done.items()}
        shared = set.intersection(*({line["index"] for line in each} for each in lines.values())) if lines else set()
        for name, own in done.items():
            found.setdefault(method, {})[name] = _of_run(own, [ln for ln in lines[name] if ln["index"] in shared])
    return found


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The cases of a run's journal that were measured."""
    every = [json.loads(text) for text in (folder / CASE_LINES).read_text(encoding="utf-8").splitlines()[1:]]
    return [line for line in every if "failed" not in line]


def _of_run(folder: Path, lines: list[dict[str, Any]]) -> dict[str, Any]:
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    tables = Tables(lines)
    edit = {key: value for key, value in tables.edit().items() if key != "spectra"}
    command = [text for text in record["environment"]["command"][1:] if not text.startswith(("hydra.", "resume"))]
    environment = {key: record["environment"][key] for key in ("commit", "packages", "threads", "platform")}
    averages = {score.metric.column(score.when): score.average for score in tables.summary}
    scores = {name: asdict(average) for name, average in averages.items() if average}
    kept = {m.column(when): scores.get(m.column(when)) for m in COLUMNS.values() for when in (BEFORE, AFTER)}
    return {
        "command": " ".join(["python -m editkit.run", *command]),
        "model": record["model"],
        "edit": edit,
        "reversal": record["reversal"],
        "seconds": record["timings"]["total"],
        "environment": environment,
        "metrics": kept,
    }


def table(found: dict[str, Any]) -> str:
    """A row for each cell."""
    titles = [*COLUMNS, "n", "‖ΔW‖", "kept", "error", "codes changed", "every bit back"]
    lines = []
    for method, each in found.items():
        lines += ["", f"**{method}**", "", "| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
        for name, one in each.items():
            means = [one["metrics"][metric.column()] for metric in COLUMNS.values()]
            row = [_cell(mean) for mean in means] + [str(means[0]["n"]), f"{one['edit']['norm']:.2f}"]
            left = [one["edit"].get(f"requantized_{key}") for key in ("kept", "error", "codes_changed")]
            row += ["–" if value is None else f"{value:.3f}" for value in left]
            row.append("yes" if one["reversal"]["exact"] else "NO")
            lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines[1:])


def made(found: dict[str, Any]) -> str:
    """With what all of it was run."""
    each = [one for method in found.values() for one in method.values()]
    commits = sorted({one["environment"]["commit"][:7] for one in each})
    packages: dict[str, str] = each[0]["environment"]["packages"] | each[-1]["environment"]["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "bitsandbytes", "torchao"))
    threads, platform = each[0]["environment"]["threads"], each[0]["environment"]["platform"]
    total = sum(one["seconds"] for one in each)
    return "\n".join(
        [
            f"Commit {', '.join(commits)}; {versions}; {threads} thread; {platform};",
            f"{total / 60:.0f} minutes in all, on cores that other work shared. One cell: `{each[-1]['command']}`.",
        ]
    )


def _cell(mean: dict[str, Any] | None) -> str:
    """A mean with half of the width of its interval."""
    if mean is None:
        return "–"
    return f"{mean['mean']:.3f} ±{(mean['high'] - mean['low']) / 2:.3f}"


def write(found: dict[str, Any]) -> None:
    """Put the table between README.md's marks."""
    for name, part in {"table": table(found), "made": made(found)}.items():
        between(HERE / "README.md", name, [part])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("folder", type=Path, nargs="?", help="of the runs")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--schemes", nargs="+", choices=tuple(SCHEMES), default=tuple(SCHEMES))
    parser.add_argument("--limit", type=int, default=100, help="cases of the atlas in each cell")
    options = parser.parse_args()
    results = HERE / "results.json"
    if options.what == "run":
        run(options.folder.absolute(), options.limit, options.methods, options.schemes)
        return
    if options.folder is not None:
        write_text(results, json.dumps(read(options.folder), indent=1, ensure_ascii=False) + "\n")
    write(json.loads(results.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
