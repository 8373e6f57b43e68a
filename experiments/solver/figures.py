"""The study's figures, table and picture, from its rows. See README.md.

python experiments/solver/figures.py ROWS.jsonl [MORE.jsonl]   # writes results.json, curves.png and README's tables
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from marked import between

from editkit.files import whole, write_text
from editkit.metrics.summary import BOUNDS, resampled

HERE = Path(__file__).parent
Table = dict[str, numpy.ndarray]  # by name, a value of each case; NaN where there is none
Cell = tuple[str, str, str]  # model, method, block
SECOND = "descent:0.07"  # the second look
# The five measures of the rule: of a table and the cases drawn [resamples, cases], a value of each resample.
MEASURES: dict[str, Callable[[Table, numpy.ndarray], numpy.ndarray]] = {
    "S": lambda t, drawn: 3 / (1 / _mean(t["ES"], drawn) + 1 / _mean(t["PS"], drawn) + 1 / _mean(t["NS"], drawn)),
    "unseen PS": lambda t, drawn: _mean(t["unseen_PS"], drawn),
    "NS": lambda t, drawn: _mean(t["NS"], drawn),
    "same subject": lambda t, drawn: _mean(t["same_subject"], drawn),
    "said freely": lambda t, drawn: _mean(t["says_rewrite"], drawn),
}


def _mean(values: numpy.ndarray, drawn: numpy.ndarray) -> numpy.ndarray:
    """[resamples]: the mean over the cases that have a value."""
    found: numpy.ndarray = numpy.nanmean(values[drawn], 1)
    return found


def tables(paths: Sequence[Path], solver: str = "descent") -> dict[Cell, dict[str, Table]]:
    """Of each cell, the rows of Adam and of `solver` as columns; the seeds one after the other, the cases the same."""
    found: dict[Cell, dict[str, list[dict[str, Any]]]] = {}
    for path in paths:
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            about = line["cell"]
            cell = (about["model"], about["method"], str(about.get("layer", "")))
            found.setdefault(cell, {}).setdefault(about["solver"], []).extend(line["rows"])
    result = {}
    for cell, solvers in found.items():
        asked = [row["case"] for row in solvers["adam"]]
        if [row["case"] for row in solvers.get(solver, [])] != asked:
            print(f"left out, not finished: {cell} by {solver}")
            continue
        result[cell] = {"adam": _columns(solvers["adam"]), "descent": _columns(solvers[solver])}
    return result


def _columns(rows: Sequence[dict[str, Any]]) -> Table:
    own: list[dict[str, Any]] = [
        row | {"evaluations": len(row["losses"]), "ended": row["losses"][-1] < 0.05} for row in rows
    ]
    names = [name for name in own[0] if name not in ("case", "losses")]
    columns = {n: numpy.array([numpy.nan if row[n] is None else float(row[n]) for row in own]) for n in names}
    longest = max(len(row["losses"]) for row in rows)
    # A fact that has ended keeps its last loss.
    curves = [row["losses"] + [row["losses"][-1]] * (longest - len(row["losses"])) for row in rows]
    return columns | {"curve": numpy.array(curves)}


def compared(cell: dict[str, Table]) -> dict[str, Any]:
    """Each measure of both solvers, the paired difference with its interval, evaluations and sizes; and the rule."""
    n = len(cell["adam"]["evaluations"])
    drawn, all_cases = resampled(n), numpy.arange(n)[None]
    found: dict[str, Any] = {"n": n, "measures": {}}
    for name, measure in MEASURES.items():
        adam, descent = (float(measure(cell[solver], all_cases)[0]) for solver in ("adam", "descent"))
        low, high = numpy.quantile(measure(cell["descent"], drawn) - measure(cell["adam"], drawn), BOUNDS)
        values = {"adam": adam, "descent": descent, "low": float(low), "high": float(high)}
        found["measures"][name] = values | {"not_worse": bool(high >= 0)}
    for name in ("evaluations", "norm", "clamp_hit", "ended", "says_unseen_paraphrase"):
        found[name] = {solver: float(numpy.nanmean(table[name])) for solver, table in cell.items()}
    found["most"] = {solver: int(table["evaluations"].max()) for solver, table in cell.items()}
    found["third"] = found["evaluations"]["descent"] <= found["evaluations"]["adam"] / 3
    found["passes"] = found["third"] and all(each["not_worse"] for each in found["measures"].values())
    return found


def markdown(results: dict[Cell, dict[str, Any]]) -> str:
    """The table of README.md."""
    head = ["", "n", "evaluations (most)", "‖δ‖ / ‖v0‖", *MEASURES, "rule"]
    lines = [head, ["---"] * len(head)]
    for (model, method, block), r in results.items():
        evaluations = " → ".join(f"{r['evaluations'][s]:.1f} ({r['most'][s]})" for s in ("adam", "descent"))
        norm = " → ".join(f"{r['norm'][s]:.2f}" for s in ("adam", "descent"))
        cells = [
            f"{m['adam']:.3f} → {m['descent']:.3f} [{m['low']:+.3f}, {m['high']:+.3f}]" for m in r["measures"].values()
        ]
        place = f"{model}, {method}" + (f", block {block}" if block else "")
        lines.append([place, str(r["n"]), evaluations, norm, *cells, "holds" if r["passes"] else "**fails**"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def other_ways(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """The table of variants.json in README.md."""
    shown = {"evaluations": ".1f", "most": "d", "norm": ".2f", "ES": ".3f", "unseen_PS": ".3f", "NS": ".3f"}
    shown |= {"same_subject": ".3f", "says_rewrite": ".3f"}
    lines = [["", "", *shown], ["---"] * (len(shown) + 2)]
    for place, variants in found.items():
        for name, values in variants.items():
            lines.append([place, name, *(format(values[key], how) for key, how in shown.items())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(cells: dict[Cell, dict[str, Table]], path: Path) -> None:
    """The loss against evaluations: median over facts, and the middle half of them."""
    figure = Figure(figsize=(4.2 * min(3, len(cells)), 3.2 * -(-len(cells) // 3)), layout="constrained")
    for number, ((model, method, block), cell) in enumerate(cells.items()):
        axes = figure.add_subplot(-(-len(cells) // 3), min(3, len(cells)), number + 1)
        for solver, colour in (("adam", "#0072b2"), ("descent", "#d55e00")):
            low, middle, high = numpy.quantile(cell[solver]["curve"], (0.25, 0.5, 0.75), axis=0)
            x = numpy.arange(1, len(middle) + 1)
            axes.plot(x, middle, color=colour, label=solver)
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.axhline(0.05, color="grey", linewidth=0.8, linestyle=":")
        axes.set(yscale="log", xlabel="evaluations", ylabel="loss")
        axes.set_title(f"{model}, {method}" + (f", block {block}" if block else ""), fontsize=9)
        axes.legend(frameon=False, fontsize=8)
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="what solver.py wrote")
    options = parser.parse_args()
    cells = tables(options.rows)
    results = {cell: compared(each) for cell, each in cells.items()}
    kept = {" | ".join(cell): each for cell, each in results.items()}
    draw(cells, HERE / "curves.png")
    new = {"results": markdown(results)}
    if again := {cell: compared(each) for cell, each in tables(options.rows, SECOND).items()}:
        new["second"] = markdown(again)
        kept |= {" | ".join((*cell, SECOND)): each for cell, each in again.items()}
    if (HERE / "variants.json").exists():
        new["variants"] = other_ways(json.loads((HERE / "variants.json").read_text(encoding="utf-8")))
    for name, table in new.items():
        between(HERE / "README.md", name, [table])
    write_text(HERE / "results.json", json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    print(new["results"])


if __name__ == "__main__":
    main()
