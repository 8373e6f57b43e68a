"""doctor: a good edit, an enormous one, one for another base, one cut short; what is predicted beside what moved."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from editkit import Edit, Fact, rome
from editkit.doctor import ROUNDINGS, examine, repeated
from editkit.edits.__main__ import main
from editkit.errors import EditkitError
from editkit.metrics.audit import Asked, Audit
from editkit.models.load import LanguageModel
from editkit.settings import MomentSettings
from editkit.testing.tiny import tiny_lm
from tests.test_peft import edit_of

FACT = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")


MOVED = Asked("city_country", "Rome", "Italy", "Italy", "France", changed=True, edited=False, cosine=0.4, pull=0.25)


@pytest.fixture(autouse=True)
def audited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thousand facts are not asked here: test_audit.py does it."""

    def few(lm: LanguageModel, edit: Edit, *, progress: bool) -> Audit:
        if lm.name != "atlas":
            raise EditkitError(f"'{lm.name}' answers 0% of the atlas.")
        return Audit((MOVED, *[replace(MOVED, changed=False)] * 199))

    monkeypatch.setattr("editkit.doctor.audit", few)


@pytest.fixture(scope="module")
def good(atlas_lm: LanguageModel) -> Edit:
    return rome(atlas_lm, FACT, moments=MomentSettings(), progress=False)


def kinds(text: str) -> dict[str, str]:
    """About what: good, note or bad, from the terminal's lines."""
    lines = [line for line in text.splitlines() if line[:2] in ("  ", "· ", "! ") and line[2:3].strip()]
    return {line[2:].split()[0]: {" ": "good", "·": "note", "!": "bad"}[line[0]] for line in lines}


def test_a_good_edit(good: Edit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = good.save(tmp_path / "good.safetensors")
    assert main(["doctor", str(path), "--model", "atlas", "--prompt", "The Louvre is located in the city of"]) == 0
    out = capsys.readouterr().out
    assert {kinds(out)[name] for name in ("base", "size", "facts", "prose")} == {"good"} and "fit to be used" in out
    page = (tmp_path / "good.html").read_text(encoding="utf-8")
    for said in ("Fit to be used.", "What rounding leaves", "Predicted change", "The Louvre", "4 bits", "0.25"):
        assert said in page
    assert "1 of 1 are the likeliest answer after it, 0 before" in out
    assert "1 of 200 other facts of the atlas have another answer" in out


def test_an_enormous_edit(
    good: Edit, atlas_lm: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = atlas_lm.digest
    with pytest.warns(UserWarning, match="larger than the weight"):
        found = examine(atlas_lm, 100 * good, progress=False)
    assert atlas_lm.digest == before and not found.fit
    bad = {each.about for each in found.findings if each.kind == "bad"}
    assert {"size", "prose"} <= bad and "do not use it as it is" in str(found)


def test_an_edit_of_another_base(good: Edit, tmp_path: Path) -> None:
    found = examine(tiny_lm("gpt2"), good, progress=False)
    assert [(each.about, each.kind) for each in found.findings] == [("base", "bad")]
    assert "Load the base it was made for" in str(found)
    assert "Do not use it as it is: base." in found.write(tmp_path / "x.html").read_text(encoding="utf-8")


def test_an_edit_cut_short(good: Edit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "half.safetensors"
    path.write_bytes(good.to_bytes()[:-50])
    assert main(["doctor", str(path), "--model", "atlas"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("editkit: ") and str(path) in error and error.count("\n") == 1
    assert not (tmp_path / "half.html").exists()


def test_a_family_without_the_atlas() -> None:
    """Random weights know nothing: no neighbors, and the fact has not landed."""
    lm = tiny_lm("llama")
    found = examine(lm, edit_of(lm), progress=False)
    assert "neighbors" not in {each.about for each in found.findings}
    assert {each.about for each in found.findings} >= {"base", "size", "rounding", "facts", "prose"}


@pytest.mark.parametrize(("name", "bits"), [("8 bits", 8), ("4 bits", 4)])
def test_rounding_is_to_the_nearest_level(name: str, bits: int) -> None:
    """Against a loop over blocks and entries."""
    weight = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found: Tensor = ROUNDINGS[name](weight)
    flat, most = weight.flatten().tolist(), 2 ** (bits - 1) - 1
    expected = []
    for begin in range(0, len(flat), 64):
        block = flat[begin : begin + 64]
        scale = max(map(abs, block)) / most
        levels = [level * scale for level in range(-most, most + 1)]
        for entry in block:
            apart = [abs(level - entry) for level in levels]
            expected.append(levels[apart.index(min(apart))])
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64))


def test_text_that_repeats() -> None:
    assert repeated("is is is is is is") == 0.75 and repeated("a b") == 0 and repeated("") == 0
