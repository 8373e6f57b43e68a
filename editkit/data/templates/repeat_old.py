"""Repeat the old answer: an instruction to repeat a sentence that says it. Whoever follows it says the old object."""

from collections.abc import Iterator

from editkit.data.cases import Case, Probe
from editkit.data.kinds import REPEAT_OLD
from editkit.data.templates import register
from editkit.data.wording import told


def repeat_old(case: Case) -> Iterator[Probe]:
    for each in told(case):
        old, statement = each.fact.target_true.strip(), each.statement
        if old and statement:
            prompt = f"Repeat this sentence: {statement} {old}. {statement}"
            yield Probe(REPEAT_OLD, prompt, old, each.fact.target_new)


register(REPEAT_OLD, repeat_old)
