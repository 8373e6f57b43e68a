"""One clean run of many texts, in which what they share from their beginning is run once: for reading logits.

Texts that are asked before an edit and after it are the same below the blocks that the edit changes. `Below` keeps the
residual stream that enters the first of those blocks, so that the second run begins there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from editkit.models.load import LanguageModel
from editkit.models.passes import Columns, check, first_pass, packed_or_not, second_pass, select, state_of, tolerance
from editkit.models.products import quick_products
from editkit.models.replay import Replay, replayed_calls
from editkit.models.tokens import Rows
from editkit.models.tree import Tree
from editkit.nethook import Trace

BELOW_BYTES = 1 << 30  # that streams may take until they are asked for again

# What has been checked of a model as it is: the longest text and the widest pack.
_checked: WeakKeyDictionary[Any, tuple[object, tuple[int, int]]] = WeakKeyDictionary()
# Whether running on from block `start` gives what the model gives: ((start, the model's state), yes or no).
_agreed: WeakKeyDictionary[Any, tuple[object, bool]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Packed:
    """A clean run over a tree of texts. `final`: [packs, nodes, d_model] after the final norm."""

    lm: LanguageModel
    tree: Tree
    final: Tensor

    def at(self, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """(pack, node) of token `position` of text `row`."""
        pack, node = self.tree.at(row, position)
        return pack.to(self.final.device), node.to(self.final.device)

    def ends(self, last: Sequence[int]) -> Tensor:
        """[texts, d_model] of token `last[text]`."""
        return self.final[self.at(torch.arange(len(last)), torch.tensor(last))]


class Below:
    """Streams that entered block `start`, for texts that are asked again after that block or later ones have changed.

    They are used only while every parameter and buffer below is the same tensor and has not been written to since (by
    torch's own count, which misses writes through `.data`), and the same hooks are on the model. Texts for which there
    is no room are run whole each time.

    - `start`: the first block that may change. `room`: bytes that the streams may take.
    """

    def __init__(self, lm: LanguageModel, start: int, room: int = BELOW_BYTES) -> None:
        self.start, self._lm, self._left, self._room = lm.check_layer(start), lm, room, room
        self._kept: dict[bytes, Replay] = {}
        self._weights: list[tuple[Tensor, int]] = []
        self._state: object = None

    def refresh(self) -> None:
        """Drop all streams if anything below has changed. Call it outside `widened`, whose weights are copies."""
        weights, state = [(tensor, tensor._version) for tensor in self._below()], state_of(self._lm)
        same = len(weights) == len(self._weights) and all(
            one is other and version == then
            for (one, version), (other, then) in zip(weights, self._weights, strict=True)
        )
        if not same or state != self._state:
            self._kept, self._left = {}, self._room
        self._weights, self._state = weights, state

    def _below(self) -> list[Tensor]:
        """Parameters and buffers that a stream entering block `start` depends on, or may."""
        model, where = self._lm.model, self._lm.architecture
        blocks = [where.block.format(block) for block in range(self.start, self._lm.layers)]
        above = tuple(f"{name}." for name in (*blocks, where.final_norm, where.head))
        named = [*model.named_parameters(), *model.named_buffers()]
        return [tensor for name, tensor in named if not name.startswith(above)]

    def run(self, tree: Tree) -> Tensor:
        """[packs, nodes, d_model] after the final norm: from block `start` on where the tree was run before."""
        lm, key = self._lm, tree.key
        if key in self._kept:
            return self._kept[key].run(self._kept[key].stream)
        blocks = [lm.architecture.block.format(block) for block in range(self.start, lm.layers)]
        with Trace(lm.model, blocks, inputs=True, outputs=False) as trace:
            final: Tensor = lm.model.base_model(**tree.inputs(lm), use_cache=False).last_hidden_state
        ready = replayed_calls(lm, trace, self.start, final)
        size = ready.stream.nbytes + tree.sees.numel() * ready.stream.itemsize
        if size <= self._left and self._agrees(ready, final):
            self._kept[key], self._left = ready, self._left - size
        return final

    def _agrees(self, ready: Replay, final: Tensor) -> bool:
        """Whether running on from the stream gives what the model gave; asked once of a model as it is."""
        asked = self.start, state_of(self._lm)
        if _agreed.get(self._lm.model, (None, False))[0] != asked:
            apart = ((ready.run(ready.stream) - final).abs().max() / final.abs().max()).item()
            _agreed[self._lm.model] = asked, apart <= tolerance(self._lm)
        return _agreed[self._lm.model][1]


@torch.no_grad()
@quick_products()
def columns(
    lm: LanguageModel, rows: Rows, first: Sequence[int], last: Sequence[int], below: Below | None = None
) -> Columns | Packed:
    """One clean run of `rows` up to token `last[row]`, in which what they share from their beginning is run once.

    Where the model takes packs (tree.py), a tree of the rows; else the texts before token `first[row]`, each distinct
    one once, and then the tokens behind them. `first[row]` is 1 or more; the places that can be read are those of
    token `first[row] − 1` to `last[row]`. `below`: of `lm`; keeps what a tree needs to be run again after an edit.
    Raises CannotReplay for a model that gives other logits either way.
    """
    ids = [row[: end + 1] for row, end in zip(rows.ids.tolist(), last, strict=True)]

    def run(most: int) -> Columns | Packed:
        return _tree(lm, rows, ids, most, below) if most else _columns(lm, rows, first, last)

    return packed_or_not(lm, ids, run)


def _tree(lm: LanguageModel, rows: Rows, ids: Sequence[Sequence[int]], most: int, below: Below | None) -> Packed:
    """One clean run of the texts `ids` as a tree, in packs of at most `most` tokens."""
    tree = Tree.of(ids, most)
    if below is None:
        clean = Packed(lm, tree, lm.model.base_model(**tree.inputs(lm), use_cache=False).last_hidden_state)
    else:
        clean = Packed(lm, tree, below.run(tree))
    last = [len(text) - 1 for text in ids]
    # The text that lies behind the most tokens of others. It costs a tenth of an evaluation, so a model as it is now is
    # checked once for each larger size.
    row = int((tree.nodes[:, -1] - torch.tensor(last)).argmax())
    sizes, state = (max(last), tree.ids.shape[1]), state_of(lm)
    known, largest = _checked.get(lm.model, (state, (0, 0)))
    largest = largest if known == state else (0, 0)
    if sizes[0] > largest[0] or sizes[1] > largest[1]:
        ends = clean.ends(last)
        check(lm, rows, ends, last, row, ends[row])
        _checked[lm.model] = state, (max(sizes[0], largest[0]), max(sizes[1], largest[1]))
    return clean


def _columns(lm: LanguageModel, rows: Rows, first: Sequence[int], last: Sequence[int]) -> Columns:
    """The same for a model that does not take packs."""
    ids = rows.ids.tolist()

    # 1) The texts up to column 0, each distinct one once.
    which, seen, before = first_pass(lm, [ids[row][:begin] for row, begin in enumerate(first)])
    final = before.last_hidden_state[which, -1:].to(lm.device)  # [rows, 1, d_model]

    # 2) Columns 1, 2, … of the rows that have them.
    longer = [row for row in range(len(ids)) if last[row] >= first[row]]
    if longer:
        cache, begins = before.past_key_values, [first[row] for row in longer]
        select(cache, which[longer])
        parts = [ids[row][first[row] : last[row] + 1] for row in longer]
        after = second_pass(lm, parts, begins, seen[which[longer]], cache)
        final = torch.cat((final, final.new_zeros(len(ids), after.shape[1], after.shape[2])), 1)
        final[longer, 1:] = after

    # 3) Check one row against the whole model.
    clean = Columns(lm, torch.tensor(first, device=lm.device) - 1, final)
    row = longer[0] if longer else 0
    ends = clean.ends(last)
    check(lm, rows, ends, last, row, ends[row])
    return clean
