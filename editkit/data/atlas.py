"""The atlas as an editing benchmark, CounterFact-shaped.

For a sampled fact, `target_new` is another object of the same relation. Paraphrases are the phrasings held out
of training with this subject; unseen paraphrases were never in training with any subject. Neighborhood prompts ask
the same relation of other subjects: first of those that share the object, as in CounterFact; where a
relation has too few of them (capitals), of others, each with its own answer. Same-subject prompts ask the
subject's other relations, except one that follows from the edited one (a landmark moved to Rome is in Italy):
where its answer would change, that one is a portability prompt.
"""

import random

from editkit.corpora import Atlas, AtlasFact, load_atlas
from editkit.data.cases import NEIGHBORHOOD, PARAPHRASE, PORTABILITY, REWRITE, SAME_SUBJECT, UNSEEN, Case, Probe
from editkit.facts import Fact

NEIGHBORS = 10

# Two hops: from the edited relation to the one that follows, by way of the object's own relation.
CHAINS = {
    "landmark_city": ("landmark_country", "city_country"),
    "person_birth_city": ("person_birth_country", "city_country"),
    "company_headquarters": ("company_country", "city_country"),
}


def atlas_cases(n: int, *, seed: int = 0, atlas: Atlas | None = None) -> list[Case]:
    """`n` cases over facts drawn without replacement, in a seeded order; all facts when n is larger."""
    atlas = atlas or load_atlas()
    rng = random.Random(seed)
    facts = rng.sample(atlas.facts, min(n, len(atlas.facts)))
    return [atlas_case(atlas, fact, rng) for fact in facts]


def atlas_case(atlas: Atlas, fact: AtlasFact, rng: random.Random) -> Case:
    """The case of one fact: a target drawn from its relation's other objects, and all its probes."""
    rewrite = atlas.trained_pairs(fact)[0]
    others = sorted({f.object for f in atlas.by_relation[fact.relation]} - {fact.object})
    new = rng.choice(others)

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
            follows = _follows(atlas, fact, new, sibling)
            if follows is None:
                probes.append(Probe(SAME_SUBJECT, prompt, sibling.object, new))
            elif follows != sibling.object:
                probes.append(Probe(PORTABILITY, prompt, sibling.object, follows))
    return Case(Fact(rewrite, fact.subject, new, fact.object), tuple(probes))


def _follows(atlas: Atlas, fact: AtlasFact, new: str, sibling: AtlasFact) -> str | None:
    """What `sibling`'s object becomes when `fact`'s becomes `new` (as it is where the atlas does not know the
    second hop); None when nothing follows from the edit."""
    follower, hop = CHAINS.get(fact.relation, ("", ""))
    if sibling.relation != follower:
        return None
    answers = [f.object for f in atlas.by_subject.get(new, []) if f.relation == hop]
    return answers[0] if answers else sibling.object


def _neighbors(atlas: Atlas, fact: AtlasFact, new: str, rng: random.Random) -> list[AtlasFact]:
    same_relation = [f for f in atlas.by_relation[fact.relation] if f.subject != fact.subject and f.object != new]
    near = [f for f in same_relation if f.object == fact.object]
    far = [f for f in same_relation if f.object != fact.object]
    near = rng.sample(near, min(NEIGHBORS, len(near)))
    return near + rng.sample(far, min(NEIGHBORS - len(near), len(far)))
