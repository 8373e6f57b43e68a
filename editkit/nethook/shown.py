"""How captures look in a notebook and at a prompt: a row for each site, of many sites the first few."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from torch import Tensor

MOST = 8  # rows that are shown
KINDS = ("input", "output", "grad")
COLUMNS = ("site", "runs", *KINDS)


class Shown:
    """A value that says in `_shown` what it is called, and a row of cells for each of its sites."""

    def _shown(self) -> tuple[str, Sequence[Sequence[str]]]:
        """The title, and rows as COLUMNS names them."""
        raise NotImplementedError

    def __repr__(self) -> str:
        title, rows = self._shown()
        said = [", ".join([row[0], *_told(row)]) for row in rows[:MOST]]
        more = [f"and {len(rows) - MOST} more sites"] if len(rows) > MOST else []
        return f"<{title}: {'; '.join([*said, *more])}>"

    def _repr_html_(self) -> str:
        title, rows = self._shown()
        more = [[f"and {len(rows) - MOST} more sites", *[""] * (len(COLUMNS) - 1)]] if len(rows) > MOST else []
        head = "".join(f"<th>{name}</th>" for name in COLUMNS)
        body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in [*rows[:MOST], *more])
        caption = f"<caption style='text-align:left'><b>{escape(title)}</b></caption>"
        return f"<table>{caption}<tr>{head}</tr>{body}</table>"


def row_of(site: str, count: int, kept: Mapping[str, Any]) -> list[str]:
    """The cells of a site that ran `count` times: its name, and the shape and dtype of each kind that is kept."""
    return [site, str(count), *(_described(kept.get(kind)) for kind in KINDS)]


def _described(value: Any) -> str:
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}" if isinstance(value, Tensor) else ""


def _told(row: Sequence[str]) -> list[str]:
    """The cells behind the name, in words; an empty one is left out."""
    _, runs, *cells = row
    ran = "did not run" if runs == "0" else f"{runs} run" + ("" if runs == "1" else "s")
    return [ran, *(f"{kind} {cell}" for kind, cell in zip(KINDS, cells, strict=True) if cell)]


def _cell(text: str) -> str:
    return f"<td style='text-align:left'>{escape(text)}</td>"
