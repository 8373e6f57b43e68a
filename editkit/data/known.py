"""known-1000, the facts that ROME's causal tracing used (arXiv 2202.05262, section 2): GPT-2 XL knows them.

    {"known_id": ..., "subject": ..., "attribute": the answer, "prompt": ..., "relation_id": ..., "template": ...,
     "prediction": what GPT-2 XL said}

The prompt is `prompt`; `template` is shorter than it in many records. Tracing asks for what the model says and takes
no target, but an edit needs one: unless a record has its own target_new, it is another record's answer of the same
relation, drawn with the seed (of all relations where the relation has one answer only).
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from editkit.data.cases import REWRITE, Case, Probe
from editkit.data.fields import Raw, fact_of_text

DRAWN = "target_new is drawn (seeded) from other records' answers of the same relation: the data set is for tracing"


def known(raw: Raw) -> Case:
    """One record, with its target_new. Raises BadField."""
    fact = fact_of_text(
        "prompt", raw.text("prompt"), raw.text("subject"), raw.text("target_new"), raw.text("attribute")
    )
    probe = Probe(REWRITE, fact.text, fact.target_true, fact.target_new)
    return Case(
        (fact,),
        (probe,),
        raw.id("known_id"),
        raw.maybe_text("relation_id"),
        notes=(DRAWN,) if raw.values.get("drawn") else (),
    )


def with_targets(records: Sequence[Any], seed: int) -> list[Any]:
    """The records with target_new where they have none; what is no usable record stays as it is."""
    answers: dict[str, set[str]] = defaultdict(set)
    for record in filter(_answers, records):
        answers[str(record.get("relation_id"))].add(record["attribute"].strip())
    every = sorted(set().union(*answers.values()))
    pools = {relation: sorted(found) if len(found) > 1 else every for relation, found in answers.items()}
    ready = []
    for index, record in enumerate(records):
        if _answers(record) and record.get("target_new") is None:
            rng = random.Random(f"{seed}|{index}")
            pool = [a for a in pools[str(record.get("relation_id"))] if a != record["attribute"].strip()]
            if pool:
                record = record | {"target_new": rng.choice(pool), "drawn": True}
        ready.append(record)
    return ready


def _answers(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("attribute"), str) and bool(record["attribute"].strip())
