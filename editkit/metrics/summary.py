"""Averages over cases, each with its n and a bootstrap interval.

A metric has one value a case, the mean over the case's probes; its average is the mean over cases (as in ROME's own
`summarize.py`), so a case with ten neighborhood prompts weighs as much as one with two. Cases without a value are
left out of its n, and a metric without any is left out. Intervals are 95 % percentile intervals of 2,000 resamples of
the cases (Efron 1979). The same values in the same order give the same bytes.

    S = 3 / (1/ES + 1/PS + 1/NS)        of the averages (ROME, table 1), 0 where one of them is 0
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy

RESAMPLES = 2000
BOUNDS = (0.025, 0.975)
PARTS = ("ES", "PS", "NS")

Values = Mapping[str, float | None]  # of one case, by the metric's name


@dataclass(frozen=True)
class Average:
    """A mean over `n` cases, with the bounds of its interval."""

    mean: float
    n: int
    low: float
    high: float


def summary(values: Sequence[Values], seed: int = 0) -> dict[str, Average]:
    """The average of every metric, and S before and after, in the order in which metrics first appear."""
    every = dict.fromkeys(name for case in values for name in case)
    names = [name for name in every if any(case.get(name) is not None for case in values)]
    if not values:
        return {}
    drawn = numpy.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    found, means = {}, {}
    for name in names:
        column = numpy.array([_number(case.get(name)) for case in values])
        means[name] = _means(column, drawn)
        found[name] = _average(column, means[name])
    for when in ("before", "after"):
        parts = [f"counterfact.{part}_{when}" for part in PARTS]
        if all(part in found for part in parts):
            mean = _harmonic(numpy.array([found[part].mean for part in parts], dtype=float))
            low, high = numpy.nanquantile(_harmonic(numpy.stack([means[part] for part in parts])), BOUNDS)
            n = min(found[part].n for part in parts)
            found[f"counterfact.S_{when}"] = Average(float(mean), n, float(low), float(high))
    return found


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _means(column: numpy.ndarray, drawn: numpy.ndarray) -> numpy.ndarray:
    """[resamples]: the mean of each resample over the cases that have a value."""
    has = ~numpy.isnan(column)
    sums, counts = numpy.where(has, column, 0.0)[drawn].sum(1), has[drawn].sum(1)
    return numpy.divide(sums, counts, out=numpy.full(len(drawn), numpy.nan), where=counts > 0)


def _harmonic(parts: numpy.ndarray) -> numpy.ndarray:
    """The harmonic mean over the first axis; 0 where a part is 0."""
    safe = numpy.where(parts > 0, parts, 1.0)
    return numpy.where((parts > 0).all(0), len(parts) / (1 / safe).sum(0), 0.0)


def _average(column: numpy.ndarray, resampled: numpy.ndarray) -> Average:
    there = column[~numpy.isnan(column)]
    low, high = numpy.nanquantile(resampled, BOUNDS)
    return Average(float(there.mean()), len(there), float(low), float(high))
