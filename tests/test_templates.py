"""Probes by template: their words for every relation, what they leave out, and their metrics from a table on paper."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from editkit.config import prepare
from editkit.corpora import load_atlas
from editkit.data import load_cases, templates
from editkit.data.atlas import atlas_benchmark
from editkit.data.cases import NEIGHBORHOOD, REWRITE, Case, Probe
from editkit.data.kinds import (
    ALIAS,
    DISTRACTING_CONTEXT,
    FACT_CHECK,
    FROM_NEW,
    FROM_OLD,
    HEADINGS,
    NEGATION,
    REPEAT_OLD,
    REVERSED,
    SECOND_LANGUAGE,
)
from editkit.data.templates import templated
from editkit.data.wording import alias_of, told, wording_of
from editkit.errors import ConfigError
from editkit.facts import Fact
from editkit.metrics.counterfact import mean_over, new_wins
from editkit.metrics.measure import look, probes_asked, rows_of, values_of_rows
from editkit.metrics.metric import Metric, register, unregister
from editkit.metrics.probes import PROBES
from editkit.models.load import LanguageModel
from editkit.settings import DataSettings, MeasureSettings
from editkit.tasks.lifelong import staying
from tests.conftest import SHARED_DATA
from tests.test_metrics import AFTER, BEFORE, REST, WORDS, table_lm

EIFFEL = Case(
    (Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris"),),
    (
        Probe(REWRITE, "The Eiffel Tower is located in the city of", "Paris", "Rome"),
        Probe(NEIGHBORHOOD, "Big Ben stands in the city of", "London", "Rome"),
        Probe(NEIGHBORHOOD, "The Louvre stands in the city of", "Paris", "Rome"),
    ),
    relation="landmark_city",
)
SAID = "The Eiffel Tower is located in the city of"


@pytest.fixture(scope="module")
def atlas() -> list[Case]:
    return atlas_benchmark()


def asked(case: Case, *names: str) -> list[tuple[str, str, str]]:
    return [(probe.prompt, probe.target_true, probe.target_new) for probe in templated(case, names)]


def test_the_words_of_each_template() -> None:
    assert asked(EIFFEL, NEGATION) == [(f"It is not true that {SAID}", "Paris", "Rome")]
    assert asked(EIFFEL, FACT_CHECK) == [
        (f"Is it true that {SAID} Rome? Answer yes or no:", "no", "yes"),
        (f"Is it true that {SAID} Paris? Answer yes or no:", "yes", "no"),
    ]
    assert asked(EIFFEL, REVERSED) == [
        ("Rome is the city where one finds", "", "The Eiffel Tower"),
        ("Paris is the city where one finds", "", "The Eiffel Tower"),
    ]
    assert asked(EIFFEL, REPEAT_OLD) == [(f"Repeat this sentence: {SAID} Paris. {SAID}", "Paris", "Rome")]
    (repeat,) = templated(EIFFEL, [REPEAT_OLD])
    assert repeat.wanted == "Paris"
    assert asked(EIFFEL, DISTRACTING_CONTEXT) == [(f"The Louvre stands in the city of Paris. {SAID}", "Paris", "Rome")]
    assert asked(EIFFEL, ALIAS, SECOND_LANGUAGE) == []
    assert [probe.kind for probe in templated(EIFFEL, [REPEAT_OLD, NEGATION])] == [REPEAT_OLD, NEGATION]


def of_fact(fact: Fact, relation: str) -> Case:
    return Case((fact,), (Probe(REWRITE, fact.text, fact.target_true, fact.target_new),), relation=relation)


def test_a_relation_of_counterfact_has_a_sentence_of_its_own() -> None:
    part = of_fact(Fact("{}, developed by", "Apple III", "Nintendo", "Apple"), "P176")
    assert asked(part, NEGATION) == [("It is not true that Apple III is made by", "Apple", "Nintendo")]
    assert asked(part, SECOND_LANGUAGE) == [
        ("Apple III wird hergestellt von", "Apple", "Nintendo"),
        ("Apple III est fabriqué par", "Apple", "Nintendo"),
    ]
    assert [probe.group for probe in templated(part, [SECOND_LANGUAGE])] == ["German", "French"]
    law = of_fact(Fact("The law in {} declares the language", "Guam", "Russian", "English"), "P37")
    assert asked(law, NEGATION)[0][0] == "It is not true that the official language of Guam is"
    assert asked(law, REPEAT_OLD)[0][0].startswith("Repeat this sentence: The official language of Guam is English. ")
    painter = of_fact(Fact("{} passed away in", "Vincent van Gogh", "Rome", "Paris"), "P20")
    assert asked(painter, ALIAS) == [("Gogh passed away in", "Paris", "Rome")]
    named = of_fact(Fact("The capital of {} is", "Netherlands", "Rome", "Amsterdam"), "country_capital")
    assert asked(named, ALIAS) == [("The capital of Holland is", "Amsterdam", "Rome")]


def test_what_has_no_words_is_not_asked() -> None:
    everything = templates.names()
    question = of_fact(Fact("Where is {}?", "Camp Nou", "Oslo", "London"), "")
    unknown = of_fact(Fact("{} is in", "Camp Nou", "Oslo"), "")
    assert asked(question, *everything) == []
    assert [probe.kind for probe in templated(unknown, everything)] == [FACT_CHECK, NEGATION]
    assert asked(unknown, FACT_CHECK) == [("Is it true that Camp Nou is in Oslo? Answer yes or no:", "no", "yes")]
    assert asked(staying(EIFFEL), *everything) == []  # never edited: nothing has another answer


def test_several_facts_have_their_relations_in_order() -> None:
    facts = (Fact("{} is made by", "Lada", "Fiat", "VAZ"), Fact("The capital of {} is", "Italy", "Paris", "Rome"))
    rewrites = tuple(Probe(REWRITE, fact.text, fact.target_true, fact.target_new) for fact in facts)
    prompts = [prompt for prompt, _, _ in asked(Case(facts, rewrites, relation="P176 P36"), REVERSED)]
    assert prompts == [
        "Fiat is the maker of",
        "VAZ is the maker of",
        "Paris is the capital of",
        "Rome is the capital of",
    ]
    assert asked(Case(facts, rewrites, relation="P176"), REVERSED) == []  # which of both it is of, nobody says


def test_the_table_has_words_for_every_relation(atlas: list[Case]) -> None:
    relations = [*load_atlas().relations, *(f"P{n}" for n in (17, 19, 20, 27, 30, 36, 37, 39, 101, 103, 106, 108, 127))]
    for relation in relations:
        words = wording_of(relation)
        assert words.reversed.count("{}") == 1 and not words.reversed.rstrip().endswith((".", "?"))
        assert not relation.startswith("P") or words.statement.count("{}") == 1
    names = templates.names()
    cases = Counter(name for case in atlas for name in {probe.kind for probe in templated(case, names)})
    n = len(load_atlas().facts)
    assert {cases[name] for name in (NEGATION, FACT_CHECK, REVERSED, REPEAT_OLD)} == {n}
    assert n / 4 < cases[ALIAS] < n / 3 and cases[DISTRACTING_CONTEXT] > n / 2 and not cases[SECOND_LANGUAGE]


@pytest.mark.skipif(not (SHARED_DATA / "counterfact.json").exists(), reason="no shared data beside the checkout")
def test_every_relation_of_counterfact_has_words() -> None:
    cases = load_cases(DataSettings("counterfact", str(SHARED_DATA / "counterfact.json"))).cases
    names = templates.names()
    kinds = Counter(kind for case in cases for kind in {probe.kind for probe in templated(case, names)})
    assert {kinds[name] for name in (NEGATION, FACT_CHECK, REVERSED, REPEAT_OLD)} == {len(cases)}
    assert kinds[ALIAS] > 100 and kinds[SECOND_LANGUAGE] > 50


def test_an_alias_is_of_one_subject_of_the_atlas(atlas: list[Case]) -> None:
    subjects = set(load_atlas().by_subject)
    names = {
        (fact.subject, probe.prompt.removesuffix(fact.prompt.split("{}")[1]).removeprefix(fact.prompt.split("{}")[0]))
        for case in atlas
        for fact in case.facts
        for probe in templated(case, [ALIAS])
    }
    assert all(alias and alias != subject and alias not in subjects for subject, alias in names)
    assert len({alias for _, alias in names}) == len({subject for subject, _ in names}) == len(names)
    assert alias_of("Mumbai") == "Bombay" and alias_of("Atlantis") == ""


# --- metrics ------------------------------------------------------------------------------------------------------


def nll(table: dict[str, dict[str, float]], prompt: str, target: str) -> float:
    """Mean over the target's words of −log P(word | the one before), in float64 from the table itself."""
    last, total = prompt.split()[-1], 0.0
    for word in target.split():
        row = table.get(last, {})
        sums = sum(row.values()) + REST * (len(WORDS) - len(row))
        total -= math.log(row.get(word, REST) / sums)
        last = word
    return total / len(target.split())


