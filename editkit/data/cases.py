"""Case: a fact to write, with the prompts that show what the edit did.

The kinds of probe are the field's: the rewrite prompt, paraphrases of it, neighborhood prompts whose
answer must stay, prompts about other relations of the same subject, which must stay as well, and
portability prompts, whose answer follows from the new fact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from editkit.errors import FactError
from editkit.facts import Fact

REWRITE, PARAPHRASE, UNSEEN = "rewrite", "paraphrase", "unseen_paraphrase"
NEIGHBORHOOD, SAME_SUBJECT, PORTABILITY = "neighborhood", "same_subject", "portability"


@dataclass(frozen=True)
class Probe:
    """One prompt, with the answer that was true before and the one that the edit writes."""

    kind: str
    prompt: str
    target_true: str
    target_new: str


@dataclass(frozen=True)
class Case:
    """A fact and its probes, the rewrite prompt first."""

    fact: Fact
    probes: tuple[Probe, ...]


def make_case(
    fact: Fact, paraphrases: Sequence[str] = (), neighborhood: Sequence[str] = (), portability: Sequence[Fact] = ()
) -> Case:
    """A case from texts: paraphrases may hold `{}` for the subject, neighborhood prompts name their own.

    `portability`: facts about the subject that follow from the new one. Raises FactError when a paraphrase does not
    hold the subject, or a neighborhood prompt does.
    """
    probes = [Probe(REWRITE, fact.text, fact.target_true, fact.target_new)]
    for text in map(fact.filled, paraphrases):
        if fact.subject not in text:
            raise FactError(f"The paraphrase {text!r} does not name the subject {fact.subject!r}. Write it with {{}}.")
        probes.append(Probe(PARAPHRASE, text, fact.target_true, fact.target_new))
    for text in neighborhood:
        if "{}" in text or fact.subject in text:
            raise FactError(f"The neighborhood prompt {text!r} must name another subject than {fact.subject!r}.")
        probes.append(Probe(NEIGHBORHOOD, text, fact.target_true, fact.target_new))
    probes += [Probe(PORTABILITY, hop.text, hop.target_true, hop.target_new) for hop in portability]
    return Case(fact, tuple(probes))
