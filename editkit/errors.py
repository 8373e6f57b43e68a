"""The one family of errors that a user is meant to read.

Each message says what was asked, what was found, and what to do. The command line prints the message
alone and exits with the class's code; set `EDITKIT_TRACEBACK=1` to see the traceback as well.
"""

import difflib
from collections.abc import Iterable


class EditkitError(Exception):
    """Something in the request cannot be done as asked. Nothing was left edited or half written."""

    exit_code = 1


class ConfigError(EditkitError):
    """A key or value of the configuration is wrong (exit code 2, as for any bad command line)."""

    exit_code = 2


class ModelError(EditkitError):
    """A model cannot be loaded, or is of a kind that editkit does not edit."""


class FactError(EditkitError):
    """A fact, its prompt, or its subject's place among the tokens is unusable."""


class DataError(EditkitError):
    """A data set, or a record of it, cannot be read as asked."""


class EditFileError(EditkitError):
    """A file of editkit (edit, session, second moment, hypernetwork) is missing, damaged, or of another kind."""


class ReversalError(EditkitError):
    """Weights are not bit for bit what they were. This is a defect: please report it."""


class RecordError(EditkitError):
    """A run folder cannot be read: nothing finished there, or a file is damaged."""


class OutputError(EditkitError):
    """A result cannot be written."""


def did_you_mean(name: str, known: Iterable[str], *, show: int = 8) -> str:
    """The closing words of an unknown-name message: the near match, or the first few known names.

    >>> did_you_mean("rmoe", ["rome", "memit"])
    "did you mean 'rome'?"
    >>> did_you_mean("zzz", ["rome", "memit"])
    'known: memit, rome'
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    listed = ", ".join(names[:show])
    return f"known: {listed}" + (f", … ({len(names)} in all)" if len(names) > show else "")
