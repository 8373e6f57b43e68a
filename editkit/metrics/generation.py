"""What the model says by itself: the most likely next tokens, and exact match of free greedy continuations.

Beside every teacher-forced score stands the share of prompts whose free greedy continuation begins with the answer, or
one of its aliases (arXiv 2502.11177: teacher forcing flatters). Both texts are compared in Unicode's form NFKC, without
letter case, with white space as one blank and none in front. Nothing else is forgiven: no article, no quotation mark.
The answer must end where a word does, except in scripts that part no words (Chinese, Japanese, Thai, …).

    rewrite, paraphrase, unseen_paraphrase, attribute      the new answer is said
    neighborhood, same_subject, distracted                 the true answer is said
    portability                                            what follows is said; asked only where the unedited model
                                                           says the old answer, or the old answer is not known
    multi_hop                                              share of the wordings answered (MQuAKE's own rule: `mquake`)
"""

import re
import unicodedata
from collections.abc import Sequence

import torch

from editkit.data.cases import (
    ATTRIBUTE,
    MULTI_HOP,
    NEIGHBORHOOD,
    PARAPHRASE,
    PORTABILITY,
    REWRITE,
    SAME_SUBJECT,
    UNSEEN,
)
from editkit.metrics.row_stats import Row, mean, of_kind
from editkit.models.generate import generate
from editkit.models.load import LanguageModel
from editkit.models.precision import widened
from editkit.models.tokens import tokenise

DISTRACTED = "distracted"  # the kind of neighborhood rows with the new fact in front
KINDS = (REWRITE, PARAPHRASE, UNSEEN, NEIGHBORHOOD, DISTRACTED, SAME_SUBJECT, PORTABILITY, MULTI_HOP, ATTRIBUTE)
UNPARTED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")  # write words without blanks


def top_next(lm: LanguageModel, prompt: str, k: int = 5) -> list[tuple[str, float]]:
    """The k most likely next tokens after `prompt`, as (text, probability)."""
    rows = tokenise(lm, [prompt])
    with torch.inference_mode(), widened(lm):
        logits = lm.model(**rows.inputs(), use_cache=False).logits[0, rows.last(0)].float()
    values, tokens = logits.softmax(-1).topk(k)
    return [(lm.tokenizer.decode([t]), v) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]


def continuation(lm: LanguageModel, prompt: str, tokens: int) -> str:
    """The greedy continuation of `prompt`, without it."""
    (text,) = generate(lm, [prompt], tokens)
    return text


def exact(said: str, answers: Sequence[str]) -> bool:
    """Whether a continuation begins with one of `answers`.

    >>> exact(" rome. The city", ["Rome"]), exact(" Romeo", ["Rome"]), exact(" in Rome", ["Rome"])
    (True, False, False)
    >>> exact("罗马的首都", ["罗马"]), exact(" the Netherlands", ["Netherlands"])
    (True, False)
    """
    text = _plain(said)
    return any(text.startswith(answer) and _ends_a_word(text, len(answer)) for answer in map(_plain, answers))


def values(rows: Sequence[Row], when: str) -> dict[str, float | None]:
    """One case's share of exact matches for each kind of probe; `when` is before or after."""
    found = {}
    for kind in KINDS:
        asked = of_kind(rows, kind)
        if kind == PORTABILITY:
            asked = [row for row in asked if row["greedy_true_before"] in (None, True)]
        found[kind] = mean(asked, lambda row: row[f"exact_{when}"])
    return found


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _ends_a_word(text: str, end: int) -> bool:
    """Whether no word goes on at `end` of a plain text."""
    around = text[end - 1 : end + 1]
    return re.fullmatch(r"\w\w", around) is None or unicodedata.name(around[0], "").startswith(UNPARTED)
