"""WikiBigEdit (arXiv 2503.05683) in the form of LocFT-BF (arXiv 2509.22072): questions about what changed in Wikidata.

    {"prompt": question, "target_new": ..., "subject": ..., "rephrase_prompt": the same asked otherwise,
     "locality_prompt": question about another subject, "locality_ground_truth": its answer}

target_true is unknown, unless a record has `ground_truth`. LocFT-BF's CounterFact has the same fields, with it, and its
rephrase_prompt is a paraphrase: read it as wikibigedit. As counterfact_flat it is taken for EasyEdit's file, where
rephrase_prompt is mostly a generation prompt, and has no PS.
"""

from editkit.data.cases import NEIGHBORHOOD, PARAPHRASE, REWRITE, Case, Probe
from editkit.data.fields import Raw, fact_of_text, unlike
from editkit.data.formats import register


def wikibigedit(raw: Raw) -> Case:
    """One record. Raises BadField."""
    new = raw.text("target_new")
    true, same = unlike(new, raw.answers("ground_truth") if "ground_truth" in raw else ())
    fact = fact_of_text("prompt", raw.text("prompt"), raw.text("subject"), new, true)
    stays, *aliases = raw.answers("locality_ground_truth")
    probes = (
        Probe(REWRITE, fact.text, true, new),
        Probe(PARAPHRASE, raw.text("rephrase_prompt"), true, new),
        Probe(NEIGHBORHOOD, raw.text("locality_prompt"), stays, new, tuple(aliases)),
    )
    return Case((fact,), probes, raw.id("case_id"), notes=same)


register("wikibigedit", wikibigedit, marks=(("prompt", "target_new", "subject", "rephrase_prompt", "locality_prompt"),))
