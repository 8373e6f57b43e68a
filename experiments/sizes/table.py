"""The table of README.md, from the figures of scripts/rehearse.py beside it.

python experiments/sizes/table.py
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from marked import between, table

HERE = Path(__file__).parent
COLUMNS = (
    "shape", "parameters", "dtype", "evaluations", "ROME, s", "MEMIT, s", "second moments, s", "digests, s",
    "peak, GB", "planned, GB", "apart", "planned, s", "bits restored",
)  # fmt: skip


def row(found: dict[str, Any]) -> list[str]:
    """One rehearsal's row of the table."""
    plan, seconds = found["plan"], dict[str, float]()
    for phase in found["phases"]:
        seconds[phase["name"]] = seconds.get(phase["name"], 0.0) + phase["seconds"]
    moments = sum(value for name, value in seconds.items() if "second moments" in name)
    edits = [step for step in plan["steps"] if step["name"] in ("rome", "memit")]
    return [
        found["options"]["shape"],
        f"{plan['model']['parameters'] / 1e9:.2f} · 10⁹",
        found["options"]["dtype"],
        " / ".join(re.findall(r"at most (\d+) evaluations", " ".join(step["note"] for step in edits))),
        f"{seconds['rome']:.0f}",
        f"{seconds['memit']:.0f}",
        f"{moments:.0f}",
        f"{seconds['digests of all weights'] / 2:.0f}",
        f"{found['peak'] / 1e9:.2f}",
        f"{plan['peak'] / 1e9:.2f}",
        f"{plan['peak'] / found['peak'] - 1:+.0%}",
        " + ".join(f"{step['seconds']:.0f}" for step in edits),
        "yes" if found["reversal"]["exact"] else "NO",
    ]


def main() -> None:
    files = sorted(HERE.glob("*.json"), key=lambda path: json.loads(path.read_text())["plan"]["model"]["weights"])
    all_found = [json.loads(path.read_text()) for path in files]
    made = sorted({f"{found['commit']}, {found['threads']} threads, {found['cpu']}" for found in all_found})
    lines = table(COLUMNS, [row(found) for found in all_found])
    between(HERE / "README.md", "table", [f"Commit {'; '.join(made)}.", "", *lines])


if __name__ == "__main__":
    main()
