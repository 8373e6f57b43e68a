"""Case: facts to write together, with the prompts that show what the edit did.

The kinds of probe are the field's: the rewrite prompt, paraphrases of it, neighborhood prompts whose
answer must stay, prompts about other relations of the same subject, which must stay as well, portability
prompts, whose answer follows from the new fact, multi-hop questions (MQuAKE), attribute prompts, whose
subjects have the new object already (CounterFact), and conditions: prompts that the unedited model must answer, or
their test does not count (RippleEdits).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from editkit.data.kinds import (
    ATTRIBUTE,
    CONDITION,
    HOP,
    MULTI_HOP,
    NEIGHBORHOOD,
    PARAPHRASE,
    PORTABILITY,
    REWRITE,
    SAME_SUBJECT,
    STAY,
    TRUE_WANTED,
    UNSEEN,
)
from editkit.errors import FactError
from editkit.facts import Fact
from editkit.settings import EditSettings

__all__ = [
    "ATTRIBUTE",
    "CONDITION",
    "HOP",
    "MULTI_HOP",
    "NEIGHBORHOOD",
    "PARAPHRASE",
    "PORTABILITY",
    "REWRITE",
    "SAME_SUBJECT",
    "STAY",
    "UNSEEN",
    "Case",
    "Probe",
    "make_case",
]


@dataclass(frozen=True)
class Probe:
    """One prompt, with the answer that was true before and the one that the edit writes."""

    kind: str
    prompt: str
    target_true: str  # may be unknown: ""
    target_new: str
    aliases: tuple[str, ...] = ()  # other spellings of the answer wanted
    group: str = ""  # what the source calls it, where it divides a kind: KnowEdit's Subject_Aliasing
    long: bool = False  # the answer is a text: it is also scored how near the model's own text comes (longform)
    # RippleEdits: the number of the test, in its case, that the prompt belongs to; and whether all prompts of that test
    # must be answered, not one of them.
    test: int | None = None
    every: bool = False

    @property
    def wanted(self) -> str:
        """The right answer after the edit: the true one of the kinds in TRUE_WANTED, else the new one."""
        return self.target_true if self.kind in TRUE_WANTED else self.target_new


@dataclass(frozen=True)
class Case:
    """Facts that are written together (one, but in MQuAKE) and their probes, the rewrite prompt of each first."""

    facts: tuple[Fact, ...]
    probes: tuple[Probe, ...]
    id: str = ""  # the source's own, unique in its file
    relation: str = ""  # as the source names it
    generation: tuple[str, ...] = ()  # prompts to go on from at length (GE)
    references: tuple[str, ...] = ()  # texts about things that are as the new fact says (RS)
    notes: tuple[str, ...] = ()  # what the loader had to decide about this record, for the reader of the figures

    @property
    def fact(self) -> Fact:
        """The first fact, the only one of most cases."""
        return self.facts[0]


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
    return Case((fact,), tuple(probes))


def case_of(settings: EditSettings) -> Case:
    """The fact and its probes. A prompt without `{}` may hold the subject itself. Raises FactError."""
    prompt = settings.prompt
    targets = (settings.target_new, settings.target_true)
    if "{}" not in prompt and settings.subject and settings.subject in prompt:
        fact = Fact.in_text(prompt, settings.subject, *targets)
    elif "{}" not in prompt:
        raise FactError(
            f"The subject {settings.subject!r} is not in the prompt {prompt!r}. Write the prompt with {{}} in the "
            "subject's place, as in '{} is located in the city of', or with the subject itself."
        )
    else:
        fact = Fact(prompt, settings.subject, *targets)
    hops = [Fact(p.prompt, fact.subject, p.target_new, p.target_true) for p in settings.portability]
    return make_case(fact, settings.paraphrases, settings.neighborhood, hops)
