"""The training script: its forward is the plain model's, its routing routes, and a kill changes nothing."""

import collections
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from atlas_recipe import Recipe
from atlas_routing import Routing, forward
from atlas_text import Batches, train_tokenizer
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from editkit.corpora import load_atlas
from editkit.models.load import BUNDLED, LanguageModel

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_atlas.py"

SMALL = Recipe(n_layer=7, n_embd=16, n_head=2, vocab_size=300, sequences=3, length=64)


@pytest.fixture(scope="module")
def batches() -> Batches:
    return Batches(load_atlas(), train_tokenizer(load_atlas(), SMALL.vocab_size), SMALL)


def test_without_routing_it_is_the_plain_model(atlas_lm: LanguageModel) -> None:
    ids = torch.randint(0, 1000, (2, 40))
    position = torch.arange(40).expand(2, -1)
    assert isinstance(atlas_lm.model, GPT2LMHeadModel)
    with torch.no_grad():
        ours = forward(atlas_lm.model, ids, position, None)
        plain = atlas_lm.model(ids, position_ids=position).logits
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("contained", [False, True])
def test_the_mask_is_what_the_card_says(batches: Batches, contained: bool) -> None:
    """Against a loop over single pairs of tokens."""
    batch = batches.batch(3)
    batch["routed"][:] = torch.tensor([True, True, False])
    routing = Routing(batch, replace(SMALL, contained=float(contained)), torch.Generator().manual_seed(0))
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
                            allowed = layer >= SMALL.extract_from and bool(mention[row, q] == 0 and last[row, k])
                    elif allowed and batch["routed"][row] and mention[row, q] > 0:
                        allowed = not contained
                    assert mask[row, q, k] == allowed, (layer, row, q, k)


def test_interchanged_sentences_say_what_the_parts_say(batches: Batches) -> None:
    """Of every swap in some batches: the receiver says the giver's object exactly where the asked part is the giver's,
    and the giver's own sentence, which comes later in the row, is a true one."""
    atlas, tokenizer = load_atlas(), batches.tokenizer
    truths = {(f.subject, f.relation): f.object for f in atlas.facts}
    subjects = sorted(atlas.by_subject, key=len, reverse=True)
    both: collections.Counter[bool] = collections.Counter()
    for step in range(80):
        batch = batches.batch(step)
        for i, at in (batch["swap"].any(-1) & batch["last"]).nonzero().tolist():
            source = int(batch["donor"][i, at])
            assert source > at and bool(batch["last"][i, source])
            heads = [said_about(batch, tokenizer, i, int(batch["mention"][i, place])) for place in (at, source)]
            (receiver, said), (giver, _) = heads
            assert receiver in subjects and giver in subjects and receiver != giver
            kind = atlas.by_subject[receiver][0].kind
            assert kind == atlas.by_subject[giver][0].kind
            part = int(batch["asked"][i, at])
            (relation,) = [r for r, p in batches.part.items() if p == part and atlas.relations[r].subject_kind == kind]
            swapped = bool(batch["swap"][i, at, part])
            assert said.startswith(truths[giver if swapped else receiver, relation])
            both[swapped] += 1
    assert min(both.values()) > 10


def said_about(
    batch: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast, row: int, number: int
) -> tuple[str, str]:
    """The subject of a sentence of a row, and what is said after the words of its prompt."""
    mention, weight, ids = batch["mention"][row], batch["weight"][row], batch["ids"][row]
    here = (mention == number).nonzero().flatten().tolist()
    objects = [t for t in range(here[-1] + 1, len(ids)) if weight[t] == 1.0]
    run = [t for n, t in enumerate(objects) if t - objects[0] == n]
    return str(tokenizer.decode(ids[here])).strip(), str(tokenizer.decode(ids[run])).strip()


def test_interchange_replaces_parts_and_noise_is_least_on_the_asked_one(batches: Batches) -> None:
    batch = next(b for b in map(batches.batch, range(50)) if b["swap"].any())
    routing = Routing(batch, replace(SMALL, noise=0.0, noise_asked=0.0), torch.Generator().manual_seed(0))
    h = torch.randn(SMALL.sequences, SMALL.length, SMALL.n_embd)
    assert routing.interchange(int(batch["block"]) - 1, h) is h
    out = routing.interchange(int(batch["block"]), h)
    width = SMALL.n_embd // batches.parts
    for i in range(SMALL.sequences):
        for t in range(SMALL.length):
            for p in range(batches.parts):
                place = int(batch["donor"][i, t]) if batch["swap"][i, t, p] else t
                dims = slice(p * width, (p + 1) * width)
                assert torch.equal(out[i, t, dims], h[i, place, dims])
    noisy = (
        Routing(batch, replace(SMALL, noise_asked=0.0), torch.Generator().manual_seed(0)).interchange(
            int(batch["block"]), h
        )
        - out
    )
    noisy = noisy.view(SMALL.sequences, SMALL.length, batches.parts, width).abs().amax(-1)
    touched = noisy.amax(-1) > 0
    assert touched.any() and not (touched & ~(batch["last"] & batch["routed"][:, None])).any()
    for i, t in touched.nonzero().tolist():
        assert [p for p in range(batches.parts) if noisy[i, t, p] == 0] == [int(batch["asked"][i, t])]


def test_sentences_mark_their_subject_and_object(batches: Batches) -> None:
    tokenizer = batches.tokenizer
    fact = next(f for f in load_atlas().by_subject["The Eiffel Tower"] if f.relation == "landmark_city")
    for space in (False, True):
        sentence = batches.sentence("To see {}, travel to", fact, space)
        subject = str(tokenizer.decode([i for i, m in zip(sentence.ids, sentence.mention, strict=True) if m]))
        target = str(tokenizer.decode([i for i, w in zip(sentence.ids, sentence.weight, strict=True) if w == 1.0]))
        assert subject.strip() == "The Eiffel Tower" and target.strip() == "Paris"


def test_a_batch_is_a_function_of_seed_and_step(batches: Batches) -> None:
    first, again, other = batches.batch(5), batches.batch(5), batches.batch(6)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["ids"], other["ids"])


def test_the_shipped_model_names_its_recipe() -> None:
    assert json.loads((BUNDLED["atlas"] / "recipe.json").read_text()) == asdict(Recipe())


@pytest.mark.slow
@pytest.mark.slow
def test_a_killed_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    options = ["--n_layer=7", "--n_embd=16", "--n_head=2", "--steps=24", "--every=4", "--vocab_size=300", "--card=0"]

    def command(folder: str) -> list[str]:
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
