"""Every method against its oracle: the largest relative difference of what an edit holds, by method and family.

    python scripts/oracles.py                    # needs the checkout, for tests/; a few minutes
    python scripts/oracles.py --json FILE

An oracle is a slow, plain version in float64 under tests/, written from the paper, at full depth. The figures are those
of the tests themselves: each compares ‖ours − oracle‖/‖oracle‖ with its bound by the fixture `near`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from marked import table as in_markdown

from editkit.files import write_text

ROOT = Path(__file__).resolve().parent.parent
ORACLE = "oracle"  # as in tests/conftest.py: a mark, and a property with what was compared


def compared(tests: list[str]) -> tuple[dict[tuple[str, str], tuple[float, float]], int]:
    """(method, family) → the largest difference and its bound; and pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "oracles.xml"
        asked = ["-q", "--whole", "-m", ORACLE, f"--junitxml={path}", "-o", "junit_family=legacy", *tests]
        code = subprocess.call([sys.executable, "-m", "pytest", *asked], cwd=ROOT)
        found: dict[tuple[str, str], tuple[float, float]] = {}
        for each in ElementTree.parse(path).iter("property"):
            if each.get("name") == ORACLE:
                method, family, difference, within = str(each.get("value")).split("|")
                key = (method, family)
                found[key] = max(found.get(key, (0.0, 0.0)), (float(difference), float(within)))
    return found, code


def table(found: dict[tuple[str, str], tuple[float, float]]) -> str:
    """A row a method: how many families, the largest difference and where, and those over 1e-4."""
    rows = []
    for method in sorted({method for method, _ in found}):
        mine = {family: value for (name, family), value in found.items() if name == method}
        worst = max(mine, key=lambda family: mine[family])
        over = ", ".join(
            f"{name} {value:.1e} (bound {bound:g})" for name, (value, bound) in mine.items() if value > 1e-4
        )
        rows.append([method, str(len(mine)), f"{mine[worst][0]:.1e}", worst, over or "none"])
    return "\n".join(in_markdown(["method", "families", "largest difference", "in", "over 1e-4"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    chosen = parser.parse_args()
    uses = re.compile(r"\bnear\(")
    tests = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if uses.search(path.read_text())]
    found, code = compared(tests)
    if not found:
        sys.exit("No test compared an edit with its oracle.")
    print(table(found))
    if chosen.json:
        rows = [{"method": m, "family": f, "difference": d, "within": w} for (m, f), (d, w) in sorted(found.items())]
        write_text(chosen.json, json.dumps(rows, indent=1) + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
