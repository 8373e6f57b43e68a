"""Fact check: "Is it true that …?", of the new object (yes) and of the old one (no), so that one word is right once."""

from collections.abc import Iterator

from editkit.data.cases import Case, Probe
from editkit.data.kinds import FACT_CHECK
from editkit.data.templates import register
from editkit.data.wording import told


def fact_check(case: Case) -> Iterator[Probe]:
    for each in told(case):
        answers = ((each.fact.target_new, "no", "yes"), (each.fact.target_true, "yes", "no"))
        for stated, before, after in answers:
            if each.statement and stated:
                question = f"Is it true that {each.clause} {stated.strip()}? Answer yes or no:"
                yield Probe(FACT_CHECK, question, before, after)


register(FACT_CHECK, fact_check)
