"""The notebooks run from top to bottom, hold no outputs in git, and end with the weights as they were."""

import os

import notebooks
import pytest

from tests.covering import spread


@pytest.mark.parametrize("name", notebooks.names())
def test_no_outputs_are_kept_in_git(name: str) -> None:
    for cell in notebooks.read(name).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.parametrize("name", spread(notebooks.names(), 3))
def test_it_runs(name: str) -> None:
    assert len(notebooks.names()) >= 3
    before = dict(os.environ)
    found = notebooks.run(name)
    assert dict(os.environ) == before
    outputs = [each for cell in found.cells for each in cell.get("outputs", [])]
    assert any("image/png" in each.get("data", {}) for each in outputs)
    if name == "first_edit":
        said = "".join(each.get("text", "") for each in outputs)
        assert "all equal, bit for bit" in said and "Rome" in said


@pytest.mark.parametrize("name", notebooks.names())
def test_a_rendered_copy_has_the_same_cells(name: str) -> None:
    text = (notebooks.RENDERED / f"{name}.md").read_text(encoding="utf-8")
    for cell in notebooks.read(name).cells:
        assert cell.source.strip() in text, "render it again: python scripts/notebooks.py --render"
