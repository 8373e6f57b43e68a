"""AKEW (EMNLP 2024), unstructured: facts of CounterFact and MQuAKE-CF, each written as a text about its subject.

    {"case_id": ..., "requested_rewrite": one fact, or a list of them:
        {"question": ..., "prompt": "{} is a citizen of", "prompt_full": ..., "subject": ...,
         "target_new": {"str": ...}, "target_true": {"str": ...}, "fact_new_uns": the text,
         "unsfact_triplets_GPT": [{"subject": ..., "prompt": "{} is located in", "target": ...}, ...]}, ...}

and then what CounterFact (paraphrase_prompts, neighborhood_prompts, generation_prompts) or MQuAKE (questions,
new_single_hops) has, or nothing (WikiUpdate). What is written is the text, after `question`, else after `prompt_full`
or `prompt`. The triplets say what is in the text: prompts of kind portability and group "sub_question", all of them
(AnyEdit asks the first five). The old answer is a name, whose likelihood says nothing beside that of a text, so
target_true is left unknown; MQuAKE's questions and CounterFact's neighborhood prompts keep their short answers.
"""

from editkit.data.cases import NEIGHBORHOOD, PARAPHRASE, PORTABILITY, REWRITE, Case, Probe
from editkit.data.fields import BadField, Raw, fact_of_text, new_fact
from editkit.data.formats import register
from editkit.data.formats.mquake import chain
from editkit.data.formats.unke import long_probe
from editkit.data.kinds import SUB_QUESTION
from editkit.facts import Fact


def akew(raw: Raw) -> Case:
    """One record of any of the three. Raises BadField."""
    several = isinstance(raw.value("requested_rewrite"), list)
    rewrites = raw.parts("requested_rewrite") if several else [raw.part("requested_rewrite")]
    if not rewrites:
        raise BadField("requested_rewrite", "holds no fact.")
    facts = [_fact(each) for each in rewrites]
    probes = [long_probe(REWRITE, fact.text, fact.target_new) for fact in facts]
    if "paraphrase_prompts" in raw:
        probes += [long_probe(PARAPHRASE, text, facts[0].target_new) for text in raw.texts("paraphrase_prompts")]
    for each in rewrites:
        probes += _parts(each)
    if "questions" in raw:
        probes += chain(raw, {_cloze(each): _short(each, "target_true") for each in rewrites})
    if "neighborhood_prompts" in raw:
        true, new = _short(rewrites[0], "target_true"), _short(rewrites[0], "target_new")
        probes += [Probe(NEIGHBORHOOD, prompt, true, new) for prompt in raw.texts("neighborhood_prompts")]
    generation = raw.texts("generation_prompts") if "generation_prompts" in raw else ()
    relation = " ".join(filter(None, (each.maybe_text("relation_id") for each in rewrites)))
    return Case(tuple(facts), tuple(probes), raw.id("case_id"), relation, generation)


def _fact(raw: Raw) -> Fact:
    """What is written: the text after the question, or after the prompt where there is none."""
    text, subject = raw.text("fact_new_uns"), raw.text("subject")
    for name in ("question", "prompt_full"):
        if name in raw:
            return fact_of_text(raw.at(name), raw.text(name), subject, text)
    return new_fact(raw.at("prompt"), raw.template("prompt"), subject, text)


def _parts(raw: Raw) -> list[Probe]:
    """Prompts about what the text says."""
    if "unsfact_triplets_GPT" not in raw:
        return []
    return [
        long_probe(
            PORTABILITY, each.template("prompt").replace("{}", each.text("subject")), each.text("target"), SUB_QUESTION
        )
        for each in raw.parts("unsfact_triplets_GPT")
    ]


def _cloze(raw: Raw) -> str:
    return raw.template("prompt").replace("{}", raw.text("subject"))


def _short(raw: Raw, name: str) -> str:
    return raw.part(name).text("str")


register(
    "akew",
    akew,
    marks=(("requested_rewrite", "requested_rewrite.subject", "requested_rewrite.fact_new_uns", "case_id"),),
)
