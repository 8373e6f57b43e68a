"""Raw records from wherever they are: a file, a folder of files, a folder that `datasets` saved, or the Hub."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError, DataError, did_you_mean

LISTS = ("data", "records", "cases", "examples", "instances", "rows")  # where a JSON object may keep its records
MOVING = ("main", "master")  # revisions that are another thing tomorrow
_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")  # what `save_to_disk` leaves


@dataclass(frozen=True)
class Unreadable:
    """A line in place of a record, that is none."""

    reason: str


@dataclass(frozen=True)
class Source:
    """Records as they were found, with the file of each and its place in it; `digest` of all of them."""

    name: str
    rows: tuple[tuple[str, int, Any], ...]
    digest: str


def read_source(path: str, revision: str | None = None) -> Source:
    """The records at `path`: a .json, .jsonl, .csv or .parquet file; a folder of such files, in order of their names; a
    folder that `datasets` saved; or hub:NAME[:CONFIG[:SPLIT]], at a pinned `revision`.

    Raises ConfigError for a path or revision that does not fit, DataError for a file that cannot be read.
    """
    if path.startswith("hub:"):
        return _hub(path.removeprefix("hub:"), revision)
    found = Path(path).expanduser()
    if found.is_dir():
        return _saved(found) if any((found / name).is_file() for name in _SAVED) else _folder(found)
    if not found.is_file():
        near = [str(found.with_name(p.name)) for p in found.parent.iterdir()] if found.parent.is_dir() else []
        hint = did_you_mean(str(found), near) if near else f"there is no folder '{found.parent}' either."
        raise ConfigError(f"No data at '{path}': {hint} Set data.path to a file or folder, or to hub:NAME.")
    return _files(path, [found])


def _files(name: str, files: list[Path]) -> Source:
    rows: list[tuple[str, int, Any]] = []
    whole = hashlib.sha256()
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(f"'{file}' cannot be read: {error.strerror}. Check the file's permissions.") from error
        whole.update(hashlib.sha256(content).digest())
        rows += [(str(file), i, record) for i, record in enumerate(_records(file, content))]
    if not rows:
        raise DataError(f"'{name}' holds no record. Give a file with a list of records.")
    return Source(name, tuple(rows), whole.hexdigest())


def _folder(folder: Path) -> Source:
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in READERS)
    if not files:
        names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())[:5]
        held = f"It holds {', '.join(names)}" if names else "It is empty"
        raise DataError(
            f"The folder '{folder}' has no data file ({', '.join(READERS)}) and was not saved by `datasets`. {held}. "
            "Set data.path to the folder or file with the records."
        )
    return _files(str(folder), files)


def _records(file: Path, content: bytes) -> list[Any]:
    read = READERS.get(file.suffix.lower())
    if read is None:
        raise DataError(
            f"'{file}' is of no known kind: its name ends in '{file.suffix}'. Known are {', '.join(READERS)}."
        )
    return read(file, content)


# --- one function a kind of file --------------------------------------------------------------------------------


def _text(file: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"'{file}' is not UTF-8 text ({error}). Save it as UTF-8.") from error


def _json(file: Path, content: bytes) -> list[Any]:
    text = _text(file, content)
    if not text.strip():
        raise DataError(f"'{file}' is empty. Give a file with a list of records.")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # an object a line, under the name .json
            return _json_lines(file, content)
        raise DataError(
            f"'{file}' is not JSON: {error}. Give a .json list or a .jsonl with a record a line."
        ) from error
    if isinstance(found, list):
        return found
    if isinstance(found, dict):
        held = [found[name] for name in LISTS if isinstance(found.get(name), list)]
        if len(found) == 1 and not held:
            held = [value for value in found.values() if isinstance(value, list)]
        if held:
            first: list[Any] = held[0]
            return first
    keys = f" with {', '.join(map(ascii, list(found)[:5]))}" if isinstance(found, dict) else ""
    raise DataError(
        f"'{file}' holds no list of records but one {type(found).__name__}{keys}. Give a list, or an object that keeps "
        f"it under one of {', '.join(LISTS)}."
    )


def _json_lines(file: Path, content: bytes) -> list[Any]:
    # Not splitlines: U+2028 and its like may stand inside a JSON text.
    return [_line(line) for line in _text(file, content).split("\n") if line.strip()]


def _line(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"the line is not JSON: {error}")


def _csv(file: Path, content: bytes) -> list[Any]:
    limit = csv.field_size_limit(2**31 - 1)  # of the whole process, so it is put back
    try:
        return list(csv.DictReader(_text(file, content).splitlines(keepends=True), strict=True))
    except csv.Error as error:
        raise DataError(f"'{file}' is not CSV: {error}. Give a table with a header line.") from error
    finally:
        csv.field_size_limit(limit)


def _parquet(file: Path, content: bytes) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Any] = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
        return rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"'{file}' is not Parquet: {error}. Write it again.") from error


READERS: dict[str, Callable[[Path, bytes], list[Any]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}


# --- through `datasets` -----------------------------------------------------------------------------------------


def _saved(folder: Path) -> Source:
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"The folder '{folder}' was saved by `datasets` but cannot be read: {error}.") from error
    if isinstance(rows, datasets.DatasetDict):
        splits = [str(name) for name in rows]
        if len(rows) != 1:
            raise ConfigError(
                f"The data set in '{folder}' has the splits {', '.join(splits) or '(none)'}. Set data.path to the "
                f"folder of one of them, as in '{folder / next(iter(splits), 'train')}'."
            )
        rows = next(iter(rows.values()))
    return _rows(str(folder), rows)


def _hub(name: str, revision: str | None) -> Source:
    if not revision or revision in MOVING:
        raise ConfigError(
            f"data.revision is {revision!r} for 'hub:{name}'. Pin a commit or a tag (data.revision=...): without one "
            "the figures would be of other records when the data set changes."
        )
    import datasets

    dataset, config, split, *_ = [*name.split(":"), "", "", ""]
    try:
        rows = datasets.load_dataset(dataset, config or None, split=split or "train", revision=revision)
    except Exception as error:
        raise DataError(
            f"The data set '{name}' at revision '{revision}' could not be opened through `datasets`: {error}. Set "
            "data.path to a local file to work without the Hub."
        ) from error
    return _rows(f"hub:{name}@{revision}", rows)


def _rows(name: str, rows: Iterable[Any]) -> Source:
    records, whole = [], hashlib.sha256()
    for record in rows:
        records.append(record)
        whole.update(json.dumps(record, sort_keys=True, default=str).encode())
    if not records:
        raise DataError(f"'{name}' holds no record.")
    return Source(name, tuple((name, i, record) for i, record in enumerate(records)), whole.hexdigest())