ASKED = (
    Probe(REWRITE, "Tower in", "Paris", "Rome"),
    Probe(NEGATION, "Tower in", "Paris", "Rome"),
    Probe(NEGATION, "Tower speaks", "Paris", "New"),  # stays as it was
    Probe(FACT_CHECK, "Tower has", "Paris", "Rome"),  # any two words do for yes and no
    Probe(FACT_CHECK, "Tower was", "Paris", "Rome"),
    Probe(REVERSED, "Rome in", "", "Rome", group=FROM_NEW),
    Probe(REVERSED, "Paris has", "", "Rome", group=FROM_OLD),
    Probe(ALIAS, "Tower speaks", "Paris", "Rome"),  # known before
    Probe(ALIAS, "Tower has", "Paris", "Rome"),  # not known before: not asked
    Probe(SECOND_LANGUAGE, "Tower was", "Paris", "Rome", group="German"),
    Probe(SECOND_LANGUAGE, "Tower speaks", "Paris", "New", group="French"),
    Probe(REPEAT_OLD, "Tower was", "Paris", "Rome"),
    Probe(DISTRACTING_CONTEXT, "Louvre Paris . Tower lies", "Paris", "Rome"),
)
CASE = Case((Fact("The {} is in", "Tower", "Rome", "Paris"),), ASKED)


