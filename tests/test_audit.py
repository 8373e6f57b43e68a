"""The audit asks everything, names what changed, and says how near it was; against plain loops."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from editkit import Fact, r_rome
from editkit.corpora import Atlas, AtlasFact, load_atlas
from editkit.edits.edit import Edit
from editkit.errors import EditkitError
from editkit.methods.r_rome import RRomeSettings
from editkit.metrics.audit import Audit, answers, audit, nearness, written_by
from editkit.models.generate import generate, generate_batch
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.tokens import tokenise
from editkit.settings import ContextSettings, MomentSettings
from editkit.testing.tiny import tiny_lm

FACT = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
OTHERS = [Fact("{} is located in the city of", name, "Paris") for name in ("The Louvre", "Big Ben")]

Audited = tuple[list[str], Audit]  # the answers before the edit, and its audit


@pytest.fixture(scope="module")
def edit(atlas_lm: LanguageModel) -> Edit:
    settings = RRomeSettings(contexts=ContextSettings(lengths=(4,), counts=(2,)))
    return r_rome(atlas_lm, FACT, settings, moments=MomentSettings(tokens=3000), progress=False)


def key(lm: LanguageModel, module: str, fact: Fact) -> Tensor:
    """The input of `module` at the subject's last token, by a plain hook."""
    rows = tokenise(lm, [fact.text])
    seen: list[Tensor] = []
    handle = lm.model.get_submodule(module).register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with torch.inference_mode():
        lm.model(**rows.inputs())
    handle.remove()
    return seen[0][0, lookup_position(rows, 0, fact.prompt, fact.subject)].double()


def test_cosine_and_pull_are_those_of_a_plain_loop(atlas_lm: LanguageModel, edit: Edit) -> None:
    cosine, pull = nearness(atlas_lm, edit, [FACT, *OTHERS])
    (delta,) = edit.deltas
    assert delta.right is not None
    own = key(atlas_lm, delta.module, FACT)
    change = delta.left.double() @ delta.right.double()
    for place, fact in enumerate([FACT, *OTHERS]):
        k = key(atlas_lm, delta.module, fact)
        assert cosine[place] == pytest.approx((k @ own / k.norm() / own.norm()).item(), abs=1e-6)
        assert pull[place] == pytest.approx(((change @ k).norm() / (change @ own).norm()).item(), rel=1e-5)
    assert cosine[0] == pytest.approx(1) and pull[0] == pytest.approx(1)


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    """A part of the atlas: everything of landmarks' cities and countries, and some more."""
    whole = load_atlas()
    kept = whole.by_relation["landmark_city"] + whole.by_relation["landmark_country"] + whole.facts[::25]
    return Atlas(list(dict.fromkeys(kept)), whole.relations)


@pytest.fixture(scope="module")
def audited(atlas_lm: LanguageModel, edit: Edit, atlas: Atlas) -> Audited:
    before = answers(atlas_lm, atlas, progress=False)
    return before, audit(atlas_lm, edit, before=before, atlas=atlas, progress=False)


def test_the_unedited_model_knows_its_world(audited: Audited, atlas: Atlas) -> None:
    before, found = audited
    facts = atlas.facts
    assert len(found.facts) == len(facts) == len(before)
    right = sum(answer == fact.object for answer, fact in zip(before, facts, strict=True))
    assert right / len(facts) > 0.98


def test_the_edited_fact_has_changed_and_what_follows_is_named(audited: Audited) -> None:
    _, found = audited
    (edited,) = [fact for fact in found.facts if fact.edited]
    assert (edited.subject, edited.before, edited.after, edited.changed) == ("The Eiffel Tower", "Paris", "Rome", True)
    assert edited not in found.changed and len(found.changed) < 20
    assert [fact.cosine for fact in found.facts] == sorted((fact.cosine for fact in found.facts), reverse=True)


def test_answers_are_what_the_model_says_by_itself(
    atlas_lm: LanguageModel, edit: Edit, audited: Audited, atlas: Atlas
) -> None:
    """Of the nearest, the changed and some others: generated one by one."""
    _, found = audited
    some = [*found.facts[:5], *found.changed[:3], *found.facts[-5:]]
    prompts = {(f.relation, f.subject, f.object): atlas.trained_pairs(f)[0].format(f.subject) for f in atlas.facts}
    with edit.applied(atlas_lm):
        for fact in some:
            (said,) = generate(atlas_lm, [prompts[fact.relation, fact.subject, fact.object]], 12)
            assert said.strip().startswith(fact.after)


def test_a_model_that_does_not_know_the_atlas_is_refused(edit: Edit) -> None:
    lm = tiny_lm("gpt2")
    with pytest.raises(EditkitError, match="does not know this world"):
        audit(lm, edit, before=["nothing"] * len(load_atlas().facts), progress=False)


def test_a_sum_of_edits_is_audited_for_the_facts_of_its_parts(atlas_lm: LanguageModel, edit: Edit) -> None:
    other = Fact("{} is located in the city of", "The Louvre", "Rome", "Paris")
    settings = RRomeSettings(contexts=ContextSettings(lengths=(4,), counts=(2,)))
    second = r_rome(atlas_lm, other, settings, moments=MomentSettings(tokens=3000), progress=False)
    both = edit + second
    assert written_by(both) == [FACT, other]
    cosine, _ = nearness(atlas_lm, both, [FACT, other])
    assert cosine.tolist() == pytest.approx([1, 1])
    with pytest.raises(EditkitError, match="does not say which facts"):
        nearness(atlas_lm, replace(edit, provenance={}), [FACT])


def test_a_sibling_with_the_same_answer_is_not_the_edited_fact(atlas_lm: LanguageModel, edit: Edit) -> None:
    """Two relations of one subject may have one object: only the one that was edited is left out of what changed."""
    relations = {name: load_atlas().relations[name] for name in ("landmark_city", "landmark_country")}
    facts = [AtlasFact("The Eiffel Tower", "landmark", name, "Paris") for name in relations]
    found = audit(atlas_lm, edit, before=["Paris", "Paris"], atlas=Atlas(facts, relations), progress=False)
    assert {fact.relation: fact.edited for fact in found.facts} == {"landmark_city": True, "landmark_country": False}
    by_answer = replace(edit, provenance=edit.provenance | {"facts": [asdict(replace(FACT, prompt="See {} in"))]})
    found = audit(atlas_lm, by_answer, before=["Paris", "Paris"], atlas=Atlas(facts, relations), progress=False)
    assert all(fact.edited for fact in found.facts)  # phrased as no relation of the atlas is


def test_answers_known_before_are_the_same_sooner(
    atlas_lm: LanguageModel, edit: Edit, atlas: Atlas, audited: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what may have changed is asked freely; every answer is that of asking everything freely."""
    before, found = audited
    with (edit * 3.0).applied(atlas_lm):  # strong, so that many change
        asked = answers(atlas_lm, atlas, progress=False)
        free: list[str] = []
        run = generate_batch

        def counted(lm: LanguageModel, prompts: list[str], tokens: int) -> list[str]:
            free.extend(prompts)
            return run(lm, prompts, tokens)

        monkeypatch.setattr("editkit.metrics.audit.generate_batch", counted)
        assert answers(atlas_lm, atlas, before=before, progress=False) == asked
    changed = sum(a != b for a, b in zip(before, asked, strict=True))
    assert len(found.changed) <= changed <= len(free) < len(asked) // 2
