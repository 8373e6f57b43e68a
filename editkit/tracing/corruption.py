"""What stands in the place of the subject's embeddings while a fact is traced: noise on them, or another subject."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from editkit.errors import FactError
from editkit.facts import Fact
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.tokens import Rows, tokenise
from editkit.nethook import get_module, get_parameter
from editkit.settings import TraceSettings

CHUNK = 8192  # of the vocabulary


def embed(lm: LanguageModel, ids: Tensor) -> Tensor:
    """[.., d_embedding] that the embedding puts out, with what the family multiplies it by inside (Gemma 3)."""
    return get_module(lm.model, lm.architecture.embedding)(ids)


@torch.no_grad()
def embedding_std(lm: LanguageModel, subjects: Sequence[str] | None = None) -> float:
    """The standard deviation of the entries of embeddings.

    - `subjects`: over the tokens of these names, each tokenised alone, as the paper takes σ (code
      `collect_embedding_std`). None: over the whole vocabulary, each token once.
    """
    if subjects is not None:
        if not subjects:
            raise FactError("The standard deviation of embeddings was asked for over no subject: name at least one.")
        ids = torch.cat([rows.ids[0] for rows in (tokenise(lm, [each]) for each in subjects)])
    else:
        vocabulary = len(get_parameter(lm.model, f"{lm.architecture.embedding}.weight"))
        ids = torch.arange(vocabulary, device=lm.device)
    count, mean, around = 0, 0.0, 0.0  # around: Σ (h − mean)²
    for some in ids.split(CHUNK):
        h = embed(lm, some).float()
        variance, centre = (value.item() for value in torch.var_mean(h, correction=0))
        both = count + h.numel()
        around += variance * h.numel() + (centre - mean) ** 2 * count * h.numel() / both
        mean += (centre - mean) * h.numel() / both
        count = both
    return (around / (count - 1)) ** 0.5


def noised(lm: LanguageModel, ids: Tensor, settings: TraceSettings, sigma: float, seed: int) -> Tensor:
    """[samples, tokens, d_embedding]: the embeddings of `ids` [tokens] with Gaussian noise of `settings.noise` · σ."""
    clean = embed(lm, ids)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(settings.samples, *clean.shape, generator=generator)
    return clean + (settings.noise * sigma * drawn).to(clean)


def swapped(
    lm: LanguageModel, fact: Fact, span: tuple[int, int], others: Sequence[str], settings: TraceSettings, seed: int
) -> tuple[tuple[str, ...], Tensor]:
    """Up to `settings.samples` other subjects that fit the fact's prompt, and their embeddings [others, tokens, d].

    `span`: the subject's first and last token. One fits that has as many tokens in the prompt, so that every clean
    activation has its place, and another answer. Which are taken is drawn with `seed`. Raises FactError when none does.
    """
    clean, (first, last) = tokenise(lm, [fact.text]), span
    answer = _answers(lm, clean)[0]
    names = list(dict.fromkeys(other for other in others if other != fact.subject))
    random.Random(seed).shuffle(names)
    fitting: list[tuple[str, Tensor]] = []
    for name in names:
        rows = tokenise(lm, [fact.prompt.replace("{}", name)])
        if not _alike(clean, rows, fact.prompt, name, span) or _answers(lm, rows)[0] == answer:
            continue
        fitting.append((name, embed(lm, rows.ids[0, first : last + 1])))
        if len(fitting) == settings.samples:
            break
    if not fitting:
        raise FactError(
            f"None of the {len(names)} other subjects has the {last + 1 - first} tokens of {fact.subject!r} in "
            f"{fact.prompt!r} and another answer. Give more of them as others=, or trace with corruption='noise'."
        )
    return tuple(name for name, _ in fitting), torch.stack([h for _, h in fitting])


def _answers(lm: LanguageModel, rows: Rows) -> list[int]:
    """The likeliest next token of each row; the rows are equally long."""
    return lm.model(**rows.inputs(), use_cache=False).logits[:, -1].argmax(-1).tolist()


def _alike(clean: Rows, rows: Rows, prompt: str, name: str, span: tuple[int, int]) -> bool:
    """Whether the two rows differ in the tokens of the span alone, which are the subject's in both."""
    first, last = span
    if clean.ids.shape != rows.ids.shape:
        return False
    same = (clean.ids == rows.ids)[0]
    found = (lookup_position(rows, 0, prompt, name, "subject_first"), lookup_position(rows, 0, prompt, name))
    return bool(same[:first].all() and same[last + 1 :].all()) and found == span
