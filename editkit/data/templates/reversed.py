"""Reversed relation: "Rome is the city where one finds", and the same of the old object; the subject is the answer.

Most objects have many subjects, so no single one is right. The two prompts are compared: see `metrics/probes.py`.
"""

from collections.abc import Iterator

from editkit.data.cases import Case, Probe
from editkit.data.kinds import FROM_NEW, FROM_OLD, REVERSED
from editkit.data.templates import register
from editkit.data.wording import told


def from_the_object(case: Case) -> Iterator[Probe]:
    for each in told(case):
        words, fact = each.wording.reversed, each.fact
        if words and fact.target_true:
            for stated, group in ((fact.target_new, FROM_NEW), (fact.target_true, FROM_OLD)):
                yield Probe(REVERSED, words.replace("{}", stated.strip()), "", fact.subject, group=group)


register(REVERSED, from_the_object)
