"""MQuAKE (arXiv 2305.14795): several facts written together, and questions that chain them.

    {"case_id": ..., "requested_rewrite": [as CounterFact's, ...], "questions": [three wordings], "answer": before,
     "new_answer": after, "new_answer_alias": [...], "new_single_hops": [{"question", "cloze", "answer",
     "answer_alias"}, ...]}

Probes: every fact's rewrite prompt; the questions, of kind multi_hop; and each step of the new chain asked alone as a
question, of kind portability and group "hop" (its cloze would be the rewrite prompt again).

MQuAKE-Remastered (ICLR 2025) corrects the many wrong answers of MQuAKE and has the same fields. On the Hub
(henryzhongsc/MQuAKE-Remastered) its facts are flat, with `target_new_str` and `target_true_str`; both are read, and
a note says that a case is of it. Its `split`, which cases are edited in a run of so many edits, is not used: every case
is edited, and those of a run are chosen as those of any data set.
"""

from collections.abc import Mapping

from editkit.data.cases import HOP, MULTI_HOP, PORTABILITY, REWRITE, Case, Probe
from editkit.data.fields import BadField, Raw
from editkit.data.formats import register
from editkit.data.formats.counterfact import rewritten

REMASTERED = "the record is of MQuAKE-Remastered, whose answers are corrected"


def mquake(raw: Raw) -> Case:
    """One record. Raises BadField."""
    rewrites = raw.parts("requested_rewrite")
    if not rewrites:
        raise BadField("requested_rewrite", "holds no fact.")
    pairs = [rewritten(each) for each in rewrites]
    facts, relations = [fact for fact, _ in pairs], [relation for _, relation in pairs]
    probes = [Probe(REWRITE, fact.text, fact.target_true, fact.target_new) for fact in facts]
    probes += chain(raw, {fact.text: fact.target_true for fact in facts})
    remastered = "target_new_str" in rewrites[0] or any(str(name).endswith("split") for name in raw.values)
    notes = (REMASTERED,) if remastered else ()
    return Case(tuple(facts), tuple(probes), raw.id("case_id"), " ".join(filter(None, relations)), notes=notes)


def chain(raw: Raw, old: Mapping[str, str]) -> list[Probe]:
    """The multi-hop questions of a record, and their single hops. Raises BadField.

    `old`: what was true, by the rewrite prompt: the answer of a hop before the edit. The other hops are as they were.
    """
    before, after = raw.text("answer"), raw.text("new_answer")
    aliases = _aliases(raw, "new_answer_alias", after)
    questions = raw.texts("questions")
    if not questions:
        raise BadField("questions", "holds no question.")
    probes = [Probe(MULTI_HOP, question, before, after, aliases) for question in questions]
    for hop in raw.parts("new_single_hops"):
        answer = hop.text("answer")
        spelled = _aliases(hop, "answer_alias", answer)
        true = old.get(hop.maybe_text("cloze"), "")
        probes.append(Probe(PORTABILITY, hop.text("question"), true, answer, spelled, HOP))
    return probes


def _aliases(raw: Raw, name: str, answer: str) -> tuple[str, ...]:
    """Other spellings of `answer`; the field may be absent or empty."""
    if name not in raw or raw.value(name) == []:
        return ()
    return tuple(alias for alias in raw.answers(name) if alias != answer)


register("mquake", mquake, marks=(("requested_rewrite", "questions", "new_answer"),))
