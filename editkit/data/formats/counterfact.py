"""CounterFact (ROME, arXiv 2202.05262), the authors' format.

    {"case_id": 7, "requested_rewrite": {"prompt": "{} stands in", "relation_id": "P131", "subject": "Big Ben",
        "target_new": {"str": "Oslo"}, "target_true": {"str": "London"}}, "paraphrase_prompts": [...],
     "neighborhood_prompts": [...], "attribute_prompts": [...], "generation_prompts": [...]}

Neighborhood prompts are of other subjects with the old object, attribute prompts of subjects that have the new one.
"""

from editkit.data.cases import ATTRIBUTE, NEIGHBORHOOD, PARAPHRASE, REWRITE, Case, Probe
from editkit.data.fields import BadField, Raw, located, new_fact, shown
from editkit.data.formats import register
from editkit.facts import Fact


def counterfact(raw: Raw) -> Case:
    """ROME's format. Raises BadField."""
    fact, relation = rewritten(raw.part("requested_rewrite"))
    true, new = fact.target_true, fact.target_new
    probes = [Probe(REWRITE, fact.text, true, new)]
    for i, prompt in enumerate(raw.texts("paraphrase_prompts")):
        if located(prompt, fact.subject) is None:
            raise BadField(
                f"paraphrase_prompts[{i}]", f"does not hold the subject {shown(fact.subject)}: {shown(prompt)}."
            )
        probes.append(Probe(PARAPHRASE, prompt, true, new))
    probes += [Probe(NEIGHBORHOOD, prompt, true, new) for prompt in raw.texts("neighborhood_prompts")]
    probes += [Probe(ATTRIBUTE, prompt, true, new) for prompt in raw.texts("attribute_prompts")]
    return Case((fact,), tuple(probes), raw.id("case_id"), relation, raw.texts("generation_prompts"))


def rewritten(raw: Raw) -> tuple[Fact, str]:
    """The fact of a `requested_rewrite`, and its relation. Its targets may be flat: target_new_str. Raises BadField."""
    new, true = (
        raw.text(f"{name}_str") if f"{name}_str" in raw and name not in raw else raw.part(name).text("str")
        for name in ("target_new", "target_true")
    )
    fact = new_fact(raw.at("prompt"), raw.template("prompt"), raw.text("subject"), new, true)
    return fact, raw.maybe_text("relation_id")


register("counterfact", counterfact, marks=(("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"),))
