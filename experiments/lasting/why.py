"""Why do the methods with values break where they do? The same stream, over fewer facts.

    python experiments/lasting/why.py run FOLDER       # steps of 100 edits over 100, 300 and 1,000 facts
    python experiments/lasting/why.py results FOLDER   # why.json, and README.md's table

If it is the number of edits, or the norm that they add, a stream over 100 facts breaks where one over 1,000 does. If it
is the number of different keys that W must hold, it lives longer.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from marked import between
from marked import table as in_markdown

from editkit.files import write_text
from editkit.runs import names

HERE = Path(__file__).parent
METHODS = ("memit", "alphaedit")
FACTS = (100, 300, 1000)
EDITS = 2000


def run(folder: Path) -> None:
    """Every cell that has not ended."""
    for method in METHODS:
        for facts in FACTS:
            path = folder / f"{method}-{facts}"
            if (path / names.RECORD).exists():
                continue
            keys = ["task=lifelong", f"method={method}", "method.solver=descent", f"data.stream={EDITS}"]
            keys += [f"data.limit={facts}", "task.step=100", "task.every=null", "task.at=[100,200,300,400,500,1000]"]
            keys += ["task.keep=1", "task.alarm.every=1", "task.alarm.growth=null", "task.alarm.per_fact=null"]
            keys += ["task.on_collapse=stop", "task.measure.distracted=false", f"hydra.run.dir={path}"]
            resume = ["resume=true"] if (path / names.POINT_LINES).exists() else []
            print(method, facts, flush=True)
            if code := subprocess.call([sys.executable, "-m", "editkit.run", *keys, *resume]):
                sys.exit(code)


def results(folder: Path) -> list[dict[str, Any]]:
    """Where each cell that has ended broke, and what it was like there."""
    found = []
    for method in METHODS:
        for facts in FACTS:
            path = folder / f"{method}-{facts}" / names.RECORD
            if not path.exists():
                continue
            record = json.loads(path.read_text(encoding="utf-8"))
            last = record["series"][-1]
            broken = record["data"].get("collapse")
            found.append(
                {
                    "method": method,
                    "facts": facts,
                    "broken": broken and broken["edits_kept"],
                    "edits": last["edits"],
                    "growth": last["alarm"]["growth"],
                    "perplexity": last["alarm"]["perplexity"],
                    "commit": record["environment"]["commit"],
                }
            )
    return found


def table(found: list[dict[str, Any]]) -> list[str]:
    """A row a cell."""
    rows = []
    for row in found:
        end = f"{row['broken']:,}" if row["broken"] is not None else f"not by {row['edits']:,}"
        rows.append([row["method"], f"{row['facts']:,}", end, f"{row['growth']:.3g}", f"{row['perplexity']:.3g}"])
    return in_markdown(["method", "facts", "broken at", "‖ΔW‖/‖W‖ there", "perplexity ×"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "results"))
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    if chosen.what == "run":
        run(folder)
        return
    found = results(folder)
    write_text(HERE / "why.json", json.dumps(found, indent=1) + "\n")
    between(HERE / "README.md", "why", table(found))


if __name__ == "__main__":
    main()
