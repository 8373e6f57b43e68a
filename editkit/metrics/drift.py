"""How far an edited model has moved on text that has nothing to do with its edits.

KL           mean over the text's tokens of KL(unedited ‖ edited), in nats, of the next-token distributions
perplexity   exp of the mean negative log-likelihood of the text's tokens

Intervals are 95 % percentile intervals of a bootstrap over blocks of text, all of one length; n is their number.
"""

import math
from collections.abc import Sequence

import numpy

from editkit.metrics.metric import AFTER, NATS, OTHER, Average, Metric, Protocol, Score, register
from editkit.metrics.summary import average

DRIFT = Protocol("drift", "Drift on running text that has nothing to do with the edits")
OVER_TEXT = "mean over blocks of running text"

KL = register(
    Metric(DRIFT, "KL", "KL(unedited ‖ edited) of the next-token distributions, in nats per token", better=-1,
           unit=NATS, range=(0.0, None), averaged=OVER_TEXT, both=False)
)  # fmt: skip
PERPLEXITY = register(
    Metric(DRIFT, "perplexity", "perplexity on running text", better=-1, unit=OTHER, range=(1.0, None),
           averaged=f"exp of the {OVER_TEXT}", both=False)
)  # fmt: skip


def drift_scores(divergence: Sequence[float], surprise: Sequence[float], seed: int = 0) -> tuple[Score, Score]:
    """KL and perplexity from each block's mean KL and mean negative log-likelihood, both in nats per token."""
    kl, nll = (average(numpy.array(values), seed) for values in (divergence, surprise))
    low, high = (None if bound is None else exp(bound) for bound in (nll.low, nll.high))
    return Score(KL, AFTER, kl), Score(PERPLEXITY, AFTER, Average(exp(nll.mean), nll.n, low, high))


def exp(value: float) -> float:
    """e to the power of `value`; infinite where that overflows."""
    return math.exp(value) if value < 700 else math.inf
