"""EasyEdit's four figures (arXiv 2308.07269, section 3 and its `evaluate`): teacher-forced token match.

reliability   share of target_new's tokens that are the argmax after the rewrite prompt
generality    the same after paraphrases
portability   the same for the answer that follows, after portability prompts
locality      share of argmax tokens, at the places of the true answer's tokens, that are as they were before the edit:
              right or wrong does not matter. 1 before the edit. Asked of every prompt whose answer must stay, about
              neighbors and about the subject itself: KnowEdit's locality (arXiv 2401.01286) is mostly the latter

KnowEdit divides portability and locality, and so do its paper's tables: each part has a figure of its own too
(`Metric.part`, such as Subject_Aliasing).
"""

from collections.abc import Sequence

from editkit.data.kinds import PARAPHRASE, PORTABILITY, REWRITE, STAY
from editkit.metrics.metric import AFTER, Metric, Protocol, register
from editkit.metrics.row_stats import Row, mean
from editkit.metrics.zsre import accuracy

EASYEDIT = Protocol("easyedit", "EasyEdit: tokens that are the argmax (teacher-forced), and tokens that stay")


def unchanged(rows: Sequence[Row], when: str) -> float | None:
    """locality: 1 before the edit."""
    return mean([row for row in rows if row["kind"] in STAY], lambda row: row["kept"] if when == AFTER else 1.0)


RELIABILITY = register(
    Metric(EASYEDIT, "reliability", "share of the new answer's tokens that are the argmax, after rewrite prompts"),
    accuracy(REWRITE, "new"),
)
GENERALITY = register(
    Metric(EASYEDIT, "generality", "share of the new answer's tokens that are the argmax, after paraphrases"),
    accuracy(PARAPHRASE, "new"),
)
PORTABLE = register(
    Metric(EASYEDIT, "portability", "share of the tokens of the answer that follows that are the argmax"),
    accuracy(PORTABILITY, "new"),
    parts_of=[PORTABILITY],
)
LOCALITY = register(
    Metric(
        EASYEDIT, "locality", "share of argmax tokens of prompts whose answer must stay that are as before the edit"
    ),
    unchanged,
    parts_of=STAY,
)
