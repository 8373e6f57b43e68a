"""RippleEdits (arXiv 2307.12976): a fact, and tests of what else must change and what must stay, by six criteria.

    {"example_type": "popular", "edit": {"prompt": "The name of the mother of Ada is Eve.", "relation": "MOTHER",
        "original_fact": {"prompt": "The name of the mother of Ada is Anne.", "relation": "MOTHER"}},
     "Logical_Generalization": [{"test_queries": [query, ...], "test_condition": "OR" or "AND",
        "condition_queries": [query, ...]}, ...], "Compositionality_I": ..., "Compositionality_II": ...,
     "Subject_Aliasing": ..., "Relation_Specificity": ..., "Forgetfulness": ...}

where a query is {"prompt": ..., "answers": [{"value": ..., "aliases": [...]}, ...]}. A criterion is its prompts' group.
Prompts of the last two must stay ("Forgetfulness" is the paper's Preservation); the others are of kind portability. A
test counts where the unedited model answers its condition_queries, which are of kind condition, and is passed with one
of its prompts (OR) or all (AND): `metrics/ripple.py`. Recent facts have no original_fact, and target_true is unknown.

The edit is one sentence, with ids in place of names: the relation's wording (`wordings`) tells subject and target. A
query with several answers asks for all of them in the source; here one suffices, as in KnowEdit. Tests with a query
whose answers have empty names, which the source can never pass, are left out, and a note says how many.
"""

import re

from editkit.data.cases import CONDITION, PORTABILITY, REWRITE, Case, Probe
from editkit.data.fields import BadField, Raw, as_list, as_text, new_fact, shown, stays
from editkit.data.formats import register
from editkit.facts import Fact

FOLLOWS = ("Logical_Generalization", "Compositionality_I", "Compositionality_II", "Subject_Aliasing")
STAYS = ("Relation_Specificity", "Forgetfulness")
CRITERIA = (*FOLLOWS, *STAYS)

# Relations that are worded otherwise than "The [name of the] RELATION of SUBJECT is".
_WORDED = {
    "AWARD_RECEIVED": "The name of the award {} won is",
    "CAPITAL": "The name of the capital city of {} is",
    "CAPITAL_OF": "The name of the country which {} is the capital of is",
    "CAST_MEMBER": "The names of the cast members of {} are",
    "CONTINENT": "The name of the continent which {} is part of is",
    "COUNTRY": "The name of the country which {} is associated with is",
    "CURRENCY": "The name of the currency in {} is",
    "ETHNIC_GROUP": "The name of the ethnic group which {} is associated with is",
    "FOLLOWED_BY": "{} is followed by",
    "FOLLOWS": "{} follows",
    "LEAGUE": "The name of the league which {} plays in is",
    "MEMBER_OF_SPORTS_TEAM": "The name of the sports team which {} is a member of is",
    "NATIVE_LANGUAGE": "The mother tongue of {} is",
    "NUMBER_OF_CHILDREN": "The number of children {} has is",
    "POSITION_HELD": "The name of the position held by {} is",
    "RELIGION": "The name of the religion which {} is associated with is",
    "SEX_OR_GENDER": "The gender of {} is",
    "SIBLING": "The names of the siblings of {} are",
}


def ripple(raw: Raw) -> Case:
    """One record of any of the three files. Raises BadField."""
    edit = raw.part("edit")
    template, subject, new = _told(edit)
    true = ""
    if "original_fact" in edit:
        was = edit.part("original_fact")
        same, whose, true = _told(was)
        if (same, whose) != (template, subject):
            raise BadField(was.at("prompt"), f"is about another fact than the edit: {shown(was.text('prompt'))}.")
    fact = new_fact(edit.at("prompt"), template, subject, new, true)
    probes, left_out = _tests(raw, fact)
    notes = (f"{left_out} of its tests are left out, since the source names no answer to them",) if left_out else ()
    return Case((fact,), (Probe(REWRITE, fact.text, true, new), *probes), relation=edit.text("relation"), notes=notes)


def wordings(relation: str) -> list[str]:
    """How the benchmark words a relation, with {} for the subject; one of these."""
    words = relation.lower().replace("_", " ")
    usual = [f"The name of the {words} of {{}} is", f"The {words} of {{}} is"]
    return [_WORDED[relation]] if relation in _WORDED else usual


def _told(raw: Raw) -> tuple[str, str, str]:
    """(prompt with {} for the subject, subject, target) of a sentence that states a fact."""
    text, relation = raw.text("prompt"), raw.text("relation")
    for wording in wordings(relation):
        before, behind = map(re.escape, wording.split("{}"))
        # The last place that fits: a subject may hold "is", as titles do.
        if found := re.fullmatch(rf"{before}(\S.*){behind} (\S.*)\.", text):
            return wording, found[1], found[2]
    asked = " or ".join(f"'{wording.format('…')} ….'" for wording in wordings(relation))
    raise BadField(raw.at("prompt"), f"is no sentence of the relation {relation}, {asked}; found {shown(text)}.")


def _tests(raw: Raw, fact: Fact) -> tuple[list[Probe], int]:
    """The prompts of all tests with their conditions, and how many tests are left out: Wikidata names no answer."""
    probes: list[Probe] = []
    left_out = 0
    tests = [(criterion, test) for criterion in CRITERIA for test in raw.parts(criterion)]
    for number, (criterion, test) in enumerate(tests):
        joined, queries = test.text("test_condition"), test.parts("test_queries")
        if joined not in ("OR", "AND"):
            raise BadField(test.at("test_condition"), f"must be OR or AND; found {shown(joined)}.")
        if not queries:
            raise BadField(test.at("test_queries"), "holds no query.")
        asked = [(query.text("prompt"), _answers(query)) for query in queries]
        conditions = [(query.text("prompt"), _answers(query)) for query in test.parts("condition_queries")]
        if not all(answers for _, answers in (*asked, *conditions)):
            left_out += 1
            continue
        for prompt, (answer, *aliases) in asked:
            kind, true, new = PORTABILITY, "", answer
            if criterion in STAYS:
                kind, true, new = stays(fact, prompt, (answer,)).kind, answer, fact.target_new
            probes.append(Probe(kind, prompt, true, new, tuple(aliases), criterion, test=number, every=joined == "AND"))
        for prompt, (answer, *aliases) in conditions:
            probes.append(Probe(CONDITION, prompt, "", answer, tuple(aliases), criterion, test=number))
    return probes, left_out


def _answers(query: Raw) -> tuple[str, ...]:
    """Every answer that counts as right, the first one first; none where their names are empty."""
    found: dict[str, None] = {}
    for each in query.parts("answers"):
        names = [(each.value("value"), each.at("value"))]
        if "aliases" in each:
            field = each.at("aliases")
            names += [(alias, f"{field}[{i}]") for i, alias in enumerate(as_list(each.value("aliases"), field))]
        found |= {as_text(name, field): None for name, field in names if name != ""}
    return tuple(found)


register("ripple", ripple, marks=(("example_type", "edit", "Logical_Generalization", "Relation_Specificity"),))
