"""UnKEBench (UnKE, arXiv 2405.15349): questions whose answers are texts, and questions about parts of each text.

    {"id": ..., "question": ..., "para_question": the same asked otherwise, "answer": a text,
     "sub_question": [question, ...], "sub_answer": [the answer of each, ...]}

The records name no subject, so the whole question stands in its place: a method that writes at the subject's last token
writes at the question's last token, as UnKE and AnyEdit do. Answers are scored as texts (`longform`), those of the
sub-questions too, which are of kind portability and group "sub_question". What was answered before is unknown.
"""

from editkit.data.cases import PARAPHRASE, PORTABILITY, REWRITE, Case, Probe
from editkit.data.fields import BadField, Raw, new_fact
from editkit.data.formats import register
from editkit.data.kinds import SUB_QUESTION
from editkit.facts import Fact

WHOLE = (
    "the source names no subject: the whole question stands in its place, so methods write at its last token, as UnKE "
    "and AnyEdit do"
)


def unke(raw: Raw) -> Case:
    """One record. Raises BadField."""
    fact = asked_whole(raw, "question", "answer")
    probes = [long_probe(REWRITE, fact.text, fact.target_new)]
    probes.append(long_probe(PARAPHRASE, raw.text("para_question"), fact.target_new))
    questions, answers = raw.texts("sub_question"), raw.texts("sub_answer")
    if len(questions) != len(answers):
        raise BadField("sub_answer", f"has {len(answers)} answers to {len(questions)} questions in sub_question.")
    pairs = zip(questions, answers, strict=True)
    probes += [long_probe(PORTABILITY, question, answer, SUB_QUESTION) for question, answer in pairs]
    return Case((fact,), tuple(probes), raw.id("id"), notes=(WHOLE,))


def asked_whole(raw: Raw, question: str, answer: str) -> Fact:
    """The fact of the fields `question` and `answer`, with the whole question as its subject. Raises BadField."""
    return new_fact(question, "{}", raw.text(question), raw.text(answer))


def long_probe(kind: str, prompt: str, answer: str, group: str = "") -> Probe:
    """A probe whose answer is a text."""
    return Probe(kind, prompt, "", answer, group=group, long=True)


register("unke", unke, marks=(("question", "para_question", "answer", "sub_question", "sub_answer"),))
