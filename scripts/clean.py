"""The wheel of this checkout, and a clean environment that has it: what outside.py and the tests of the wheel share."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Failed(RuntimeError):
    """A command failed; the message is what it printed."""


def run(command: Sequence[str | Path], cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints on its standard output. Raises Failed."""
    given = clean() if environment is None else environment
    done = subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True)
    if done.returncode:
        asked = " ".join(map(str, command))
        raise Failed(f"exit code {done.returncode} of {asked}\n{done.stdout}{done.stderr}")
    return done.stdout


def clean() -> dict[str, str]:
    """This process's environment without the paths that it imports from."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def build(into: Path) -> Path:
    """The wheel of this checkout. Raises Failed, as without the package index that has the build backend."""
    run([sys.executable, "-m", "build", "--wheel", "--outdir", into, ROOT], ROOT)
    (path,) = into.glob("*.whl")
    return path


def environment(folder: Path, *packages: Path) -> Path:
    """The Python of a new environment with these wheels or folders installed, the last one winning.

    It sees the dependencies that are installed here, so nothing is downloaded; of a checkout that is installed here to
    be edited it sees nothing.
    """
    run([sys.executable, "-m", "venv", "--without-pip", folder], ROOT)
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    here = Path(next(path for path in sys.path if path.endswith("site-packages")))
    (site / "dependencies.pth").write_text(f"{here}\n")  # the .pth files there are not read in turn
    pip: list[str | Path] = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    for package in packages:
        run([*pip, "--ignore-installed", "--prefix", folder, package], ROOT)
    return folder / "bin" / "python"
