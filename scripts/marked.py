"""Tables in Markdown, put between marks in a README: what the scripts of studies share.

<!-- scores -->
…
<!-- /scores -->
"""

from collections.abc import Sequence
from pathlib import Path

from editkit.files import write_text


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: its head, the rule below it, and its rows."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def between(path: Path, name: str, lines: Sequence[str]) -> None:
    """Put lines between the marks of that name in the file `path`, in place of what is there."""
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = text.partition(begin)
    write_text(path, f"{before}{begin}" + "\n".join(lines).rstrip() + f"\n{end}{rest.partition(end)[2]}")
