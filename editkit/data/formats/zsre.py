"""zsRE as editing data: the records of MEND (arXiv 2110.11309) that ROME and its descendants are measured on.

    {"subject": ..., "src": question, "rephrase": the same asked otherwise, "pred": what MEND's model said,
     "alt": another answer, "answers": [the true one, ...], "loc": "nq question: ...", "loc_ans": ...}
    and with EasyEdit: "portability": {"New Question": ..., "New Answer": ..., "Recalled Relation": ...}

What is written: `alt` in records with portability, as in EasyEdit, since their questions follow from it; else the first
of `answers`, as in ROME's evaluation, which the published figures are of (the models do not know the answer;
target_true is unknown). A "?" is put behind `loc`, which has none, and its "nq question: " stays, both as in ROME.

EasyEdit's other form (prompt, target_new, ground_truth, locality, portability) is KnowEdit's and read as such.
"""

from editkit.data.cases import NEIGHBORHOOD, PARAPHRASE, PORTABILITY, REWRITE, Case, Probe
from editkit.data.fields import Raw, fact_of_text, unlike
from editkit.data.formats import register
from editkit.data.formats.knowedit import knowedit

ALT = "target_new is `alt`, as in EasyEdit: the portability questions follow from it"
ANSWER = "target_new is the first of `answers`, as in ROME's evaluation; target_true is unknown"


def zsre(raw: Raw) -> Case:
    """One record of either form. Raises BadField."""
    if "src" not in raw and "prompt" in raw:
        return knowedit(raw)
    answers = raw.answers("answers")
    ports = "portability" in raw
    new, aliases = (raw.text("alt"), ()) if ports else (answers[0], answers[1:])
    true, same = unlike(new, answers) if ports else ("", ())
    fact = fact_of_text("src", raw.text("src"), raw.text("subject"), new, true)
    loc = raw.text("loc")
    probes = [
        Probe(REWRITE, fact.text, true, new, aliases),
        Probe(PARAPHRASE, raw.text("rephrase"), true, new, aliases),
        Probe(NEIGHBORHOOD, loc if loc.endswith("?") else f"{loc}?", raw.text("loc_ans"), new),
    ]
    if ports:
        hop = raw.part("portability")
        follows = hop.answers("New Answer")
        probes.append(Probe(PORTABILITY, hop.text("New Question"), "", follows[0], follows[1:]))
    return Case((fact,), tuple(probes), raw.id("case_id"), notes=(ALT if ports else ANSWER, *same))


register("zsre", zsre, marks=(("src", "subject", "rephrase", "answers"),))
