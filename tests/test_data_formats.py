"""Each format: which probes a record becomes, and the rules that are stated where it is read."""

from typing import Any

import pytest

from editkit.data.cases import (
    ATTRIBUTE,
    HOP,
    MULTI_HOP,
    NEIGHBORHOOD,
    PARAPHRASE,
    PORTABILITY,
    REWRITE,
    SAME_SUBJECT,
    Case,
    Probe,
)
from editkit.data.fields import SAME, BadField, Raw, located
from editkit.data.formats import get_format, looks_like, names
from editkit.data.formats.counterfact_flat import TRAP
from editkit.data.formats.known import DRAWN, with_targets
from editkit.data.formats.zsre import ALT, ANSWER
from editkit.facts import Fact
from tests.records import (
    ANOTHER_KNOWN,
    COUNTERFACT,
    COUNTERFACT_FLAT,
    KNOWEDIT,
    KNOWN,
    MQUAKE,
    RECORDS,
    WIKIBIO,
    ZSRE,
)


def case_of(name: str, record: Any) -> Case:
    read = get_format(name).read
    assert read is not None
    return read(Raw(record))


def test_counterfact() -> None:
    case = case_of("counterfact", COUNTERFACT)
    assert case.facts == (Fact("{} stands in the city of", "Big Ben", "Oslo", "London"),)
    assert (case.id, case.relation) == ("7", "P131")
    assert [(p.kind, p.prompt) for p in case.probes] == [
        (REWRITE, "Big Ben stands in the city of"),
        (PARAPHRASE, "It rained all day. Big Ben is found in"),
        (PARAPHRASE, "To see Big Ben, one goes to"),
        (NEIGHBORHOOD, "The Tower Bridge stands in"),
        (NEIGHBORHOOD, "Buckingham Palace is found in"),
        (ATTRIBUTE, "The Munch Museum stands in"),
    ]
    assert {(p.target_true, p.target_new) for p in case.probes} == {("London", "Oslo")}
    assert {p.kind: p.wanted for p in case.probes} == {
        REWRITE: "Oslo",
        PARAPHRASE: "Oslo",
        NEIGHBORHOOD: "London",
        ATTRIBUTE: "Oslo",
    }
    assert case.generation == ("The surroundings of Big Ben include",)


def test_the_flat_format_has_no_paraphrase_and_says_so() -> None:
    case = case_of("counterfact_flat", COUNTERFACT_FLAT)
    assert case.facts == (Fact("The currency of {} is the", "Japan", "peso", "yen"),)
    assert case.probes == (
        Probe(REWRITE, "The currency of Japan is the", "yen", "peso"),
        Probe(NEIGHBORHOOD, "The money of Okinawa is the", "yen", "peso"),
    )
    assert case.generation == ("Shoppers in Japan like to",) and case.notes == (TRAP,)


def test_zsre_with_portability_writes_what_its_questions_follow_from() -> None:
    case = case_of("zsre", ZSRE)
    assert case.fact == Fact("What sea does {} flow into?", "The Nile", "Black Sea", "Mediterranean Sea")
    assert case.probes == (
        Probe(REWRITE, "What sea does The Nile flow into?", "Mediterranean Sea", "Black Sea"),
        Probe(PARAPHRASE, "Where does the water of the Nile end?", "Mediterranean Sea", "Black Sea"),
        Probe(NEIGHBORHOOD, "nq question: who wrote the magic flute?", "Mozart", "Black Sea"),
        Probe(PORTABILITY, "Name a country at the sea that The Nile flows into.", "", "Romania"),
    )
    assert case.notes == (ALT,)


def test_zsre_of_mend_writes_the_first_answer() -> None:
    record = {key: value for key, value in ZSRE.items() if key != "portability"}
    case = case_of("zsre", record)
    assert case.fact == Fact("What sea does {} flow into?", "The Nile", "Mediterranean Sea", "")
    assert [p.kind for p in case.probes] == [REWRITE, PARAPHRASE, NEIGHBORHOOD]
    assert case.probes[0].aliases == ("the Mediterranean",) and case.notes == (ANSWER,)


