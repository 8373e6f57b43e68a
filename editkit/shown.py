"""How values look in a notebook and at a prompt: one line as text, a small table as HTML, from the same rows."""

from html import escape

Rows = list[tuple[str, str]]
SHORT = 16  # characters of a digest


class Shown:
    """A value that says in `shown` what it is called and what is worth knowing of it."""

    def shown(self) -> tuple[str, Rows]:
        """The title, and rows of a name and a value; a row without a name goes on with the one before."""
        raise NotImplementedError

    def __repr__(self) -> str:
        title, rows = self.shown()
        return f"<{title}: " + ", ".join(f"{name} {value}".strip() for name, value in rows) + ">"

    def _repr_html_(self) -> str:
        title, rows = self.shown()
        body = "".join(
            f"<tr><th style='text-align:left;vertical-align:top'>{escape(name)}</th>"
            f"<td style='text-align:left'>{escape(value)}</td></tr>"
            for name, value in rows
        )
        return f"<table><caption style='text-align:left'><b>{escape(title)}</b></caption>{body}</table>"


def counted(number: int, noun: str) -> str:
    """
    >>> counted(1, "fact"), counted(1200, "fact")
    ('1 fact', '1,200 facts')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
