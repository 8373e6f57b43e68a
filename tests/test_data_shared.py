"""Files of every format: each record is a case, and its prompts are the source's own, none lost.

Asked of our own files (own_data.py), and of the real ones too where they are.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from editkit.data import load_cases, load_texts
from editkit.data.cases import (
    ATTRIBUTE,
    HOP,
    MULTI_HOP,
    NEIGHBORHOOD,
    PARAPHRASE,
    PORTABILITY,
    REWRITE,
    STAY,
    Case,
    Probe,
)
from editkit.data.formats.counterfact_flat import TRAP
from editkit.data.kinds import SUB_QUESTION
from editkit.data.sources import Cases
from editkit.errors import DataError
from editkit.settings import DataSettings
from tests import own_data
from tests.conftest import SHARED_DATA
from tests.records import TEXTS

# Records of each real file, by its folder's README.
REAL_COUNTS = {
    ("counterfact", "counterfact.json"): 560,
    ("counterfact_flat", "counterfact_flat.json"): 1000,
    ("zsre", "zsre.json"): 300,
    ("zsre", "knowedit/zsre.json"): 100,
    ("knowedit", "knowedit"): 290,
    ("knowedit", "knowedit/wikibio.json"): 30,
    ("mquake", "mquake.json"): 80,
    ("known", "known_1000.json"): 1209,
    ("qaedit", "protocols/qaedit.json"): 400,
    ("wikibigedit", "protocols/locft_wikibigedit_3k.json"): 300,
    ("wikibigedit", "protocols/locft_counterfact_3k.json"): 300,
    ("zsre", "protocols/locft_zsre_3k.json"): 300,
    ("unke", "protocols/unke.json"): 120,
    ("editevery", "protocols/editevery.json"): 120,
    ("akew", "protocols/akew_mquake_cf.json"): 60,
    ("me_ppl", "protocols/me_ppl.json"): 400,
}
CASES = [(name, file) for name, file in REAL_COUNTS if name not in TEXTS]


@pytest.fixture(scope="module", params=["own", *(["real"] if SHARED_DATA.is_dir() else [])])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the files."""
    return SHARED_DATA if request.param == "real" else own_data.write(tmp_path_factory.mktemp("own") / "data")


def loaded(folder: Path, name: str, file: str) -> Cases:
    return load_cases(DataSettings(name, str(folder / file), on_bad_record="fail"))


