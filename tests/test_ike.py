"""IKE: the model with a prefix in force gives what it gives when the same text is typed by hand."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit import Edit, Fact, Session, apply_files
from editkit.corpora import load_atlas
from editkit.data.cases import REWRITE, Case, Probe
from editkit.edits import base_of, routing_change
from editkit.errors import ConfigError, EditFileError, EditkitError, FactError
from editkit.lenses import attention_to_subject, logit_lens, side_effects, stream_change
from editkit.methods.ike import IkeSettings, ike, read
from editkit.methods.rome import RomeSettings, rome
from editkit.methods.shared.demonstrations import KINDS, Corpus, Example
from editkit.metrics.measure import look, rows_of
from editkit.metrics.running_text import Drift
from editkit.metrics.scoring import score_targets, top_next
from editkit.models.generate import generate, generate_batch
from editkit.models.installed import installed_on
from editkit.models.load import LanguageModel, load
from editkit.models.prefix import Prefix, prefix_of
from editkit.models.tokens import encode_with_targets, tokenise
from editkit.settings import MeasureSettings, MomentSettings, TraceSettings
from editkit.testing.tiny import SITES, tiny_lm
from editkit.testing.untouched import everything, plain_nll, tokens_of
from editkit.tracing import trace
from tests.run_folders import really_run, record_of
from tests.test_session import FACTS

FACT = Fact("The city of {}", "The Eiffel Tower", "Rome", "Paris")
TYPED = "New Fact: The city of The Eiffel Tower Rome\nPrompt: "
PROMPTS = [FACT.text, "The Eiffel Tower is located in the city of", "The old bridge", FACT.text]
TARGETS = ["Rome", "Berlin Madrid", "of stone", "Paris"]


def typed(lm: LanguageModel, text: str) -> tuple[Any, ...]:
    """Scores, texts and more of a model, each text with `text` typed in front of it."""
    asked = [text + prompt for prompt in PROMPTS]
    return (
        score_targets(lm, asked, TARGETS),
        generate_batch(lm, asked, 6),
        generate_batch(lm, asked, 6, top_k=5, seed=3),
        generate(lm, asked, 6),
        top_next(lm, asked[0]),
    )


@pytest.mark.parametrize("family", SITES)
def test_it_is_the_text_typed_by_hand(family: str) -> None:
    lm = tiny_lm(family)
    before, start = {n: t.clone() for n, t in everything(lm.model).items()}, lm.digest
    edit = ike(lm, FACT)
    assert edit.deltas == () and lm.digest == start and prefix_of(lm.model) == ""
    wanted, without = typed(lm, TYPED), typed(lm, "")
    with edit.applied(lm) as applied:
        assert lm.digest != start and prefix_of(lm.model) == TYPED
        assert typed(lm, "") == wanted
        assert all(torch.equal(each, before[name]) for name, each in everything(lm.model).items())
    assert applied.reversal is not None and applied.reversal.exact
    assert lm.digest == start and typed(lm, "") == without
    # And against the whole model, one row and one token at a time.
    exact = plain_nll(lm.model, [tokens_of(lm, TYPED + PROMPTS[1], TARGETS[1])]).item()
    assert wanted[0][1].nll == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_characters_are_counted_from_the_texts_own_first(family: str) -> None:
    lm = tiny_lm(family)
    plain = encode_with_targets(lm, PROMPTS, [f" {target}" for target in TARGETS])
    by_hand = tokenise(lm, [TYPED + prompt for prompt in PROMPTS])
    with ike(lm, FACT).applied(lm):
        scored = encode_with_targets(lm, PROMPTS, [f" {target}" for target in TARGETS])
        rows = tokenise(lm, PROMPTS)
    assert torch.equal(rows.ids, by_hand.ids) and rows.texts == tuple(PROMPTS)
    for row, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        (first, *_), offsets = scored.positions[row], scored.rows.offsets[row]
        assert len(scored.positions[row]) == len(plain.positions[row])
        assert offsets[first][1] > len(prompt) >= offsets[first - 1][1]
        assert offsets[-1][1] == len(f"{prompt} {target}")
        covered = rows.tokens_covering(row, 0, len(prompt))
        said = str(lm.tokenizer.decode(rows.ids[row, covered].tolist()))
        assert said.strip() == prompt and covered == list(range(covered[0], len(rows.offsets[row])))
    with pytest.raises(FactError, match="with the prefix of .* characters that is in force has"):
        far = Edit((), base_of(lm), installed=(Prefix("word " * 400, ""),))
        with far.applied(lm):
            tokenise(lm, PROMPTS)
    assert installed_on(lm.model) == ()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_looks_inside_sees_the_prefix_and_finds_the_subject(family: str) -> None:
    """A trace, lenses and an edit of weights on a model with a prefix are those of the typed text."""
    lm = tiny_lm(family)
    by_hand = Fact(TYPED + FACTS[0].prompt, FACTS[0].subject, "Rome", "Paris")
    settings = RomeSettings(layer=1, steps=3)
    options: dict[str, Any] = {"moments": MomentSettings(enabled=False), "contexts": ["{}"], "progress": False}

    def seen(fact: Fact) -> tuple[Any, ...]:
        (delta,) = rome(lm, fact, RomeSettings(layer=1, steps=3, kl_factor=0.0), **options).deltas
        found = trace(lm, fact, TraceSettings(samples=2), progress=False)
        lens, looks = logit_lens(lm, fact.text, ["Rome"]), attention_to_subject(lm, fact)
        return delta.change(), found.clean, lens.probability, looks.to_subject, looks.tokens[-1]

    wanted = seen(by_hand)
    with ike(lm, FACT).applied(lm):
        got = seen(FACTS[0])
        rome(lm, FACTS[0], settings, **options)
    for ours, exact in zip(got, wanted, strict=True):
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, exact)
        else:
            assert ours == pytest.approx(exact) if isinstance(ours, float) else ours == exact


def test_running_text_carries_it_and_its_own_tokens_do_not_count() -> None:
    lm = load("atlas")
    drift = Drift.take(lm, tokens=256, length=64)
    with ike(lm, FACT).applied(lm):
        kl, perplexity = drift.measure(lm)
    before = lm.tokenizer(TYPED)["input_ids"]
    surprise, divergence = [], []
    for block, unedited in zip(drift.blocks.tolist(), drift.unedited, strict=True):
        with torch.no_grad():
            log_p = lm.model(torch.tensor([[*before, *block]])).logits[0].double().log_softmax(-1)[len(before) : -1]
        surprise += [-log_p[at - 1, block[at]].item() for at in range(1, len(block))]
        divergence += (unedited.double().exp() * (unedited.double() - log_p)).sum(-1).tolist()
    assert kl.average is not None and perplexity.average is not None
    assert kl.average.mean == pytest.approx(sum(divergence) / len(divergence), rel=1e-3)
    assert perplexity.average.mean == pytest.approx(torch.tensor(surprise).mean().exp().item(), rel=1e-3)
    far = Edit((), base_of(lm), installed=(Prefix("word " * 250, ""),))
    with far.applied(lm), pytest.raises(EditkitError, match="behind a prefix of .* 'atlas' has 256 positions"):
        drift.measure(lm)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_it_is_taken_away_under_exceptions(error: type[BaseException]) -> None:
    lm = tiny_lm("gpt2")
    start = lm.digest
    with pytest.raises(error), ike(lm, FACT).applied(lm):
        assert prefix_of(lm.model)
        raise error
    assert prefix_of(lm.model) == "" and lm.digest == start


# Demonstrations


@pytest.fixture(scope="module")
def atlas_lm() -> LanguageModel:
    return load("atlas")


@pytest.fixture(scope="module")
def atlas_corpus(atlas_lm: LanguageModel) -> Corpus:
    found = read(atlas_lm, IkeSettings(corpus="atlas"))
    assert found is not None
    return found


def shown(edit: Edit) -> list[str]:
    """The demonstrations in an edit's prefix, the fact's own copy last."""
    (prefix,) = edit.installed
    assert isinstance(prefix, Prefix)
    *found, stated = prefix.text.split("\n\n")
    assert stated.startswith("New Fact: ") and stated.count("\n") == 1 and prefix.lead == "Prompt: "
    return found


def test_demonstrations_are_the_nearest_facts_of_the_corpus(atlas_lm: LanguageModel, atlas_corpus: Corpus) -> None:
    lm, fact = atlas_lm, Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
    corpus = Corpus(atlas_corpus.examples[::16], atlas_corpus.states[::16])
    edit = ike(lm, fact, IkeSettings(corpus="atlas", demonstrations=40, room=0.95), base=corpus)
    *found, own = shown(edit)
    assert own == f"New Fact: {fact.text} Rome\nPrompt: {fact.text} Rome"
    assert len(found) == edit.provenance["demonstrations"] > 2

    def mean_state(text: str) -> torch.Tensor:
        with torch.no_grad():
            ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
            found: torch.Tensor = lm.model(ids, output_hidden_states=True).hidden_states[-1][0].mean(0).double()
            return found

    ours = mean_state(f"{fact.text} Rome")
    near = []
    for number, each in enumerate(corpus.examples):
        if "The Eiffel Tower" not in (each.subject, each.neighbor_subject):
            state = mean_state(f"{each.prompt} {each.target_new}")
            near.append((-(state @ ours / state.norm() / ours.norm()).item(), number))
    nearest = [corpus.examples[number] for _, number in sorted(near)[: len(found)]]
    assert found[::-1] == [each.demonstration(KINDS[i % 8]).strip() for i, each in enumerate(nearest)]
    # As many as fit: with one more the prefix is too long.
    one_more = corpus.examples[sorted(near)[len(found)][1]].demonstration(KINDS[len(found) % 8])
    (prefix,) = edit.installed
    assert isinstance(prefix, Prefix)
    longest = int(0.95 * 256)
    assert len(lm.tokenizer(prefix.text + prefix.lead)["input_ids"]) <= longest
    assert len(lm.tokenizer(one_more + prefix.text + prefix.lead)["input_ids"]) > longest
    few = ike(lm, fact, IkeSettings(corpus="atlas", demonstrations=2, room=0.95), base=corpus)
    assert shown(few) == [*found[-2:], own]
    assert [KINDS.count(kind) for kind in ("copy", "update", "retain")] == [1, 3, 4]


def test_the_atlas_as_a_corpus_tells_the_truth_but_for_the_new_facts(atlas_corpus: Corpus) -> None:
    corpus, atlas = atlas_corpus, load_atlas()
    true = {f"{p.format(f.subject)} {f.object}" for f in atlas.facts for p in atlas.trained_pairs(f)}
    assert len(corpus.examples) > 0.9 * len(atlas.facts)
    for each in corpus.examples:
        assert f"{each.neighbor} {each.answer}" in true and each.subject != each.neighbor_subject
        assert f"{each.prompt} {each.target_new}" not in true and each.paraphrase != each.prompt


RECORD = {
    "requested_rewrite": {
        "prompt": "The home of {} is",
        "subject": "Ada",
        "target_new": {"str": "Oslo"},
        "target_true": {"str": "London"},
    },
    "paraphrase_prompts": ["Ada lives in", "unused"],
    "neighborhood_prompts": ["Charles lives in", "unused"],
}


def test_a_corpus_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps([RECORD]))
    lm = tiny_lm("llama")
    edit = ike(lm, FACT, IkeSettings(corpus=str(path), room=0.95))
    (demonstration, own) = shown(edit)
    assert demonstration == "New Fact: The home of Ada is Oslo\nPrompt: Charles lives in London"
    assert own.startswith("New Fact: The city of The Eiffel Tower Rome")
    example = Example("Ada", "The home of Ada is", "Oslo", "Ada lives in", "Charles lives in", "", "London")
    assert example.demonstration("update") == "New Fact: The home of Ada is Oslo\nPrompt: Ada lives in Oslo\n\n"
    assert example.demonstration("copy").endswith("Prompt: The home of Ada is Oslo\n\n")
    assert shown(ike(lm, Fact("{} is", "Ada", "here"), IkeSettings(corpus=str(path), room=0.95)))[0].startswith(
        "New Fact: Ada is here"
    )
    for wrong in ("[]", "{", json.dumps([{"prompt": "x"}]), json.dumps([RECORD, 3])):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match="method.corpus=.*corpus.json"):
            ike(lm, FACT, IkeSettings(corpus=str(path)))
    with pytest.raises(ConfigError, match="cannot be read"):
        ike(lm, FACT, IkeSettings(corpus=str(tmp_path / "none")))


# Sessions, files, refusals


def test_a_session_states_each_step_and_forgets_what_is_undone(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    start = lm.digest
    settings = IkeSettings(room=0.9)
    one, two = Fact("The city of {}", "A", "Rome"), Fact("The city of {}", "B", "Oslo")
    with Session(lm, "ike", settings, progress=False) as session:
        session.edit(one)
        first = lm.digest
        session.edit(two)
        assert prefix_of(lm.model) == "New Fact: The city of A Rome\nNew Fact: The city of B Oslo\nPrompt: "
        state = lm.digest
        session.save(tmp_path)
        session.undo(1)
        assert lm.digest == first
        session.edit(two)
        session.undo(0)
        assert prefix_of(lm.model) == "New Fact: The city of B Oslo\nPrompt: "
        for number in range(40):
            try:
                session.edit(Fact("The city of {}", f"C{number}", "Rome"))
            except EditkitError as error:
                assert "method.room gives it" in str(error)
                break
        else:
            raise AssertionError("a prefix without end")
    assert lm.digest == start
    with Session.load(tmp_path, lm, progress=False) as again:
        assert lm.digest == state
        files = sorted(
            tmp_path.glob("*.safetensors"), key=lambda path: path.name != f"{again.steps[0].digest[:16]}.safetensors"
        )
    with apply_files(files, lm):
        assert lm.digest == state
    assert lm.digest == start


def test_a_file_holds_it_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    edit = ike(lm, [FACT, FACTS[1]], IkeSettings(room=0.9))
    path = edit.save(tmp_path / "edit.safetensors")
    again = Edit.load(path)
    assert again.to_bytes() == edit.to_bytes() == path.read_bytes()
    (prefix,) = again.installed
    assert isinstance(prefix, Prefix) and isinstance(edit.installed[0], Prefix)
    assert (prefix.text, prefix.lead) == (edit.installed[0].text, "Prompt: ") and prefix.digest == edit.installed[
        0
    ].digest
    for wrong in (b'"kind": "prefix"'.replace(b"prefix", b"suffix"), b'"kind": "codebook"'):
        damaged = path.read_bytes().replace(b'\\"kind\\": \\"prefix\\"', wrong.replace(b'"', b'\\"'))
        assert damaged != path.read_bytes()
        (tmp_path / "damaged.safetensors").write_bytes(damaged)
        with pytest.raises(EditFileError, match="cannot be read as an edit"):
            Edit.load(tmp_path / "damaged.safetensors")
    plain = Edit((), edit.base)
    assert b"installed" not in plain.to_bytes()  # files of other edits are as they were


def test_what_compares_token_by_token_is_refused() -> None:
    lm = tiny_lm("mixtral")
    edit = ike(lm, FACT)
    with pytest.raises(EditkitError, match="stream_change compares a text .* token by token, and a prefix of"):
        stream_change(lm, edit, FACT.text)
    with pytest.raises(EditkitError, match="routing_change compares"):
        routing_change(lm, edit, [FACT.text])
    with pytest.raises(EditkitError, match="side_effects is for changes of weights, and this edit is a prefix of"):
        side_effects(lm, edit, [FACT.text])
    refused: list[dict[str, Any]] = [{"transform": "rect"}, {"simie": 1.0}, {"demonstrations": 0}, {"room": 1.0}]
    for wrong in refused:
        with pytest.raises(ConfigError):
            IkeSettings(**wrong)


def test_a_case_is_asked_behind_it() -> None:
    lm = tiny_lm("gpt2")
    case = Case((FACT,), (Probe(REWRITE, FACT.text, "Paris", "Rome"),), generation=("The Eiffel Tower is",))
    settings = MeasureSettings(fluency=12, generate=4)
    before = look(lm, case, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ike(lm, FACT).applied(lm):
            after = look(lm, case, settings)
    rows = rows_of(case, before, after)
    (said,) = generate_batch(lm, [TYPED + FACT.text], 8)
    assert rows[0]["prompt"] == FACT.text and said.startswith(rows[0]["said_after"])
    assert rows[1]["text_after"].startswith("The Eiffel Tower is")


@pytest.mark.parametrize("method", ["ike", "grace"])
def test_the_command_tells_of_an_edit_that_changes_no_weight(method: str, tmp_path: Path) -> None:
    folder = really_run(tmp_path / "edit", "edit=gpt2_fact", f"method={method}")
    record = record_of(folder)
    (told,) = record["edit"]["installed"]
    assert told.startswith({"ike": "a prefix of 66 characters", "grace": "a codebook of 1 entry at"}[method])
    assert (record["edit"]["relative_norm"], record["edit"]["parameters"], record["edit"]["spectra"]) == (0.0, [], [])
    assert record["reversal"]["exact"] and (folder / "report.html").is_file()
    assert Edit.load(folder / "edit.safetensors").installed
