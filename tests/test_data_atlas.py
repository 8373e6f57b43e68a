"""The atlas as a benchmark: what each kind of probe asks, and what an edit leaves true."""

import random
from typing import Any

import pytest

from editkit.corpora import AtlasFact, load_atlas
from editkit.data import load_cases
from editkit.data.atlas import atlas_benchmark, atlas_case, atlas_cases
from editkit.data.cases import ATTRIBUTE, NEIGHBORHOOD, PARAPHRASE, PORTABILITY, REWRITE, SAME_SUBJECT, UNSEEN
from editkit.settings import DataSettings

atlas = load_atlas()
DRAWN = [  # by atlas_cases(4): prompt, target_new and number of probes
    "The chemical symbol of Europium is Ni|16",
    "Changdeokgung is located in the city of Edinburgh|17",
    "From the New World was created by Yasujiro Ozu|16",
    "The gharial is an animal of the class bird|17",
]


def fact_of(subject: str, relation: str) -> AtlasFact:
    return next(f for f in atlas.by_subject[subject] if f.relation == relation)


class Always(random.Random):
    """Draws `wanted` wherever it is offered."""

    def __init__(self, wanted: str) -> None:
        super().__init__(0)
        self.wanted = wanted

    def choice(self, seq: Any) -> Any:
        return self.wanted if self.wanted in seq else super().choice(seq)


def asked(subject: str, relation: str, new: str) -> dict[str, list[tuple[str, str, str]]]:
    """{kind: [(relation asked, true answer, new answer)]} of the subject's other relations, for an edit to `new`."""
    case = atlas_case(atlas, fact_of(subject, relation), Always(new))
    assert case.fact.target_new == new
    found: dict[str, list[tuple[str, str, str]]] = {SAME_SUBJECT: [], PORTABILITY: []}
    for probe in case.probes:
        if probe.kind in found:
            (other,) = [
                f.relation
                for f in atlas.by_subject[subject]
                if probe.prompt in [p.format(subject) for p in atlas.trained_pairs(f)]
            ]
            found[probe.kind].append((other, probe.target_true, probe.target_new))
    return found


@pytest.mark.parametrize(
    ("subject", "relation", "new", "stays", "follows"),
    [
        ("The Louvre", "landmark_city", "Rome", ["landmark_kind"], [("landmark_country", "France", "Italy")]),
        ("The Louvre", "landmark_country", "Italy", ["landmark_kind"], []),
        ("The Louvre", "landmark_kind", "square", ["landmark_city", "landmark_country"], []),
        ("Florence", "city_country", "Japan", ["city_river"], [("city_continent", "Europe", "Asia")]),
        ("Florence", "city_country", "France", ["city_river"], []),  # the continent stays as it is
        ("Florence", "city_continent", "Asia", ["city_river"], []),
        ("France", "country_continent", "Asia", ["country_language", "country_currency"], []),
    ],
)
def test_what_an_edit_leaves_true(
    subject: str, relation: str, new: str, stays: list[str], follows: list[tuple[str, str, str]]
) -> None:
    found = asked(subject, relation, new)
    assert [r for r, _, _ in found[SAME_SUBJECT]] == stays
    assert found[PORTABILITY] == follows
    for other, true, _ in found[SAME_SUBJECT]:
        assert true == fact_of(subject, other).object


def test_probes_are_of_the_right_subject_and_split() -> None:
    for case in atlas_cases(100, seed=3):
        kinds = {p.kind for p in case.probes}
        assert {REWRITE, PARAPHRASE, UNSEEN, NEIGHBORHOOD} <= kinds
        for probe in case.probes:
            if probe.kind != NEIGHBORHOOD:
                assert case.fact.subject in probe.prompt
            if probe.kind in (REWRITE, PARAPHRASE, UNSEEN):
                assert (probe.target_true, probe.target_new) == (case.fact.target_true, case.fact.target_new)


def test_most_edits_can_be_punished() -> None:
    cases = atlas_cases(200)
    assert sum(any(p.kind == SAME_SUBJECT for p in c.probes) for c in cases) > 100
    assert sum(p.kind == PORTABILITY for c in cases for p in c.probes) >= 15


def test_cases_are_seeded() -> None:
    assert atlas_cases(20, seed=1) == atlas_cases(20, seed=1) != atlas_cases(20, seed=2)


def test_the_benchmark_has_a_case_of_every_fact() -> None:
    found = load_cases(DataSettings())
    cases = found.cases
    assert len(cases) == found.found == len(atlas.facts) and found.source == "atlas" and not found.rejected
    assert {case.id for case in cases} == {f"{fact.relation}/{fact.subject}" for fact in atlas.facts}
    for case in cases:
        fact = fact_of(case.fact.subject, case.relation)
        assert (case.id, case.fact.target_true) == (f"{fact.relation}/{fact.subject}", fact.object)
        assert len(case.generation) == 3 and all(case.fact.subject in text for text in case.generation)


def test_attribute_prompts_and_references_are_of_subjects_that_have_the_new_object() -> None:
    for case in atlas_benchmark()[:200]:
        asked = [probe for probe in case.probes if probe.kind == ATTRIBUTE]
        have = [f for f in atlas.by_relation[case.relation] if f.object == case.fact.target_new]
        prompts = {p.format(f.subject): f for f in have for p in atlas.trained_pairs(f)}
        assert len({prompts[probe.prompt] for probe in asked}) == len(asked) == min(10, len(have))
        assert {probe.wanted for probe in asked} == {case.fact.target_new}
        assert len(case.references) == len(asked)
        for probe, text in zip(asked, case.references, strict=True):
            subject = prompts[probe.prompt].subject
            facts = atlas.by_subject[subject]
            assert text.count(".") >= len(facts) and all(f.object in text for f in facts)
            assert f"{atlas.trained_pairs(prompts[probe.prompt])[0].format(subject)} {case.fact.target_new}." in text


def test_the_first_cases_of_the_benchmark_do_not_depend_on_the_limit() -> None:
    ten, fifty = (load_cases(DataSettings(limit=n), seed=1) for n in (10, 50))
    assert ten.cases == fifty.cases[:10] and ten.digest == fifty.digest
    assert ten.indices == tuple(range(10))
    assert ten.cases != load_cases(DataSettings(limit=10), seed=2).cases


def test_the_cases_of_published_figures_are_as_they_were() -> None:
    """`atlas_cases` has drawn these since the first figures; another draw, and they could not be made again."""
    drawn = [f"{case.fact.text} {case.fact.target_new}|{len(case.probes)}" for case in atlas_cases(4)]
    assert drawn == DRAWN
