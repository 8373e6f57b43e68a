"""Running text under the unedited and the edited model: what `drift` computes its figures from.

A prefix that is in force (models/prefix.py) stands in front of each block too, and its own tokens are not counted: with
an edit in context every text of a user carries it, so what it does to other text is a cost of the edit. Second moments
are of running text without it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from editkit.corpora import atlas_prose, running_text
from editkit.data import load_texts
from editkit.errors import ConfigError, EditkitError
from editkit.metrics.drift import drift_scores, exp
from editkit.metrics.metric import Score
from editkit.models.evalmode import eval_mode
from editkit.models.load import LanguageModel
from editkit.models.prefix import prefix_of
from editkit.models.tokens import positions_of
from editkit.moments import packed_blocks

PROSE = "prose"  # the bundled essays on everyday things: they state no fact of the atlas
BYTES = 1 << 30  # of unedited log-probabilities that are kept; longer texts are cut


@dataclass(frozen=True)
class Drift:
    """The unedited model on a text; `measure` compares what the model has become."""

    blocks: Tensor  # [blocks, length] token ids
    unedited: Tensor  # [blocks, length - 1, vocabulary] log-probabilities in float32, on the CPU
    perplexity: float

    @classmethod
    def take(cls, lm: LanguageModel, *, source: str = PROSE, tokens: int = 4096, length: int = 128) -> "Drift":
        """Run `lm`, unedited, over `tokens` tokens of running text in blocks of `length`.

        `source`: prose (bundled), records of running text (me_ppl:FILE), or as `corpora.running_text`. Raises
        ConfigError for a text shorter than a block, DataError for records that cannot be read.
        """
        embeddings = lm.model.get_input_embeddings().weight  # [vocabulary, d_model]
        assert isinstance(embeddings, Tensor)
        vocabulary = embeddings.shape[0]
        blocks = text_blocks(lm, source, tokens=min(tokens, BYTES // (4 * vocabulary)), length=length)
        unedited = torch.stack(list(_log_probabilities(lm, blocks)))
        return cls(blocks, unedited, _perplexity(unedited, blocks))

    def measure(self, lm: LanguageModel, seed: int = 0) -> tuple[Score, Score]:
        """KL and perplexity of the model as it is now; both may be infinite or NaN where it is broken."""
        divergence, surprise = [], []
        for before, now, ids in zip(self.unedited, _log_probabilities(lm, self.blocks), self.blocks, strict=True):
            p, q = before.double(), now.double()
            divergence.append((p.exp() * (p - q)).sum(-1).mean().item())
            surprise.append(-_said(q, ids).mean().item())
        return drift_scores(divergence, surprise, seed)


def text_blocks(lm: LanguageModel, source: str = PROSE, *, tokens: int, length: int = 128) -> Tensor:
    """[blocks, length] token ids of running text, one block at least; `source` as in `Drift.take`.

    Raises ConfigError for a text shorter than a block.
    """
    if source == PROSE:
        texts = iter(atlas_prose())
    else:
        records = load_texts(source)
        texts = running_text(source) if records is None else iter(records.texts)
    found = list(islice(packed_blocks(lm, texts, length), max(1, tokens // length)))
    if not found:
        raise ConfigError(f"The running text '{source}' has fewer than {length} tokens. Give a longer one.")
    return torch.stack(found)


def perplexity(lm: LanguageModel, blocks: Tensor) -> float:
    """exp of the mean negative log-likelihood of the tokens of `blocks` [blocks, length], one block after the other."""
    return _perplexity(_log_probabilities(lm, blocks), blocks)


@torch.inference_mode()
def _log_probabilities(lm: LanguageModel, blocks: Tensor) -> Iterator[Tensor]:
    """[length - 1, vocabulary] of each block, in float32 on the CPU. Raises EditkitError where a prefix leaves no room
    for a block."""
    prefix = prefix_of(lm.model)
    before = torch.tensor(lm.tokenizer(prefix)["input_ids"] if prefix else [], dtype=torch.long)
    limit = positions_of(lm)
    if limit is not None and prefix and len(before) + blocks.shape[1] > limit:
        raise EditkitError(
            f"A block of {blocks.shape[1]} tokens of running text was to be read behind a prefix of {len(before)}; "
            f"'{lm.name}' has {limit} positions. Use fewer demonstrations or facts in the prefix."
        )
    for ids in blocks:
        whole = torch.cat((before, ids.cpu())).to(lm.device)
        with eval_mode(lm):
            logits = lm.model(input_ids=whole[None], use_cache=False).logits[0, len(before) : -1]
        yield logits.float().log_softmax(-1).cpu()


def _said(log_p: Tensor, ids: Tensor) -> Tensor:
    """[length - 1]: the log-probability of each token that comes."""
    return log_p.gather(1, ids[1:, None].cpu())[:, 0]


def _perplexity(log_p: Iterable[Tensor], blocks: Tensor) -> float:
    said = torch.stack([_said(each.double(), ids) for each, ids in zip(log_p, blocks, strict=True)])
    return exp(-said.mean().item())
