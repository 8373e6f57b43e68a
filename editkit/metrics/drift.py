"""How far an edited model has moved on text that has nothing to do with its edits.

KL           mean over the text's tokens of KL(unedited ‖ edited), in nats, of the next-token distributions
perplexity   exp of the mean negative log-likelihood of the text's tokens
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from editkit.corpora import atlas_prose, running_text
from editkit.errors import ConfigError
from editkit.models.load import LanguageModel
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

        `source`: prose (bundled), or as `corpora.running_text`. Raises ConfigError for a text shorter than a block.
        """
        vocabulary = lm.model.get_input_embeddings().weight.shape[0]
        count = max(1, min(tokens, BYTES // (4 * vocabulary)) // length)
        texts = iter(atlas_prose()) if source == PROSE else running_text(source)
        found = list(islice(packed_blocks(lm, texts, length), count))
        if not found:
            raise ConfigError(f"The running text '{source}' has fewer than {length} tokens. Give a longer one.")
        blocks = torch.stack(found)
        unedited = torch.stack(list(_log_probabilities(lm, blocks)))
        return cls(blocks, unedited, _perplexity(unedited, blocks))

    def measure(self, lm: LanguageModel) -> dict[str, float]:
        """`kl` and `perplexity` of the model as it is now; both may be infinite or NaN where it is broken."""
        divergence, likelihood = 0.0, 0.0
        for before, now, ids in zip(self.unedited, _log_probabilities(lm, self.blocks), self.blocks, strict=True):
            p, q = before.double(), now.double()
            divergence += (p.exp() * (p - q)).sum().item()
            likelihood -= _said(q, ids).sum().item()
        n = self.unedited.shape[0] * self.unedited.shape[1]
        return {"kl": divergence / n, "perplexity": _exp(likelihood / n)}


@torch.inference_mode()
def _log_probabilities(lm: LanguageModel, blocks: Tensor) -> Iterator[Tensor]:
    """[length - 1, vocabulary] of each block, in float32 on the CPU."""
    for ids in blocks:
        logits = lm.model(input_ids=ids[None].to(lm.device), use_cache=False).logits[0, :-1]
        yield logits.float().log_softmax(-1).cpu()


def _said(log_p: Tensor, ids: Tensor) -> Tensor:
    """[length - 1]: the log-probability of each token that comes."""
    return log_p.gather(1, ids[1:, None].cpu())[:, 0]


def _perplexity(log_p: Tensor, blocks: Tensor) -> float:
    said = torch.stack([_said(each.double(), ids) for each, ids in zip(log_p, blocks, strict=True)])
    return _exp(-said.mean().item())


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
