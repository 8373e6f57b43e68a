"""Alias: the rewrite prompt with another name of the subject; the new object is the answer.

The name is one of the table (`data/wording.json`), else a person's family name: the last word before a comma, where the
others begin with a capital or are "van", "de" and the like.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from editkit.data.cases import Case, Probe
from editkit.data.kinds import ALIAS
from editkit.data.templates import register
from editkit.data.wording import alias_of, told

_PARTICLES = frozenset(("van", "von", "der", "den", "de", "di", "da", "du", "la", "le"))


def family_name(person: str) -> str:
    """The family name; "" of who has one name, or whose name is not told by its capitals.

    >>> family_name("Robert A. Millikan"), family_name("Nancy Astor, Viscountess Astor"), family_name("Socrates")
    ('Millikan', 'Astor', '')
    >>> family_name("Ludwig van Beethoven"), family_name("Jerome of Prague"), family_name("Henry III")
    ('Beethoven', '', '')
    """
    *before, last = person.split(",")[0].split()
    named = before and all(word[0].isupper() or word in _PARTICLES for word in before)
    return last if named and re.fullmatch(r"[A-Z](?=.*[^\W\d_A-Z])[^\W\d_]*(?:['’-][^\W\d_]+)*", last) else ""


def alias(case: Case) -> Iterator[Probe]:
    for each in told(case):
        fact = each.fact
        name = alias_of(fact.subject) or (family_name(fact.subject) if each.wording.of_a_person else "")
        if name:
            yield Probe(ALIAS, replace(fact, subject=name).text, fact.target_true, fact.target_new)


register(ALIAS, alias)
