"""What plots share: a blank figure, text that is safe and fits, colours, and writing a figure with its numbers."""

import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.errors import EditkitError
from editkit.files import whole, write_text
from editkit.report.svg import clean, clip, text_width

if TYPE_CHECKING:
    from pandas import DataFrame

SIZE = 8.0  # points, of text
SMALL = 7.0
DPI = 200  # of a PNG that is written
WRITTEN = ("png", "pdf", "csv")
TALLEST = 250.0  # inches: more than matplotlib can paint at DPI

# Okabe and Ito 2008, neighbours as different as possible; markers and dashes tell lines apart without colour.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", "-", "--", "-.")
_SEEN = {"\n": "↵", "\r": "↵", "\t": "⇥"}


def blank(width: float, height: float) -> Any:
    """An empty figure, `width` by `height` inches. Raises EditkitError without matplotlib, or if it is too tall."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise EditkitError('Pictures need matplotlib, which is not installed: pip install "editkit[plots]"') from error
    from editkit.plots.shared.drawn import Drawn

    if height > TALLEST:
        raise EditkitError(f"A picture {height:.0f} inches tall was asked for: draw fewer rows, {TALLEST:.0f} fit.")
    return Drawn(figsize=(width, height), dpi=120, layout="constrained")


def done(figure: Any, numbers: "DataFrame", path: str | Path | None) -> Any:
    """Finish a figure: fix its layout, so that every file of it is the same, and write it if a `path` is given.

    `numbers`: what is drawn, a row for each mark; saved as CSV. Returns the figure.
    """
    figure.numbers = numbers
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    if path is not None:
        save(figure, path)
    return figure


def save(figure: Any, path: str | Path, kinds: Sequence[str] = WRITTEN) -> list[Path]:
    """Write a figure as PATH.png and PATH.pdf, and its numbers as PATH.csv; returns the paths.

    The same figure gives the same bytes. `kinds`: which of png, pdf and csv. A suffix .png, .pdf or .csv of `path` is
    removed. Raises EditkitError for another suffix or kind, or a figure without numbers; OutputError when a file cannot
    be written.
    """
    import matplotlib

    path = Path(path)
    if wrong := [kind for kind in kinds if kind not in WRITTEN]:
        raise EditkitError(f"A picture cannot be saved as '{wrong[0]}': kinds are {', '.join(WRITTEN)}.")
    if path.suffix not in ("", *(f".{kind}" for kind in WRITTEN)) or not path.name:
        raise EditkitError(f"A picture cannot be saved as '{path}': end the name in .png, .pdf or .csv, or in nothing.")
    numbers: Any = getattr(figure, "numbers", "")
    if not hasattr(numbers, "to_csv") and "csv" in kinds:
        raise EditkitError("This figure has no numbers to save: give one that editkit.plots drew, or leave csv.")
    written = []
    for kind in kinds:
        target = path.with_name(f"{path.name.removesuffix(path.suffix)}.{kind}")
        if kind == "csv":
            write_text(target, numbers.to_csv(index=False, lineterminator="\n"))
        else:
            # Text in a PDF as TrueType, which publishers ask for. No date, so that equal figures are equal files.
            about = {"CreationDate": None} if kind == "pdf" else {"Software": None}
            fixed: Any = {"pdf.fonttype": 42, "savefig.bbox": None, "savefig.transparent": False}
            with matplotlib.rc_context(fixed), whole(target) as temporary:
                figure.savefig(temporary, format=kind, dpi=DPI, metadata=about)
        written.append(target)
    return written


def token(text: str, inches: float = 1.6, size: float = SIZE) -> str:
    """A token as a label: white space visible, characters that the font lacks replaced, at most `inches` wide.

    The space in front of a word is left out; a token of spaces only is shown as ␣. `size`: of the font, in points.
    """
    text = "".join(_SEEN.get(c, c) for c in text)
    text = text.strip(" ") or "␣" * min(len(text), 3)
    return label(text, inches, size)


def label(text: str, inches: float, size: float = SIZE) -> str:
    """Text as a label of one line: characters that the font lacks replaced, at most `inches` wide."""
    text = " ".join(clean(text).split())
    text = "".join(c if unicodedata.category(c)[0] != "C" and _drawable(c) else "\u25a1" for c in text)
    return clip(text, 72 * inches, size)


@cache
def _drawable(character: str) -> bool:
    """Whether one of the fonts in use has the character."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = []
    for family in FontProperties().get_family():
        try:
            fonts.append(findfont(FontProperties(family=family), fallback_to_default=False))
        except ValueError:  # not installed
            continue
    return any(get_font(font).get_char_index(ord(character)) for font in fonts or [findfont(FontProperties())])


def wrapped(text: str, inches: float, size: float) -> str:
    """Text in lines at most `inches` wide, at a font of `size` points."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            word = label(word, inches, size)
            longer = f"{line} {word}".strip()
            if line and text_width(longer, size) > 72 * inches:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    return "\n".join(lines)


def headed(figure: Any, title: str) -> None:
    """Put the title above everything, in lines that fit the figure."""
    if title:
        figure.suptitle(wrapped(title, figure.get_figwidth() - 0.3, SIZE + 1), fontsize=SIZE + 1, parse_math=False)


def legend(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Put the legend below everything, in as many columns as fit; the figure grows with its rows."""
    inches = figure.get_figwidth() - 0.4
    names = [label(name, inches - 0.6) for name in names]
    each = max(text_width(name, SIZE) for name in names) / 72 + 0.55
    columns = max(1, min(len(names), int(inches / each)))
    rows = -(-len(names) // columns)
    figure.set_figheight(figure.get_figheight() + 0.18 * (rows - 1))
    box = figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=SIZE, frameon=False)
    for text in box.get_texts():
        text.set_parse_math(False)


def every(names: Sequence[str], inches: float, size: float = SMALL) -> int:
    """The least n of 1, 2, 5, 10, 20, … such that every n-th name fits along `inches`."""
    if not names:
        return 1
    room = 72 * inches / len(names)
    widest = max(text_width(name, size) for name in names) + 0.6 * size
    steps = [m * 10**p for p in range(6) for m in (1, 2, 5)]
    fitting: int = next((step for step in steps if step * room >= widest), steps[-1])
    return fitting


def plain(axes: Any) -> None:
    """Axes without a box, with small ticks and a light grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL, length=2.5)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def series(i: int) -> dict[str, Any]:
    """Colour, marker and dash of the i-th line."""
    i %= len(COLOURS)
    return {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": DASHES[i], "markersize": 3.2, "linewidth": 1.2}
