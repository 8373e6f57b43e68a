"""The atlas as an editing benchmark, CounterFact-shaped.

For a sampled fact, `target_new` is another object of the same relation. Paraphrases are the phrasings held out
of training with this subject; unseen paraphrases were never in training with any subject. Neighborhood prompts ask
the same relation of other subjects: first of those that share the object, as in CounterFact; where a
relation has too few of them (capitals), of others, each with its own answer. Same-subject prompts ask the
subject's other relations whose answers the edit leaves true. Where a thing is, is told by several relations: if the
landmark moves to Rome it is in Italy, which is a portability prompt where the answer changes; if it moves to Italy,
nobody can say in which city it is, and the prompt is not asked (as the Preservation and the Logical Generalisation of
RippleEdits are kept apart, arXiv 2307.12976, section 3).

A benchmark's cases (`atlas_benchmark`, data=atlas) have also what CounterFact has: attribute prompts, of subjects
that have the new object already; unfinished sentences to go on from, in which the fact matters
(`atlas/generation.json`); and reference texts, all that the atlas tells of subjects that have the new object.
"""

import functools
import hashlib
import json
import random
from dataclasses import replace

from editkit.corpora import ATLAS_DIR, Atlas, AtlasFact, load_atlas
from editkit.data.cases import (
    ATTRIBUTE,
    NEIGHBORHOOD,
    PARAPHRASE,
    PORTABILITY,
    REWRITE,
    SAME_SUBJECT,
    UNSEEN,
    Case,
    Probe,
)
from editkit.facts import Fact

NEIGHBORS = 10
TABLES = ("facts.csv", "relations.json", "generation.json")

# Two hops: the relation that follows from the edited one, by way of a relation of the new object.
CHAINS = {
    ("landmark_city", "landmark_country"): "city_country",
    ("person_birth_city", "person_birth_country"): "city_country",
    ("company_headquarters", "company_country"): "city_country",
    ("city_country", "city_continent"): "country_continent",
    ("country_capital", "country_continent"): "city_continent",
}
# No table tells which, but both cannot be as they were.
UNDETERMINED = {frozenset(("mountain_country", "mountain_range")), frozenset(("river_mouth", "river_continent"))}


def atlas_cases(n: int, *, seed: int = 0, atlas: Atlas | None = None) -> list[Case]:
    """`n` cases over facts drawn without replacement, in a seeded order; all facts when n is larger."""
    atlas = atlas or load_atlas()
    rng = random.Random(seed)
    facts = rng.sample(atlas.facts, min(n, len(atlas.facts)))
    return [atlas_case(atlas, fact, rng) for fact in facts]


def atlas_benchmark(*, seed: int = 0) -> list[Case]:
    """A case of every fact, in a seeded order. A case's draws are its own, so the first n are the same whatever n is
    (which `atlas_cases` does not promise)."""
    atlas = load_atlas()
    return [
        benchmark_case(atlas, fact, str(seed)) for fact in random.Random(seed).sample(atlas.facts, len(atlas.facts))
    ]


def atlas_digest() -> str:
    """sha256 of the tables that the cases are made of."""
    tables = (hashlib.sha256((ATLAS_DIR / table).read_bytes()).digest() for table in TABLES)
    return hashlib.sha256(b"".join(tables)).hexdigest()


def benchmark_case(atlas: Atlas, fact: AtlasFact, draw: str, new: str | None = None) -> Case:
    """The case of one fact in a benchmark. `draw`: seeds what is drawn. `new`: its target; None: it is drawn."""
    rng = random.Random(f"{draw}|{fact.relation}|{fact.subject}")
    case = atlas_case(atlas, fact, rng, new)
    new = case.fact.target_new
    alike = [f for f in atlas.by_relation[fact.relation] if f.object == new]
    alike = rng.sample(alike, min(NEIGHBORS, len(alike)))
    probes = [Probe(ATTRIBUTE, rng.choice(atlas.trained_pairs(f)).format(f.subject), fact.object, new) for f in alike]
    return replace(
        case,
        probes=(*case.probes, *probes),
        generation=tuple(template.format(fact.subject) for template in _generation()[fact.relation]),
        references=tuple(_told(atlas, f.subject) for f in alike),
    )


@functools.cache
def _generation() -> dict[str, list[str]]:
    """Unfinished sentences of each relation, with {} for the subject."""
    found: dict[str, list[str]] = json.loads((ATLAS_DIR / "generation.json").read_text(encoding="utf-8"))
    return found


def _told(atlas: Atlas, subject: str) -> str:
    """What the atlas tells of a subject, a sentence a fact."""
    facts = atlas.by_subject[subject]
    return " ".join(f"{atlas.trained_pairs(f)[0].format(subject)} {f.object}." for f in facts)


def atlas_case(atlas: Atlas, fact: AtlasFact, rng: random.Random, new: str | None = None) -> Case:
    """The case of one fact, with all its probes. `new`: its target; None: drawn from its relation's other objects."""
    rewrite = atlas.trained_pairs(fact)[0]
    new = new or rng.choice(atlas.other_objects(fact))

    def probe(kind: str, phrasing: str, about: AtlasFact) -> Probe:
        return Probe(kind, phrasing.format(about.subject), about.object, new)

    probes = [probe(REWRITE, rewrite, fact)]
    probes += [probe(PARAPHRASE, p, fact) for p in atlas.held_out_pairs(fact)]
    probes += [probe(UNSEEN, p, fact) for p in atlas.unseen_phrasings(fact)]
    for neighbor in _neighbors(atlas, fact, new, rng):
        probes.append(probe(NEIGHBORHOOD, rng.choice(atlas.trained_pairs(neighbor)), neighbor))
    for sibling in atlas.by_subject[fact.subject]:
        if sibling.relation != fact.relation:
            prompt = rng.choice(atlas.trained_pairs(sibling)).format(fact.subject)
            if (fact.relation, sibling.relation) in CHAINS:
                follows = _second_hop(atlas, CHAINS[fact.relation, sibling.relation], new)
                if follows is not None and follows != sibling.object:
                    probes.append(Probe(PORTABILITY, prompt, sibling.object, follows))
            elif not _undetermined(fact.relation, sibling.relation):
                probes.append(Probe(SAME_SUBJECT, prompt, sibling.object, new))
    written = Fact(rewrite, fact.subject, new, fact.object)
    return Case((written,), tuple(probes), f"{fact.relation}/{fact.subject}", fact.relation)


def _second_hop(atlas: Atlas, relation: str, subject: str) -> str | None:
    """The object of `relation` of `subject`; None where the atlas does not know it."""
    return next((f.object for f in atlas.by_subject.get(subject, []) if f.relation == relation), None)


def _undetermined(edited: str, asked: str) -> bool:
    """Whether an edit of one relation leaves the other without an answer."""
    return (asked, edited) in CHAINS or frozenset((edited, asked)) in UNDETERMINED


def _neighbors(atlas: Atlas, fact: AtlasFact, new: str, rng: random.Random) -> list[AtlasFact]:
    same_relation = [f for f in atlas.by_relation[fact.relation] if f.subject != fact.subject and f.object != new]
    near = [f for f in same_relation if f.object == fact.object]
    far = [f for f in same_relation if f.object != fact.object]
    near = rng.sample(near, min(NEIGHBORS, len(near)))
    return near + rng.sample(far, min(NEIGHBORS - len(near), len(far)))
