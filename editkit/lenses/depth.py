"""The logit lens: the next-token distribution at each depth of a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from editkit.errors import EditkitError
from editkit.models.evalmode import in_eval_mode
from editkit.models.head import logits_of
from editkit.models.load import LanguageModel
from editkit.models.tokens import encode_with_targets, spaced, tokenise, unflatten
from editkit.nethook import Trace, get_module
from editkit.shown import Rows, Shown

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False, repr=False)
class Lens(Shown):
    """Next-token probabilities at the prompt's last token, by depth.

    Depth 0 is the embedding, depth i the residual stream after block i − 1.
    """

    axes: ClassVar[tuple[str, str]] = ("depth", "word")

    text: str
    words: tuple[str, ...]
    probability: Tensor  # [depths, words], of each word's first token
    rank: Tensor  # [depths, words], of that token; 0 for the likeliest
    said: tuple[str, ...]  # [depths], the likeliest token

    def shown(self) -> tuple[str, Rows]:
        """Of each word P at the first and last depth; and what is said at last."""
        ends = self.probability[[0, -1]].tolist()
        rows = [(word, f"P {first:.2g} → {last:.4f}") for word, first, last in zip(self.words, *ends, strict=True)]
        return "Logit lens", [("prompt", self.text), *rows, ("said", self.said[-1].strip())]

    def to_frame(self) -> "DataFrame":
        """A row for each depth and word: depth, word, probability, rank, said."""
        from pandas import DataFrame

        rows = [
            (depth, word, self.probability[depth, w].item(), int(self.rank[depth, w]), self.said[depth])
            for depth in range(len(self.said))
            for w, word in enumerate(self.words)
        ]
        return DataFrame(rows, columns=[*self.axes, "probability", "rank", "said"])


@in_eval_mode
@torch.no_grad()
def logit_lens(lm: LanguageModel, text: str, words: Sequence[str]) -> Lens:
    """The logit lens (nostalgebraist 2020) of one prompt: P(word) after each block.

    The last token's residual stream goes through the final norm and the head; the last depth is the model's own answer.

    - `text`: the prompt.
    - `words`: continuations; of a word of several tokens the first token counts.

    Raises EditkitError for no word or an empty one, FactError for a word that has no token of its own.
    """
    if not all(word.strip() for word in words) or not words:
        raise EditkitError(f"The logit lens was given the words {list(words)}: name one or more, none of them empty.")
    scored = encode_with_targets(lm, [text] * len(words), [spaced(word) for word in words])
    first = torch.tensor([scored.rows.ids[row, at[0]].item() for row, at in enumerate(scored.positions)])
    blocks = [lm.architecture.block.format(i) for i in range(lm.layers)]
    norm = lm.architecture.final_norm
    rows = tokenise(lm, [text])
    with Trace(lm.model, [*blocks, norm], inputs=True, outputs=False) as trace:
        lm.model(**rows.inputs(), use_cache=False)
    found = (unflatten(trace[site].input, 1)[0, -1] for site in (*blocks, norm))
    stream = torch.stack([each.to(lm.device) for each in found])  # [depths, d_model]
    logits = logits_of(lm, get_module(lm.model, norm)(stream)).double().cpu()
    of_words = logits[:, first]
    return Lens(
        text=text,
        words=tuple(words),
        probability=logits.softmax(-1)[:, first],
        rank=(logits[:, None] > of_words[..., None]).sum(-1),
        said=tuple(str(lm.tokenizer.decode([i])) for i in logits.argmax(-1).tolist()),
    )
