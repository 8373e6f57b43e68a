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
from editkit.data.fields import BadField, Raw, fact_of_text
from editkit.data.formats import register

DRAWN = "target_new is drawn (seeded) from other records' answers of the same relation: the data set is for tracing"


def known(raw: Raw) -> Case:
    """One record, with its target_new. Raises BadField."""
    prompt, subject, attribute = raw.text("prompt"), raw.text("subject"), raw.text("attribute")
    fact = fact_of_text("prompt", prompt, subject, raw.text("target_new"), attribute)
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
    told = [_told(record) for record in records]
    answers: dict[str, set[str]] = defaultdict(set)
    for relation, answer in filter(None, told):
        answers[relation].add(answer)
    every = set().union(*answers.values())
    ready = []
    for index, (record, found) in enumerate(zip(records, told, strict=True)):
        if found and record.get("target_new") is None:
            relation, answer = found
            pool = sorted(answers[relation] - {answer}) or sorted(every - {answer})
            if pool:
                target = random.Random(f"{seed}|{index}").choice(pool)
                record = {**record, "target_new": target, "drawn": True}
        ready.append(record)
    return ready


def _told(record: Any) -> tuple[str, str] | None:
    """The relation and the answer of a record; None of what is none."""
    try:
        raw = Raw(record)
        return raw.maybe_text("relation_id"), raw.text("attribute")
    except BadField:
        return None


register("known", known, marks=(("prompt", "subject", "attribute"),), before=with_targets)
