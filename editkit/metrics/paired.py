"""Two methods on the same cases: the mean difference, its interval, and how sure its sign is. No torch.

The difference is taken case by case, and the bootstrap draws cases, the same for both methods (paired bootstrap: Efron
and Tibshirani 1993, section 16; Koehn 2004, EMNLP): what makes a case hard for both falls out. The resamples are those
of `summary`. The probability is the share of resamples in which the first method is better, ties counted half; it is
of one comparison, and not corrected for the others in a table.

A combined metric (CounterFact's S) is combined in each resample from the means of its parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from editkit.metrics.metric import Average, Metric, get
from editkit.metrics.summary import bounds_of, harmonic, means_of, resampled
from editkit.numbers import finite

TIE = 1e-12  # two means as near as this are equal but for the rounding of their sums
Rows = Mapping[Any, Mapping[str, object]]  # each case's row of edits.parquet


@dataclass(frozen=True)
class Paired:
    """The first method's mean minus the second's, over the cases that both have, and P(the first is better).

    For a metric without a better side the probability is that the first is larger.
    """

    difference: Average
    probability: float

    def __str__(self) -> str:
        found = self.difference
        return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}], P {self.probability:.3f}"


def paired(metric: Metric, ours: Rows, theirs: Rows, seed: int = 0) -> Paired | None:
    """The paired difference of a metric after the edit; None where fewer than two cases have it from both.

    - `ours`, `theirs`: for each case its values by `Metric.column`. Cases that one side lacks are left out.
    """
    names = [part.column() for part in map(get, metric.combines) if part] if metric.combines else [metric.column()]
    # 1) [2, parts, cases]: NaN in both where one side has no value.
    shared = [case for case in ours if case in theirs]
    values = numpy.array(
        [[[_value(rows[case].get(name)) for case in shared] for name in names] for rows in (ours, theirs)]
    ).reshape(2, len(names), len(shared))
    values[:, numpy.isnan(values).any(0)] = numpy.nan
    values = values[:, :, ~numpy.isnan(values).all((0, 1))]
    n = int((~numpy.isnan(values[0])).sum(1).min()) if values.size else 0
    if n < 2:
        return None
    # 2) The means of both sides, over all cases and in each resample.
    drawn = resampled(values.shape[2], seed)
    means = numpy.nanmean(values, axis=2)  # [2, parts]
    resamples = numpy.array([[means_of(column, drawn) for column in side] for side in values])
    combine = harmonic if metric.combines else (lambda parts: parts[0])
    differences = combine(resamples[0]) - combine(resamples[1])
    # 3) Their difference.
    low, high = bounds_of(differences)
    better = (metric.better or 1) * differences[~numpy.isnan(differences)]
    probability = float((better > TIE).mean() + (numpy.abs(better) <= TIE).mean() / 2)
    return Paired(Average(float(combine(means[0]) - combine(means[1])), n, low, high), probability)


def _value(found: object) -> float:
    value = finite(found)
    return numpy.nan if value is None else value
