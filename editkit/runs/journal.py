"""Journal: results appended line by line, each on the disk before the next begins, so that a kill loses one at most.

The first line says what is being done; a run that goes on must be doing the same. Each later line is one JSON object.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from editkit.errors import ConfigError, OutputError, RecordError


class Journal:
    """`with Journal(path, header, resume=True) as journal: journal.append({...})`; `journal.lines` are those there.

    - `header`: nested JSON that decides the results, with the `format` of the lines. A journal that is there must have
      begun with the same.
    - `resume`: go on where a former run stopped; without it a journal that is there is an error, and stays.

    A last line that was cut short by a kill is removed. Raises OutputError for a journal that is there without
    `resume`, is damaged, in use by another process or cannot be written; RecordError for another format; ConfigError
    for another header.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                f"'{path}' is being written by another process. Wait for it, or choose another run folder."
            ) from None
        try:
            self._begin(json.loads(json.dumps(header)), resume)
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, header: dict[str, Any], resume: bool) -> None:
        found = _read(self.path) if self.path.exists() else []
        if found and not resume:
            raise OutputError(
                f"'{self.path}' holds {len(found) - 1} results of a former run. resume=true goes on with it; or choose "
                "another folder with hydra.run.dir=FOLDER."
            )
        if found:
            if found[0].get("format") != header.get("format"):
                raise RecordError(
                    f"'{self.path}' was begun in format {found[0].get('format', 1)} by another version of editkit; "
                    f"this version writes format {header.get('format', 1)}. Begin in another folder, or go on with "
                    "that version."
                )
            _require_same(found[0], header, self.path)
            self.lines = found[1:]
        self._file = self.path.open("ab")
        if not found:
            self._write(header)

    def append(self, line: dict[str, Any]) -> None:
        """Add one result; it is on the disk when this returns."""
        self._write(line)
        self.lines.append(line)

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line, ensure_ascii=True).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(
                f"'{self.path}' could not be written: {error.strerror}. What it holds is kept; with some space "
                "free, resume=true goes on."
            ) from error

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._lock.release()


def _read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a torn last one is cut off the file."""
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        data = data[: data.rfind(b"\n") + 1]
        os.truncate(path, len(data))
    lines = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise OutputError(f"'{path}', line {number}, is damaged: {error}. Begin in another folder.") from error
    return lines


def _require_same(before: Any, now: Any, path: Path, key: str = "") -> None:
    """Raise ConfigError naming the first key that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(name for name in now if name not in before)]:
            _require_same(before.get(name), now.get(name), path, f"{key}.{name}" if key else name)
    elif before != now:
        raise ConfigError(
            f"'{path}' was begun with {key}={before!r}, and now it is {now!r}. Go on with the same settings, or begin "
            "in another folder."
        )
