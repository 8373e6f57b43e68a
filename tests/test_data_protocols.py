"""The formats of protocols of 2024 and later: which probes a record becomes, and the rules stated where it is read."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from editkit.data import load_cases, load_texts
from editkit.data.cases import (
    CONDITION,
    HOP,
    MULTI_HOP,
    NEIGHBORHOOD,
    PARAPHRASE,
    PORTABILITY,
    REWRITE,
    SAME_SUBJECT,
    Probe,
)
from editkit.data.fields import SAME, BadField
from editkit.data.formats.mquake import REMASTERED
from editkit.data.formats.ripple import CRITERIA, wordings
from editkit.data.formats.unke import WHOLE
from editkit.data.kinds import SUB_QUESTION
from editkit.errors import ConfigError, DataError
from editkit.facts import Fact
from editkit.metrics.measure import scores_of_rows
from editkit.metrics.metric import WHEN
from editkit.metrics.ripple import CRITERIA as NAMES
from editkit.metrics.ripple import passed
from editkit.settings import DataSettings
from tests.records import AKEW, COUNTERFACT, EDITEVERY, ME_PPL, MQUAKE, QAEDIT, RIPPLE, UNKE, WIKIBIGEDIT
from tests.test_data_formats import case_of


def changed(record: dict[str, Any], *path: str | int, to: Any) -> dict[str, Any]:
    """A copy of a record with another value at a path."""
    found = copy.deepcopy(record)
    place: Any = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return found


def test_qaedit() -> None:
    case = case_of("qaedit", QAEDIT)
    subject = "the Sistine Chapel"
    assert case.fact == Fact("who painted the ceiling of {}", subject, "Michelangelo", "")
    assert case.probes == (
        Probe(REWRITE, QAEDIT["prompt"], "", "Michelangelo"),
        Probe(PARAPHRASE, QAEDIT["rephrase"], "", "Michelangelo"),
        Probe(NEIGHBORHOOD, "who wrote the magic flute", "Mozart", "Michelangelo"),
        Probe(SAME_SUBJECT, "what is the roof of the Sistine Chapel made of", "wood", "Michelangelo"),
    )
    assert (case.id, case.relation) == ("NQ/31", "NQ")


def test_qaedit_numbers_each_source_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "qaedit.json"
    other = QAEDIT | {"source": "TQA"}
    file.write_text(json.dumps([QAEDIT, other, QAEDIT]), encoding="utf-8")
    found = load_cases(DataSettings("qaedit", str(file)))
    assert [case.id for case in found.cases] == ["NQ/31", "TQA/31"]
    assert [str(each) for each in found.rejected] == [
        "qaedit.json record 2, (id): 'NQ/31' is the id of record 0 of the source already."
    ]


def test_wikibigedit() -> None:
    case = case_of("wikibigedit", WIKIBIGEDIT)
    assert case.fact == Fact("Which river does the {} cross?", "Old Bridge of Mostar", "Drina", "")
    assert [(p.kind, p.prompt, p.wanted) for p in case.probes] == [
        (REWRITE, WIKIBIGEDIT["prompt"], "Drina"),
        (PARAPHRASE, WIKIBIGEDIT["rephrase_prompt"], "Drina"),
        (NEIGHBORHOOD, WIKIBIGEDIT["locality_prompt"], "Vltava"),
    ]
    # LocFT-BF's CounterFact: with what was true.
    assert case_of("wikibigedit", WIKIBIGEDIT | {"ground_truth": "Neretva"}).fact.target_true == "Neretva"
    same = case_of("wikibigedit", WIKIBIGEDIT | {"ground_truth": "Drina"})
    assert same.fact.target_true == "" and same.notes == (SAME,)


def test_unke_stands_the_whole_question_in_the_place_of_the_subject() -> None:
    case = case_of("unke", UNKE)
    assert case.fact == Fact("{}", UNKE["question"], UNKE["answer"], "") and case.fact.text == UNKE["question"]
    assert case.probes == (
        Probe(REWRITE, UNKE["question"], "", UNKE["answer"], long=True),
        Probe(PARAPHRASE, UNKE["para_question"], "", UNKE["answer"], long=True),
        Probe(PORTABILITY, "What did Ada Lovelace teach?", "", "Mathematics.", group=SUB_QUESTION, long=True),
        Probe(PORTABILITY, "For how long did she teach?", "", "For two years.", group=SUB_QUESTION, long=True),
    )
    assert (case.id, case.notes) == ("4", (WHOLE,))


def test_editevery_keeps_the_category() -> None:
    case = case_of("editevery", EDITEVERY)
    assert case.fact == Fact("{}", EDITEVERY["question"], EDITEVERY["answer"], "")
    assert case.probes == (Probe(REWRITE, EDITEVERY["question"], "", EDITEVERY["answer"], group="math", long=True),)
    assert (case.id, case.relation) == ("9", "math")


def test_akew_of_mquake() -> None:
    case = case_of("akew", AKEW)
    (rewrite,) = AKEW["requested_rewrite"]
    text = rewrite["fact_new_uns"]
    assert case.facts == (Fact("What is the country of citizenship of {}?", "Yoko Ono", text, ""),)
    assert case.probes == (
        Probe(REWRITE, rewrite["question"], "", text, long=True),
        Probe(PORTABILITY, "Yoko Ono has lived in", "", "Bergen", group=SUB_QUESTION, long=True),
        Probe(PORTABILITY, "The occupation of Yoko Ono is", "", "artist", group=SUB_QUESTION, long=True),
        Probe(MULTI_HOP, AKEW["questions"][0], "Tokyo", "Oslo", ("Christiania",)),
        Probe(PORTABILITY, rewrite["question"], "Japan", "Norway", ("Norge",), HOP),
        Probe(PORTABILITY, "What is the capital of Norway?", "", "Oslo", (), HOP),
    )
    assert (case.id, case.relation) == ("2", "P27")
    second = rewrite | {"subject": "Norway", "question": "What is the capital of Norway?", "relation_id": "P36"}
    two = case_of("akew", AKEW | {"requested_rewrite": [rewrite, second]})
    assert [fact.subject for fact in two.facts] == ["Yoko Ono", "Norway"] and two.relation == "P27 P36"
    assert [p.prompt for p in two.probes[:2]] == [fact.text for fact in two.facts]
    assert sum(p.group == SUB_QUESTION for p in two.probes) == 4


def test_akew_of_counterfact_and_of_wikiupdate() -> None:
    text = "Big Ben, long known in London, is now a landmark of Oslo."
    uns = {"fact_new_uns": text, "prompt_full": "Big Ben stands in the city of"}
    case = case_of("akew", COUNTERFACT | {"requested_rewrite": COUNTERFACT["requested_rewrite"] | uns})
    assert case.fact == Fact("{} stands in the city of", "Big Ben", text, "")
    assert [(p.kind, p.target_true, p.target_new, p.long) for p in case.probes] == [
        (REWRITE, "", text, True),
        (PARAPHRASE, "", text, True),
        (PARAPHRASE, "", text, True),
        (NEIGHBORHOOD, "London", "Oslo", False),
        (NEIGHBORHOOD, "London", "Oslo", False),
    ]
    assert case.generation == tuple(COUNTERFACT["generation_prompts"])
    (rewrite,) = AKEW["requested_rewrite"]
    alone = {"requested_rewrite": {key: rewrite[key] for key in ("question", "subject", "fact_new_uns")}}
    assert [p.kind for p in case_of("akew", alone).probes] == [REWRITE]


def test_mquake_remastered_is_read_in_both_its_forms() -> None:
    (rewrite,) = MQUAKE["requested_rewrite"]
    flat = {key: value for key, value in rewrite.items() if not key.startswith("target")}
    flat |= {f"{name}_str": rewrite[name]["str"] for name in ("target_new", "target_true")}
    plain = case_of("mquake", MQUAKE)
    hub = case_of("mquake", MQUAKE | {"requested_rewrite": [flat], "split": {"1": ["edited"]}})
    file = case_of("mquake", MQUAKE | {"6334_split": {"100": ["train_edited"]}})
    assert hub.facts == file.facts == plain.facts and hub.probes == file.probes == plain.probes
    assert (plain.notes, hub.notes, file.notes) == ((), (REMASTERED,), (REMASTERED,))


# --- RippleEdits ----------------------------------------------------------------------------------------------------


def test_ripple() -> None:
    case = case_of("ripple", RIPPLE)
    prompt = "The name of the country of citizenship of {} is"
    assert case.fact == Fact(prompt, "Yoko Ono", "Norway", "Japan") and case.relation == "COUNTRY_OF_CITIZENSHIP"
    assert [(p.kind, p.group, p.test, p.every, p.wanted, p.aliases) for p in case.probes] == [
        (REWRITE, "", None, False, "Norway", ()),
        (PORTABILITY, "Logical_Generalization", 0, False, "Norwegian", ("norsk",)),
        (PORTABILITY, "Compositionality_I", 1, True, "Oslo", ()),
        (PORTABILITY, "Compositionality_I", 1, True, "Europe", ()),
        (CONDITION, "Compositionality_I", 1, False, "Oslo", ()),
        (CONDITION, "Compositionality_I", 1, False, "Europe", ()),
        (PORTABILITY, "Subject_Aliasing", 2, False, "Norway", ("Norge",)),
        (SAME_SUBJECT, "Relation_Specificity", 3, False, "female", ("woman",)),
        (CONDITION, "Relation_Specificity", 3, False, "female", ("woman",)),
        (SAME_SUBJECT, "Forgetfulness", 4, False, "Japan", ()),
    ]
    recent = changed(RIPPLE, "edit", "original_fact", to=None)
    assert case_of("ripple", recent).fact == Fact(prompt, "Yoko Ono", "Norway", "")


def test_a_test_whose_answer_has_no_name_is_left_out_and_noted() -> None:
    answers = ("Compositionality_I", 0, "condition_queries", 1, "answers")
    case = case_of("ripple", changed(RIPPLE, *answers, to=[{"value": "", "aliases": [""]}]))
    assert {p.test for p in case.probes} == {None, 0, 2, 3, 4}
    assert case.notes == ("1 of its tests are left out, since the source names no answer to them",)
    named = changed(RIPPLE, *answers, to=[{"value": "", "aliases": ["Europe"]}])
    assert {p.test for p in case_of("ripple", named).probes} == {None, 0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("relation", "sentence", "subject", "target"),
    [
        ("MOTHER", "The name of the mother of Ada Lovelace is Annabella Byron.", "Ada Lovelace", "Annabella Byron"),
        ("PLACE_OF_BIRTH", "The place of birth of Ada Lovelace is St. Paul.", "Ada Lovelace", "St. Paul"),
        ("SIBLING", "The names of the siblings of Moominpappa are Ö.", "Moominpappa", "Ö"),
        ("FOLLOWED_BY", "May is followed by June.", "May", "June"),
        ("COUNTRY", "The name of the country which Lake Como is associated with is Italy.", "Lake Como", "Italy"),
        # A title that holds the relation's own "is".
        ("DIRECTOR", "The name of the director of This is It is Kenny Ortega.", "This is It", "Kenny Ortega"),
    ],
)
def test_a_sentence_tells_subject_and_target(relation: str, sentence: str, subject: str, target: str) -> None:
    record = RIPPLE | {"edit": {"prompt": sentence, "relation": relation}}
    fact = case_of("ripple", record).fact
    assert (fact.subject, fact.target_new, f"{fact.text} {target}.") == (subject, target, sentence)
    assert fact.prompt in wordings(relation)


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (
            ("edit", "relation"),
            "MOTHER",
            r"^edit\.prompt: is no sentence of the relation MOTHER, 'The name of the mother",
        ),
        (("edit", "prompt"), "The name of the country of citizenship of  is .", r"^edit\.prompt: is no sentence"),
        (
            ("edit", "original_fact", "prompt"),
            "The name of the country of citizenship of John Lennon is Japan.",
            r"^edit\.original_fact\.prompt: is about another fact than the edit",
        ),
        (("Forgetfulness", 0, "test_condition"), "XOR", r"^Forgetfulness\[0\]\.test_condition: must be OR or AND"),
        (("Forgetfulness", 0, "test_queries"), [], r"^Forgetfulness\[0\]\.test_queries: holds no query"),
        (
            ("Forgetfulness", 0, "test_queries", 0, "answers", 0, "aliases"),
            [3],
            r"^Forgetfulness\[0\]\.test_queries\[0\]\.answers\[0\]\.aliases\[0\]: must be a text; found int 3",
        ),
        (("Subject_Aliasing",), None, r"^Subject_Aliasing: is missing"),
    ],
)
def test_what_is_wrong_with_a_ripple_record(path: tuple[str | int, ...], to: Any, message: str) -> None:
    with pytest.raises(BadField, match=message):
        case_of("ripple", changed(RIPPLE, *path, to=to))


def test_the_sub_answers_of_unke_are_counted() -> None:
    with pytest.raises(BadField, match=r"^sub_answer: has 1 answers to 2 questions in sub_question"):
        case_of("unke", UNKE | {"sub_answer": ["Mathematics."]})


def row(kind: str, test: int, before: bool, after: bool, every: bool = False) -> dict[str, Any]:
    """What the ripple metrics read of a row."""
    told = {"kind": kind, "group": "Compositionality_I", "test": test, "every": every}
    return told | {"exact_before": before, "exact_after": after}


def test_tests_count_where_their_conditions_held_before() -> None:
    rows = [
        # OR: one of two is answered. Its condition holds before; afterwards it does not matter.
        row(PORTABILITY, 0, False, True),
        row(PORTABILITY, 0, False, False),
        row(CONDITION, 0, True, False),
        # AND: one of two is not enough.
        row(PORTABILITY, 1, True, True, every=True),
        row(PORTABILITY, 1, True, False, every=True),
        # AND: both.
        row(PORTABILITY, 2, False, True, every=True),
        row(PORTABILITY, 2, True, True, every=True),
        # One of its conditions does not hold: not counted.
        row(PORTABILITY, 3, True, True),
        row(CONDITION, 3, True, True),
        row(CONDITION, 3, False, True),
    ]
    formula = passed("Compositionality_I")
    assert formula(rows, "after") == pytest.approx(2 / 3) and formula(rows, "before") == pytest.approx(1 / 3)
    assert passed("Forgetfulness")(rows, "after") is None and formula(rows[7:], "after") is None
    assert formula([{**each, "exact_after": None} for each in rows], "after") is None  # nothing was said freely
    assert set(NAMES) == set(CRITERIA)


def test_every_criterion_has_a_score() -> None:
    case = case_of("ripple", RIPPLE)
    rows = [answered(probe) for probe in case.probes]
    scores = {s.metric.short: s.value for s in scores_of_rows(rows) if s.metric.protocol.name == "ripple"}
    no_tests = {"compositionality_2"}
    assert scores == {short: None if short in no_tests else 1.0 for short, _ in NAMES.values()}


def answered(probe: Probe) -> dict[str, Any]:
    """A row of a probe that is answered before and after."""
    numbers = dict.fromkeys(("nll", "probability", "greedy", "right"), 1.0)
    found = {f"{k}_{which}_{when}": v for k, v in numbers.items() for which in ("new", "true") for when in WHEN}
    return asdict(probe) | found | {f"exact_{when}": True for when in WHEN} | {"kept": 1.0}


# --- running text ---------------------------------------------------------------------------------------------------


def test_me_ppl_is_text_and_no_case(tmp_path: Path) -> None:
    file = tmp_path / "me_ppl.json"
    file.write_text(json.dumps([ME_PPL, {"Corpus": "C4"}, ME_PPL | {"Text": "One more line. "}]), encoding="utf-8")
    found = load_texts(f"me_ppl:{file}")
    assert found is not None and found.texts == (ME_PPL["Text"], "One more line.") and found.indices == (0, 2)
    assert found.note == f"running text: 2 of 3 texts in {file}; left out: me_ppl.json record 1, Text: is missing."
    with pytest.raises(ConfigError, match=rf"holds no fact to edit\. .* task\.text=me_ppl:{file}, and edit facts"):
        load_cases(DataSettings("me_ppl", str(file)))
    for other in ("prose", str(file), "hub:wikitext", "unke:file.json", "me_ppl:"):
        assert load_texts(other) is None
    file.write_text(json.dumps([WIKIBIGEDIT]), encoding="utf-8")
    with pytest.raises(DataError, match="can be read as me_ppl: .*They look like wikibigedit: try data=wikibigedit"):
        load_texts(f"me_ppl:{file}")
    with pytest.raises(ConfigError, match=r"data\.revision is None for 'hub:some/set'"):
        load_texts("me_ppl:hub:some/set")


def test_an_unknown_source_is_still_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No data at"):
        load_texts(f"me_ppl:{tmp_path / 'nothing.json'}")