def raw(folder: Path, file: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads((folder / file).read_text(encoding="utf-8"))
    return records


def probes(cases: Sequence[Case], *kinds: str) -> list[Probe]:
    return [probe for case in cases for probe in case.probes if probe.kind in kinds]


@pytest.mark.parametrize(("name", "file"), CASES)
def test_every_record_is_a_case(data: Path, name: str, file: str) -> None:
    found = loaded(data, name, file)
    counts = REAL_COUNTS if data == SHARED_DATA else own_data.COUNTS
    assert len(found.cases) == found.found == counts[name, file] and not found.rejected
    assert len({case.id for case in found.cases}) == len(found.cases)
    for case in found.cases:
        rewrites = [probe for probe in case.probes if probe.kind == REWRITE]
        assert [(p.prompt, p.target_true, p.target_new) for p in rewrites] == [
            (fact.text, fact.target_true, fact.target_new) for fact in case.facts
        ]
        assert case.probes[: len(rewrites)] == tuple(rewrites)
        for probe in case.probes:
            assert probe.prompt.strip() and probe.wanted.strip() and "{}" not in probe.prompt
            assert probe.wanted not in probe.aliases and all(probe.aliases)
        assert all(text.strip() for text in case.generation)


def test_counterfact_keeps_every_prompt(data: Path) -> None:
    cases, records = loaded(data, "counterfact", "counterfact.json").cases, raw(data, "counterfact.json")
    for kind, field in ((PARAPHRASE, "paraphrase"), (NEIGHBORHOOD, "neighborhood"), (ATTRIBUTE, "attribute")):
        assert [p.prompt for p in probes(cases, kind)] == [p for r in records for p in r[f"{field}_prompts"]]
    assert [case.generation for case in cases] == [tuple(r["generation_prompts"]) for r in records]
    assert [case.id for case in cases] == [str(r["case_id"]) for r in records]


def test_the_flat_file_gives_no_paraphrase(data: Path) -> None:
    found = loaded(data, "counterfact_flat", "counterfact_flat.json")
    records = raw(data, "counterfact_flat.json")
    assert not probes(found.cases, PARAPHRASE) and found.notes == (TRAP,)
    assert [case.generation for case in found.cases] == [(r["rephrase_prompt"],) for r in records]
    assert [case.fact.text for case in found.cases] == [r["prompt"] for r in records]
    assert {(p.kind, p.target_true) for p in probes(found.cases, *STAY)} == {
        (NEIGHBORHOOD, r["locality_ground_truth"]) for r in records
    }


def test_zsre_asks_what_easyedit_asks(data: Path) -> None:
    found, records = loaded(data, "zsre", "zsre.json"), raw(data, "zsre.json")
    assert [case.fact.target_new for case in found.cases] == [r["alt"].strip() for r in records]
    assert [p.prompt for p in probes(found.cases, NEIGHBORHOOD)] == [r["loc"] + "?" for r in records]
    assert [p.target_new for p in probes(found.cases, PORTABILITY)] == [r["portability"]["New Answer"] for r in records]
    same = [i for i, r in enumerate(records) if r["alt"].strip() in r["answers"]]
    assert [i for i, case in enumerate(found.cases) if not case.fact.target_true] == same
    assert same
    assert found.notes[1].startswith(f"{len(same)} of {len(records)} cases ({', '.join(map(str, same))}): ")


def test_knowedit_keeps_every_question(data: Path) -> None:
    for file in ("wiki_recent", "wiki_counterfact", "zsre", "wikibio"):
        cases, records = _knowedit(data, file), raw(data, f"knowedit/{file}.json")
        for kinds, field in (((PORTABILITY,), "portability"), (STAY, "locality")):
            assert [(p.group, p.prompt) for p in probes(cases, *kinds)] == [
                (group, asked["prompt"].strip())
                for record in records
                for group, all_asked in record.get(field, {}).items()
                for asked in all_asked
            ]


def _knowedit(folder: Path, file: str) -> Sequence[Case]:
    return loaded(folder, "knowedit", f"knowedit/{file}.json").cases


def test_nested_answers_of_wiki_recent(data: Path) -> None:
    cases, records = _knowedit(data, "wiki_recent"), raw(data, "knowedit/wiki_recent.json")
    asked = [a for r in records for part in ("portability", "locality") for q in r[part].values() for a in q]
    found = probes(cases, PORTABILITY, *STAY)
    for probe, record in zip(found, asked, strict=True):
        flat = [answer.strip() for answers in record["ground_truth"] for answer in answers]
        assert probe.wanted == flat[0] and {probe.wanted, *probe.aliases} == set(flat)


def test_mquake_asks_questions_and_hops(data: Path) -> None:
    cases, records = loaded(data, "mquake", "mquake.json").cases, raw(data, "mquake.json")
    assert [len(case.facts) for case in cases] == [len(r["requested_rewrite"]) for r in records]
    assert [(p.prompt, p.target_new) for p in probes(cases, MULTI_HOP)] == [
        (question.strip(), r["new_answer"]) for r in records for question in r["questions"]
    ]
    assert [(p.prompt, p.target_new, p.group) for p in probes(cases, PORTABILITY)] == [
        (hop["question"], hop["answer"], HOP) for r in records for hop in r["new_single_hops"]
    ]


def test_known_prompts_are_the_longer_ones(data: Path) -> None:
    cases, records = loaded(data, "known", "known_1000.json").cases, raw(data, "known_1000.json")
    assert [case.fact.text for case in cases] == [r["prompt"] for r in records]
    assert [case.fact.target_true for case in cases] == [r["attribute"] for r in records]
    answers = {
        relation: {r["attribute"] for r in records if r["relation_id"] == relation}
        for relation in {r["relation_id"] for r in records}
    }
    for case in cases:
        assert case.fact.target_new in answers[case.relation] or len(answers[case.relation]) == 1


# --- protocols of 2024 and later ----------------------------------------------------------------------------------


def test_qaedit_keeps_every_question(data: Path) -> None:
    cases, records = loaded(data, "qaedit", "protocols/qaedit.json").cases, raw(data, "protocols/qaedit.json")
    assert [case.id for case in cases] == [f"{r['source']}/{r['id']}" for r in records]
    assert [case.fact.text for case in cases] == [r["prompt"] for r in records]
    assert [case.fact.target_new for case in cases] == [r["target"].strip() for r in records]
    assert [p.prompt for p in probes(cases, PARAPHRASE)] == [r["rephrase"] for r in records]
    assert [(p.prompt, p.wanted) for p in probes(cases, *STAY)] == [
        (each["loc"], each["loc_ans"]) for r in records for each in r["locality"]
    ]


@pytest.mark.parametrize("name", ["wikibigedit", "counterfact"])
def test_locft_asks_paraphrases(data: Path, name: str) -> None:
    file = f"protocols/locft_{name}_3k.json"
    cases, records = loaded(data, "wikibigedit", file).cases, raw(data, file)
    assert [p.prompt for p in probes(cases, PARAPHRASE)] == [r["rephrase_prompt"].strip() for r in records]
    assert [case.fact.target_true for case in cases] == [r.get("ground_truth", "") for r in records]
    assert all(case.fact.subject.lower() == r["subject"].lower() for case, r in zip(cases, records, strict=True))


def test_long_answers_are_kept_whole(data: Path) -> None:
    for name in ("unke", "editevery"):
        cases, records = loaded(data, name, f"protocols/{name}.json").cases, raw(data, f"protocols/{name}.json")
        assert [(case.id, case.fact.text, case.fact.target_new) for case in cases] == [
            (str(r["id"]), r["question"].strip(), r["answer"].strip()) for r in records
        ]
        assert [(p.prompt, p.target_new) for p in probes(cases, PORTABILITY)] == [
            (question.strip(), answer.strip())
            for r in records
            for question, answer in zip(r.get("sub_question", []), r.get("sub_answer", []), strict=True)
        ]
        assert all(probe.long for case in cases for probe in case.probes)


def test_akew_writes_texts_and_asks_their_parts(data: Path) -> None:
    file = "protocols/akew_mquake_cf.json"
    cases, records = loaded(data, "akew", file).cases, raw(data, file)
    facts = [each for r in records for each in r["requested_rewrite"]]
    assert [(f.text, f.target_new) for case in cases for f in case.facts] == [
        (each["question"], each["fact_new_uns"].strip()) for each in facts
    ]
    assert [(p.prompt, p.target_new) for p in probes(cases, PORTABILITY) if p.group == SUB_QUESTION] == [
        (part["prompt"].format(part["subject"]).strip(), part["target"])
        for each in facts
        for part in each["unsfact_triplets_GPT"]
    ]
    assert len(probes(cases, MULTI_HOP)) == sum(len(r["questions"]) for r in records)


def test_me_ppl_is_every_text(data: Path) -> None:
    file = "protocols/me_ppl.json"
    found, records = load_texts(f"me_ppl:{data / file}"), raw(data, file)
    assert found is not None and not found.rejected
    assert found.texts == tuple(record["Text"].strip() for record in records)
    counts = REAL_COUNTS if data == SHARED_DATA else own_data.COUNTS
    assert found.found == len(found.texts) == counts["me_ppl", file]


@pytest.mark.parametrize(
    ("read_as", "file", "is_"),
    [
        ("zsre", "counterfact.json", "counterfact"),
        ("counterfact", "counterfact_flat.json", "counterfact_flat"),
        ("counterfact_flat", "counterfact.json", "counterfact"),
        ("zsre", "counterfact_flat.json", "counterfact_flat"),
        ("counterfact", "zsre.json", "zsre"),
        ("counterfact", "mquake.json", "mquake"),
        ("mquake", "known_1000.json", "known"),
        ("counterfact", "knowedit", "knowedit"),
        ("unke", "protocols/qaedit.json", "qaedit"),
        ("zsre", "protocols/locft_wikibigedit_3k.json", "wikibigedit"),
        ("qaedit", "protocols/unke.json", "unke"),
        ("unke", "protocols/editevery.json", "editevery"),
        ("counterfact", "protocols/akew_mquake_cf.json", "akew"),
        ("ripple", "protocols/me_ppl.json", "me_ppl"),
    ],
)
def test_a_file_read_as_another_format(data: Path, read_as: str, file: str, is_: str) -> None:
    with pytest.raises(DataError, match=f"They look like {is_}: try data={is_}"):
        load_cases(DataSettings(read_as, str(data / file)))
