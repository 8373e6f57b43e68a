"""Pages from run folders.

python -m editkit.report RUN             one run: RUN/report.html
python -m editkit.report sweeps/NAME     all runs inside, side by side: sweeps/NAME/report.html
python -m editkit.report RUN RUN --out comparison.html
"""

import argparse
import os
import sys
import traceback
import webbrowser
from pathlib import Path

from editkit.errors import EditkitError
from editkit.report import write


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or an error's own."""
    parser = argparse.ArgumentParser(
        "python -m editkit.report",
        description="One self-contained HTML page of a run, or of several side by side.",
        epilog="The page's path is printed on the last line.",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", type=Path, help="a run, or a folder that holds runs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; default: report.html in the folder")
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    chosen = parser.parse_args(arguments)
    try:
        path = write(*chosen.folders, to=chosen.out)
    except EditkitError as error:
        if os.environ.get("EDITKIT_TRACEBACK"):
            traceback.print_exception(error)
        print(f"editkit: {error}", file=sys.stderr)
        return error.exit_code
    if chosen.open:
        webbrowser.open(path.resolve().as_uri())
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
