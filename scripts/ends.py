"""The requirements of pyproject.toml at one end of their ranges, for pip.

python scripts/ends.py oldest    # torch==2.6 transformers==5.17 …
python scripts/ends.py newest    # torch transformers …, whatever is the latest
"""

import argparse
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def ends(which: str) -> list[str]:
    """One requirement for each dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = []
    for text in project["dependencies"]:
        match = re.match(r"([\w.-]+)(?:\[.*\])?>=([\d.]+)", text)
        if match is None:
            raise SystemExit(f"pyproject.toml states no oldest version of '{text}'.")
        name, oldest = match.groups()
        found.append(f"{name}=={oldest}" if which == "oldest" else name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("oldest", "newest"))
    print(" ".join(ends(parser.parse_args().which)))


if __name__ == "__main__":
    main()
