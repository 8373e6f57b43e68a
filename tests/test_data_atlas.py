"""The atlas as a benchmark: what each kind of probe asks, and what an edit leaves true."""

import random

import pytest

from editkit.corpora import AtlasFact, load_atlas
from editkit.data.atlas import atlas_case, atlas_cases
from editkit.data.cases import NEIGHBORHOOD, PARAPHRASE, PORTABILITY, REWRITE, SAME_SUBJECT, UNSEEN

atlas = load_atlas()


def fact_of(subject: str, relation: str) -> AtlasFact:
    return next(f for f in atlas.by_subject[subject] if f.relation == relation)


class Always(random.Random):
    """Draws `wanted` wherever it is offered."""

    def __init__(self, wanted: str) -> None:
        super().__init__(0)
        self.wanted = wanted

    def choice(self, seq):
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
def test_what_an_edit_leaves_true(subject, relation, new, stays, follows):
    found = asked(subject, relation, new)
    assert [r for r, _, _ in found[SAME_SUBJECT]] == stays
    assert found[PORTABILITY] == follows
    for other, true, _ in found[SAME_SUBJECT]:
        assert true == fact_of(subject, other).object


def test_probes_are_of_the_right_subject_and_split():
    for case in atlas_cases(100, seed=3):
        kinds = {p.kind for p in case.probes}
        assert {REWRITE, PARAPHRASE, UNSEEN, NEIGHBORHOOD} <= kinds
        for probe in case.probes:
            if probe.kind != NEIGHBORHOOD:
                assert case.fact.subject in probe.prompt
            if probe.kind in (REWRITE, PARAPHRASE, UNSEEN):
                assert (probe.target_true, probe.target_new) == (case.fact.target_true, case.fact.target_new)


def test_most_edits_can_be_punished():
    cases = atlas_cases(200)
    assert sum(any(p.kind == SAME_SUBJECT for p in c.probes) for c in cases) > 100
    assert sum(p.kind == PORTABILITY for c in cases for p in c.probes) >= 15


def test_cases_are_seeded():
    assert atlas_cases(20, seed=1) == atlas_cases(20, seed=1) != atlas_cases(20, seed=2)
