"""What the model says: the most likely next tokens, and a greedy continuation."""

import torch

from editkit.models.load import LanguageModel
from editkit.models.tokens import generate, tokenise


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
