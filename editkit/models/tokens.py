"""From texts to token rows, with the characters each token came from.

Texts are tokenised whole, as a user would send them, and places are found by character offsets. So a
BOS, a space-prefixing tokenizer, or a piece that merges across a boundary cannot shift a position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from editkit.errors import FactError
from editkit.models.load import LanguageModel


@dataclass(frozen=True)
class Rows:
    """Tokenised texts, padded on the right.

    `ids`, `mask`: [rows, tokens]; `offsets[row][token]` is the (begin, end) of its characters.
    """

    texts: tuple[str, ...]
    ids: Tensor
    mask: Tensor
    offsets: list[list[tuple[int, int]]]

    @classmethod
    def joined(cls, parts: "Sequence[Rows]") -> "Rows":
        """The rows of all parts, one part after the other."""
        width = max(part.ids.shape[1] for part in parts)
        ids, mask = (
            torch.cat([pad(each, (0, width - each.shape[1])) for each in side])
            for side in ([part.ids for part in parts], [part.mask for part in parts])
        )
        texts = tuple(text for part in parts for text in part.texts)
        return cls(texts, ids, mask, [offsets for part in parts for offsets in part.offsets])

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for a transformers model."""
        return {"input_ids": self.ids, "attention_mask": self.mask}

    def last(self, row: int) -> int:
        """The position of the row's last token."""
        return len(self.offsets[row]) - 1

    def touching(self, row: int, begin: int, end: int) -> list[int]:
        """Positions of the tokens that cover any of the characters [begin, end) of the row's text."""
        return [i for i, (left, right) in enumerate(self.offsets[row]) if right > begin and left < end]


def tokenise(lm: LanguageModel, texts: Sequence[str]) -> Rows:
    """Rows for `texts`, with the tokenizer's own special tokens, on the model's device.

    Raises FactError when a text has no tokens or more than the model has positions for.
    """
    encode = partial(lm.tokenizer, return_offsets_mapping=True, truncation=False, verbose=False)
    encoded = [encode(text) for text in texts]
    lengths = [len(e["input_ids"]) for e in encoded]
    limit = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    for text, length in zip(texts, lengths, strict=True):
        if length == 0:
            raise FactError(f"The tokenizer of '{lm.name}' maps {text!r} to no tokens.")
        if limit is not None and length > limit:
            raise FactError(f"{text[:60]!r}… has {length} tokens; '{lm.name}' has {limit} positions. Shorten it.")
    ids = torch.zeros(len(texts), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, e in enumerate(encoded):
        ids[row, : lengths[row]] = torch.tensor(e["input_ids"])
        mask[row, : lengths[row]] = 1
    offsets = [[tuple(pair) for pair in e["offset_mapping"]] for e in encoded]
    return Rows(tuple(texts), ids.to(lm.device), mask.to(lm.device), offsets)


def by_token(tensor: Tensor, rows: int) -> Tensor:
    """A view [rows, tokens, d] of what passed through a module, where the family (OPT) flattens rows and tokens too."""
    return tensor.view(rows, -1, tensor.shape[-1])


@dataclass(frozen=True)
class Scored:
    """Rows of prompt + continuation, with each continuation's token positions."""

    rows: Rows
    positions: list[list[int]]  # of the continuation's tokens; each is predicted one position before

    def pick(self) -> tuple[Tensor, Tensor, Tensor]:
        """(row, position that predicts, token predicted), each [all continuation tokens]."""
        row = [r for r, found in enumerate(self.positions) for _ in found]
        at = [i - 1 for found in self.positions for i in found]
        device = self.rows.ids.device
        row_index, at_index = torch.tensor(row, device=device), torch.tensor(at, device=device)
        return row_index, at_index, self.rows.ids[row_index, at_index + 1]


def continued(lm: LanguageModel, prompts: Sequence[str], continuations: Sequence[str]) -> Scored:
    """Rows of each prompt with its continuation (written with its leading space; "" scores nothing there).

    Raises FactError when a continuation gets no token of its own.
    """
    rows = tokenise(lm, [p + c for p, c in zip(prompts, continuations, strict=True)])
    positions = []
    for row, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        found = rows.touching(row, len(prompt), len(prompt) + len(continuation))
        found = [i for i in found if i > 0]
        if continuation and not found:
            raise FactError(
                f"The tokenizer of '{lm.name}' maps {continuation!r} after {prompt!r} to no tokens of its own. "
                "Choose another target_new."
            )
        positions.append(found)
    return Scored(rows, positions)


def spaced(text: str) -> str:
    """The text with one leading space, as a continuation of a prompt (ROME does the same to targets)."""
    return text if text[:1].isspace() else " " + text


@torch.inference_mode()
def go_on(
    lm: LanguageModel, prompts: Sequence[str], new_tokens: int, *, top_k: int | None = None, seed: int = 0
) -> list[str]:
    """Continuations of all `prompts` side by side: greedy, or sampled from the `top_k` with `seed`.

    Greedy ones are those of `generate`, several times sooner; sampled ones belong to the whole list. Prompts are
    padded on the left, and transformers counts positions from the mask. The global random state is left as it was.
    Raises FactError for more tokens than the model has positions for.
    """
    if not prompts:
        return []
    rows = [lm.tokenizer(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, rows))
    limit = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and width + new_tokens > limit:
        raise FactError(
            f"A prompt of {width} tokens was to be continued by {new_tokens}; '{lm.name}' has {limit} positions. "
            "Shorten it, or ask for fewer tokens."
        )
    pad_id = next(i for i in (lm.tokenizer.pad_token_id, lm.tokenizer.eos_token_id, 0) if i is not None)
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=lm.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=lm.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if top_k is not None:
        sampling = {"do_sample": True, "top_k": top_k, "temperature": 1.0, "top_p": 1.0}
    with torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = lm.model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=pad_id, **sampling)
    return [lm.tokenizer.decode(row, skip_special_tokens=True) for row in out[:, width:]]


def generate(
    lm: LanguageModel, prompts: Sequence[str], new_tokens: int, *, top_k: int | None = None, seed: int = 0
) -> list[str]:
    """Continuations of `prompts` without the prompts: greedy, or sampled from the `top_k` with `seed`.

    An empty prompt starts from the tokenizer's BOS or EOS token. The global random state is left as it was.
    """
    start = lm.tokenizer.bos_token_id
    start = lm.tokenizer.eos_token_id if start is None else start
    texts = []
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        for prompt in prompts:
            ids = lm.tokenizer(prompt)["input_ids"] or [start]
            out = lm.model.generate(
                torch.tensor([ids], device=lm.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=lm.device),
                max_new_tokens=new_tokens,
                do_sample=top_k is not None,
                pad_token_id=start,
                **({"top_k": top_k, "temperature": 1.0, "top_p": 1.0} if top_k else {}),
            )
            texts.append(lm.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
    return texts
