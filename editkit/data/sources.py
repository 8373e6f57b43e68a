"""load_cases: the cases that the settings of data ask for; load_texts: running text. With what was left out and why."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from editkit.data.cases import Case
from editkit.data.fields import BadField, Raw, printable
from editkit.data.formats import Format, get_format, looks_like, names
from editkit.data.records import Source, Unreadable, read_source
from editkit.data.stream import CaseStream
from editkit.errors import ConfigError, DataError
from editkit.settings import DataSettings

T = TypeVar("T")


@dataclass(frozen=True)
class Rejected:
    """A record that is no case, or no text: its file, its place in it (from 0), the field and what is wrong with it."""

    file: str
    index: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{Path(self.file).name} record {self.index}, {self.field}: {self.reason}".replace("\n", " ")


@dataclass(frozen=True)
class Cases:
    """Cases to edit, in the order of their source, after limit and shard."""

    cases: tuple[Case, ...]
    indices: tuple[int, ...]  # place of each case's record in the whole source (of the atlas: in its order), from 0
    rejected: tuple[Rejected, ...]  # of the whole source
    found: int  # records in the whole source
    source: str
    digest: str  # of the whole source, sha256
    notes: tuple[str, ...] = ()  # what the loader had to decide about these cases


@dataclass(frozen=True)
class Texts:
    """Running text, a document a record."""

    texts: tuple[str, ...]
    indices: tuple[int, ...]  # place of each text's record in the source, from 0
    rejected: tuple[Rejected, ...]
    found: int  # records in the source
    source: str
    digest: str  # of the source, sha256

    @property
    def note(self) -> str:
        """What was read, and what was left out, in one line."""
        left = f"; left out: {self.rejected[0]}" if self.rejected else ""
        more = f" (and {len(self.rejected) - 1} more)" if len(self.rejected) > 1 else ""
        return f"running text: {len(self.texts):,} of {self.found:,} texts in {self.source}{left}{more}"


def load_texts(source: str) -> Texts | None:
    """The texts of NAME:PATH, where NAME is a format of running text, such as me_ppl; None for any other source.

    PATH is as data.path; of a Hub data set with its revision behind it, as in me_ppl:hub:NAME@COMMIT.
    Raises ConfigError and DataError; when no record can be read, the error says which format they look like.
    """
    name, _, path = source.partition(":")
    if not path or name not in names() or (form := get_format(name)).text is None:
        return None
    path, _, revision = path.partition("@") if path.startswith("hub:") else (path, "", "")
    found = read_source(path, revision or None)
    read = form.text
    texts, rejected = _sorted_out(found, [each for _, _, each in found.rows], lambda record, *_: read(Raw(record)))
    if not texts:
        raise DataError(_none_fits(name, found, rejected))
    return Texts(tuple(texts.values()), tuple(texts), tuple(rejected), len(found.rows), found.name, found.digest)


def load_cases(settings: DataSettings, *, seed: int = 0, distinct: bool = False) -> Cases:
    """The cases of `settings`.

    A record that is no case is in `rejected`, or with bad=fail an error. `distinct` leaves out the cases that ask a
    prompt of an earlier case again, as one batch or session must: it can hold one answer of a prompt only. Then the
    limit counts, then the shard is taken: of 10 cases, shard 1/4 is those at 1, 5 and 9.

    `seed` draws the atlas's order and targets, and the targets of known-1000.
    Raises ConfigError and DataError; when no record can be read, the error says which format they look like.
    """
    if settings.stream is not None:
        raise ConfigError(f"data.stream={settings.stream} needs task=lifelong: each case alone has nothing before it.")
    form = get_format(settings.name)
    if form.text is not None:
        raise ConfigError(
            f"data={form.name} is running text and holds no fact to edit. Measure on it with task=lifelong "
            f"task.text={form.name}:{settings.path or 'FILE'}, and edit facts of another data=."
        )
    whole = _read(form, settings, seed) if form.make is None else _made(form, settings, seed)
    places: Sequence[int] = range(len(whole.cases))
    dropped = ""
    if distinct:
        kept = _distinct(whole.cases)
        if len(kept) < len(places):
            dropped = (
                f"{len(places) - len(kept)} of {len(places)} cases ask a prompt of an earlier case and are left out"
            )
        places = kept
    number, count = map(int, settings.shard.split("/"))
    limited = places[: settings.limit]
    places = limited[number::count]
    if not places:
        raise DataError(
            f"Shard {settings.shard} of the {len(limited)} cases of '{whole.source}' is empty: take fewer shards."
        )
    cases = tuple(whole.cases[i] for i in places)
    notes = (*_notes(cases), *filter(None, [dropped]))
    return replace(whole, cases=cases, indices=tuple(whole.indices[i] for i in places), notes=notes)


def streamed(settings: DataSettings, cases: Sequence[Case], *, seed: int = 0) -> CaseStream:
    """`cases` one after the other, or as `settings.stream` asks: that many, each fact again and again.

    Raises ConfigError for a format whose facts have no other targets.
    """
    if settings.stream is None:
        return CaseStream(cases)
    form = get_format(settings.name)
    if form.stream is None:
        raise ConfigError(
            f"data.stream={settings.stream} needs other targets for each fact, and data={form.name} has one. Use "
            "data=atlas, or leave out data.stream."
        )
    return form.stream(cases, settings.stream, seed)


def _made(form: Format, settings: DataSettings, seed: int) -> Cases:
    """The cases of a format that needs no file."""
    if settings.path is not None:
        raise ConfigError(
            f"data={form.name} is bundled and takes no data.path; found '{settings.path}'. Name the format of the "
            f"file with data=, one of {_others(form.name)}."
        )
    assert form.make is not None and form.digest is not None
    cases = tuple(form.make(seed))
    return Cases(cases, tuple(range(len(cases))), (), len(cases), form.name, form.digest())


def _others(name: str) -> str:
    return ", ".join(other for other in names() if other != name)


def _read(form: Format, settings: DataSettings, seed: int) -> Cases:
    """The cases of the records at data.path."""
    if settings.path is None:
        raise ConfigError(
            f"data={form.name} needs data.path: a file, a folder, or hub:NAME[:CONFIG[:SPLIT]] with data.revision."
        )
    source = read_source(settings.path, settings.revision)
    records = [record for _, _, record in source.rows]
    if form.before is not None:
        records = form.before(records, seed)
    several = len({file for file, _, _ in source.rows}) > 1
    places: dict[str, int] = {}  # of each id

    def read(record: Any, place: int, file: str, index: int) -> Case:
        case = _case(form, record, index, f"{Path(file).stem}/" if several else "")
        if case.id in places:
            raise BadField("(id)", f"{case.id!r} is the id of record {places[case.id]} of the source already.")
        places[case.id] = place
        return case

    cases, rejected = _sorted_out(source, records, read)
    if not cases:
        raise DataError(_none_fits(settings.name, source, rejected))
    if rejected and settings.on_bad_record == "fail":
        more = f" (and {len(rejected) - 1} more)" if len(rejected) > 1 else ""
        raise DataError(f"{rejected[0]}{more} Correct it, or leave out such records with data.on_bad_record=skip.")
    found = len(source.rows)
    return Cases(tuple(cases.values()), tuple(cases), tuple(rejected), found, source.name, source.digest)


def _sorted_out(
    source: Source, records: Sequence[Any], read: Callable[[Any, int, str, int], T]
) -> tuple[dict[int, T], list[Rejected]]:
    """What `read` makes of each record, by its place in the source, and the records that it cannot use.

    `read`: of a record, its place in the source, its file and its place there.
    """
    made: dict[int, T] = {}
    rejected = []
    for place, (file, index, _) in enumerate(tqdm(source.rows, desc="records", delay=3, leave=False)):
        try:
            if isinstance(records[place], Unreadable):
                raise BadField("(line)", records[place].reason)
            made[place] = read(records[place], place, file, index)
        except BadField as error:
            rejected.append(Rejected(file, index, printable(error.field), printable(error.reason)))
    return made, rejected


def _case(form: Format, record: Any, index: int, prefix: str) -> Case:
    """The case of a record, with an id that is unique in the source if the file's ids are."""
    assert form.read is not None
    case = form.read(Raw(record))
    return replace(case, id=f"{prefix}{case.id or index}")


def _none_fits(name: str, source: Source, rejected: list[Rejected]) -> str:
    like = looks_like(record for _, _, record in source.rows)
    hint = "Correct the records, or name their format with data=" + _others(name) + "."
    if like and like != name:
        hint = f"They look like {like}: try data={like}."
    found = f"None of the {len(source.rows)} records of '{source.name}' can be read as {name}"
    return f"{found}: {rejected[0]} {hint}"


def _distinct(cases: Iterable[Case]) -> list[int]:
    """Places of the cases none of whose prompts is written by an earlier one that is kept."""
    asked: set[str] = set()
    kept = []
    for place, case in enumerate(cases):
        prompts = {fact.text for fact in case.facts}
        if not prompts & asked:
            asked |= prompts
            kept.append(place)
    return kept


def _notes(cases: Iterable[Case]) -> list[str]:
    """Each note once, with how many cases it is of where that is not all."""
    cases = list(cases)
    counts = Counter(note for case in cases for note in case.notes)
    notes = []
    for note, count in counts.items():
        named = [case.id for case in cases if note in case.notes][:10]
        which = f"{count} of {len(cases)} cases ({', '.join(named)}{', …' * (count > len(named))}): "
        notes.append(note if count == len(cases) else which + note)
    return notes
