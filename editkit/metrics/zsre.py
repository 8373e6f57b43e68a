"""zsRE as MEND and ROME score it (arXiv 2110.11309; ROME's `eval_utils_zsre.py`): teacher-forced argmax accuracy.

    accuracy of a target   share of its tokens that are the argmax, given the prompt and the target's tokens before
    efficacy               of target_new after the rewrite prompt
    paraphrase             of target_new after the paraphrases
    specificity            of the true answer after neighborhood prompts

Teacher forcing flatters: see `generation` for what the model says by itself (arXiv 2502.11177).
"""

from collections.abc import Sequence

from editkit.data.cases import NEIGHBORHOOD, PARAPHRASE, REWRITE
from editkit.metrics.row_stats import Row, mean, of_kind


def values(rows: Sequence[Row], when: str) -> dict[str, float | None]:
    """One case's values; `when` is before or after."""
    return {
        "efficacy": mean(of_kind(rows, REWRITE), lambda row: row[f"right_new_{when}"]),
        "paraphrase": mean(of_kind(rows, PARAPHRASE), lambda row: row[f"right_new_{when}"]),
        "specificity": mean(of_kind(rows, NEIGHBORHOOD), lambda row: row[f"right_true_{when}"]),
    }
