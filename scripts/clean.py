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
    """The Python of a new environment with these packages, each a wheel or a folder with a pyproject.toml.

    It sees the dependencies that are installed here, so nothing is downloaded; of a checkout that is installed here to
    be edited it sees nothing. Raises Failed.
    """
    run([sys.executable, "-m", "venv", "--without-pip", folder], ROOT)
    python = folder / "bin" / "python"
    # 1) The packages, while it sees nothing else: no installation of theirs elsewhere can be touched.
    wheels = [package for package in packages if package.suffix == ".whl"]
    if folders := [package for package in packages if package not in wheels]:
        make: list[str | Path] = [
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            folder / "wheels",
        ]
        run([sys.executable, "-m", "pip", *make, *folders], ROOT)
        wheels += (folder / "wheels").glob("*.whl")
    run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", *wheels], ROOT)
    # 2) The dependencies. The .pth files there, as that of a checkout, are not read in turn.
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    here = Path(next(path for path in sys.path if path.endswith("site-packages")))
    (site / "dependencies.pth").write_text(f"{here}\n")
    return python
