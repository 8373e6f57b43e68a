"""The tables and curves of this study, from the folders of its benchmarks and of its lifelong runs.

    python experiments/benchmark/make.py BENCHMARKS LIFELONG     # folders of runs; writes the JSON files and curves.png
    python experiments/benchmark/make.py                         # README.md's tables again, from the JSON files

The JSON files keep every metric with its interval (along the edits: those of the curves), by its column in
edits.parquet, and with what each run was made: commit, command, settings.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from marked import between

from editkit.data.kinds import REWRITE, UNSEEN
from editkit.files import write_text
from editkit.metrics.counterfact import ES, NS, NS_DISTRACTED, PORTABLE, PS, SAME_SUBJECT_KEPT, UNSEEN_PS, S
from editkit.metrics.drift import KL, PERPLEXITY
from editkit.metrics.fluency import GE
from editkit.metrics.generation import ANSWERED
from editkit.metrics.metric import RECENT, RETENTION, UNTOUCHED, Metric, Score
from editkit.runs.names import RECORD
from editkit.runs.read import Point, Run

HERE = Path(__file__).parent


def _key(metric: Metric, asked: str = "") -> str:
    """What a figure after the edit is called in the JSON files."""
    return ".".join(part for part in (asked, metric.column()) if part)


COLUMNS = {
    "S": _key(S),
    "ES": _key(ES),
    "PS": _key(PS),
    "unseen": _key(UNSEEN_PS),
    "NS": _key(NS),
    "NS, distracted": _key(NS_DISTRACTED),
    "same subject": _key(SAME_SUBJECT_KEPT),
    "follows": _key(PORTABLE),
    "said freely": _key(ANSWERED[REWRITE]),
    "said, unseen": _key(ANSWERED[UNSEEN]),
    "GE": _key(GE),
}
CURVES = {
    "ES of all edits so far": _key(ES, RETENTION),
    "PS of all edits so far": _key(PS, RETENTION),
    "NS of all edits so far": _key(NS, RETENTION),
    "same subject, all so far": _key(SAME_SUBJECT_KEPT, RETENTION),
    "rewrites said freely, all so far": _key(ANSWERED[REWRITE], RETENTION),
    "ES of the last stretch": _key(ES, RECENT),
    "untouched facts: true answer likelier": _key(NS, UNTOUCHED),
}
POINT = {"ES": "ES of all edits so far", "PS": "PS of all edits so far", "NS": "NS of all edits so far"}
POINT |= {"said": "rewrites said freely, all so far"}
POINT |= {"recent ES": "ES of the last stretch", "untouched": "untouched facts: true answer likelier"}
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito
MARKERS = "os^Dvx*"


def read(sweep: Path) -> dict[str, Any]:
    """{method: what its run found and was made with} of runs of one task."""
    found = {}
    for path in sorted(sweep.glob(f"*/{RECORD}")):
        record = json.loads(path.read_text(encoding="utf-8"))
        environment = {key: record["environment"][key] for key in ("commit", "packages", "threads")}
        # Where a run was started and what it wrote to does not decide what it found.
        asked = [text for text in record["environment"]["command"][1:] if not text.startswith("hydra.")]
        environment["command"] = " ".join(["python -m editkit.run", *asked])
        kept: dict[str, Any] = {key: record[key] for key in ("config", "timings", "edit", "reversal")}
        kept["edit"] = {key: kept["edit"].get(key) for key in ("count", "rank", "norm", "relative_norm", "seconds")}
        kept |= _of_format_1(record) if record.get("schema") == 1 else _measured(Run.at(path.parent))
        found[_named(record["config"]["method"])] = kept | {"environment": environment, "model": record["model"]}
    return found


def _measured(run: Run) -> dict[str, Any]:
    return {"metrics": _by_key(run.scores), "series": [_point(point) for point in run.series]}


def _of_format_1(record: dict[str, Any]) -> dict[str, Any]:
    """Of a run before format 2: its metrics had these keys already."""
    drawn = CURVES.values()
    series = [
        point | {"metrics": {key: found for key, found in point["metrics"].items() if key in drawn}}
        for point in record["series"]
    ]
    return {"metrics": record["metrics"], "series": series}


def _by_key(scores: list[Score]) -> dict[str, Any]:
    """Averages by metric, time and who was asked."""
    return {
        ".".join(part for part in (score.asked, score.metric.column(score.when)) if part): asdict(score.average)
        for score in scores
        if score.average
    }


def _point(point: Point) -> dict[str, Any]:
    """A point of a lifelong run with the figures that are drawn."""
    kl, perplexity = point.average(KL), point.average(PERPLEXITY)
    metrics = {key: found for key, found in _by_key(point.scores).items() if key in CURVES.values()}
    drift = {"kl": kl.mean if kl else None, "perplexity": perplexity.mean if perplexity else None}
    return {"edits": int(point.edits), "metrics": metrics, "relative_norm": point.relative_norm, **drift,
            "collapsed": point.collapsed}  # fmt: skip


def _named(method: dict[str, Any]) -> str:
    """The method, with the settings that were varied where they are not the model's own."""
    varied = {"null space": method.get("fraction"), "l2": method.get("l2")}
    without = [] if method.get("keep_earlier", True) else ["without K_p"]
    return ", ".join([method["name"], *(f"{name} {value:g}" for name, value in varied.items() if value), *without])


