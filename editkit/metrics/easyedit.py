"""EasyEdit's four figures (arXiv 2308.07269, section 3 and its `evaluate`): teacher-forced token match.

reliability   share of target_new's tokens that are the argmax after the rewrite prompt
generality    the same after paraphrases
portability   the same for the answer that follows, after portability prompts
locality      share of argmax tokens, at the places of the true answer's tokens, that are as they were before the edit:
              right or wrong does not matter. 1 before the edit. Asked of every prompt whose answer must stay, about
              neighbors and about the subject itself: KnowEdit's locality (arXiv 2401.01286) is mostly the latter

KnowEdit divides portability and locality, and so do its paper's tables: each part has a figure of its own too, as in
easyedit.portability_Subject_Aliasing.
"""

from collections.abc import Sequence

from editkit.data.cases import PARAPHRASE, PORTABILITY, REWRITE, STAY
from editkit.metrics.row_stats import Row, mean, of_kind


def values(rows: Sequence[Row], when: str) -> dict[str, float | None]:
    """One case's values; `when` is before or after."""

    def match(row: Row) -> float | None:
        return row[f"right_new_{when}"]

    def same(row: Row) -> float | None:
        return row["kept"] if when == "after" else 1.0

    found = {
        "reliability": mean(of_kind(rows, REWRITE), match),
        "generality": mean(of_kind(rows, PARAPHRASE), match),
    }
    stay = [row for row in rows if row["kind"] in STAY]
    for name, asked, value in (("portability", of_kind(rows, PORTABILITY), match), ("locality", stay, same)):
        found[name] = mean(asked, value)
        for group in dict.fromkeys(row["group"] for row in asked if row["group"]):
            found[f"{name}_{group}"] = mean([row for row in asked if row["group"] == group], value)
    return found
