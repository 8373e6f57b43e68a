"""EasyEdit's four figures (arXiv 2308.07269, section 3 and its `evaluate`): teacher-forced token match.

reliability   share of target_new's tokens that are the argmax after the rewrite prompt
generality    the same after paraphrases
portability   the same for the answer that follows, after portability prompts
locality      share of argmax tokens, at the places of the true answer's tokens after neighborhood prompts, that are
              as they were before the edit: right or wrong does not matter. 1 before the edit
"""

from collections.abc import Sequence

from editkit.data.cases import NEIGHBORHOOD, PARAPHRASE, PORTABILITY, REWRITE
from editkit.metrics.shares import Row, mean, of_kind


def values(rows: Sequence[Row], when: str) -> dict[str, float | None]:
    """One case's values; `when` is before or after."""
    match = {"reliability": REWRITE, "generality": PARAPHRASE, "portability": PORTABILITY}
    found = {name: mean(of_kind(rows, kind), lambda row: row[f"right_new_{when}"]) for name, kind in match.items()}
    near = of_kind(rows, NEIGHBORHOOD)
    return found | {"locality": mean(near, lambda row: row["kept"] if when == "after" else 1.0)}
