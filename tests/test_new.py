"""python -m editkit.new: each package installs as it is, is known to the command, and passes its own tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from editkit.errors import ConfigError
from editkit.new.__main__ import KINDS, main, package
from tests.covering import spread

NAMES = {"method": "nudge", "data": "quiz", "metric": "margin", "family": "gpt_bigcode"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """All of them, and an environment in which they are installed (into a folder, as `pip install --target` does)."""
    home = tmp_path_factory.mktemp("new")
    for kind, name in NAMES.items():
        package(kind, name, home / kind)
    target = home / "site"
    folders = [str(home / kind) for kind in KINDS]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
    ]
    subprocess.run([*pip, *folders], check=True, capture_output=True, timeout=300)
    return home, os.environ | {"PYTHONPATH": str(target)}


def python(installed: tuple[Path, dict[str, str]], *arguments: str, cwd: str) -> subprocess.CompletedProcess[str]:
    home, environment = installed
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=home / cwd, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("kind", spread(KINDS, 3))
def test_its_own_tests_pass(installed: tuple[Path, dict[str, str]], kind: str) -> None:
    done = python(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=kind)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{ {'family': 1}.get(kind, 2) } passed" in done.stdout


def test_the_command_knows_the_method_the_format_and_the_metric(installed: tuple[Path, dict[str, str]]) -> None:
    asked = ["task=benchmark", "data=quiz", "data.path=example.json", "method=nudge", "task.measure.fluency=0"]
    done = python(installed, "-m", "editkit.run", *asked, "hydra.run.dir=run", cwd="data")
    assert done.returncode == 0, done.stderr
    assert "all equal" in done.stdout
    page = (installed[0] / "data" / "run" / "report.html").read_text(encoding="utf-8")
    assert "nats a token by which the new answer is ahead" in page
    wrong = python(installed, "-m", "editkit.run", "method=nudge", "method.lr=-1", cwd="data")
    assert wrong.returncode == 2 and wrong.stderr.strip() == "editkit: method.lr must be positive; found -1.0."


def test_the_code_passes_the_linter(installed: tuple[Path, dict[str, str]]) -> None:
    """As it is written, with names filled in."""
    found = [str(path) for kind in KINDS for path in (installed[0] / kind).rglob("*.py") if "build" not in path.parts]
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--line-length", "120"]
    done = subprocess.run([*ruff, *found], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["my-method", "1st", "class", "Nudge", "../up"])
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be a name"):
        package("method", name, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("kept")
    assert main(["method", "nudge", "--into", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err and (tmp_path / "mine").read_text() == "kept"
