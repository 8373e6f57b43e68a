"""How a relation is put into words, for probes by template: `wording.json`, by the relation's name in the data.

    statement     the fact as a sentence that the object ends, {} for the subject. CounterFact's relations have one:
                  their rewrite prompts may be parts of a sentence ("{}, formulated in"). The atlas' prompts are
                  sentences, and are taken as they are
    reversed      the same from the object, {} for it; the subject follows
    of_a_person   the subject is a person, whose family name is an alias
    translated    the statement in other languages, by language. Only where the objects (companies, channels) have one
                  name in all of them, so that the answer is the same text. The atlas has English alone

and `aliases`, other names of subjects, by subject.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from editkit.data.cases import Case
from editkit.data.kinds import REWRITE
from editkit.facts import Fact

_BEGIN = ("The", "A", "An", "In", "On", "As", "At")  # words that are written small inside a sentence


@dataclass(frozen=True)
class Wording:
    """What the table says of one relation."""

    statement: str = ""
    reversed: str = ""
    of_a_person: bool = False
    translated: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Told:
    """A fact that a case writes, and how its relation is put into words."""

    fact: Fact
    wording: Wording

    @property
    def statement(self) -> str:
        """The sentence that the object ends: the table's, else the rewrite prompt; "" where that is none."""
        words = self.wording.statement or self.fact.prompt
        return "" if "?" in words or words.rstrip().endswith(".") else self.fact.filled(words)

    @property
    def clause(self) -> str:
        """The statement as it goes on behind "that": a first word that is no name is written small."""
        first = (self.wording.statement or self.fact.prompt).split(" ")[0]
        return self.statement[:1].lower() + self.statement[1:] if first in _BEGIN else self.statement


def told(case: Case) -> Iterator[Told]:
    """The facts that a case writes and asks. One that is never edited has no rewrite prompt, and gives none."""
    asked = {probe.prompt for probe in case.probes if probe.kind == REWRITE}
    relations = case.relation.split() if len(case.facts) > 1 else [case.relation]
    if len(relations) != len(case.facts):  # a source that names the relations of some facts only
        relations = [""] * len(case.facts)
    for fact, relation in zip(case.facts, relations, strict=True):
        if fact.text in asked:
            yield Told(fact, wording_of(relation))


def wording_of(relation: str) -> Wording:
    """The wording of a relation; an empty one where the table has none."""
    return Wording(**_table()["relations"].get(relation, {}))


def alias_of(subject: str) -> str:
    """Another name of a subject; "" where the table has none."""
    return str(_table()["aliases"].get(subject, ""))


@functools.cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return found
