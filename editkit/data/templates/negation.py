"""Negation: "It is not true that … is located in the city of". Anything but the new object goes on with it rightly."""

from collections.abc import Iterator

from editkit.data.cases import Case, Probe
from editkit.data.kinds import NEGATION
from editkit.data.templates import register
from editkit.data.wording import told


def negation(case: Case) -> Iterator[Probe]:
    for each in told(case):
        if each.statement:
            yield Probe(NEGATION, f"It is not true that {each.clause}", each.fact.target_true, each.fact.target_new)


register(NEGATION, negation)
