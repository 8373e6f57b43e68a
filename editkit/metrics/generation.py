"""Free generation: exact match of what the model says by itself.

Beside every teacher-forced score stands the share of prompts whose free greedy continuation begins with the answer, or
one of its aliases (arXiv 2502.11177: teacher forcing flatters). Both texts are compared in Unicode's form NFKC, without
letter case, with white space as one blank and none in front. Nothing else is forgiven: no article, no quotation mark.
The answer must end where a word does, except in scripts that part no words (Chinese, Japanese, Thai, …).

    rewrite, paraphrase, unseen_paraphrase, attribute      the new answer is said
    neighborhood, same_subject, distracted                 the true answer is said
    portability                                            what follows is said; asked only where the unedited model
                                                           says the old answer, or the old answer is not known
    multi_hop                                              share of the wordings answered (MQuAKE's own rule: `mquake`)

and of probes by template (`probes` says what a right answer to each is):

    fact_check, distracting_context                        yes or no; the new answer
    alias, second_language                                 the new answer is said; asked as portability is
    repeat_old                                             the old answer is said
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

from editkit.data.kinds import (
    ALIAS,
    ATTRIBUTE,
    DISTRACTED,
    DISTRACTING_CONTEXT,
    FACT_CHECK,
    MULTI_HOP,
    NEIGHBORHOOD,
    PARAPHRASE,
    PORTABILITY,
    REPEAT_OLD,
    REWRITE,
    SAME_SUBJECT,
    SECOND_LANGUAGE,
    UNSEEN,
)
from editkit.metrics.metric import Formula, Metric, Protocol, register
from editkit.metrics.row_stats import Row, mean, of_kind

FREE = Protocol("generation", "Free generation: the greedy continuation begins with the wanted answer")
UNPARTED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")  # write words without blanks


KNOWN_BEFORE = (PORTABILITY, ALIAS, SECOND_LANGUAGE)  # asked only where the unedited model gives the old answer


def exact(said: str, answers: Sequence[str]) -> bool:
    """Whether a continuation begins with one of `answers`.

    >>> exact(" rome. The city", ["Rome"]), exact(" Romeo", ["Rome"]), exact(" in Rome", ["Rome"])
    (True, False, False)
    >>> exact("罗马的首都", ["罗马"]), exact(" the Netherlands", ["Netherlands"])
    (True, False)
    """
    text = _plain(said)
    return any(text.startswith(answer) and _ends_a_word(text, len(answer)) for answer in map(_plain, answers))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _ends_a_word(text: str, end: int) -> bool:
    """Whether no word goes on at `end` of a plain text."""
    around = text[end - 1 : end + 1]
    return re.fullmatch(r"\w\w", around) is None or unicodedata.name(around[0], "").startswith(UNPARTED)


def answered(kind: str, right: Callable[[Row, str], bool | None]) -> Formula:
    """The share of right answers among a case's rows of one kind. `right(row, when)`: whether it was right."""

    def formula(rows: Sequence[Row], when: str) -> float | None:
        asked = of_kind(rows, kind)
        if kind in KNOWN_BEFORE:
            asked = [row for row in asked if row["greedy_true_before"] in (None, True)]
        return mean(asked, lambda row: right(row, when))

    return formula


# What is asked freely: the kind of prompt, how tables call its prompts, and the answer that is wanted.
ASKED_FREELY = (
    (REWRITE, "rewrite prompts", "new object"),
    (PARAPHRASE, "paraphrases", "new object"),
    (UNSEEN, "paraphrases in phrasings never seen", "new object"),
    (NEIGHBORHOOD, "neighborhood prompts", "old object"),
    (DISTRACTED, "neighborhood prompts with the new fact in front", "old object"),
    (SAME_SUBJECT, "prompts about the subject's other relations", "old answer"),
    (PORTABILITY, "prompts one hop on", "answer that follows"),
    (MULTI_HOP, "multi-hop questions", "new answer"),
    (ATTRIBUTE, "prompts whose subjects have the new object already", "new object"),
    (FACT_CHECK, "questions whether the new or the old fact is true", "right one of yes and no"),
    (ALIAS, "rewrite prompts with another name of the subject", "new object"),
    (SECOND_LANGUAGE, "rewrite prompts in another language", "new object"),
    (REPEAT_OLD, "instructions to repeat the old answer", "old object"),
    (DISTRACTING_CONTEXT, "rewrite prompts behind a sentence that has the old object", "new object"),
)
# By the kind of prompt: which answer the continuation has to begin with.
ANSWERED = {
    kind: register(
        Metric(FREE, kind, f"share of {prompts} continued with the {wanted}"),
        answered(kind, lambda row, when: row[f"exact_{when}"]),
    )
    for kind, prompts, wanted in ASKED_FREELY
}
