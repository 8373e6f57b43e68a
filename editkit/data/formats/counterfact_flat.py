"""CounterFact in EasyEdit's flat format.

    {"case_id": 3, "prompt": "Big Ben stands in", "subject": "Big Ben", "target_new": "Oslo", "ground_truth": "London",
     "rephrase_prompt": ..., "locality_prompt": ..., "locality_ground_truth": ...}

It has one prompt of each sort, `rephrase_prompt` among them. That is mostly one of CounterFact's *generation* prompts
("Big Ben's surroundings include"), which target_new does not complete: here it becomes a generation prompt, and PS
cannot be told from this format. LocFT-BF's CounterFact has these fields with a true paraphrase: data=wikibigedit.
"""

from editkit.data.cases import NEIGHBORHOOD, REWRITE, Case, Probe
from editkit.data.fields import Raw, fact_of_text
from editkit.data.formats import register

TRAP = (
    "rephrase_prompt is mostly a generation prompt, no paraphrase: it is used for generation only, and this format "
    "has no paraphrases (PS); CounterFact in ROME's format has"
)


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


register(
    "counterfact_flat",
    counterfact_flat,
    marks=(("prompt", "subject", "ground_truth", "rephrase_prompt", "locality_prompt"),),
)
