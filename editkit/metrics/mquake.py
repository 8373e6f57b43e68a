"""MQuAKE's multi-hop accuracy (arXiv 2305.14795, section 2): does what follows from the edits follow?

    multi_hop   1 where any of the case's multi-hop questions is answered, in free greedy generation, with the new
                answer or one of its aliases; 0 where none is
    hops        share of the single hops of the chain that are answered so
    instance    1 where all of them are: the paper's instance-wise accuracy. Its edit-wise success is generation.rewrite

An answer is right as `generation.exact` says. The paper prompts with examples in front; here the questions are bare.
"""

from collections.abc import Sequence

from editkit.data.cases import HOP, MULTI_HOP, PORTABILITY
from editkit.metrics.row_stats import Row, of_kind


def values(rows: Sequence[Row], when: str) -> dict[str, float | None]:
    """One case's values; `when` is before or after."""
    answered = [row[f"exact_{when}"] for row in of_kind(rows, MULTI_HOP) if row[f"exact_{when}"] is not None]
    hops = [row[f"exact_{when}"] for row in of_kind(rows, PORTABILITY, HOP) if row[f"exact_{when}"] is not None]
    return {
        "multi_hop": float(any(answered)) if answered else None,
        "hops": sum(hops) / len(hops) if hops else None,
        "instance": float(all(hops)) if hops else None,
    }
