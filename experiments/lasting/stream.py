"""A long stream of edits, once through and once killed on the way: are the files the same, and what does a step cost?

    python experiments/lasting/stream.py run FOLDER [key=value …]       # FOLDER/whole: once through
    python experiments/lasting/stream.py kill FOLDER [key=value …]      # FOLDER/killed: killed three times
    python experiments/lasting/stream.py results FOLDER                 # compares both: stream.json, stream.png
    python experiments/lasting/stream.py tables                         # README.md's tables again, from the JSON files

FOLDER/tens is the same with task.step=10 task.save=5, and is shown beside it. collapse.json is collapse.py's.

A kill is SIGKILL, at a step and a moment in it that the seed draws. Compared byte for byte are the session's folder and
points.jsonl, in which everything measured is.
"""

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from marked import between

from editkit.files import write_text
from editkit.runs import names
from editkit.tasks.costs import Cost, read_costs

HERE = Path(__file__).parent
STREAM = [
    "task=lifelong",
    "method=ultraedit",
    "data.stream=10000",
    "data.limit=1000",
    "task.keep=10",
    "task.save=50",
    "task.every=1000",
    "task.retention=20",
    "task.untouched=20",
    "task.measure.distracted=false",
]
WINDOW = 100  # steps of which a cost is the mean
AT = (100, 500, 1000, 2000, 5000, 10_000)


def command(folder: Path, more: list[str]) -> list[str]:
    """The run in `folder`; of keys that come twice the later value counts."""
    keys = dict(text.split("=", 1) for text in [*STREAM, *more])
    return [sys.executable, "-m", "editkit.run", *(f"{k}={v}" for k, v in keys.items()), f"hydra.run.dir={folder}"]


