"""A llama2.c model, converted: it says what it says elsewhere, and edits come off (and land on the real one).

Always a tiny one of our own (llama2c.py); the real stories260K too where it is.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from editkit import Fact, MemitSettings, MomentSettings, RRomeSettings, load, memit, r_rome
from editkit.metrics.scoring import score_targets
from editkit.models.generate import generate
from editkit.models.load import LanguageModel
from editkit.testing.untouched import everything
from tests import llama2c
from tests.conftest import SHARED_DATA

SCRIPT = Path(__file__).parent.parent / "scripts" / "convert_llama2c.py"


@dataclass(frozen=True)
class Told:
    """A converted model, the files that it came from, and what it is known to say."""

    lm: LanguageModel
    checkpoint: Path
    begins: str  # what it goes on with after "Once upon a time"
    ids: list[int]  # the tokens of "Once upon a time"
    fact: Fact
    editable: bool  # our tiny model learned three sentences by heart: an edit moves it, but does not land


@pytest.fixture(scope="module", params=["own", *(["real"] if SHARED_DATA.is_dir() else [])])
def stories(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Told:
    folder, out = SHARED_DATA / "stories260K", tmp_path_factory.mktemp("stories")
    checkpoint, tokenizer = folder / "stories260K.bin", folder / "tok512.bin"
    # The greedy text that llama2.c's own program prints.
    begins, ids = ", there was a little girl named Lily. She loved to play", [1, 403, 407, 261, 378]
    fact = Fact("Once upon a time, there was a little {} named", "girl", "Tom", "Lily")
    if request.param == "own":
        made = tmp_path_factory.mktemp("own")
        checkpoint, tokenizer = made / "model.bin", made / "tokenizer.bin"
        llama2c.write_tokenizer(tokenizer)
        llama2c.write_checkpoint(llama2c.trained(), checkpoint)
        begins, ids = llama2c.STORY.removeprefix("Once upon a time"), llama2c.encode("Once upon a time")
        fact = Fact("Once upon a time, there was a little {} named", "fox", "Otto", "Ada")
    convert(checkpoint, tokenizer, out)
    return Told(load(out, device="cpu"), checkpoint, begins, ids, fact, request.param == "real")


def convert(checkpoint: Path, tokenizer: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(checkpoint), str(tokenizer), "--out", str(out)]
    return subprocess.run(command, check=True, capture_output=True, text=True)


def test_it_tells_its_story(stories: Told) -> None:
    text = generate(stories.lm, ["Once upon a time"], 60)[0]
    assert text.startswith(stories.begins)
    assert stories.lm.tokenizer("Once upon a time")["input_ids"] == stories.ids


def test_its_logits_are_those_of_the_files_own_program(stories: Told) -> None:
    with torch.no_grad():
        ours = stories.lm.model(input_ids=torch.tensor([stories.ids])).logits[0].double()
    theirs = torch.from_numpy(llama2c.forward(stories.checkpoint, stories.ids))
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("method", ["r_rome", "memit"])
def test_an_edit_moves_it_and_comes_off(stories: Told, method: str) -> None:
    lm, fact = stories.lm, stories.fact
    before = everything(lm.model)

    def p_new() -> float:
        return score_targets(lm, [fact.text], [fact.target_new])[0].probability

    moments, was = MomentSettings(tokens=4000), p_new()
    if method == "r_rome":
        edit = r_rome(lm, fact, RRomeSettings(layer=2), moments=moments, progress=False)
    else:
        settings = MemitSettings(layers=[1, 2], mom2_update_weight=1.0, clamp=4.0)
        edit = memit(lm, fact, settings, moments=moments, progress=False)
    with edit.applied(lm):
        assert p_new() != was
        assert p_new() > 0.5 > 10 * was or not stories.editable
    assert all(torch.equal(b, before[n]) for n, b in everything(lm.model).items())


@pytest.mark.slow
def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    for size in (3, 400):
        (tmp_path / "model.bin").write_bytes(bytes([7]) * size)
        with pytest.raises(subprocess.CalledProcessError) as caught:
            convert(tmp_path / "model.bin", tmp_path / "none", tmp_path / "out")
        assert "no llama2.c checkpoint" in caught.value.stderr and "Traceback" not in caught.value.stderr
    assert not (tmp_path / "out").exists()
