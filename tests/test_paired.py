"""Paired differences against a plain bootstrap written here, and the protocols that keep runs apart."""

import random
from collections.abc import Hashable, Mapping
from dataclasses import replace
from statistics import fmean, harmonic_mean

import numpy
import pytest

from editkit.metrics.counterfact import ES, NS, PS, S
from editkit.metrics.drift import PERPLEXITY
from editkit.metrics.metric import Metric
from editkit.metrics.paired import paired
from editkit.metrics.summary import RESAMPLES, resampled
from tests.present import present

Rows = dict[Hashable, Mapping[str, object]]


def tables(cases: int, seed: int, moved: float = 0.3) -> tuple[Rows, Rows]:
    """Two methods on the same cases: shares, some moved in the second, mostly down; some values missing."""
    rng = random.Random(seed)
    ours, theirs = Rows(), Rows()
    for case in range(cases):
        mine = {metric.column(): rng.choice((0.5, 1.0)) for metric in (ES, PS, NS)}
        other = {name: value + rng.choice((-0.5, -0.5, 0.5)) * (rng.random() < moved) for name, value in mine.items()}
        if case % 7 == 3:
            mine[PS.column()] = None  # type: ignore[assignment]
        if case % 11 == 5:
            other[NS.column()] = float("nan")
        ours[case], theirs[case] = mine, other
    return ours, theirs


def plain(metric: Metric, ours: Rows, theirs: Rows) -> tuple[float, float, float, float]:
    """(difference, low, high, probability) by loops: the drawn cases are put together, and both means are taken."""
    parts = [ES, PS, NS] if metric == S else [metric]

    def known(case: Hashable, part: Metric) -> bool:
        values = (ours[case].get(part.column()), theirs[case].get(part.column()))
        return not any(value is None or value != value for value in values)

    cases = [case for case in ours if case in theirs and any(known(case, part) for part in parts)]

    def side(rows: Rows, drawn: list[Hashable]) -> float:
        means = [fmean(float(str(rows[c][p.column()])) for c in drawn if known(c, p)) for p in parts]
        return harmonic_mean(means) if metric == S else means[0]

    found = []
    for draw in resampled(len(cases)):
        drawn = [cases[i] for i in draw]
        found.append(side(ours, drawn) - side(theirs, drawn))
    whole = side(ours, cases) - side(theirs, cases)
    low, high = numpy.quantile(found, (0.025, 0.975))
    # The rounding of sums may leave a tie at 1e-17.
    better = [metric.better * each if abs(each) > 1e-12 else 0.0 for each in found]
    probability = (sum(each > 0 for each in better) + sum(each == 0 for each in better) / 2) / RESAMPLES
    return whole, float(low), float(high), probability


@pytest.mark.parametrize("metric", [PS, S], ids=lambda m: m.short)
def test_a_paired_difference_is_that_of_loops(metric: Metric) -> None:
    ours, theirs = tables(15, seed=1)
    found = present(paired(metric, ours, theirs))
    mean, low, high = found.difference.mean, found.difference.low, found.difference.high
    whole = plain(metric, ours, theirs)
    assert (mean, low, high) == pytest.approx(whole[:3], abs=1e-12)
    assert found.probability == whole[3] and 0 < whole[3] < 1


def test_only_cases_that_both_have_are_compared() -> None:
    ours, theirs = tables(30, seed=2)
    some = {case: row for case, row in theirs.items() if isinstance(case, int) and case % 2}
    found = present(paired(PS, ours, some | {"other": {PS.column(): 0.0}}))
    both = [case for case in some if ours[case][PS.column()] is not None]
    assert found.difference.n == len(both)
    assert found == paired(PS, {case: ours[case] for case in both}, some)


def test_pairing_sees_what_two_intervals_do_not() -> None:
    """Cases differ widely, the methods by a constant: each method's own interval is wide, the paired one has none."""
    column = ES.column()
    ours: Rows = {case: {column: case / 40} for case in range(40)}
    theirs: Rows = {case: {column: case / 40 - 0.01} for case in range(40)}
    found = present(paired(ES, ours, theirs))
    assert (found.difference.low, found.difference.high) == pytest.approx((0.01, 0.01))
    assert found.probability == 1.0 and present(paired(ES, theirs, ours)).probability == 0.0
    assert present(paired(ES, ours, ours)).probability == 0.5
    # Of a metric of which less is better the smaller one wins.
    less = replace(ES, better=-1)
    assert present(paired(less, ours, theirs)).probability == 0.0 and PERPLEXITY.better == -1


def test_fewer_than_two_cases_have_no_difference() -> None:
    ours, theirs = tables(1, seed=0)
    assert paired(ES, ours, theirs) is None and paired(ES, {}, {}) is None
    assert paired(ES, ours, {"another": {ES.column(): 1.0}}) is None
