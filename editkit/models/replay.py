"""Replay: a model from one block on, over the tokens from one on, with everything before them held fixed.

What is changed at block L and token t reaches no block below L and, attention being causal, no token before t. So
one clean pass is enough for those: its residual stream enters block `start`, and its keys and values of the earlier
tokens stand in for them. Rows are laid out around their first token that runs again, which is column 0 of all:

    clean pass 1    texts before column 0, what they share once (tree.py)            -> keys and values of each block
    clean pass 2    columns 0, 1, …, padded on the right, all blocks                 -> how each block is called
    run             blocks `start`, … on columns 0, 1, …, called as in pass 2, then the final norm; logits where asked

Masks, positions, windows and cache rules are those that transformers itself made in pass 2, so no family has code
here. Whether that holds for a model is measured each time: one row is compared with the whole model.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from editkit.models.load import LanguageModel
from editkit.models.passes import Columns, KeysAndValues, check, earlier, packed_or_not, second_pass
from editkit.models.products import quick_products
from editkit.models.tokens import Rows, unflatten
from editkit.nethook import Record, Trace, get_module, hidden, with_input

_CACHE = object()  # in a kept call: here goes the cache


class _Prefix:
    """Stands for a cache: puts the keys and values of earlier columns in front of those given, and both into `seen`."""

    def __init__(self, kept: KeysAndValues, seen: KeysAndValues | None) -> None:
        self._kept, self._seen = kept, seen

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if layer in self._kept:
            keys, values = map(_behind, self._kept[layer], (keys, values))
        if self._seen is not None:
            self._seen[layer] = keys, values
        return keys, values


def _behind(before: Tensor, states: Tensor) -> Tensor:
    """`states` [n · rows, heads, tokens, d_head] behind those of earlier tokens, [rows, heads, earlier, d_head]."""
    if len(before) == len(states):
        return torch.cat((before, states), -2)
    each = states.unflatten(0, (-1, len(before)))
    return torch.cat((before.expand(len(each), *before.shape), each), -2).flatten(0, 1)


class _KeysAreMade(Exception):
    """Ends the run of a block of which only keys and values are wanted."""


class _KeysAlone(_Prefix):
    """The same, and the block's run ends here."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        super().update(keys, values, layer)
        raise _KeysAreMade


