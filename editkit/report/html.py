"""A page: blocks put into one self-contained HTML file, without network, fonts or scripts.

What a page shows is decided by the tasks' pages, `page` and `compare`; how it looks, in page.html.jinja and page.css.
Prompts, model outputs and names are untrusted: the template escapes everything but our own drawings.
"""

import importlib.resources
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from editkit.files import write_text
from editkit.metrics.metric import Average
from editkit.numbers import mean, number
from editkit.report.charts import Chart
from editkit.report.svg import clean


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind`: note (small), good or bad (a verdict)."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Code:
    """Text as it is, to be copied."""

    text: str


@dataclass(frozen=True)
class Link:
    """A cell that leads to a file beside the page."""

    text: str
    href: str


@dataclass(frozen=True)
class Best:
    """A cell set in bold."""

    value: Any


@dataclass(frozen=True)
class Table:
    """Rows of cells. `stacked`: on a narrow page each row becomes a card (tables of texts)."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    stacked: bool = False


@dataclass(frozen=True)
class Pairs:
    """Names and values, in columns where there is room."""

    items: Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Tiles:
    """The few numbers to see first: (name, value, small print)."""

    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Charts:
    """Drawings side by side, each with its numbers behind it."""

    charts: Sequence[Chart]


@dataclass(frozen=True)
class Fold:
    """Blocks behind a line that opens them."""

    summary: str
    blocks: Sequence[Any]
    open: bool = False


@dataclass(frozen=True)
class Section:
    """A heading and its blocks; `name` is its place in the page's address."""

    name: str
    title: str
    blocks: Sequence[Any]


@dataclass(frozen=True)
class Body:
    """What a task says of its run: the page's title, the few numbers to see first, and the sections."""

    title: str
    tiles: Sequence[tuple[str, str, str]]
    sections: Sequence[Section]


@dataclass(frozen=True)
class Page:
    """Everything one file shows."""

    title: str
    subtitle: str
    head: Sequence[Any]
    sections: Sequence[Section]
    foot: Sequence[Any] = field(default_factory=tuple)


def render(page: Page) -> str:
    """The page as HTML."""
    return clean(_environment().get_template("page.html.jinja").render(page=page, css=_file("page.css")))


def save(page: Page, path: Path) -> Path:
    """Write the page, whole or not at all. Raises OutputError."""
    return write_text(path, render(page))


@cache
def _file(name: str) -> str:
    return (importlib.resources.files("editkit.report") / name).read_text(encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"number": number, "mean": mean}
    environment.tests["average"] = lambda value: isinstance(value, Average)
    environment.tests["link"] = lambda value: isinstance(value, Link)
    environment.tests["best"] = lambda value: isinstance(value, Best)
    environment.globals |= {"kind": lambda block: type(block).__name__, "numeric_columns": _numeric_columns}
    return environment


def _numeric_columns(table: Any) -> set[int]:
    """The columns of numbers (and –): set to the right."""
    rows = table["rows"] if isinstance(table, dict) else table.rows
    words = {i for row in rows for i, value in enumerate(row) if value is not None and not _numeric(value)}
    return set(range(max(map(len, rows), default=0))) - words


def _numeric(value: Any) -> bool:
    if isinstance(value, Best):
        return _numeric(value.value)
    return isinstance(value, (int, float, Average)) and not isinstance(value, bool)


def cell(value: Any) -> Any:
    """A value of a record as a cell: lists and objects as short text, NaN as none."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (list, tuple)):
        return ", ".join(str(cell(v)) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k}: {cell(v)}" for k, v in value.items())
    return value
