"""The tables of README.md that come from undo.py's and scripts/ultraedit.py's figures.

python experiments/lasting/tables.py
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from marked import between

HERE = Path(__file__).parent


def undone() -> list[str]:
    """A row for each session of undo.py."""
    lines = [
        "| steps | undone | ‖ΔW‖/‖W‖ | undo, s | same bits | computed anew, s | apart |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(HERE.glob("undo*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        kept, again = found["kept"], found["again"]
        lines.append(
            f"| {found['steps']:,} | {found['undone']} | {found['relative_norm']:.2f} | {kept['seconds']:.2f} | "
            f"{'yes' if kept['same_bits'] else 'NO'} | {again['seconds']:.0f} | {again['apart']:.2f} |"
        )
    return lines


def timed() -> list[str]:
    """A row for each weight of scripts/ultraedit.py."""
    lines = [
        "| shape | W | tokens | p × p, s | tokens × tokens, s | ratio | edits a second | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(HERE.glob("ultraedit*.json")):
        for shape, parts in json.loads(path.read_text(encoding="utf-8"))["shapes"].items():
            lines += [_row(shape, part) for part in parts]
    return lines


def _row(shape: str, found: dict[str, Any]) -> str:
    size = f"{found['part']} [{found['q']}, {found['p']}]" if "q" in found else found["part"]
    apart = f"{found['difference']:.1e}" if "difference" in found else ""
    return (
        f"| {shape} | {size} | {found.get('tokens', '')} | {found['slow_seconds']:.4f} | {found['fast_seconds']:.4f} | "
        f"{found['ratio']:.1f} | {found['edits_a_second']:,.0f} | {apart} |"
    )


def main() -> None:
    for name, lines in (("undo", undone()), ("ultraedit", timed())):
        between(HERE / "README.md", name, lines)


if __name__ == "__main__":
    main()