def test_a_target_that_the_source_calls_true_is_kept_and_noted() -> None:
    case = case_of("zsre", ZSRE | {"alt": " the Mediterranean"})
    assert (case.fact.target_new, case.fact.target_true) == ("the Mediterranean", "")
    assert case.notes == (ALT, SAME)
    with pytest.raises(BadField, match="target_new: is str 'yen', as target_true is"):
        case_of("counterfact_flat", COUNTERFACT_FLAT | {"target_new": "yen "})


@pytest.mark.parametrize("name", ["knowedit", "zsre"])  # EasyEdit's zsRE is KnowEdit's
def test_knowedit(name: str) -> None:
    case = case_of(name, KNOWEDIT)
    assert case.fact == Fact("The place of birth of {} is", "Marie Curie", "Vienna", "Warsaw")
    assert case.probes == (
        Probe(REWRITE, "The place of birth of Marie Curie is", "Warsaw", "Vienna"),
        Probe(PARAPHRASE, "Where was Marie Curie born? In", "Warsaw", "Vienna"),
        Probe(PORTABILITY, "The river of the birthplace of Marie Curie is the", "", "Danube", (), "Reasoning"),
        Probe(PORTABILITY, "Maria Skłodowska was born in", "", "Vienna", ("Wien",), "Subject_Aliasing"),
        Probe(SAME_SUBJECT, "The field of marie curie is", "physics", "Vienna", ("chemistry",), "Relation_Specificity"),
        Probe(NEIGHBORHOOD, "The field of Albert Einstein is", "physics", "Vienna", (), "Relation_Specificity"),
    )


def test_knowedit_may_lack_what_wiki_recent_lacks() -> None:
    record = {key: KNOWEDIT[key] for key in ("subject", "prompt", "target_new")}
    case = case_of("knowedit", record | {"locality": {}, "portability": {}})
    assert case.fact.target_true == "" and [p.kind for p in case.probes] == [REWRITE]


def test_wikibio() -> None:
    case = case_of("knowedit", WIKIBIO)
    assert case.fact.subject == "ada lovelace" and case.fact.text == WIKIBIO["text"].strip()
    assert (case.fact.target_new, case.fact.target_true) == (WIKIBIO["labels"], "")
    assert [(p.kind, p.wanted) for p in case.probes] == [(REWRITE, WIKIBIO["labels"]), (SAME_SUBJECT, "London")]


def test_mquake() -> None:
    case = case_of("mquake", MQUAKE)
    assert case.facts == (Fact("The author of {} is", "Anna Karenina", "Henrik Ibsen", "Leo Tolstoy"),)
    aliases = ("Kingdom of Norway", "Norge")
    assert case.probes == (
        Probe(REWRITE, "The author of Anna Karenina is", "Leo Tolstoy", "Henrik Ibsen"),
        *(Probe(MULTI_HOP, question, "Russia", "Norway", aliases) for question in MQUAKE["questions"]),
        Probe(PORTABILITY, "Who is the author of Anna Karenina?", "Leo Tolstoy", "Henrik Ibsen", ("Ibsen",), HOP),
        Probe(PORTABILITY, "In which country was Henrik Ibsen born?", "", "Norway", (), HOP),
    )
    (first,) = MQUAKE["requested_rewrite"]
    second = first | {"prompt": "{} was born in", "subject": "Henrik Ibsen", "relation_id": "P19"}
    two = case_of("mquake", MQUAKE | {"requested_rewrite": [first, second]})
    assert len(two.facts) == 2 and two.relation == "P50 P19"
    assert [p.prompt for p in two.probes if p.kind == REWRITE] == [fact.text for fact in two.facts]


def test_known_facts_get_a_target_of_their_relation() -> None:
    records = [KNOWN, ANOTHER_KNOWN, KNOWN | {"relation_id": "P30", "attribute": "Asia"}, {"attribute": "\ud800"}, 3]
    ready = with_targets(records, seed=0)
    assert [r["target_new"] for r in ready[:2]] == ["France", "Japan"]
    assert ready[2]["target_new"] in ("France", "Japan")  # no other answer of its relation
    assert ready[3:] == records[3:] and "target_new" not in KNOWN
    case = case_of("known", ready[0])
    assert case.fact == Fact("{} is in the country of", "Mount Fuji", "France", "Japan")
    assert (case.id, case.relation, case.notes) == ("5", "P17", (DRAWN,))
    assert with_targets([KNOWN | {"target_new": "Peru"}, ANOTHER_KNOWN], 0)[0]["target_new"] == "Peru"
    many = [KNOWN | {"attribute": f"land {i}"} for i in range(30)]
    assert with_targets(many, 0) == with_targets(many, 0) != with_targets(many, 1)


