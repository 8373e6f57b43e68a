"""Writing files whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from editkit.errors import OutputError


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; on a clean exit it is flushed to the disk and renamed to `path`.

    So a kill, an interrupt or a full disk never leaves half. Raises OutputError saying which file could not be
    written and why; the temporary file is removed on every error.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OutputError(
                f"'{path}' could not be written: {error.strerror or error}. Free some space or choose another "
                "folder; no half-written file was left."
            ) from error
        raise


def write_bytes(path: Path, data: bytes) -> Path:
    """Write `data` to `path`, whole or not at all. Raises OutputError."""
    with whole(path) as temporary:
        temporary.write_bytes(data)
    return path


def write_text(path: Path, text: str) -> Path:
    """`write_bytes` for text, as UTF-8."""
    return write_bytes(path, text.encode())


def make_folder(folder: Path) -> Path:
    """The folder, made and shown to be writable. Raises OutputError."""
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"The run folder '{folder}' cannot be written: {error.strerror}. Choose another with hydra.run.dir=FOLDER "
            "(hydra.sweep.dir=FOLDER for a sweep)."
        ) from error
    return folder
