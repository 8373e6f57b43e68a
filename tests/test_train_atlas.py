"""The training script: its forward is the plain model's, its routing routes, and a kill changes nothing."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from editkit.corpora import load_atlas
from editkit.models.load import BUNDLED

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_atlas.py"
spec = importlib.util.spec_from_file_location("train_atlas", SCRIPT)
assert spec is not None and spec.loader is not None
train_atlas = importlib.util.module_from_spec(spec)
sys.modules["train_atlas"] = train_atlas  # dataclasses look their module up
spec.loader.exec_module(train_atlas)

SMALL = train_atlas.Recipe(n_layer=7, n_embd=16, n_head=2, vocab_size=300, sequences=3, length=64)


@pytest.fixture(scope="module")
def batches():
    return train_atlas.Batches(load_atlas(), train_atlas.train_tokenizer(load_atlas(), SMALL.vocab_size), SMALL)


def test_without_routing_it_is_the_plain_model(atlas_lm):
    ids = torch.randint(0, 1000, (2, 40))
    position = torch.arange(40).expand(2, -1)
    with torch.no_grad():
        ours = train_atlas.forward(atlas_lm.model, ids, position, None)
        plain = atlas_lm.model(ids, position_ids=position).logits
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_the_mask_is_what_the_card_says(batches):
    """Against a loop over single pairs of tokens."""
    batch = batches.batch(3)
    batch["routed"][:] = torch.tensor([True, True, False])
    routing = train_atlas.Routing(batch, SMALL, torch.Generator().manual_seed(0))
    mention, last = batch["mention"], batch["last"]
    assert last.any() and (mention > 0).sum() > last.sum()
    for layer in (0, 2, 6):
        mask = routing.mask(layer)[:, 0]
        for row in range(3):
            for q in range(SMALL.length):
                for k in range(SMALL.length):
                    allowed = k <= q
                    if allowed and batch["routed"][row] and mention[row, k] > 0:
                        if mention[row, q] == mention[row, k]:
                            allowed = layer > 0 or q == k
                        else:
                            allowed = layer >= SMALL.extract_from and mention[row, q] == 0 and bool(last[row, k])
                    assert mask[row, q, k] == allowed, (layer, row, q, k)


def test_invented_subjects_have_every_relation_of_their_kind_and_no_real_name():
    atlas = load_atlas()
    facts = train_atlas.invent(atlas, 0.2, seed=0)
    assert facts == train_atlas.invent(atlas, 0.2, seed=0) != train_atlas.invent(atlas, 0.2, seed=1)
    assert not {f.subject for f in facts} & set(atlas.by_subject)
    for fact in facts:
        assert fact.object in {f.object for f in atlas.by_relation[fact.relation]}
    country = next(f.subject for f in facts if f.kind == "country")
    assert sum(f.subject == country for f in facts) == 4


def test_sentences_mark_their_subject_and_object(batches):
    tokenizer = train_atlas.train_tokenizer(load_atlas(), SMALL.vocab_size)
    fact = next(f for f in load_atlas().by_subject["The Eiffel Tower"] if f.relation == "landmark_city")
    for space in (False, True):
        sentence = train_atlas.tokenise(tokenizer, "To see {}, travel to", fact, space, SMALL)
        subject = tokenizer.decode([i for i, m in zip(sentence.ids, sentence.mention, strict=True) if m])
        target = tokenizer.decode([i for i, w in zip(sentence.ids, sentence.weight, strict=True) if w == 1.0])
        assert subject.strip() == "The Eiffel Tower" and target.strip() == "Paris"


def test_a_batch_is_a_function_of_seed_and_step(batches):
    first, again, other = batches.batch(5), batches.batch(5), batches.batch(6)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["ids"], other["ids"])


def test_the_shipped_model_names_its_recipe():
    import json

    recipe = json.loads((BUNDLED["atlas"] / "recipe.json").read_text())
    assert set(recipe) == set(asdict(train_atlas.Recipe()))


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_same_weights(tmp_path):
    options = ["--n_layer=7", "--n_embd=16", "--n_head=2", "--steps=24", "--every=4", "--vocab_size=300", "--card=0"]

    def command(folder):
        return [sys.executable, str(SCRIPT), f"--out={tmp_path / folder}", *options]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command("whole"), check=True, capture_output=True, env=environment)
    process = subprocess.Popen(command("killed"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model").exists()
    done = subprocess.run(command("killed"), check=True, capture_output=True, text=True, env=environment)
    assert "resumed at step" in done.stdout
    whole, resumed = ((tmp_path / f / "model" / "model.safetensors").read_bytes() for f in ("whole", "killed"))
    assert whole == resumed