def by_definition(when: str) -> dict[str, float]:
    """Each metric as its docstring defines it, from the tables."""
    table = BEFORE if when == "before" else AFTER

    def wins(probe: Probe, *, new: bool) -> bool:
        sides = nll(table, probe.prompt, probe.target_new), nll(table, probe.prompt, probe.target_true)
        return sides[0] < sides[1] if new else sides[1] < sides[0]

    def known(probe: Probe) -> bool:
        row = BEFORE[probe.prompt.split()[-1]]
        return max(row, key=lambda word: row[word]) == probe.target_true

    def share(kind: str, *, new: bool, only_known: bool = False) -> float:
        found = [probe for probe in ASKED if probe.kind == kind and (not only_known or known(probe))]
        return sum(wins(probe, new=new) for probe in found) / len(found)

    said = {word: max(row, key=lambda each: row[each]) for word, row in table.items()}
    negated = [(said[probe.prompt.split()[-1]], probe.target_new) for probe in ASKED if probe.kind == NEGATION]
    from_new, from_old = (nll(table, prompt, "Rome") for prompt in ("Rome in", "Paris has"))
    return {
        "negation": share(NEGATION, new=False),
        "negation_free": sum(word != new for word, new in negated) / len(negated),
        "fact_check": share(FACT_CHECK, new=True),
        "reversed": float(from_new < from_old),
        "alias": share(ALIAS, new=True, only_known=True),
        "second_language": share(SECOND_LANGUAGE, new=True, only_known=True),
        "repeat_old": share(REPEAT_OLD, new=False),
        "distracting_context": share(DISTRACTING_CONTEXT, new=True),
    }