@pytest.mark.parametrize(
    ("text", "subject", "found"),
    [
        ("Rome is where Romeo and Rome meet", "Rome", "Rome|24"),  # the last whole word
        ("Romeo saw rome", "Rome", "Rome|0"),  # the same letters before other capitals
        ("Romeo and romeos", "Rome", "Rome|0"),
        ("the louvre is in", "The Louvre", "the louvre|0"),
        ("Where are C++ and C++?", "C++", "C++|18"),
        ("What is Javan surilis status?", "Javan surili", "Javan surili|8"),
        ("Who lives here?", "Rome", None),
        ("a.b", "aXb", None),
    ],
)
def test_where_a_prompt_names_its_subject(text: str, subject: str, found: str | None) -> None:
    place = located(text, subject)
    assert found == (place and f"{text[slice(*place)]}|{place[0]}")


def test_a_subject_is_taken_as_the_prompt_spells_it() -> None:
    record = COUNTERFACT_FLAT | {"subject": "JAPAN", "prompt": "Of Japan and Peru, Japan has the"}
    fact = case_of("counterfact_flat", record).fact
    assert fact == Fact("Of Japan and Peru, {} has the", "Japan", "peso", "yen")
    assert fact.text == record["prompt"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "counterfact",
            {"paraphrase_prompts": ["Nothing is in"]},
            r"^paraphrase_prompts\[0\]: does not hold the subject",
        ),
        ("counterfact", {"paraphrase_prompts": "Big Ben"}, r"^paraphrase_prompts: must be a list; found str 'Big Ben'"),
        ("counterfact", {"requested_rewrite": []}, r"^requested_rewrite: must be an object with fields; found list"),
        ("counterfact", {"case_id": True}, r"^case_id: must be a text; found bool True"),
        ("counterfact_flat", {"prompt": "The yen is of"}, r"^prompt: does not hold the subject str 'Japan'"),
        ("counterfact_flat", {"prompt": "{} of Japan"}, r"^prompt: holds \{\}, the place of a subject, unfilled"),
        ("counterfact", {"neighborhood_prompts": ["{} is"]}, r"^neighborhood_prompts\[0\]: holds \{\}"),
        ("counterfact_flat", {"target_new": None}, r"^target_new: is missing"),
        (
            "counterfact_flat",
            {"target_new": "a\0b"},
            r"^target_new: holds a control character, '\\x00', at character 1",
        ),
        ("zsre", {"answers": []}, r"^answers: holds no answer"),
        ("zsre", {"answers": [[["x"]]]}, r"^answers\[0\]: must be a text; found list"),
        ("knowedit", {"locality": {"A": [{"prompt": "x"}]}}, r"^locality\.A\[0\]\.ground_truth: is missing"),
        ("knowedit", {"locality": {"A": "x"}}, r"^locality\.A: must be a list"),
        ("mquake", {"requested_rewrite": []}, r"^requested_rewrite: holds no fact"),
        ("mquake", {"questions": []}, r"^questions: holds no question"),
        ("known", {"attribute": 5}, r"^attribute: must be a text; found int 5"),
    ],
)
def test_what_is_wrong_is_named_by_its_field(name: str, changes: Any, message: str) -> None:
    with pytest.raises(BadField, match=message) as caught:
        case_of(name, RECORDS[name] | changes)
    assert str(caught.value) == f"{caught.value.field}: {caught.value.reason}" and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in names() if name != "atlas"])
def test_every_format_is_told_from_the_others(name: str) -> None:
    assert looks_like([RECORDS[name], 3, {}]) == name
    assert looks_like([{"a": 1}]) == ""
