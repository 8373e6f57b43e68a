"""Run the notebooks in experiments/notebooks, and write their rendered copies to docs/notebooks.

    python scripts/notebooks.py                # every notebook; exit code 1 where a cell fails
    python scripts/notebooks.py --render       # also write docs/notebooks/NAME.md with its pictures
    python scripts/notebooks.py first_edit

In git the notebooks hold no outputs; the copies do.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from tqdm import tqdm

from editkit.files import write_bytes, write_text

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS, RENDERED = ROOT / "experiments" / "notebooks", ROOT / "docs" / "notebooks"
CELL_SECONDS = 600


def names() -> list[str]:
    return sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def read(name: str) -> NotebookNode:
    notebook: NotebookNode = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    return notebook


def run(name: str) -> NotebookNode:
    """The notebook with its outputs, run in a kernel of this Python and this editkit. Raises CellExecutionError."""
    notebook = read(name)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    client = NotebookClient(notebook, timeout=CELL_SECONDS, resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.execute(env={**os.environ, "PYTHONPATH": path})
    return notebook


def render(name: str, notebook: NotebookNode) -> Path:
    """Write the notebook as Markdown with its pictures beside it; progress bars and warnings are left out."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
            for each in cell.outputs:  # a table once, as text: its HTML has styles that few viewers show
                each.get("data", {}).pop("text/html", None)
                if "image/png" in each.get("data", {}):
                    each.data.pop("text/plain", None)
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    files = RENDERED / f"{name}_files"
    shutil.rmtree(files, ignore_errors=True)
    for picture, data in resources["outputs"].items():
        files.mkdir(parents=True, exist_ok=True)
        write_bytes(files / picture, data)
        text = text.replace(f"({picture})", f"({files.name}/{picture})")
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return write_text(RENDERED / f"{name}.md", "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks without .ipynb; none: all of them")
    parser.add_argument("--render", action="store_true", help="write docs/notebooks")
    options = parser.parse_args()
    if unknown := set(options.names) - set(names()):
        sys.exit(f"No notebook {', '.join(sorted(unknown))} in {NOTEBOOKS.relative_to(ROOT)}: {', '.join(names())}.")
    failed = []
    for name in tqdm(options.names or names(), desc="notebooks", unit="notebook"):
        try:
            notebook = run(name)
        except CellExecutionError as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr)
            continue
        if options.render:
            print(render(name, notebook).relative_to(ROOT))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
