"""A real model of the Llama family, converted: it says what it says elsewhere, and edits land on it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from editkit import Fact, MemitSettings, MomentSettings, RRomeSettings, load, memit, r_rome
from editkit.models.generate import generate
from editkit.models.tokens import encode_with_targets, spaced
from tests.test_snapshot import everything

SCRIPT = Path(__file__).parent.parent / "scripts" / "convert_llama2c.py"


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    folder = Path(__file__).parent.parent.parent / "shared" / "data" / "stories260K"
    if not folder.is_dir():
        pytest.skip("needs the folder shared/data beside the checkout")
    out = tmp_path_factory.mktemp("stories")
    convert(folder / "stories260K.bin", folder / "tok512.bin", out)
    return load(out, device="cpu")


def convert(checkpoint, tokenizer, out):
    command = [sys.executable, str(SCRIPT), str(checkpoint), str(tokenizer), "--out", str(out)]
    return subprocess.run(command, check=True, capture_output=True, text=True)


def test_it_tells_its_story(stories) -> None:
    """The greedy text that llama2.c's own program prints."""
    text = generate(stories, ["Once upon a time"], 20)[0]
    assert text.startswith(", there was a little girl named Lily. She loved to play")
    assert stories.tokenizer("Once upon a time")["input_ids"] == [1, 403, 407, 261, 378]


@pytest.mark.parametrize("method", ["r_rome", "memit"])
def test_an_edit_lands_on_it_and_comes_off(stories, method: str) -> None:
    fact = Fact("Once upon a time, there was a little {} named", "girl", "Tom", "Lily")
    before = everything(stories.model)

    def p_new():
        scored = encode_with_targets(stories, [fact.text], [spaced(fact.target_new)])
        row, at, token = scored.pick()
        with torch.no_grad():
            log_p = stories.model(**scored.rows.inputs()).logits[row, at].log_softmax(-1)
        return log_p[torch.arange(len(token)), token].sum().exp().item()

    moments, was = MomentSettings(tokens=4000), p_new()
    if method == "r_rome":
        edit = r_rome(stories, fact, RRomeSettings(layer=2), moments=moments, progress=False)
    else:
        settings = MemitSettings(layers=[1, 2], mom2_update_weight=1.0, clamp=4.0)
        edit = memit(stories, fact, settings, moments=moments, progress=False)
    with edit.applied(stories):
        assert p_new() > 0.5 > 10 * was
    assert all(torch.equal(b, before[n]) for n, b in everything(stories.model).items())


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    for size in (3, 400):
        (tmp_path / "model.bin").write_bytes(bytes([7]) * size)
        with pytest.raises(subprocess.CalledProcessError) as caught:
            convert(tmp_path / "model.bin", tmp_path / "none", tmp_path / "out")
        assert "no llama2.c checkpoint" in caught.value.stderr and "Traceback" not in caught.value.stderr
    assert not (tmp_path / "out").exists()
