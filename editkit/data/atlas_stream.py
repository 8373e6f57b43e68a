"""The atlas as a stream: its facts edited again and again, each time with another object; the last answer counts.

All facts come once before any comes again, the first time as in the benchmark, then in an order drawn for each round.
The new object is another one of the relation: neither the true one, nor the one that was written before (where a
relation has no third object, the true one is written back).
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from editkit.corpora import load_atlas
from editkit.data.atlas import benchmark_case
from editkit.data.cases import Case
from editkit.data.stream import CaseStream


class AtlasStream(CaseStream):
    """`count` cases of the facts of `cases`, which are the atlas's; the same for the same `seed`."""

    def __init__(self, cases: Sequence[Case], count: int, seed: int) -> None:
        which: list[int] = []
        for number in range(-(-count // len(cases))):
            order = list(range(len(cases)))
            if number:
                random.Random(f"{seed}|stream|{number}").shuffle(order)
            which += order
        super().__init__(cases, which[:count])
        self._seed, self._atlas = seed, load_atlas()
        self._facts = {f"{fact.relation}/{fact.subject}": fact for fact in self._atlas.facts}
        self._targets: list[list[str]] = [[case.fact.target_new] for case in cases]  # of each fact, as they come

    def __getitem__(self, number: int) -> Case:
        place, times = self.which[number], self.times(number)
        first = self.cases[place]
        if times == 0:
            return first
        target = self._target(place, times)
        case = benchmark_case(self._atlas, self._facts[first.id], f"{self._seed}|{times}", target)
        return replace(case, id=f"{first.id}#{times}")

    def _target(self, place: int, times: int) -> str:
        """What is written when the fact comes after it has come `times` times."""
        fact, targets = self._facts[self.cases[place].id], self._targets[place]
        while len(targets) <= times:
            others = [each for each in self._atlas.other_objects(fact) if each != targets[-1]]
            draw = random.Random(f"{self._seed}|target|{len(targets)}|{fact.relation}|{fact.subject}")
            targets.append(draw.choice(others) if others else fact.object)
        return targets[times]
