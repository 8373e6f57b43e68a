"""QAEdit (WILD, arXiv 2502.11177): questions of three question-answering data sets, written with their true answers.

    {"id": ..., "source": "NQ", "TQA" or "SQA", "prompt": question, "target": answer, "subject": ...,
     "rephrase": the same asked otherwise, "locality": [{"loc": question, "loc_ans": answer}, ...]}

What is written is true and the model does not know it: what it says before is unknown. Ids are unique in a source
only, so a case's id is SOURCE/ID. The protocol asks without teacher forcing, to the natural stop: `natural`.
"""

from editkit.data.cases import PARAPHRASE, REWRITE, Case, Probe
from editkit.data.fields import Raw, fact_of_text, stays
from editkit.data.formats import register


def qaedit(raw: Raw) -> Case:
    """One record. Raises BadField."""
    fact = fact_of_text("prompt", raw.text("prompt"), raw.text("subject"), raw.text("target"))
    probes = [
        Probe(REWRITE, fact.text, "", fact.target_new),
        Probe(PARAPHRASE, raw.text("rephrase"), "", fact.target_new),
    ]
    probes += [stays(fact, each.text("loc"), each.answers("loc_ans")) for each in raw.parts("locality")]
    source, number = raw.maybe_text("source"), raw.id("id")
    return Case((fact,), tuple(probes), f"{source}/{number}" if source and number else number, source)


register("qaedit", qaedit, marks=(("prompt", "target", "subject", "rephrase", "locality"),))
