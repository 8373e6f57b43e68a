"""A stream of cases to edit one after the other, in which a fact may come again with another target."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import repeat

from editkit.data.cases import Case


class CaseStream:
    """Cases by their number in the stream, from 0. Here each fact comes once.

    A subclass says otherwise, with `which` of each number, and makes cases when they are asked for: they take far
    more memory than the facts.
    """

    def __init__(self, cases: Sequence[Case], which: Sequence[int] | None = None) -> None:
        """`cases`: one of each fact. `which`: the place in `cases` of the fact at each number; None: each once."""
        self.cases = cases
        self.which = range(len(cases)) if which is None else which
        self._numbers: list[list[int]] = [[] for _ in repeat(None, len(cases))]  # of each fact, sorted
        for number, fact in enumerate(self.which):
            self._numbers[fact].append(number)

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, number: int) -> Case:
        return self.cases[self.which[number]]

    def latest(self, fact: int, count: int) -> int | None:
        """The number of the last case of a fact among the first `count`; None where there is none. Its target is what
        the model should say after so many."""
        numbers = self._numbers[fact]
        before = bisect_left(numbers, count)
        return numbers[before - 1] if before else None

    def times(self, number: int) -> int:
        """How often the fact at this number has come before it."""
        return bisect_left(self._numbers[self.which[number]], number)
