"""MQuAKE's multi-hop accuracy (arXiv 2305.14795, section 2): does what follows from the edits follow?

    multi_hop   1 where any of the case's multi-hop questions is answered, in free greedy generation, with the new
                answer or one of its aliases; 0 where none is
    hops        share of the single hops of the chain that are answered so
    instance    1 where all of them are: the paper's instance-wise accuracy. Its edit-wise success is generation.rewrite

An answer is right as `generation.exact` says. The paper prompts with examples in front; here the questions are bare.
"""

from collections.abc import Sequence

from editkit.data.kinds import HOP, MULTI_HOP, PORTABILITY
from editkit.metrics.metric import Metric, Protocol, register
from editkit.metrics.row_stats import Row, of_kind

MQUAKE = Protocol("mquake", "MQuAKE: multi-hop questions, in free generation")


def _answered(rows: Sequence[Row], when: str, kind: str, group: str | None = None) -> list[bool]:
    """For each row that was asked: whether its question is answered."""
    found = [row[f"exact_{when}"] for row in of_kind(rows, kind, group)]
    return [bool(answered) for answered in found if answered is not None]


def multi_hop(rows: Sequence[Row], when: str) -> float | None:
    answered = _answered(rows, when, MULTI_HOP)
    return float(any(answered)) if answered else None


def hops(rows: Sequence[Row], when: str) -> float | None:
    answered = _answered(rows, when, PORTABILITY, HOP)
    return sum(answered) / len(answered) if answered else None


def instance(rows: Sequence[Row], when: str) -> float | None:
    answered = _answered(rows, when, PORTABILITY, HOP)
    return float(all(answered)) if answered else None


register(Metric(MQUAKE, "multi_hop", "share of cases with a multi-hop question answered"), multi_hop)
register(Metric(MQUAKE, "hops", "share of the single hops answered"), hops)
register(Metric(MQUAKE, "instance", "share of cases with every single hop answered"), instance)
