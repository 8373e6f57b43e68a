"""What the model says by itself: the most likely next tokens, and exact match of free greedy continuations.

Beside every teacher-forced score stands the share of prompts whose free greedy continuation begins with the answer, or
one of its aliases: letter case and spacing do not count, and the answer must end where a word ends.
"""

import re
from collections.abc import Sequence

import torch

from editkit.data.cases import NEIGHBORHOOD, PARAPHRASE, PORTABILITY, REWRITE, SAME_SUBJECT, UNSEEN
from editkit.metrics.shares import Row, mean, of_kind
from editkit.models.load import LanguageModel
from editkit.models.tokens import generate, tokenise

KINDS = (REWRITE, PARAPHRASE, UNSEEN, NEIGHBORHOOD, SAME_SUBJECT, PORTABILITY)


def top_next(lm: LanguageModel, prompt: str, k: int = 5) -> list[tuple[str, float]]:
    """The k most likely next tokens after `prompt`, as (text, probability)."""
    rows = tokenise(lm, [prompt])
    with torch.inference_mode():
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
    """
    text = _plain(said)
    return any(re.match(rf"{re.escape(_plain(answer))}(?!\w)", text) is not None for answer in answers)


def values(rows: Sequence[Row], when: str) -> dict[str, float | None]:
    """One case's share of exact matches for each kind of probe; `when` is before or after.

    The answer is the one that a good edit leaves: the true one of neighborhood and same-subject prompts, else the new.
    """
    return {kind: mean(of_kind(rows, kind), lambda row: row[f"exact_{when}"]) for kind in KINDS}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
