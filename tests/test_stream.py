"""A stream of the atlas: every fact again and again, with other objects, the same for the same seed."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from editkit.data import load_cases, streamed
from editkit.data.cases import REWRITE
from editkit.data.stream import CaseStream
from editkit.errors import ConfigError
from editkit.settings import DataSettings

SETTINGS = DataSettings(stream=250, limit=60)
CASES = load_cases(replace(SETTINGS, stream=None), seed=3, distinct=True).cases


def test_every_fact_comes_again_with_another_object() -> None:
    stream = streamed(SETTINGS, CASES, seed=3)
    found = [stream[number] for number in range(len(stream))]
    assert len(found) == 250 and tuple(found[:60]) == CASES and len({case.id for case in found}) == 250
    times = Counter(case.fact.text for case in found)
    assert len(times) == 60 and set(times.values()) == {4, 5}
    targets: dict[str, list[str]] = {}
    for case in found:
        fact = case.fact
        targets.setdefault(fact.text, []).append(fact.target_new)
        assert case.probes[0].kind == REWRITE and case.probes[0].target_new == fact.target_new
    assert all(a != b for said in targets.values() for a, b in pairwise(said))
    true = {case.fact.text: case.fact.target_true for case in CASES}
    assert sum(target == true[text] for text, said in targets.items() for target in said) < 10
    orders = [[case.fact.text for case in found[first : first + 60]] for first in (0, 60, 120)]
    assert orders[0] != orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[1])


def test_it_is_the_same_whatever_was_asked_before() -> None:
    one, two = streamed(SETTINGS, CASES, seed=3), streamed(SETTINGS, CASES, seed=3)
    assert [one[number] for number in (200, 100, 0)] == [two[number] for number in (0, 100, 200)][::-1]
    other = streamed(SETTINGS, CASES, seed=4)
    assert [one[n].id for n in range(60, 120)] != [other[n].id for n in range(60, 120)]


def test_the_latest_case_of_a_fact() -> None:
    stream = streamed(SETTINGS, CASES, seed=3)
    for fact in (0, 17, 59):
        for count in (0, 1, 60, 61, 130, 250):
            slow = [number for number in range(count) if stream.which[number] == fact]
            assert stream.latest(fact, count) == (slow[-1] if slow else None)
    once = CaseStream(CASES)
    assert (once.latest(5, 5), once.latest(5, 6), once[5], len(once)) == (None, 5, CASES[5], 60)


def test_where_there_is_no_stream() -> None:
    with pytest.raises(ConfigError, match="data.stream=250 needs task=lifelong"):
        load_cases(SETTINGS)
    with pytest.raises(ConfigError, match="data=zsre has one"):
        streamed(DataSettings(name="zsre", stream=5), CASES)