@dataclass(frozen=True)
class Replay(Columns):
    """Blocks `start`, … of a model, ready to run again on any residual stream that enters the first of them."""

    start: int
    stream: Tensor  # [rows, columns, d_model] that entered block `start`; after the last block where start = layers
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]  # arguments of the blocks from `start` on
    kept: KeysAndValues  # before column 0
    column0: dict[str, tuple[Tensor, Tensor]]  # of the modules that were asked for: input and output, [rows, d] each
    streams: tuple[Tensor, ...] = ()  # as `stream`, for each of these blocks, and what entered the final norm
    seen: KeysAndValues = field(default_factory=dict)  # of all columns of the clean run, those before them in front

    def run(self, stream: Tensor, seen: KeysAndValues | None = None) -> Tensor:
        """[rows, columns, d_model] after the final norm, from the stream entering block `start`. Differentiable.

        `seen` is filled with the keys and values of all columns, those before column 0 in front.
        """
        final: Tensor = get_module(self.lm.model, self.lm.architecture.final_norm)(self.through(stream, seen))
        return final.to(self.first.device)

    def through(self, stream: Tensor, seen: KeysAndValues | None = None) -> Tensor:
        """The same before the final norm: what leaves the last of the blocks."""
        return self._through(stream, _Prefix(self.kept, seen))

    def keys_alone(self, stream: Tensor) -> KeysAndValues:
        """What `through` puts into `seen` for the first of the blocks, whose attention and MLP are not run."""
        seen: KeysAndValues = {}
        with contextlib.suppress(_KeysAreMade):
            self._through(stream, _KeysAlone(self.kept, seen))
        return seen

    @quick_products()
    def _through(self, stream: Tensor, prefix: _Prefix) -> Tensor:
        for number, (args, kwargs) in enumerate(self.calls):
            block = get_module(self.lm.model, self.lm.architecture.block.format(self.start + number))
            args, kwargs = _mapped((args, kwargs), lambda value: prefix if value is _CACHE else value)
            args, kwargs = with_input(args, kwargs, lambda _, stream=stream: stream)
            stream = hidden(block(*args, **kwargs))
        return stream.to(self.first.device)  # a split model's blocks lie on several

    def first_block(self) -> "Replay":
        """Block `start` alone, ready to run on a stream of the caller's; `final` and `stream` have no columns."""
        kept = {self.start: self.kept[self.start]} if self.start in self.kept else {}
        nothing = self.final[:, :0]
        return replace(self, calls=self.calls[:1], kept=kept, final=nothing, stream=nothing, streams=(), seen={})

    def of(self, rows: Tensor) -> "Replay":
        """The replay of the rows with these indices, [kept]."""
        count = len(self.first)

        def pick(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim < 2 or len(value) == 0 or len(value) % count:
                return value  # shared by all rows
            if len(value) == count:
                return value[rows.to(value.device)]
            if value.ndim != 3:
                return value
            each = value.view(count, -1, *value.shape[1:])  # Bloom's biases: rows × heads in one dimension
            return each[rows.to(value.device)].flatten(0, 1)

        calls = [_mapped(call, pick) for call in self.calls]
        kept = {layer: (pick(keys), pick(values)) for layer, (keys, values) in self.kept.items()}
        column0 = {site: (pick(given), pick(gave)) for site, (given, gave) in self.column0.items()}
        streams = tuple(stream[rows] for stream in self.streams)
        seen = {layer: (pick(keys), pick(values)) for layer, (keys, values) in self.seen.items()}
        picked = replace(self, first=self.first[rows], final=self.final[rows], stream=self.stream[rows])
        return replace(picked, calls=calls, kept=kept, column0=column0, streams=streams, seen=seen)

    def times(self, copies: int) -> "Replay":
        """The replay of so many copies of all rows, one after the other, which share what comes before column 0."""
        rows = torch.arange(len(self.first), device=self.first.device).repeat(copies)
        return replace(replace(self, kept={}).of(rows), kept=self.kept)

    def after(self, column: int, start: int, seen: KeysAndValues) -> "Replay":
        """Blocks `start`, … on the columns from `column` on, behind what a run of all columns has `seen`.

        Its `stream` is left without columns: it is the caller's, [rows, columns − column, d_model].
        """
        count = self.stream.shape[1]

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            dim = {1: 0, 2: 1, 3: 1, 4: 2}.get(value.ndim)  # where queries lie: positions, rotations, masks
            return value.narrow(dim, column, count - column) if dim is not None and value.shape[dim] == count else value

        calls = [_mapped(call, cut) for call in self.calls[start - self.start :]]
        left = count - column
        kept = {layer: (keys[:, :, :-left], values[:, :, :-left]) for layer, (keys, values) in seen.items()}
        later = replace(self, first=self.first + column, final=self.final[:, column:], stream=self.stream[:, :0])
        return replace(later, start=start, calls=calls, kept=kept, streams=(), seen={})


@quick_products()
def replay(
    lm: LanguageModel,
    rows: Rows,
    first: Sequence[int],
    last: Sequence[int],
    start: int,
    sites: Sequence[str] = (),
    *,
    everything: bool = False,
) -> Replay:
    """Get ready to run blocks `start`, … again on tokens `first[row]` to `last[row]` of each row.

    - `rows`: the texts. `first`, `last`: a position for each row.
    - `start`: the first block to run again; the number of blocks for the final norm alone.
    - `sites`: modules whose input and output at column 0 are kept as well.
    - `everything`: keep the stream that enters each block, and all keys and values (`streams`, `seen`).

    Raises CannotReplay for a model that gives other logits this way.
    """
    before = [row[:begin] for row, begin in zip(rows.ids.tolist(), first, strict=True)]
    return packed_or_not(lm, before, lambda most: _replay(lm, rows, first, last, start, sites, everything, most))


@torch.no_grad()
def _replay(
    lm: LanguageModel,
    rows: Rows,
    first: Sequence[int],
    last: Sequence[int],
    start: int,
    sites: Sequence[str],
    everything: bool,
    most: int,
) -> Replay:
    """`replay`, with the texts before column 0 in packs of at most `most` tokens, or not in packs: 0."""
    ids = rows.ids.tolist()

    # 1) Clean pass over the texts before column 0: keys and values of every block.
    seen, cache = earlier(lm, [ids[row][:begin] for row, begin in enumerate(first)], most)
    layers: Any = cache.layers
    kept = {layer: (each.keys, each.values) for layer, each in enumerate(layers) if layer >= start and any(first)}

    # 2) Clean pass over columns 0, 1, … behind them, with the arguments of each block's call.
    blocks = [lm.architecture.block.format(layer) for layer in range(start, lm.layers)]
    trace = Trace(lm.model, [*blocks, lm.architecture.final_norm], inputs=True, outputs=False)
    # Copies, since Falcon adds to an output in place.
    captured = Trace(lm.model, sites, inputs=True, clone=True) if sites else None
    parts = [ids[row][begin : end + 1] for row, (begin, end) in enumerate(zip(first, last, strict=True))]
    final = _while_traced([trace, captured], lambda: second_pass(lm, parts, first, seen, cache))

    # 3) What a replay needs: the stream that enters the first block, the calls without it and without the cache.
    column0 = {} if captured is None else {site: _first_column(captured[site], len(first)) for site in sites}
    ready = replayed_calls(lm, trace, start, final)
    ready = replace(ready, first=torch.tensor(first, device=lm.device), kept=kept, column0=column0)
    if everything:
        ready = replace(ready, streams=tuple(trace[site].input.to(lm.device) for site in trace), seen=cache.seen)

    # 4) Check the row with the longest text before column 0 against the whole model.
    row = max(range(len(first)), key=first.__getitem__)
    one = ready.of(torch.tensor([row], device=lm.device))
    check(lm, rows, ready.ends(last), last, row, one.run(one.stream)[0, last[row] - first[row]])
    return ready


def replayed_calls(lm: LanguageModel, trace: Trace, start: int, final: Tensor) -> Replay:
    """The replay of a run whose blocks from `start` on, or what comes behind them, were traced with their inputs.

    Rows begin at their first token. `final`: what the run gave after the final norm.
    """
    stream = trace[next(iter(trace))].input.to(lm.device)
    blocks = [lm.architecture.block.format(layer) for layer in range(start, lm.layers)]
    calls = [with_input(*trace[block].inputs, lambda _: stream.new_empty(0)) for block in blocks]
    calls = [_mapped(call, lambda value: _CACHE if hasattr(value, "get_seq_length") else value) for call in calls]
    first = torch.zeros(len(final), dtype=torch.long, device=lm.device)
    return Replay(lm, first, final, start, stream, calls, {}, {})


def _while_traced(traces: Sequence[Trace | None], run: Callable[[], Tensor]) -> Tensor:
    """The result of `run`, with the traces (those that are not None) open meanwhile."""
    with contextlib.ExitStack() as stack:
        for trace in traces:
            if trace is not None:
                stack.enter_context(trace)
        return run()


def _first_column(record: Record, rows: int) -> tuple[Tensor, Tensor]:
    """A module's input and output at column 0, [rows, d] each."""
    return unflatten(record.input, rows)[:, 0], unflatten(record.output, rows)[:, 0]


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The arguments of a call with `change` applied to each, inside tuples, lists and dicts too."""
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return type(value)(_mapped(item, change) for item in value) if type(value) in (tuple, list) else change(value)
