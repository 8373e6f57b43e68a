"""A wheel carries conf/, the atlas and its model, and runs from another folder in a clean environment."""

import os
import zipfile
from pathlib import Path

import pytest
from clean import Failed, build, clean, environment, run

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return build(tmp_path_factory.mktemp("wheel"))
    except Failed as error:
        if "No matching distribution" in str(error):
            pytest.skip("needs the package index, for the build backend")
        raise


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a new environment that sees this one's dependencies, so nothing is downloaded twice."""
    return environment(tmp_path_factory.mktemp("clean") / "env", wheel)


@pytest.mark.slow
def test_the_wheel_holds_what_a_run_needs(wheel: Path) -> None:
    assert wheel.stat().st_size < 40e6  # bytes
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
def test_it_runs_from_another_folder(python: Path, command: list[str], tmp_path: Path) -> None:
    start = [python, *command] if command[0] == "-m" else [python.parent / command[0]]
    assert str(python.parent.parent) in run([python, "-c", "import editkit; print(editkit.__file__)"], tmp_path)
    arguments = ["edit=gpt2_fact", "method.steps=3", "method.contexts.counts=[1,1]", "moments.tokens=2000"]
    printed = run([*start, *arguments], tmp_path)
    assert (tmp_path / printed.splitlines()[-1] / "record.json").exists()


@pytest.mark.slow
def test_bash_completes_its_words(python: Path, tmp_path: Path) -> None:
    """By what the command itself prints for bash: groups, options, keys; and nothing for what cannot be parsed."""
    lines = ["editkit meth", "editkit method=alph", "editkit method=rome method.lay", 'editkit edit.prompt="{} is']
    asked = ['eval "$(editkit -sc install=bash)"']
    for line in lines:
        asked.append(f"COMP_LINE='{line}'; COMP_CWORD={line.count(' ')}; hydra_bash_completion; echo ${{COMPREPLY[@]}}")
    there = clean() | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    printed = run(["bash", "-c", "; ".join(asked)], tmp_path, there)
    assert printed.split("\n") == ["method. method=", "method=alphaedit", "method.layer=", "", ""]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Failed, match="exit code 2 .*\neditkit: -sc takes install=SHELL"):
        run([python.parent / "editkit", "-sc", "install=tcsh"], tmp_path)