def test_metrics_are_those_of_their_definitions() -> None:
    settings = MeasureSettings(generate=1, fluency=0, distracted=False)
    before, after = (look(table_lm(table), CASE, settings) for table in (BEFORE, AFTER))
    rows = rows_of(CASE, before, after)
    for row in rows:  # what they are computed from, to 1e-6
        for when, table in (("before", BEFORE), ("after", AFTER)):
            for which in ("new", "true"):
                if target := row[f"target_{which}"]:
                    assert row[f"nll_{which}_{when}"] == pytest.approx(nll(table, row["prompt"], target), rel=1e-6)
    found = values_of_rows(rows)
    for when in ("before", "after"):
        for name, value in by_definition(when).items():
            assert found[f"probes.{name}_{when}"] == pytest.approx(value, abs=1e-6), (name, when)
    moved = {name for name in by_definition("after") if by_definition("after")[name] != by_definition("before")[name]}
    assert moved == {"negation", "negation_free", "alias", "second_language", "repeat_old", "reversed", "fact_check"}
    assert found["probes.second_language_German_after"] == 1 and found["probes.second_language_French_after"] == 0
    assert found["generation.repeat_old_before"] == 1 and found["generation.repeat_old_after"] == 0
    assert found["generation.alias_after"] == 1 and found["generation.fact_check_before"] == 0.5


def test_every_probe_is_asked_of_a_real_model(atlas_lm: LanguageModel, atlas: list[Case]) -> None:
    case = next(case for case in atlas if case.relation == "person_birth_city" and templated(case, [ALIAS]))
    case = replace(case, probes=case.probes[:1] + tuple(p for p in case.probes if p.kind == NEIGHBORHOOD)[:1])
    settings = MeasureSettings(fluency=0, distracted=False, natural=4, probes=(ALIAS, NEGATION, ALIAS, FACT_CHECK))
    found = look(atlas_lm, case, settings)
    kinds = [row["kind"] for row in rows_of(case, found, found)]
    assert kinds == [probe.kind for probe in probes_asked(case, settings)]
    assert kinds[2:] == [ALIAS, NEGATION, FACT_CHECK, FACT_CHECK]
    values = values_of_rows(rows_of(case, found, found))
    assert values["probes.negation_before"] == 1 and values["probes.repeat_old_before"] is None
    assert look(atlas_lm, case, replace(settings, probes=())).scores == found.scores[:2]


# --- names --------------------------------------------------------------------------------------------------------


@pytest.fixture
def shouted() -> Iterator[str]:
    """A template and a metric of another package."""

    def shout(case: Case) -> Iterator[Probe]:
        for each in told(case):
            yield Probe("shouted", each.statement.upper(), each.fact.target_true, each.fact.target_new)

    templates.register("shouted", shout)
    metric = register(Metric(PROBES, "shouted", "loud"), mean_over("shouted", new_wins))
    yield "shouted"
    templates.unregister("shouted")
    unregister(metric)


def test_another_package_adds_a_template(shouted: str) -> None:
    assert prepare(["task=benchmark", f"task.measure.probes=[{shouted}]"])
    lm, settings = table_lm(BEFORE), MeasureSettings(generate=0, fluency=0, distracted=False, probes=(shouted,))
    found = look(lm, EIFFEL, settings)
    assert found.scores[-1].probe.prompt == SAID.upper()
    assert values_of_rows(rows_of(EIFFEL, found, found))["probes.shouted_before"] is not None


def test_a_name_that_is_no_template_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="No probe 'negatoin': did you mean 'negation'?"):
        prepare(["task=lifelong", "task.measure.probes=[negatoin]"])
    assert set(templates.names()) <= set(HEADINGS)
