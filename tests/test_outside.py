"""scripts/outside.py, in its fast parts: one package of four, a model of its family, faults that apply."""

import tomllib
from pathlib import Path

import torch
from outside import FAULTS, PARTS, as_bigcode, joined

from editkit import load
from editkit.new.__main__ import package


def test_one_package_holds_four_kinds(tmp_path: Path) -> None:
    into = joined([package(kind, name, tmp_path / kind) for kind, name in PARTS.items()], tmp_path / "one")
    about = tomllib.loads((into / "pyproject.toml").read_text(encoding="utf-8"))
    points = about["project"]["entry-points"]
    assert {group: list(entries) for group, entries in points.items()} == {
        "editkit.methods": ["nudge"],
        "editkit.families": ["gpt_bigcode"],
        "editkit.data": ["quiz"],
        "editkit.metrics": ["margin"],
    }
    named = {f"{name}.py" for name in about["tool"]["setuptools"]["py-modules"]}
    assert named == {path.name for path in into.glob("*.py")} and (into / "example.json").exists()
    assert len([*into.glob("tests/test_*.py")]) == len(PARTS) and about["build-system"]["requires"]
    for _, file, line, instead, _ in FAULTS:
        text = (into / file).read_text(encoding="utf-8")
        assert text.count(line) == 1
        compile(text.replace(line, instead), file, "exec")


def test_a_model_of_another_family_has_the_bundled_ones_logits() -> None:
    lm = load("atlas", device="cpu")
    model, ids = as_bigcode(lm), torch.arange(2, 42).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, lm.model(input_ids=ids).logits, rtol=0, atol=1e-4)
