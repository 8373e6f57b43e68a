"""The files of a session: session.json, a file for each step that is kept, and one for those that are folded.

session.json names the others by their digests and is written last, so whenever a process is killed the folder holds
one whole session: the one before or the one after. Files that it does not name any more are removed behind it. A save
writes the steps that are new, the folded sum and session.json: as much after 10,000 steps as after 100, with `keep`.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from editkit.edits.base import Base
from editkit.edits.edit import Edit
from editkit.errors import ConfigError, EditFileError, EditkitError
from editkit.files import write_bytes, write_text
from editkit.folded import FOLD_FILE, Folded, read_folded
from editkit.methods import get_method
from editkit.methods.shared.carried import Carried
from editkit.methods.shared.transforms import TRANSFORMS
from editkit.models.load import LanguageModel
from editkit.settings import ContextSettings, MethodSettings
from editkit.tensorfiles import SEAL, FileKind, contents_digest, explained, require_fields, strict_json

FILE = "session.json"
STEP, FOLD = "{:.16}.safetensors", "folded-{:.16}.safetensors"  # from a digest
OURS = re.compile(
    r"(folded-)?[0-9a-f]{16}\.safetensors|\.((folded-)?[0-9a-f]{16}\.safetensors|session\.json)\.\d+\.part"
)
SESSION_FILE = FileKind(
    format="editkit-session/1",
    noun="a session",
    fields={
        "format": (str,),
        "base": (dict,),
        "method": (str,),
        "settings": (dict,),
        "transform": (str, type(None)),
        "seed": (int,),
        "steps": (list,),
        "keep": (int, type(None)),
        "folded": (dict, type(None)),
    },
    remedy="Copy the folder again, or begin a new session.",
    origin="Sessions are written by session.save(folder).",
    renew="Session.load(folder, lm).save(folder)",
)
OLDER = {"keep": None, "folded": None}  # what the first files lack


@dataclass(frozen=True)
class Header:
    """What session.json says, but for its steps."""

    base: Base
    method: str
    settings: MethodSettings
    transform: str | None
    seed: int
    keep: int | None


@dataclass(frozen=True)
class Contents:
    """What a session's folder holds."""

    header: Header
    folded: Folded
    carried: Carried
    steps: list[Edit]


