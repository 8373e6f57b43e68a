"""Distracting context: a true sentence about a neighbor, which has the old object, in front of the rewrite prompt.

The sentence says nothing about the subject, so the new object is still the answer. CounterFact+ does it the other way
round: the new fact in front of neighborhood prompts (`distracted`).
"""

from collections.abc import Iterator

from editkit.data.cases import Case, Probe
from editkit.data.kinds import DISTRACTING_CONTEXT, NEIGHBORHOOD
from editkit.data.templates import register
from editkit.data.wording import told


def distracting_context(case: Case) -> Iterator[Probe]:
    for each in told(case):
        old, new = each.fact.target_true, each.fact.target_new
        near = (p.prompt for p in case.probes if p.kind == NEIGHBORHOOD and old and p.target_true == old)
        if (prompt := next(near, "")) and "?" not in prompt:
            yield Probe(DISTRACTING_CONTEXT, f"{prompt} {old.strip()}. {each.fact.text}", old, new)


register(DISTRACTING_CONTEXT, distracting_context)
