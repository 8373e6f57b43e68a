"""Texts as trees: a token that several texts share from their beginning is run once.

The texts of a tree lie in packs. A pack is one row of tokens, in which each token attends to the tokens before it in
its own text and to no other; its position is its place in the text. So no token is padding but those behind the
shorter packs, texts of unlike lengths run in large matrix products, and each hidden state, key and value is that of
the text run alone.

    texts       The Louvre is in         pack      The Louvre is in stands Eiffel Tower is in
                The Louvre stands in     depth      0    1    2  3    2      1     2    3  4
                The Eiffel Tower is in   (and "in" behind "stands")
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

import torch
from torch import Tensor

from editkit.models.load import LanguageModel

# Tokens of a pack at most, where no single text is longer: a token's attention grows with its pack. At GPT-2-small's
# shape 256 keys are 5 % of a token's operations.
PACK = 256


@dataclass(frozen=True)
class Tree:
    """Where each token of each text lies.

    - `ids`, `depth`: [packs, nodes], the token and its position in its text; 0 behind the end of a shorter pack.
    - `pack`: [texts], the pack of each text. `nodes`: [texts, longest], the place of each of its tokens in the pack,
      aligned on the right (`lengths`: [texts]); 0 in front of a shorter text.
    """

    ids: Tensor
    depth: Tensor
    pack: Tensor
    nodes: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], most: int = PACK) -> "Tree":
        """The tree of `texts`, each one or more token ids, in packs of at most `most` tokens or one text."""
        # 1) packs of about one size: their number from the number of distinct tokens
        order = sorted(range(len(texts)), key=lambda i: tuple(texts[i]))
        longest = max(map(len, texts))
        distinct = len({tuple(text[: end + 1]) for text in texts for end in range(len(text))})
        most = max(longest, min(most, ceil(distinct / ceil(distinct / most)) + longest))
        # 2) each text in the order of its tokens, so that those that share a beginning follow one another
        packs: list[list[tuple[int, int]]] = [[]]  # the token and depth of each node
        found: dict[tuple[int, int], int] = {}  # (the node before, token): node, in the last pack
        pack, nodes = torch.zeros(len(texts), dtype=torch.long), torch.zeros(len(texts), longest, dtype=torch.long)
        for i in order:
            path = _path(texts[i], found)
            if len(packs[-1]) + len(texts[i]) - len(path) > most:
                packs.append([])
                found, path = {}, []
            for depth in range(len(path), len(texts[i])):
                found[path[-1] if path else -1, texts[i][depth]] = len(packs[-1])
                path.append(len(packs[-1]))
                packs[-1].append((texts[i][depth], depth))
            pack[i] = len(packs) - 1
            nodes[i, longest - len(path) :] = torch.tensor(path, dtype=torch.long)
        both = torch.zeros(2, len(packs), max(map(len, packs)), dtype=torch.long)
        for number, each in enumerate(packs):
            both[:, number, : len(each)] = torch.tensor(each).T
        return cls(both[0], both[1], pack, nodes, torch.tensor([len(text) for text in texts]))

    @cached_property
    def sees(self) -> Tensor:
        """[packs, nodes, nodes]: whether a node attends to another: those before it in its text, and itself."""
        packs, width = self.ids.shape
        sees = torch.eye(width, dtype=torch.bool).repeat(packs, 1, 1)
        earlier = torch.ones(self.nodes.shape[1], self.nodes.shape[1], dtype=torch.bool).tril()
        for pack, nodes, length in zip(self.pack.tolist(), self.nodes, self.lengths.tolist(), strict=True):
            mine = nodes[len(nodes) - length :]
            sees[pack, mine[:, None], mine] |= earlier[:length, :length]
        return sees

    @property
    def key(self) -> bytes:
        """Equal for trees that give equal states."""
        return self.ids.numpy().tobytes() + self.sees.numpy().tobytes()

    def at(self, text: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """(pack, node) of token `position` of `text`."""
        text, position = text.cpu(), position.cpu()
        return self.pack[text], self.nodes[text, self.nodes.shape[1] - self.lengths[text] + position]

    def inputs(self, lm: LanguageModel) -> dict[str, Tensor]:
        """Keyword arguments for a transformers model."""
        mask = torch.zeros(self.sees.shape, dtype=lm.dtype).masked_fill(~self.sees, torch.finfo(lm.dtype).min)
        given = {"input_ids": self.ids, "position_ids": self.depth, "attention_mask": mask[:, None]}
        return {name: value.to(lm.device) for name, value in given.items()}

    def of_texts(self, states: Tensor) -> Tensor:
        """Keys or values [packs, heads, nodes, d_head] as those of each text, [texts, heads, longest, d_head].

        In front of a shorter text is what the first token of its pack has.
        """
        heads = torch.arange(states.shape[1], device=states.device)
        pack, nodes = self.pack.to(states.device), self.nodes.to(states.device)
        return states[pack[:, None, None], heads[:, None], nodes[:, None]]


def _path(text: Sequence[int], found: dict[tuple[int, int], int]) -> list[int]:
    """The nodes that are there already of a text's beginning."""
    path: list[int] = []
    for token in text:
        node = found.get((path[-1] if path else -1, token))
        if node is None:
            break
        path.append(node)
    return path


def room(lm: LanguageModel, longest: int) -> int:
    """The most tokens that a pack may have for texts of up to `longest`; 0 where the model cannot run packs.

    It has to take positions and a mask of its caller's, which Bloom and alibi do not (they count the mask), nor
    attention kernels other than eager and sdpa. A window on attention is counted over a pack, so it has to hold one.
    """
    config: Any = lm.model.config.get_text_config()
    positions = "position_ids" in inspect.signature(lm.model.base_model.forward).parameters
    if not positions or getattr(config, "alibi", False) or config._attn_implementation not in ("eager", "sdpa"):
        return 0
    named = [getattr(config, name, None) for name in ("sliding_window", "window_size")]
    windows = [window for window in named if window]
    return 0 if windows and longest > min(windows) else min([PACK, *windows])