class Folder:
    """Where one session is saved again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sound: set[str] = set()  # names of files that are known to hold what they should

    def save(self, header: Header, folded: Folded, carried: Carried, steps: Sequence[Edit]) -> Path:
        """Write the session, whole or not at all. The path of session.json. Raises OutputError, and EditkitError for a
        method whose state cannot be saved."""
        # 1) the steps and the folded sum
        listed = [{"file": STEP.format(step.digest), "digest": step.digest} for step in steps]
        for row, step in zip(listed, steps, strict=True):
            self._write(row["file"], step)
        fold = None
        if folded.steps:
            data = folded.to_bytes(header.base, carried)
            digest = hashlib.sha256(data).hexdigest()
            fold = {"file": FOLD.format(digest), "digest": digest}
            if fold["file"] not in self._sound:
                write_bytes(self.path / fold["file"], data)
        # 2) session.json
        values = {"format": SESSION_FILE.format, **asdict(header), "folded": fold, "steps": listed}
        values[SEAL] = contents_digest(values)
        written = write_text(self.path / FILE, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        # 3) what it does not name any more; of a session without `keep` files of undone steps stay
        self._sound = {row["file"] for row in (*listed, *([fold] if fold else []))}
        if header.keep is not None:
            for path in self.path.iterdir():
                if path.name not in self._sound and OURS.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        return written

    def _write(self, name: str, step: Edit) -> None:
        """Write a step, unless its file is there and has the same bytes. Steps are many: each is compared once."""
        path = self.path / name
        if name in self._sound and path.exists():
            return
        data = step.to_bytes()
        if not (path.is_file() and path.read_bytes() == data):
            write_bytes(path, data)


def read_session(folder: Path, lm: LanguageModel) -> Contents:
    """The session in a folder, which must have begun on `lm` as it is now.

    Raises EditFileError for a folder that holds no session or a damaged one, EditkitError for another base.
    """
    # 1) session.json and the settings in it
    path = folder / FILE
    found = _read(path)
    with explained(path, SESSION_FILE):
        header = _header_of(found)
        listed = [_named(row, STEP, "a step") for row in found["steps"]]
        fold = None if found["folded"] is None else _named(found["folded"], FOLD, "its folded steps")
        if header.keep is not None and header.keep < 1:
            raise ValueError(f"keep is {header.keep}")
    if header.base.digest != (now := lm.digest):
        raise EditkitError(
            f"This session began on '{header.base.name}' with digest {header.base.digest[:12]}; "
            f"'{lm.name}' is {now[:12]}. Load the base it was made for."
        )
    # 2) the folded steps, and the others, each of which must be the one that session.json names
    folded, carried = Folded(), Carried()
    if fold is not None:
        file = folder / fold[0]
        with explained(file, FOLD_FILE):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
        _require_same(file, path, digest, fold[1])
        folded, carried = read_folded(file)
    steps = []
    for name, digest in listed:
        step = Edit.load(folder / name, note=False)
        _require_same(folder / name, path, step.digest, digest)
        steps.append(step)
    return Contents(header, folded, carried, steps)


def _require_same(file: Path, names: Path, found: str, wanted: str) -> None:
    if found != wanted:
        raise EditFileError(
            f"'{file}' is not the step that '{names}' names: it holds edit {found[:12]}, "
            f"and {wanted[:12]} is wanted. The file was exchanged or damaged. {SESSION_FILE.remedy}"
        )


def _read(path: Path) -> dict[str, Any]:
    """The JSON of a session's file, checked. Raises EditFileError; warns of one without a digest."""
    with explained(path, SESSION_FILE):
        header = strict_json(path.read_bytes())
        if isinstance(header, dict) and header.get("format", SESSION_FILE.format) != SESSION_FILE.format:
            raise ValueError(f"its format is {header['format']!r}, and {SESSION_FILE.format!r} is read here")
        stored = header.pop(SEAL, None) if isinstance(header, dict) else None
        if stored is not None and stored != contents_digest(header):
            raise ValueError("its contents do not have the digest that was stored with them")
        if isinstance(header, dict):
            header = OLDER | header
        require_fields(header, SESSION_FILE.fields, "its content")
        require_fields(header["base"], dict.fromkeys(("name", "digest", "dtype"), (str,)), "its base")
    if stored is None:
        warnings.warn(
            f"'{path}' was written without a digest, so damage would not be noticed. To write it anew with one: "
            f"{SESSION_FILE.renew}.",
            stacklevel=4,
        )
    return dict(header)


def _header_of(found: dict[str, Any]) -> Header:
    """Raises ValueError or TypeError where the settings are not those of the method."""
    try:
        kind = get_method(found["method"]).settings
        values = dict(found["settings"])
        if "contexts" in values:
            values["contexts"] = ContextSettings(**values["contexts"])
        if found["transform"] not in (None, *TRANSFORMS):
            raise ValueError(f"its transform is {found['transform']!r}")
        settings = kind(**values)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    kept = {name: found[name] for name in ("method", "transform", "seed", "keep")}
    return Header(base=Base(**found["base"]), settings=settings, **kept)


def _named(row: object, form: str, what: str) -> tuple[str, str]:
    """(file name, digest) of a file that session.json names. Raises ValueError for a name that is not one of ours."""
    found = require_fields(row, {"file": (str,), "digest": (str,)}, what)
    if found["file"] != form.format(found["digest"]) or "/" in found["file"]:
        raise ValueError(f"the file of {what} is {found['file'][:80]!r}")
    return found["file"], found["digest"]
