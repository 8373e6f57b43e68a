"""From folders to one page."""

import os
from pathlib import Path

from editkit.report import compare, run_page
from editkit.report.html import save
from editkit.runs.read import find
from editkit.runs.record import REPORT


def page(folders: list[Path], to: Path | None) -> Path:
    """See `editkit.report.write`."""
    runs, unfinished = find(folders)
    if len(runs) == 1 and not unfinished:
        path = to or runs[0].folder / REPORT
        return save(run_page.page_of(runs[0]), path)
    parent = folders[0] if len(folders) == 1 else Path(os.path.commonpath([f.resolve() for f in folders]))
    path = to or parent / REPORT
    return save(compare.page_of(runs, unfinished, parent.resolve(), path.parent), path)
