"""What stands around the code agrees with it: citation, hosted tests, the ends of the stated ranges."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml
from ends import ends

import editkit

ROOT = Path(__file__).parent.parent


def loaded(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version() -> None:
    found = loaded("CITATION.cff")
    assert found["version"] == editkit.__version__ and found["license"] == "MIT"


def test_hosted_tests_cover_the_pythons_and_both_ends() -> None:
    matrix = loaded(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f">={matrix['python'][0]}" == project["requires-python"]
    assert {each["versions"] for each in matrix["include"]} == {"oldest", "newest"}


def test_every_dependency_has_an_oldest_version_and_is_pinned() -> None:
    oldest = dict(text.split("==") for text in ends("oldest"))
    assert ends("newest") == list(oldest)
    pins = (
        text.split("==") for text in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in text
    )
    pinned = {name.lower(): version for name, version in pins}
    for name, version in oldest.items():
        ours = [int(part) for part in re.findall(r"\d+", pinned[name.lower()])]
        assert ours >= [int(part) for part in version.split(".")], name


def test_pre_commit_runs_what_make_lint_runs() -> None:
    hooks = {hook["entry"].split("/")[-1] for hook in loaded(".pre-commit-config.yaml")["repos"][0]["hooks"]}
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").split("lint:")[1].split("format:")[0]
    assert all(hook.split()[0] in lint for hook in hooks) and {"ruff format", "mypy"} <= hooks