def kill(folder: Path, more: list[str], kills: int, seed: int) -> None:
    """Run the stream, kill it at `kills` drawn steps, go on each time; write kills.json behind it."""
    keys = dict(text.split("=", 1) for text in [*STREAM, *more])
    draw = random.Random(seed)
    at = sorted(draw.sample(range(1, int(keys["data.stream"]) // int(keys.get("task.step", 1))), kills))
    done = []
    for step in [*at, None]:
        resume = ["resume=true"] if (folder / names.POINT_LINES).exists() else []
        process = subprocess.Popen([*command(folder, more), *resume], stderr=subprocess.DEVNULL)
        while process.poll() is None:
            time.sleep(0.05 + draw.random())
            if step is not None and (reached := last_step(folder / names.COSTS)) >= step:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done.append({"drawn": step, "killed_after": reached, "saved": saved(folder)})
                print(f"killed after step {reached}; session.json has {done[-1]['saved']} steps", flush=True)
        if step is None and process.returncode:
            sys.exit(process.returncode)
        if step is not None and process.returncode != -signal.SIGKILL:
            sys.exit(f"the run ended by itself, with {process.returncode}, before step {step}")
    write_text(folder / "kills.json", json.dumps(done, indent=1) + "\n")


def last_step(path: Path) -> int:
    """The step of the last whole line of costs.jsonl; -1 without one."""
    if not path.exists():
        return -1
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 500))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else -1


def saved(folder: Path) -> int:
    """How many steps session.json has, the folded ones too."""
    path = folder / names.SESSION / "session.json"
    if not path.exists():
        return 0
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["folded"] is None:
        return len(found["steps"])
    from editkit.folded import read_folded

    return len(found["steps"]) + read_folded(path.parent / found["folded"]["file"])[0].steps


def contents(folder: Path) -> dict[str, str]:
    """sha256 of each file that must not depend on kills."""
    files = [folder / names.POINT_LINES, *sorted((folder / names.SESSION).iterdir())]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def window(costs: list[Cost], end: int) -> dict[str, Any]:
    """What steps cost up to `end`, over the last WINDOW of them."""
    mine = [cost for cost in costs if end - WINDOW <= cost.step < end]
    return {
        "steps": end,
        "cpu": mean(cost.cpu for cost in mine),
        "cpu_median": median(cost.cpu for cost in mine),
        "seconds_median": median(cost.seconds for cost in mine),
        "rss": mine[-1].rss,
        "anonymous": mine[-1].anonymous,
    }


def results(folder: Path) -> dict[str, Any]:
    """What both runs show, or the one that there is."""
    whole, killed = folder / "whole", folder / "killed"
    found: dict[str, Any] = {"window": WINDOW}
    costs = read_costs(whole / names.COSTS)
    found["costs"] = [window(costs, end) for end in range(WINDOW, len(costs) + 1, WINDOW)]
    lines = [json.loads(line) for line in (whole / names.POINT_LINES).read_text(encoding="utf-8").splitlines()]
    found["config"] = lines[0]["config"]
    found["points"] = [point_of(line) for line in lines if "edits" in line]
    if (whole / names.RECORD).exists():  # the run has ended
        record = json.loads((whole / names.RECORD).read_text(encoding="utf-8"))
        found |= {key: record[key] for key in ("reversal", "timings")}
        found["commit"] = record["environment"]["commit"]
    found["contents"] = contents(whole)
    found["bytes"] = {path.name: path.stat().st_size for path in sorted((whole / names.SESSION).iterdir())}
    if (killed / "kills.json").exists():
        theirs = contents(killed)
        found["kills"] = json.loads((killed / "kills.json").read_text(encoding="utf-8"))
        found["differ"] = sorted(n for n in {*theirs, *found["contents"]} if theirs.get(n) != found["contents"].get(n))
    return found


def point_of(point: dict[str, Any]) -> dict[str, Any]:
    """The figures of a point that the table shows."""
    kept = {"edits": point["edits"], "relative_norm": point["relative_norm"], "alarm": point["alarm"]}
    scores = {f"{s.get('asked') or ''} {s['metric']}".strip(): s.get("mean") for s in point["scores"]}
    return kept | {name: scores.get(name) for name in SHOWN.values()}


SHOWN = {
    "ES": "retention counterfact.ES",
    "said freely": "retention generation.rewrite",
    "ES, last stretch": "recent counterfact.ES",
    "untouched": "untouched counterfact.NS",
    "perplexity": "drift.perplexity",
}


def costs_table(found: dict[str, Any]) -> str:
    """A row for some numbers of steps."""
    shown = [row for row in found["costs"] if row["steps"] in AT or row is found["costs"][-1]]
    lines = ["| after step | CPU ms a step | of the first | median ms | RSS MiB | not mapped MiB |", "|---" * 6 + "|"]
    for row in shown:
        cells = [f"{1000 * row['cpu']:.1f}", f"{row['cpu'] / shown[0]['cpu']:.2f} ×"]
        cells.append(f"{1000 * row['seconds_median']:.1f}")
        cells += [f"{row[name] / 2**20:.0f}" for name in ("rss", "anonymous")]
        lines.append(f"| {row['steps']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def points_table(found: dict[str, Any]) -> str:
    """A row a point."""
    columns = ["edits", *SHOWN, "‖ΔW‖/‖W‖", "‖ΔW‖/√n", "limits passed"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for point in found["points"]:
        cells = ["–" if point[name] is None else f"{point[name]:.3g}" for name in SHOWN.values()]
        alarm = point["alarm"]
        cells += [f"{point['relative_norm']:.2f}", f"{alarm['per_fact']:.2f}", ", ".join(alarm["passed"]) or "none"]
        lines.append(f"| {point['edits']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kills_table(found: dict[str, Any]) -> str:
    """A row a kill, and what differs."""
    if "kills" not in found:
        return "Not compared."
    lines = ["| kill | after step | steps in session.json |", "|---|---|---|"]
    lines += [f"| {n} | {k['killed_after'] + 1:,} | {k['saved']:,} |" for n, k in enumerate(found["kills"], 1)]
    lines.append(
        f"\nFiles compared: {len(found['contents'])}. Files that differ: {', '.join(found['differ']) or 'none'}."
    )
    return "\n".join(lines)


def collapse_table(found: dict[str, Any]) -> str:
    """What the alarm saw and said, and the digests."""
    lines = ["| step | ‖ΔW‖/‖W‖ | ‖ΔW‖/√n | perplexity × | untouched | limits passed |", "|---" * 6 + "|"]
    for row in found["looks"]:
        cells = [f"{row[name]:.3g}" for name in ("growth", "per_fact", "perplexity", "untouched")]
        lines.append(f"| {row['step']} | " + " | ".join(cells) + f" | {', '.join(row['passed']) or 'none'} |")
    lines += ["", "| digest of the weights | |", "|---|---|"]
    lines += [f"| {what} | `{digest[:16]}` |" for what, digest in found["digests"].items()]
    return "\n".join([f"    {found['line']}", f"    {found['outcome']}", "", *lines])


def growth_table(found: list[dict[str, Any]]) -> str:
    """A row a look."""
    lines = ["| step | tensors | objects | traced MiB | not mapped MiB | after malloc_trim |", "|---" * 6 + "|"]
    for row in found:
        sizes = " | ".join(f"{row[name] / 2**20:.1f}" for name in ("traced", "before", "trimmed"))
        lines.append(f"| {row['step']} | {row['tensors']} | {row['objects']:,} | {sizes} |")
    return "\n".join(lines)


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "costs": ("stream.json", costs_table),
    "points": ("stream.json", points_table),
    "kills": ("stream.json", kills_table),
    "costs tens": ("tens.json", costs_table),
    "points tens": ("tens.json", points_table),
    "kills tens": ("tens.json", kills_table),
    "collapse": ("collapse.json", collapse_table),
    "growth": ("growth.json", growth_table),
}


def draw(found: dict[str, Any], path: Path) -> None:
    """CPU time and memory of a step against steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    steps = [row["steps"] for row in found["costs"]]
    left.plot(steps, [1000 * row["cpu"] for row in found["costs"]], color="#2b6cb0", label="mean")
    left.plot(steps, [1000 * row["cpu_median"] for row in found["costs"]], color="#c05621", label="median")
    left.set(title=f"CPU time of a step, over {found['window']} steps", xlabel="steps", ylabel="ms", ylim=(0, None))
    left.legend(frameon=False)
    right.plot(steps, [row["rss"] / 2**20 for row in found["costs"]], color="#2b6cb0", label="resident")
    right.plot(steps, [row["anonymous"] / 2**20 for row in found["costs"]], color="#c05621", label="not mapped")
    right.set(title="Memory of the process", xlabel="steps", ylabel="MiB", ylim=(0, None))
    right.legend(frameon=False)
    figure.savefig(path, dpi=110)


def fill() -> None:
    """Put the tables between their marks in README.md; of a JSON file that is not there none."""
    for name, (file, table) in TABLES.items():
        if (HERE / file).exists():
            shown = table(json.loads((HERE / file).read_text(encoding="utf-8")))
            between(HERE / "README.md", name, shown.split("\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "kill", "results", "tables"))
    parser.add_argument("folder", type=Path, nargs="?", default=Path("lasting"))
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    chosen, more = parser.parse_known_args()
    folder = chosen.folder.resolve()
    if chosen.what == "run":
        sys.exit(subprocess.call(command(folder / "whole", more)))
    if chosen.what == "kill":
        kill(folder / "killed", more, chosen.kills, chosen.seed)
        return
    if chosen.what == "results":
        name = "tens" if folder.name == "tens" else "stream"
        found = results(folder)
        write_text(HERE / f"{name}.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        draw(found, HERE / f"{name}.png")
    fill()


if __name__ == "__main__":
    main()
