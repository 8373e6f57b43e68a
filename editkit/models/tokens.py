"""From texts to token rows, with the characters each token came from.

Texts are tokenised whole, as a user would send them, and places are found by character offsets. So a
BOS, a space-prefixing tokenizer, or a piece that merges across a boundary cannot shift a position.

Where a prefix is in force (prefix.py), the whole is the prefix and the text. Offsets stay those of the text: a token of
the prefix covers none of its characters, as a BOS does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from editkit.errors import ConfigError, FactError
from editkit.models.load import LanguageModel
from editkit.models.prefix import prefix_of


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

    def tokens_covering(self, row: int, begin: int, end: int) -> list[int]:
        """Positions of the tokens that cover any of the characters [begin, end) of the row's text."""
        return [i for i, (left, right) in enumerate(self.offsets[row]) if right > begin and left < end]


def tokenise(lm: LanguageModel, texts: Sequence[str]) -> Rows:
    """Rows for `texts`, with the prefix that is in force and the tokenizer's own special tokens, on the model's device.

    Raises FactError when a text has no tokens or more than the model has positions for.
    """
    encode = partial(lm.tokenizer, return_offsets_mapping=True, truncation=False, verbose=False)
    prefix = prefix_of(lm.model)
    encoded = [encode(prefix + text) for text in texts]
    lengths = [len(e["input_ids"]) for e in encoded]
    limit = positions_of(lm)
    for text, length in zip(texts, lengths, strict=True):
        if length == 0:
            raise FactError(f"The tokenizer of '{lm.name}' maps {text!r} to no tokens.")
        if limit is not None and length > limit:
            behind = f" with the prefix of {len(prefix)} characters that is in force" if prefix else ""
            raise FactError(
                f"{text[:60]!r}…{behind} has {length} tokens; '{lm.name}' has {limit} positions. Shorten it."
            )
    ids = torch.zeros(len(texts), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, e in enumerate(encoded):
        ids[row, : lengths[row]] = torch.tensor(e["input_ids"])
        mask[row, : lengths[row]] = 1
    begin = len(prefix)
    offsets = [[(max(a - begin, 0), max(b - begin, 0)) for a, b in e["offset_mapping"]] for e in encoded]
    return Rows(tuple(texts), ids.to(lm.device), mask.to(lm.device), offsets)


def positions_of(lm: LanguageModel) -> int | None:
    """How many tokens the model has positions for; None: it has no limit."""
    limit: int | None = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def unflatten(tensor: Tensor, rows: int) -> Tensor:
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


def encode_with_targets(lm: LanguageModel, prompts: Sequence[str], continuations: Sequence[str]) -> Scored:
    """Rows of each prompt with its continuation (written with its leading space; "" scores nothing there).

    Raises FactError when a continuation gets no token of its own.
    """
    rows = tokenise(lm, [p + c for p, c in zip(prompts, continuations, strict=True)])
    positions = []
    for row, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        found = rows.tokens_covering(row, len(prompt), len(prompt) + len(continuation))
        found = [i for i in found if i > 0]
        if continuation and not found:
            raise FactError(
                f"The tokenizer of '{lm.name}' maps {continuation!r} after {prompt!r} to no tokens of its own. "
                "Choose another target_new."
            )
        positions.append(found)
    return Scored(rows, positions)


def token_counts(lm: LanguageModel, texts: Sequence[str]) -> list[int]:
    """How many tokens each text has, without the tokenizer's own."""
    return [len(lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]


def spaced(text: str) -> str:
    """The text with one leading space, as a continuation of a prompt (ROME does the same to targets)."""
    return text if text[:1].isspace() else " " + text


def in_form(lm: LanguageModel, prompt: str, form: str) -> str:
    """The prompt as `measure.form` asks it.

    - `form`: bare; qa: "Question: … Answer:"; chat: a user's turn of the tokenizer's template.

    Raises ConfigError for a tokenizer without a template.
    """
    if form == "bare":
        return prompt
    if form == "qa":
        return f"Question: {prompt}\nAnswer:"
    if not lm.tokenizer.chat_template:
        raise ConfigError(
            f"task.measure.form=chat was asked for, and the tokenizer of '{lm.name}' has no chat template, as those of "
            "base models. Use form=bare or form=qa."
        )
    turn = [{"role": "user", "content": prompt}]
    text = str(lm.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    bos = lm.tokenizer.bos_token
    twice = bos is not None and lm.tokenizer("")["input_ids"][:1] == [lm.tokenizer.bos_token_id]
    return text.removeprefix(str(bos)) if twice else text
