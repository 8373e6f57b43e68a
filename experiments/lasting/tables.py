"""The tables of README.md that come from undo.py's figures and those of scripts/: oracles, method_families, ultraedit.

python experiments/lasting/tables.py
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from marked import between, table

HERE = Path(__file__).parent
NEAR = 1e-4  # the difference that is asked for


def undone() -> list[str]:
    """A row for each session of undo.py."""
    head = ["steps", "undone", "‖ΔW‖/‖W‖", "undo, s", "same bits", "computed anew, s", "apart"]
    rows = []
    for path in sorted(HERE.glob("undo*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        kept, again = found["kept"], found["again"]
        counts = [f"{found['steps']:,}", str(found["undone"]), f"{found['relative_norm']:.2f}"]
        undo = [f"{kept['seconds']:.2f}", "yes" if kept["same_bits"] else "NO"]
        rows.append([*counts, *undo, f"{again['seconds']:.0f}", f"{again['apart']:.2f}"])
    return table(head, rows)


def timed() -> list[str]:
    """A row for each weight of scripts/ultraedit.py."""
    head = ["shape", "W", "tokens", "p × p, s", "tokens × tokens, s", "ratio", "edits a second", "difference"]
    rows = []
    for path in sorted(HERE.glob("ultraedit*.json")):
        for shape, parts in json.loads(path.read_text(encoding="utf-8"))["shapes"].items():
            rows += [_row(shape, part) for part in parts]
    return table(head, rows)


def _row(shape: str, found: dict[str, Any]) -> list[str]:
    size = f"{found['part']} [{found['q']}, {found['p']}]" if "q" in found else found["part"]
    apart = f"{found['difference']:.1e}" if "difference" in found else ""
    seconds = [f"{found['slow_seconds']:.4f}", f"{found['fast_seconds']:.4f}", f"{found['ratio']:.1f}"]
    return [shape, size, str(found.get("tokens", "")), *seconds, f"{found['edits_a_second']:,.0f}", apart]


def compared() -> list[str]:
    """A row a method: how far it is from its oracle, and what became of it in every family."""
    differences: dict[str, dict[tuple[str, str], float]] = {}  # of a method: (family, what is added) → difference
    for row in json.loads((HERE / "oracles.json").read_text(encoding="utf-8")):
        method, _, added = row["method"].partition(", ")
        differences.setdefault(method, {})[row["family"], added] = row["difference"]
    families = json.loads((HERE / "families.json").read_text(encoding="utf-8"))["cells"]
    rows, counts = [], [0, 0, 0]
    for method in sorted(families["gpt2"].keys() | differences.keys()):
        own = differences.get(method, {})
        worst = max(own, key=lambda asked: own[asked], default=None)
        cells = [cells[method] for cells in families.values() if method in cells]
        refused = sum("refused" in cell for cell in cells)
        failed = sum(bool(cell.get("failures")) for cell in cells)
        became = [len(cells) - refused - failed, refused, failed]
        counts = [sum(pair) for pair in zip(counts, became, strict=True)]
        far = "–" if worst is None else f"{own[worst]:.1e}, {', '.join(filter(None, worst))}"
        over = sum(value > NEAR for value in own.values())
        rows.append([method, str(len({family for family, _ in own})), far, str(over), *map(str, became)])
    rows.append(["all", "", "", "", *map(str, counts)])
    head = ["method", "families, oracle", "largest difference", f"over {NEAR:g}", "edited", "refused", "failed"]
    return table(head, rows)


def main() -> None:
    for name, lines in (("undo", undone()), ("ultraedit", timed()), ("oracles", compared())):
        between(HERE / "README.md", name, lines)


if __name__ == "__main__":
    main()
