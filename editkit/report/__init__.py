"""Reports: read Records and tables, measure nothing. `write` makes the page of a run's folder, or of many runs'."""

from pathlib import Path


def write(*folders: str | Path, to: str | Path | None = None) -> Path:
    """Write the HTML page of the runs in `folders`, and return its path.

    - One run: its own page, by default report.html in its folder.
    - Several: a comparison, by default report.html in the folder that holds all of them.

    Raises RecordError where no run has finished or a file is damaged, ConfigError for a folder that is none,
    OutputError when the page cannot be written.
    """
    from editkit.report.pages import page  # Jinja waits until a page is asked for

    return page([Path(folder) for folder in folders], None if to is None else Path(to))
