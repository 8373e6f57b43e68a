"""CounterFact (ROME, arXiv 2202.05262): the authors' format, and the flat one of EasyEdit.

    {"case_id": 7, "requested_rewrite": {"prompt": "{} stands in", "relation_id": "P131", "subject": "Big Ben",
        "target_new": {"str": "Oslo"}, "target_true": {"str": "London"}}, "paraphrase_prompts": [...],
     "neighborhood_prompts": [...], "attribute_prompts": [...], "generation_prompts": [...]}

Neighborhood prompts are of other subjects with the old object, attribute prompts of subjects that have the new one.

The flat format has one prompt of each sort, `rephrase_prompt` among them. That is mostly one of CounterFact's
*generation* prompts ("Big Ben's surroundings include"), which target_new does not complete: here it becomes a
generation prompt, and PS cannot be told from this format.
"""

from editkit.data.cases import ATTRIBUTE, NEIGHBORHOOD, PARAPHRASE, REWRITE, Case, Probe
from editkit.data.fields import BadField, Raw, fact_of_text, located, new_fact, shown
from editkit.facts import Fact

TRAP = (
    "rephrase_prompt is mostly a generation prompt, no paraphrase: it is used for generation only, and this format "
    "has no paraphrases (PS); CounterFact in ROME's format has"
)


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
    """The fact of a `requested_rewrite`, and its relation. Raises BadField."""
    new, true = raw.part("target_new").text("str"), raw.part("target_true").text("str")
    fact = new_fact(raw.at("prompt"), raw.template("prompt"), raw.text("subject"), new, true)
    return fact, raw.maybe_text("relation_id")


def counterfact_flat(raw: Raw) -> Case:
    """EasyEdit's format. Raises BadField."""
    fact = fact_of_text(
        "prompt", raw.text("prompt"), raw.text("subject"), raw.text("target_new"), raw.text("ground_truth")
    )
    true, *aliases = raw.answers("locality_ground_truth")
    probes = (
        Probe(REWRITE, fact.text, fact.target_true, fact.target_new),
        Probe(NEIGHBORHOOD, raw.text("locality_prompt"), true, fact.target_new, tuple(aliases)),
    )
    return Case((fact,), probes, raw.id("case_id"), generation=(raw.text("rephrase_prompt"),), notes=(TRAP,))