def table(found: dict[str, Any]) -> str:
    """Means over cases with half the width of their intervals."""
    lines = ["| | " + " | ".join(COLUMNS) + " | seconds an edit |", "|---" * (len(COLUMNS) + 2) + "|"]
    for method, run in found.items():
        cells = [_cell(run["metrics"].get(key)) for key in COLUMNS.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {run['edit']['seconds']:.2f} |")
    n = [str(next(iter(found.values()))["metrics"].get(key, {}).get("n", "")) for key in COLUMNS.values()]
    return "\n".join([*lines, "| n | " + " | ".join(n) + " | |"])


def points(found: dict[str, Any]) -> str:
    """The lifelong runs at some of their points."""
    titles = [*POINT, "KL", "perplexity", "‖ΔW‖/‖W‖"]
    lines = ["| | edits | " + " | ".join(titles) + " | collapsed |", "|---" * (len(titles) + 3) + "|"]
    for method, run in found.items():
        series = run["series"]
        for point in [p for p in series if p["edits"] in (100, 200, 300, 400) or p is series[-1]]:
            cells = [_cell(point["metrics"].get(CURVES[key])) for key in POINT.values()]
            cells += [f"{point['kl']:.2g}", f"{point['perplexity']:.3g}", f"{point['relative_norm']:.2f}"]
            lines.append(f"| {method} | {point['edits']} | " + " | ".join(cells) + f" | {'yes' * point['collapsed']} |")
    return "\n".join(lines)


def made(benchmark: dict[str, Any], lifelong: dict[str, Any]) -> str:
    """Each command with its commit, and the seconds of its runs."""
    runs: dict[str, list[str]] = {}
    for method, run in [*benchmark.items(), *lifelong.items()]:
        environment = run["environment"]
        command = environment["command"].replace(" resume=true", "")
        seconds = f"{method} {run['timings']['total']:.0f} s"
        runs.setdefault(f"    {command}    # commit {environment['commit'][:7]}: ", []).append(seconds)
    return "\n".join(command + ", ".join(each) for command, each in runs.items())


def room(found: list[dict[str, Any]]) -> str:
    """What room.py wrote: a row a point."""
    blocks = sorted({row["block"] for row in found})
    lines = ["| edits before | " + " | ".join(f"left, block {b}" for b in blocks) + " | ‖ΔW‖ of an edit |"]
    lines.append("|---" * (len(blocks) + 2) + "|")
    for edits in sorted({row["edits"] for row in found}):
        mine = {row["block"]: row for row in found if row["edits"] == edits}
        cells = [f"{mine[b]['left']:.2f}" for b in blocks]
        lines.append(f"| {edits} | " + " | ".join(cells) + f" | {mine[blocks[0]]['norm']:.1f} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """The curves with their intervals as bands."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 3, figsize=(12, 8.5), sharex=True, constrained_layout=True)
    flat = axes.ravel()
    for axis, (title, key) in zip(flat, CURVES.items(), strict=False):
        for (method, run), color, marker in zip(found.items(), COLORS, MARKERS, strict=False):
            there = [(p["edits"], p["metrics"][key]) for p in run["series"] if key in p["metrics"]]
            edits = [x for x, _ in there]
            axis.plot(edits, [y["mean"] for _, y in there], color=color, label=method, marker=marker, markersize=4)
            low, high = [y["low"] for _, y in there], [y["high"] for _, y in there]
            axis.fill_between(edits, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set(title=title, ylim=(-0.03, 1.03))
    rest = {"KL on prose, nats a token": "kl", "‖ΔW‖/‖W‖": "relative_norm"}
    for axis, (title, name) in zip(flat[len(CURVES) :], rest.items(), strict=True):
        for run, color, marker in zip(found.values(), COLORS, MARKERS, strict=False):
            edits = [point["edits"] for point in run["series"]]
            axis.plot(edits, [point[name] for point in run["series"]], color=color, marker=marker, markersize=4)
        axis.set(title=title)
    for axis in axes[-1]:
        axis.set_xlabel("edits")
    flat[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    return f"{found['mean']:.3f} ±{(found['high'] - found['low']) / 2:.3f}".replace("±0.", "±.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", type=Path, nargs="*", help="the folders of the two sweeps; none: print the tables")
    sweeps = parser.parse_args().sweeps
    if len(sweeps) not in (0, 2):
        parser.error("give both sweeps, or none")
    for sweep, name in zip(sweeps, ("benchmark", "lifelong"), strict=False):
        text = json.dumps(read(sweep), indent=1, ensure_ascii=False) + "\n"
        write_text(HERE / f"{name}.json", text)
    benchmark, lifelong = (
        json.loads((HERE / f"{name}.json").read_text(encoding="utf-8")) for name in ("benchmark", "lifelong")
    )
    if sweeps:
        draw(lifelong, HERE / "curves.png")
    tables = {"benchmark": table(benchmark), "lifelong": points(lifelong), "made": made(benchmark, lifelong)}
    tables["room"] = room(json.loads((HERE / "room.json").read_text(encoding="utf-8")))
    for name, each in tables.items():
        between(HERE / "README.md", name, [each])
        print(each, end="\n\n")


if __name__ == "__main__":
    main()
