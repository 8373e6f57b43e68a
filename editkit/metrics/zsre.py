"""zsRE as MEND and ROME score it (arXiv 2110.11309; ROME's `eval_utils_zsre.py`): teacher-forced argmax accuracy.

    accuracy of a target   share of its tokens that are the argmax, given the prompt and the target's tokens before
    efficacy               of target_new after the rewrite prompt
    paraphrase             of target_new after the paraphrases
    specificity            of the true answer after neighborhood prompts

Teacher forcing flatters: see `generation` for what the model says by itself (arXiv 2502.11177).
"""

from collections.abc import Sequence

from editkit.data.kinds import NEIGHBORHOOD, PARAPHRASE, REWRITE
from editkit.metrics.metric import Formula, Metric, Protocol, register
from editkit.metrics.row_stats import Row, mean, of_kind

ZSRE = Protocol("zsre", "zsRE: share of the answer's tokens that are the argmax (teacher-forced)")


def accuracy(kind: str, which: str) -> Formula:
    """The accuracy of a target (new, true) over a case's rows of one kind."""

    def formula(rows: Sequence[Row], when: str) -> float | None:
        return mean(of_kind(rows, kind), lambda row: row[f"right_{which}_{when}"])

    return formula


EFFICACY = register(
    Metric(ZSRE, "efficacy", "share of the new answer's tokens that are the argmax, after rewrite prompts"),
    accuracy(REWRITE, "new"),
)
PARAPHRASES = register(
    Metric(ZSRE, "paraphrase", "share of the new answer's tokens that are the argmax, after paraphrases"),
    accuracy(PARAPHRASE, "new"),
)
SPECIFICITY = register(
    Metric(ZSRE, "specificity", "share of the old answer's tokens that are the argmax, after neighborhood prompts"),
    accuracy(NEIGHBORHOOD, "true"),
)
