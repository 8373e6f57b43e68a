"""Start a package of your own: a method, a data format, a metric or a model family.

    python -m editkit.new method nudge               # writes ./editkit-nudge, which runs and tests itself
    python -m editkit.new data quiz --into packages/quiz
    python -m editkit.new metric margin
    python -m editkit.new family gpt_bigcode

Then, in the folder that was written:

    pip install -e . && python -m pytest

and `python -m editkit.run method=nudge` knows it. A name is a Python identifier; of a family it is the model's
`config.model_type`.
"""

import argparse
import keyword
import re
import sys
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from editkit.commands import Commands
from editkit.errors import ConfigError
from editkit.files import write_text

KINDS = ("method", "data", "metric", "family")
SUFFIX = ".in"  # of the files of a package to be: they are no Python before names are filled in


def main(arguments: list[str] | None = None) -> int:
    """Write one package; the exit code."""
    commands = Commands("python -m editkit.new", __doc__)
    for kind in KINDS:
        one = commands.add(kind, write)
        one.set_defaults(kind=kind)
        one.add_argument("name", help="a Python identifier, as in method=NAME")
        one.add_argument("--into", type=Path, metavar="FOLDER", help="a new folder; default: editkit-NAME")
    return commands.run(arguments)


def write(options: argparse.Namespace) -> int:
    """Write a package that registers a new one, with tests; nothing that is there is overwritten."""
    folder = package(options.kind, options.name, options.into)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(path)
    print(f"\ncd {folder} && pip install -e . && python -m pytest")
    return 0


def package(kind: str, name: str, into: Path | None = None) -> Path:
    """Write the package of a new `kind` called `name` into a new folder, which is returned.

    Raises ConfigError for a name that is no identifier, or a folder that holds something.
    """
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise ConfigError(f"'{name}' cannot be a name: take small letters, digits and _, as in my_{kind}.")
    folder = into or Path(f"editkit-{name.replace('_', '-')}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"'{folder}' is there already. Name another folder with --into.")
    title = "".join(part.capitalize() for part in name.split("_"))
    filled = {"NAME": name, "TITLE": title, "PROJECT": f"editkit-{name.replace('_', '-')}"}
    for place, text in _texts(files("editkit.new") / kind):
        write_text(folder / _fill(place, filled), _fill(text, filled))
    return folder


def _texts(folder: Traversable, inside: str = "") -> list[tuple[str, str]]:
    """Paths and texts of the files of a package to be."""
    found = []
    for each in folder.iterdir():
        if each.is_dir():
            found += _texts(each, f"{inside}{each.name}/")
        elif each.name.endswith(SUFFIX):
            found.append((f"{inside}{each.name.removesuffix(SUFFIX)}", each.read_text(encoding="utf-8")))
    return found


def _fill(text: str, values: dict[str, str]) -> str:
    """The text with each @KEY@ replaced."""
    return re.sub("@([A-Z]+)@", lambda match: values[match[1]], text)


if __name__ == "__main__":
    sys.exit(main())
