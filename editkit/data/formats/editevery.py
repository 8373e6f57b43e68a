"""EditEverything (AnyEdit, arXiv 2502.05628): long answers of several sorts: mathematics, code, news and others.

    {"id": ..., "question": ..., "answer": a text, "category": "math"}

As in UnKE's data no subject is named, and the whole question stands in its place. There is one prompt a record; its
group is the category, so each category has figures of its own, as in the paper.
"""

from dataclasses import replace

from editkit.data.cases import REWRITE, Case
from editkit.data.fields import Raw
from editkit.data.formats import register
from editkit.data.formats.unke import WHOLE, asked_whole, long_probe


def editevery(raw: Raw) -> Case:
    """One record. Raises BadField."""
    fact, category = asked_whole(raw, "question", "answer"), raw.text("category")
    probe = replace(long_probe(REWRITE, fact.text, fact.target_new), group=category)
    return Case((fact,), (probe,), raw.id("id"), category, notes=(WHOLE,))


register("editevery", editevery, marks=(("question", "answer", "category"),))
