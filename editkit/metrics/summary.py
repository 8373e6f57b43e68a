"""Averages over cases, each with its n and a bootstrap interval.

A metric has one value a case, the mean over the case's probes; its average is the mean over cases (as in ROME's own
`summarize.py`), so a case with ten neighborhood prompts weighs as much as one with two. Cases without a value are
left out of its n, and a metric without any is left out. Intervals are 95 % percentile intervals of 2,000 resamples of
the cases (Efron 1979). The same values in the same order give the same bytes.

A metric that `combines` others (CounterFact's S) is the harmonic mean of their averages, 0 where one of them is 0.
"""

from collections.abc import Sequence

import numpy

from editkit.metrics.metric import AFTER, BEFORE, Average, Metric, Score, get, registered

RESAMPLES = 2000
BOUNDS = (0.025, 0.975)


def summary(cases: Sequence[Sequence[Score]], seed: int = 0, *, asked: str = "", control: str = "") -> list[Score]:
    """The average of every metric before and after, in the order in which metrics first appear; then those combined.

    - `cases`: the scores of each case.
    - `asked`: which cases of a lifelong run these are (retention, recent, untouched); "" in a benchmark.
    - `control`: the null control that was in force; "": the edit itself.
    """
    columns: dict[tuple[Metric, str], dict[int, float]] = {}
    for number, scores in enumerate(cases):
        for score in scores:
            if isinstance(score.value, int | float):
                columns.setdefault((score.metric, score.when), {})[number] = float(score.value)
    # In the order of the first case that names a metric, whether or not it applies there.
    named = dict.fromkeys((score.metric, score.when) for scores in cases for score in scores)
    drawn = resampled(len(cases), seed) if cases else numpy.empty((0, 0), dtype=int)
    found: dict[tuple[Metric, str], Average] = {}
    means: dict[tuple[Metric, str], numpy.ndarray] = {}
    for key in (key for key in named if key in columns):
        column = numpy.full(len(cases), numpy.nan)
        column[list(columns[key])] = list(columns[key].values())
        means[key] = means_of(column, drawn)
        there = column[~numpy.isnan(column)]
        found[key] = Average(float(there.mean()), len(there), *bounds_of(means[key]))
    for combined in (entry.metric for entry in registered() if entry.metric.combines):
        parts = [metric for name in combined.combines if (metric := get(name))]
        for when in (BEFORE, AFTER):
            keys = [(part, when) for part in parts]
            if all(key in found for key in keys):
                mean = harmonic(numpy.array([found[key].mean for key in keys]))
                resamples = harmonic(numpy.stack([means[key] for key in keys]))
                n = min(found[key].n or 0 for key in keys)
                found[combined, when] = Average(float(mean), n, *bounds_of(resamples))
    return [Score(metric, when, value, asked, control) for (metric, when), value in found.items()]


def resampled(n: int, seed: int = 0) -> numpy.ndarray:
    """[RESAMPLES, n] indices below n: the package's one bootstrap draws these."""
    drawn: numpy.ndarray = numpy.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    return drawn


def average(values: numpy.ndarray, seed: int = 0) -> Average:
    """The mean of `values` [n], all of them there, with its interval. NaN or infinite where one of them is."""
    with numpy.errstate(invalid="ignore"):
        low, high = numpy.quantile(values[resampled(len(values), seed)].mean(1), BOUNDS)
    return Average(float(values.mean()), len(values), float(low), float(high))


def means_of(column: numpy.ndarray, drawn: numpy.ndarray) -> numpy.ndarray:
    """[resamples]: the mean of each resample over the cases that have a value."""
    has = ~numpy.isnan(column)
    sums, counts = numpy.where(has, column, 0.0)[drawn].sum(1), has[drawn].sum(1)
    means: numpy.ndarray = numpy.divide(sums, counts, out=numpy.full(len(drawn), numpy.nan), where=counts > 0)
    return means


def harmonic(parts: numpy.ndarray) -> numpy.ndarray:
    """The harmonic mean over the first axis; 0 where a part is 0."""
    safe = numpy.where(parts > 0, parts, 1.0)
    return numpy.where((parts > 0).all(0), len(parts) / (1 / safe).sum(0), 0.0)


def bounds_of(resamples: numpy.ndarray) -> tuple[float, float]:
    """The ends of the interval, from the mean of each resample; resamples without a value are left out."""
    low, high = numpy.nanquantile(resamples, BOUNDS)
    return float(low), float(high)
