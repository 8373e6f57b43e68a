"""Read what a page of a report shows."""

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from editkit import report
from editkit.numbers import mean

Change = Callable[[dict[str, Any]], None]  # of a run's record
VOID = {"meta", "rect", "line", "path", "circle", "br"}


class Parsed(HTMLParser):
    """Tags, attributes and visible text of a page; `problems`: tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.problems: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.problems += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._keep(tag, attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._keep(tag, attrs)

    def _keep(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)
            if "td" in self._open or "th" in self._open:
                self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def row(self, first: str, cells: int = 2) -> list[str]:
        """The first row of at least so many cells that begins with `first`."""
        found = [[" ".join(c.split()) for c in row] for row in self.rows if len(row) >= cells]
        return next(row for row in found if row[0] == first)


def page(folder: Path) -> Parsed:
    return Parsed(report.write(folder).read_text(encoding="utf-8"))


def cell(score: dict[str, Any]) -> str:
    """A score as a cell of a table."""
    bounds = "" if score["n"] == 1 else f" [{mean(score['low'])}, {mean(score['high'])}]"
    return mean(score["mean"]) + bounds
