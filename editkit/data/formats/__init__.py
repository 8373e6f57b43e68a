"""The formats of records: one file a format, which turns a raw record into a Case and registers itself.

    register("counterfact", counterfact, marks=(("requested_rewrite", "paraphrase_prompts"),))

That is all: nothing else in the package names a format. Another package adds its own with the same call, and an entry
point `facts_of_mine = "its.module"` in the group `editkit.data` (see registry.py). Names are listed without importing
torch, so that the command line can check one at once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editkit.errors import ConfigError
from editkit.registry import Registry

if TYPE_CHECKING:
    from editkit.data.cases import Case
    from editkit.data.fields import Raw
    from editkit.data.stream import CaseStream

Read = Callable[["Raw"], "Case"]
Before = Callable[[Sequence[Any], int], list[Any]]
Make = Callable[[int], "Sequence[Case]"]
Stream = Callable[["Sequence[Case]", int, int], "CaseStream"]
Text = Callable[["Raw"], str]


@dataclass(frozen=True)
class Format:
    """How records of one sort become cases. `read` is None for cases that are made and not read, and for texts."""

    name: str
    read: Read | None
    marks: tuple[tuple[str, ...], ...] = ()  # sets of fields, any of which shows that a record is of this format
    before: Before | None = None  # (records, seed) -> records: what needs all records at once
    make: Make | None = None  # seed -> cases
    digest: Callable[[], str] | None = None  # of what the cases are made of
    stream: Stream | None = None  # (cases, count, seed) -> their facts again and again
    text: Text | None = None  # a raw record to running text, in place of a case


_FORMATS: Registry[Format] = Registry("data", package=__name__, group="editkit.data")


def register(
    name: str,
    read: Read | None = None,
    *,
    marks: Iterable[Sequence[str]] = (),
    before: Before | None = None,
    make: Make | None = None,
    digest: Callable[[], str] | None = None,
    stream: Stream | None = None,
    text: Text | None = None,
) -> Format:
    """Add a format: `data=NAME data.path=FILE` reads records with it.

    - `read`: a raw record to a Case; raises BadField for what does not fit (`Raw`'s readers do).
    - `marks`: sets of fields, any of which shows that a record is of this format; used to propose it in an error. A
      field inside another is written with a dot; of a list its first entry counts.
    - `before`: (records, seed) -> records, for what needs all records at once.
    - `make`, `digest`: in place of `read`, for cases without a file: seed -> cases, and the sha256 of what they are
      made of. `data=NAME` takes no data.path then.
    - `stream`: (cases, count, seed) -> so many cases of their facts, with other targets (data.stream).
    - `text`: in place of `read`, for records that are running text: task.text=NAME:PATH measures on it.

    Raises ConfigError for a name that is taken, or for not one of `read`, `make` and `text`.
    """
    homes = [each.__module__ for each in (read, make, text) if each is not None]
    if len(homes) != 1 or (make is None) != (digest is None):
        raise ConfigError(f"The data format '{name}' needs either `read`, or `make` and `digest`, or `text`.")
    found = Format(name, read, tuple(map(tuple, marks)), before, make, digest, stream, text)
    return _FORMATS.register(name, found, home=homes[0])


def names() -> list[str]:
    """The names of all formats, sorted: of this package, of installed ones, and registered before. Imports none."""
    return _FORMATS.names()


def get_format(name: str) -> Format:
    """The registered format; its file is imported now. Raises ConfigError with the near match."""
    return _FORMATS.get(name)


def unregister(name: str) -> None:
    """Take a format out again, as a test does."""
    _FORMATS.unregister(name)


def check_format(name: str) -> None:
    """Raises ConfigError for a name that is no format."""
    _FORMATS.check(name)


def looks_like(records: Iterable[Any]) -> str:
    """The format that most of the records have the fields of, and most of its fields; "" when none has."""
    formats = _FORMATS.all()
    votes = dict.fromkeys(formats, 0)
    for record in records:
        for name, found in formats.items():
            fits = [len(marks) for marks in found.marks if all(_holds(record, mark) for mark in marks)]
            votes[name] += max(fits, default=0)
    best = max(votes, key=lambda name: votes[name])
    return best if votes[best] else ""


def _holds(record: Any, mark: str) -> bool:
    """Whether a record has a field, inside others where `mark` has dots."""
    for name in mark.split("."):
        record = record[0] if isinstance(record, list) and record else record
        if not isinstance(record, dict) or name not in record:
            return False
        record = record[name]
    return True
