"""The tables of lasting.json: in README.md how long each method lives and which published orderings hold, in TABLE.md
everything.

python experiments/lasting/lasted.py
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from marked import between, table

from editkit.files import write_text

HERE = Path(__file__).parent
Cell = dict[str, Any]
SHORT = (100, 200, 500, 1000)  # edits of the short tables' columns
MEASURED = (100, 200, 500, 1000, 2000, 5000, 10_000)  # edits at which cells are measured
COLUMNS = ("written", "said freely", "paraphrase", "same subject", "goes on", "untouched")


@dataclass(frozen=True)
class Claim:
    """A published ordering: after `edits` in steps of `batch`, `better` is above `worse` in `column`."""

    better: str
    worse: str
    batch: int
    edits: int
    source: str
    column: str = "said freely"


# The papers measured other models and data, and most of them teacher-forced. Here all are judged by free answers.
CLAIMS = (
    Claim("alphaedit", "memit", 100, 2000, "arXiv 2410.02355, table 1"),
    Claim("memit_seq", "memit", 100, 2000, "arXiv 2605.26670"),
    Claim("memit_seq", "alphaedit", 100, 2000, "arXiv 2605.26670"),
    Claim("alphaedit, NAS", "alphaedit", 1, 10_000, "arXiv 2602.02543"),
    Claim("memit, NAS", "memit", 1, 10_000, "arXiv 2602.02543"),
    Claim("alphaedit, NAS", "alphaedit", 100, 10_000, "arXiv 2602.02543, there one by one"),
    Claim("memit, NAS", "memit", 100, 10_000, "arXiv 2602.02543, there one by one"),
    Claim("alphaedit", "ultraedit", 1, 10_000, "arXiv 2602.02543"),
    Claim("ultraedit", "alphaedit", 100, 10_000, "arXiv 2505.14679"),
    Claim("stableedit", "ultraedit", 100, 10_000, "arXiv 2605.11836"),
    Claim("encore", "memit", 100, 10_000, "arXiv 2502.01636"),
    Claim("encore", "alphaedit", 100, 10_000, "arXiv 2502.01636"),
    Claim("betaedit", "alphaedit", 100, 10_000, "BetaEdit, IJCAI 2026"),
    Claim("alphaedit, SPHERE", "alphaedit", 100, 2000, "SPHERE, ICLR 2026"),
    Claim("memit_seq, SimIE", "memit_seq", 100, 1000, "SimIE"),
    Claim("ft_bf", "alphaedit", 100, 10_000, "arXiv 2509.22072"),
    Claim("ft_bf", "ultraedit", 100, 10_000, "arXiv 2509.22072"),
    Claim("ft_bf", "ft_l", 100, 2000, "arXiv 2509.22072"),
    Claim("crispedit", "ft_bf", 100, 2000, "arXiv 2602.15823", "untouched"),
    Claim("r_rome", "rome", 1, 1000, "arXiv 2403.07175"),
)


def at(cell: Cell, edits: int) -> dict[str, Any] | None:
    """The point after exactly so many edits."""
    return next((point for point in cell["points"] if point["edits"] == edits), None)


def figure(value: list[float] | None) -> str:
    """A mean with its interval, in per cent."""
    if value is None or value[0] is None:
        return "–"
    mean, low, high, _ = value
    return f"{100 * mean:.0f}" + ("" if low is None else f" [{100 * low:.0f}, {100 * high:.0f}]")


def ending(cell: Cell) -> str:
    """How a cell ended, in a few words."""
    if cell["failed"] >= cell["edits"] > 0:
        return "refused"
    if cell["broken"] is not None:
        return f"broken at {cell['broken']:,}"
    refused = f", {cell['failed']:,} refused" if cell["failed"] else ""
    return ("held to the end" if cell["ended"] else f"stopped at {cell['edits']:,}") + refused


def lives(cells: list[Cell], models: list[str]) -> list[str]:
    """A row a method: after how many edits it was broken, on each model, one, ten and a hundred at a time."""
    batches = sorted({cell["batch"] for cell in cells})
    head = ["method", *(f"{model}, {batch}" for model in models for batch in batches)]
    rows: list[list[str]] = []
    for method in dict.fromkeys(cell["method"] for cell in cells):
        found = {(cell["model"], cell["batch"]): cell for cell in cells if cell["method"] == method}
        rows.append([method, *(_life(found.get((model, batch))) for model in models for batch in batches)])
    return table(head, rows)


def _life(cell: Cell | None) -> str:
    """When a cell was broken, and how many edits the method itself refused; else "> N" where its time ended, and
    "held N" at the end of the stream."""
    if cell is None:
        return "–"
    if cell["failed"] >= cell["edits"] > 0:
        return "refused"
    if cell["broken"] is not None:
        return f"{cell['broken']:,}" + (f", {cell['failed']:,} refused" if cell["failed"] else "")
    if cell["failed"]:
        return f"refuses after {cell['edits'] - cell['failed']:,}"
    if writes_nothing(cell):
        return "writes nothing"
    return f"held {cell['edits']:,}" if cell["ended"] else f"> {cell['edits']:,}"


def short(cells: list[Cell], model: str, batch: int) -> list[str]:
    """A row a method: free answers of the facts edited, and of those never edited, after SHORT edits."""
    head = ["method", *(f"said freely, {n:,}" for n in SHORT), *(f"untouched, {n:,}" for n in SHORT)]
    head += ["end", "CPU s an edit", "kB an edit"]
    rows: list[list[str]] = []
    for cell in cells:
        if (cell["model"], cell["batch"]) != (model, batch):
            continue
        row = [cell["method"]]
        for column in ("said freely", "untouched"):
            for edits in SHORT:
                point = at(cell, edits)
                refused = cell["failed"] >= cell["edits"] > 0
                row.append(figure(point.get(column)) if point and not refused else _gone(cell, edits))
        cost = "–" if cell["cpu"] is None else f"{cell['cpu']:.3f}"
        size = "–" if cell["bytes"] is None else f"{cell['bytes'] / 1000:.1f}"
        rows.append([*row, ending(cell), cost, size])
    return table(head, rows)


def _gone(cell: Cell, edits: int) -> str:
    """What stands where there is no point: the model was broken by then, or was not brought so far."""
    return "broken" if cell["broken"] is not None and cell["broken"] < edits else "–"


def whole(cells: list[Cell]) -> list[str]:
    """Every point of every cell."""
    head = ["model", "method", "facts a step", "edits", *COLUMNS, "perplexity ×", "‖ΔW‖/‖W‖", "‖ΔW‖/√n"]
    rows: list[list[str]] = []
    for cell in cells:
        for point in cell["points"]:
            row = [cell["model"], cell["method"], str(cell["batch"]), f"{point['edits']:,}"]
            row += [figure(point.get(name)) for name in COLUMNS]
            norms = ("perplexity", "growth", "per_fact")
            row += ["–" if point[name] is None else f"{point[name]:.3g}" for name in norms]
            rows.append(row)
    return table(head, rows)


def writes_nothing(cell: Cell) -> bool:
    """Whether it lives because it writes nothing: it is not broken, and no fact was said freely at any point."""
    said = [point["said freely"][0] for point in cell["points"] if "said freely" in point]
    return cell["broken"] is None and bool(said) and not any(said)


def judged(claim: Claim, cells: list[Cell], model: str) -> tuple[str, str]:
    """What came of a claim on a model, and the figures behind it.

    A method that broke before the other one did is the worse one. Else the last point that both have, up to the
    claim's number of edits, decides: the intervals apart, or the means alone. A method that lives because it writes
    nothing is not compared, and edits that it refused are none that it lived through.
    """
    pair = [
        next((c for c in cells if (c["model"], c["method"], c["batch"]) == (model, name, claim.batch)), None)
        for name in (claim.better, claim.worse)
    ]
    better, worse = pair
    if better is None or worse is None or any(cell["failed"] >= cell["edits"] > 0 for cell in (better, worse)):
        return "not measured", ""
    if idle := [cell["method"] for cell in (better, worse) if writes_nothing(cell)]:
        return "not compared", f"{' and '.join(idle)} {'write' if idle[1:] else 'writes'} nothing"
    lives = [claim.edits if cell["broken"] is None else min(cell["broken"], claim.edits) for cell in (better, worse)]
    reached = [min(claim.edits, cell["edits"] - cell["failed"]) for cell in (better, worse)]
    for this, other, outcome in ((0, 1, "no"), (1, 0, "yes")):
        if pair[this]["broken"] is not None and lives[this] < min(reached[other], lives[other]):  # type: ignore[index]
            return outcome, f"{(claim.better, claim.worse)[this]} breaks at {lives[this]:,}, the other lives"
    common = [n for n in MEASURED if n <= claim.edits and at(better, n) and at(worse, n)]
    if not common:
        return "not measured", ""
    ours, theirs = (at(cell, common[-1])[claim.column] for cell in (better, worse))  # type: ignore[index]
    figures = f"{figure(ours)} against {figure(theirs)} at {common[-1]:,}"
    if ours[1] > theirs[2]:
        return "yes", figures
    if theirs[1] > ours[2]:
        return "no", figures
    return "not told apart", figures


def orderings(cells: list[Cell], models: list[str]) -> list[str]:
    """A row a claim."""
    head = ["claim", "facts a step", "source", *(f"on {model}" for model in models)]
    rows: list[list[str]] = []
    for claim in CLAIMS:
        what = f"{claim.better} above {claim.worse}" + ("" if claim.column == "said freely" else f" ({claim.column})")
        row = [what, str(claim.batch), claim.source]
        for model in models:
            outcome, figures = judged(claim, cells, model)
            row.append(f"**{outcome}**" + (f": {figures}" if figures else ""))
        rows.append(row)
    return table(head, rows)


def fill() -> None:
    """Write TABLE.md, and README.md's tables between their marks."""
    cells = json.loads((HERE / "lasting.json").read_text(encoding="utf-8"))
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    text = ["# What each cell came to, and every point", "", "Made by `lasted.py`. In per cent, 95 % intervals.", ""]
    for model in models:
        for batch in dict.fromkeys(cell["batch"] for cell in cells if cell["model"] == model):
            text += [f"## {model}, {batch} a step", "", *short(cells, model, batch), ""]
    write_text(HERE / "TABLE.md", "\n".join([*text, "## Every point", "", *whole(cells)]) + "\n")
    between(HERE / "README.md", "lasting", lives(cells, models))
    between(HERE / "README.md", "orderings", orderings(cells, models))


if __name__ == "__main__":
    fill()
