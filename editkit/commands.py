"""What the commands beside `editkit.run` share: subcommands, the options of a model, one line for an error.

commands = Commands("python -m editkit.edits", __doc__)
one = commands.add("show", show)
one.add_argument("files", nargs="+", type=Path)
sys.exit(commands.run())
"""

import argparse
import sys
import traceback
import warnings
from collections.abc import Callable
from os import environ
from typing import TYPE_CHECKING

from editkit import start
from editkit.errors import EditkitError

if TYPE_CHECKING:
    from editkit.models.load import LanguageModel

DTYPES = ("float32", "float16", "bfloat16", "auto")


class Commands:
    """A program with subcommands. `interrupted`: what Ctrl-C is answered with."""

    def __init__(
        self, program: str, about: str | None, interrupted: str = "interrupted: nothing was written or left edited"
    ) -> None:
        self._interrupted = interrupted
        self._parser = argparse.ArgumentParser(
            prog=program, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self._commands = self._parser.add_subparsers(required=True, metavar="COMMAND")

    def add(self, name: str, command: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        """A subcommand, with its docstring for a help text; it returns the exit code."""
        does = (command.__doc__ or "").strip()
        one = self._commands.add_parser(name, help=does.splitlines()[0], description=does)
        one.set_defaults(command=command)
        return one

    def run(self, arguments: list[str] | None = None) -> int:
        """Run one command; the exit code. An error is one line, and a traceback where EDITKIT_TRACEBACK is set."""
        options = self._parser.parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = options.command
        return answered(lambda: command(options), self._interrupted)


def answered(command: Callable[[], int], interrupted: str) -> int:
    """Run a command; its exit code, or that of its error. `interrupted`: what Ctrl-C is answered with."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"editkit: warning: {message}", file=sys.stderr)
        try:
            return command()
        except EditkitError as error:
            if environ.get("EDITKIT_TRACEBACK"):
                traceback.print_exception(error)
            print(f"editkit: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print(interrupted, file=sys.stderr)
            return 130


def model_options(one: argparse.ArgumentParser, about: str, *, required: bool = True) -> None:
    """--model, --dtype and --device. `about`: what the model is for."""
    one.add_argument("--model", required=required, metavar="NAME", help=about)
    one.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model; default: float32")
    one.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N; default: auto")


def load_model(options: argparse.Namespace) -> "LanguageModel":
    """The model that the options name. Raises ModelError."""
    start.import_libraries()
    from editkit.models.load import load

    return load(options.model, dtype=options.dtype, device=options.device)
