"""The corrupted embeddings of a subject: with noise, or those of another subject."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from editkit.errors import FactError
from editkit.facts import Fact
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.prefix import without_prefix
from editkit.models.tokens import Rows, tokenise
from editkit.nethook import get_module, get_parameter
from editkit.settings import TraceSettings

CHUNK = 256  # tokens of the vocabulary at once, which stay in a processor's cache: 5 times sooner than 8192


def embed(lm: LanguageModel, ids: Tensor) -> Tensor:
    """The embeddings [.., d_embedding] of `ids` [..], scaled if the embedding module does so (Gemma 3)."""
    embeddings: Tensor = get_module(lm.model, lm.architecture.embedding)(ids)
    return embeddings


@torch.no_grad()
def embedding_std(lm: LanguageModel, subjects: Sequence[str] | None = None) -> float:
    """The standard deviation of the entries of embeddings (the paper's σ; its code: `collect_embedding_std`).

    `subjects`: names, each tokenised alone; the deviation is over their tokens. If None, over all tokens of the
    vocabulary. Raises FactError for an empty list.
    """
    if subjects is not None:
        if not subjects:
            raise FactError("The standard deviation of embeddings was asked for over no subject: name at least one.")
        with without_prefix(lm.model):
            ids = torch.cat([rows.ids[0] for rows in (tokenise(lm, [each]) for each in subjects)])
    else:
        vocabulary = len(get_parameter(lm.model, f"{lm.architecture.embedding}.weight", allow_meta=True))
        ids = torch.arange(vocabulary, device=lm.device)
    count, mean, squares = 0, 0.0, 0.0  # squares: Σ (h − mean)², added up chunk by chunk (Chan et al. 1983)
    for some in ids.split(CHUNK):
        h = embed(lm, some).float()
        average = h.mean()
        centre, both = average.item(), count + h.numel()
        squares += (h - average).square_().sum().item() + (centre - mean) ** 2 * count * h.numel() / both
        mean += (centre - mean) * h.numel() / both
        count = both
    return float((squares / (count - 1)) ** 0.5)


def noised(lm: LanguageModel, ids: Tensor, settings: TraceSettings, sigma: float, seed: int) -> Tensor:
    """The embeddings of `ids` [tokens] plus Gaussian noise: [samples, tokens, d_embedding].

    The noise has the standard deviation `settings.noise` · `sigma`; there are `settings.samples` of it, drawn with
    `seed`.
    """
    clean = embed(lm, ids)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(settings.samples, *clean.shape, generator=generator)
    return clean + (settings.noise * sigma * drawn).to(clean)


def swapped(
    lm: LanguageModel, fact: Fact, span: tuple[int, int], others: Sequence[str], settings: TraceSettings, seed: int
) -> tuple[tuple[str, ...], Tensor]:
    """Other subjects that fit the fact's prompt: (their names, their embeddings [others, tokens, d_embedding]).

    A subject fits if it has as many tokens in the prompt, so that each clean activation has its place, and another
    answer.

    - `fact`: its prompt and subject. `span`: the subject's first and last token.
    - `others`: names to choose from, in an order drawn with `seed`; at most `settings.samples` are taken.

    Raises FactError when no subject fits.
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
    """The likeliest next token of each row. All rows have the same length."""
    answers: list[int] = lm.model(**rows.inputs(), use_cache=False).logits[:, -1].argmax(-1).tolist()
    return answers


def _alike(clean: Rows, rows: Rows, prompt: str, name: str, span: tuple[int, int]) -> bool:
    """Whether two rows differ only in the tokens of `span`, and these are the subject's in both.

    - `clean`, `rows`: one row each, [1, tokens].
    - `prompt`, `name`: the template of `rows` and the subject in it.
    """
    first, last = span
    if clean.ids.shape != rows.ids.shape:
        return False
    same = (clean.ids == rows.ids)[0]
    place = (lookup_position(rows, 0, prompt, name, "subject_first"), lookup_position(rows, 0, prompt, name))
    return bool(same[:first].all() and same[last + 1 :].all()) and place == span
