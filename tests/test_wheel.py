"""A wheel carries conf/, the atlas and its model, and runs from another folder in a clean environment."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    if done.returncode and "No matching distribution" in done.stdout + done.stderr:
        pytest.skip("needs the package index, for the build backend")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_what_a_run_needs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"editkit/conf/{path.relative_to(ROOT / 'conf')}" in names
    for name in ("data/atlas/facts.csv", "data/atlas/relations.json", "data/atlas/prose.txt", "py.typed"):
        assert f"editkit/{name}" in names
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
        assert f"editkit/models/atlas/{name}" in names
    for path in (ROOT / "editkit" / "workbench" / "static").iterdir():
        assert f"editkit/workbench/static/{path.name}" in names
    assert all(name.startswith("editkit") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-m", "editkit.run"], ["editkit"]], ids=["module", "script"])
def test_it_runs_from_another_folder(wheel: Path, command: list[str], tmp_path: Path) -> None:
    """In a new environment that sees this one's dependencies, so nothing is downloaded twice."""
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    site = next((environment / "lib").glob("python3*")) / "site-packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--prefix", str(environment)]
    subprocess.run([*install, "--ignore-installed", str(wheel)], check=True)
    ours = Path(next(p for p in sys.path if p.endswith("site-packages")))
    # Dependencies only: the checkout's editable install has a .pth of its own there, and those are not read in turn.
    (site / "dependencies.pth").write_text(f"{ours}\n")
    python = environment / "bin" / "python"
    start = [str(python), *command] if command[0] == "-m" else [str(python), str(environment / "bin" / command[0])]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    show = [str(python), "-c", "import editkit; print(editkit.__file__)"]
    where = subprocess.run(show, cwd=tmp_path, capture_output=True, text=True, env=clean)
    assert str(environment) in where.stdout
    arguments = ["edit=gpt2_fact", "method.steps=3", "method.contexts.counts=[1,1]", "moments.tokens=2000"]
    done = subprocess.run([*start, *arguments], cwd=tmp_path, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / done.stdout.splitlines()[-1] / "record.json").exists()
