"""MQuAKE's multi-hop accuracy (arXiv 2305.14795, section 2): does what follows from the edits follow?

    multi_hop   1 where any of the case's multi-hop questions is answered, in free greedy generation, with the new
                answer or one of its aliases; 0 where none is
    hops        share of the single hops of the chain that are answered so

An answer is right as `generation.exact` says. The paper prompts with examples in front; here the questions are bare.
"""

from collections.abc import Sequence

from editkit.data.cases import MULTI_HOP, PORTABILITY
from editkit.metrics.shares import Row, mean, of_kind

HOP = "hop"  # the group of the single hops among the portability probes


def values(rows: Sequence[Row], when: str) -> dict[str, float | None]:
    """One case's values; `when` is before or after."""
    answered = [row[f"exact_{when}"] for row in of_kind(rows, MULTI_HOP) if row[f"exact_{when}"] is not None]
    hops = of_kind(rows, PORTABILITY, HOP)
    return {
        "multi_hop": float(any(answered)) if answered else None,
        "hops": mean(hops, lambda row: row[f"exact_{when}"]),
    }
