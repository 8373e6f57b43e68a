"""Context templates: seeded random texts in front of the prompt (ROME section 3.1)."""

import hashlib

from editkit.models.generate import generate
from editkit.models.load import LanguageModel
from editkit.models.precision import widened
from editkit.settings import ContextSettings


def context_templates(lm: LanguageModel, settings: ContextSettings, seed: int) -> list[str]:
    """Templates with one `{}` each, the bare "{}" first, then samples of the model itself as "sample. {}".

    They are a function of the model's weights, the settings and `seed`.
    """
    templates = ["{}"]
    with widened(lm):  # once for all samples
        for length, count in zip(settings.lengths, settings.counts, strict=True):
            for start in settings.starts:
                # Sampled one by one with a seed each: a sample does not depend on how many were asked for.
                for number in range(count):
                    (text,) = generate(lm, [start], length, top_k=settings.top_k, seed=_seed(seed, length, number))
                    text = (start + text).replace("{", " ").replace("}", " ").strip()
                    templates.append(f"{text}. {{}}" if text else "{}")
    return templates


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")
