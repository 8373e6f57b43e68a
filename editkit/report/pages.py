"""From folders to one page."""

import os
from pathlib import Path

from editkit.report import compare
from editkit.report import page as one
from editkit.report.html import save
from editkit.runs.names import REPORT
from editkit.runs.read import find


def page(folders: list[Path], to: Path | None) -> Path:
    """See `editkit.report.write`."""
    runs, unfinished = find(folders)
    if len(runs) == 1 and not unfinished:
        path = to or runs[0].folder / REPORT
        return save(one.page_of(runs[0]), path)
    parent = folders[0] if len(folders) == 1 else Path(os.path.commonpath([f.resolve() for f in folders]))
    path = to or parent / REPORT
    return save(compare.page_of(runs, unfinished, parent.resolve(), path.parent), path)
