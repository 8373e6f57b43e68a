"""KnowEdit (arXiv 2401.01286): wiki_recent, wiki_counterfact, zsre and wikibio.

    {"subject": ..., "prompt": ..., "target_new": ..., "ground_truth": ..., "rephrase_prompt": ...,
     "portability": {"Reasoning": [{"prompt": ..., "ground_truth": ...}, ...], "Subject_Aliasing": ..., ...},
     "locality": {"Relation_Specificity": ..., "Forgetfulness": ...}}
    wikibio: {"concept": the subject, "text": what came before, "labels": the sentence to write, "locality": ...}

A probe's group is KnowEdit's own name of its part. Locality prompts that name the subject (most of them) ask what must
stay of it; the others are of neighbors. The first of several right answers is asked for, the rest are aliases; of a
portability prompt the answer before the edit is unknown. rephrase_prompt, ground_truth and portability may be absent.
"""

from collections.abc import Iterator

from editkit.data.cases import PARAPHRASE, PORTABILITY, REWRITE, Case, Probe
from editkit.data.fields import Raw, as_text, fact_of_text, stays, unlike
from editkit.data.formats import register


def knowedit(raw: Raw) -> Case:
    """One record of any of the four. Raises BadField."""
    if "concept" in raw and "labels" in raw:
        return wikibio(raw)
    new = raw.text("target_new")
    true, same = unlike(new, raw.answers("ground_truth") if "ground_truth" in raw else ())
    fact = fact_of_text("prompt", raw.text("prompt"), raw.text("subject"), new, true)
    probes = [Probe(REWRITE, fact.text, true, new)]
    if rephrased := raw.maybe_text("rephrase_prompt"):
        probes.append(Probe(PARAPHRASE, rephrased, true, new))
    if "portability" in raw:
        for group, prompt, answers in _asked(raw.part("portability")):
            probes.append(Probe(PORTABILITY, prompt, "", answers[0], answers[1:], group))
    probes += [stays(fact, prompt, answers, group) for group, prompt, answers in _asked(raw.part("locality"))]
    return Case((fact,), tuple(probes), raw.id("case_id"), notes=same)


def wikibio(raw: Raw) -> Case:
    """A biography to go on with: target_new is a whole sentence, target_true is unknown. Raises BadField."""
    fact = fact_of_text("text", raw.text("text"), raw.text("concept"), raw.text("labels"))
    probes = [Probe(REWRITE, fact.text, "", fact.target_new)]
    probes += [stays(fact, prompt, answers, group) for group, prompt, answers in _asked(raw.part("locality"))]
    return Case((fact,), tuple(probes), raw.id("case_id"))


def _asked(raw: Raw) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(group, prompt, answers) of a portability or locality object."""
    for group in raw.values:
        name = as_text(group, f"{raw.path} (a name in it)")
        for asked in raw.parts(group) if group in raw else ():
            yield name, asked.text("prompt"), asked.answers("ground_truth")


register("knowedit", knowedit, marks=(("prompt", "subject", "target_new", "locality"), ("concept", "text", "labels")))
