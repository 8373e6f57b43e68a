"""Replay: a model from one block on, over the tokens from one on, with everything before them held fixed.

What is changed at block L and token t reaches no block below L and, attention being causal, no token before t. So
one clean pass is enough for those: its residual stream enters block `start`, and its keys and values of the earlier
tokens stand in for them. Rows are laid out around their first token that runs again, which is column 0 of all:

    clean pass 1    texts before column 0, padded on the left; equal ones once       -> keys and values of each block
    clean pass 2    columns 0, 1, …, padded on the right, all blocks                 -> how each block is called
    run             blocks `start`, … on columns 0, 1, …, called as in pass 2, then the final norm; logits where asked

Masks, positions, windows and cache rules are those that transformers itself made in pass 2, so no family has code
here. Whether that holds for a model is measured each time: one row is compared with the whole model.
"""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from editkit.errors import ModelError
from editkit.models.load import LanguageModel
from editkit.models.products import faster, quick_products
from editkit.models.tokens import Rows, unflatten
from editkit.nethook import Record, Trace, get_module, hidden, with_input

# How far a replayed row may be from the whole model, relative to its largest logit; some families attend in float32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# Rows of the head that a product takes at once: with few logits to read, 50,257 at once are slow on a processor. 43
# went at 38 GFLOP/s whole and at 65 in pieces of 512, 300 at 53 and 78 (MKL, one core; a large product: 90).
PIECE = 512

KeysAndValues = dict[int, tuple[Tensor, Tensor]]  # of each block, [rows, heads, tokens, d_head]
_CACHE = object()  # in a kept call: here goes the cache


class CannotReplay(ModelError):
    """This model does not do what replay relies on; the message says where it differs."""


class _Prefix:
    """Stands for a cache: puts the keys and values of earlier columns in front of those given, and both into `seen`."""

    def __init__(self, kept: KeysAndValues, seen: KeysAndValues | None) -> None:
        self._kept, self._seen = kept, seen

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if layer in self._kept:
            before = self._kept[layer]
            keys, values = torch.cat((before[0], keys), -2), torch.cat((before[1], values), -2)
        if self._seen is not None:
            self._seen[layer] = keys, values
        return keys, values


@dataclass(frozen=True)
class Columns:
    """A clean run over columns 0, 1, … of each row, where column 0 is token `first[row]`.

    `final`: [rows, columns, d_model] after the final norm; columns behind a row's last token hold nothing of use.
    """

    lm: LanguageModel
    first: Tensor  # [rows]
    final: Tensor

    def at(self, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """(row, column) of token `position` of `row`."""
        return row, position - self.first[row]


@dataclass(frozen=True)
class Replay(Columns):
    """Blocks `start`, … of a model, ready to run again on any residual stream that enters the first of them."""

    start: int
    stream: Tensor  # [rows, columns, d_model] that entered block `start`; after the last block where start = layers
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]  # arguments of the blocks from `start` on
    kept: KeysAndValues  # before column 0
    column0: dict[str, tuple[Tensor, Tensor]]  # of the modules that were asked for: input and output, [rows, d] each

    def run(self, stream: Tensor, seen: KeysAndValues | None = None) -> Tensor:
        """[rows, columns, d_model] after the final norm, from the stream entering block `start`. Differentiable.

        `seen` is filled with the keys and values of all columns, those before column 0 in front.
        """
        final: Tensor = get_module(self.lm.model, self.lm.architecture.final_norm)(self.through(stream, seen))
        return final

    @quick_products()
    def through(self, stream: Tensor, seen: KeysAndValues | None = None) -> Tensor:
        """The same before the final norm: what leaves the last of the blocks."""
        prefix = _Prefix(self.kept, seen)
        for number, (args, kwargs) in enumerate(self.calls):
            block = get_module(self.lm.model, self.lm.architecture.block.format(self.start + number))
            args, kwargs = _mapped((args, kwargs), lambda value: prefix if value is _CACHE else value)
            args, kwargs = with_input(args, kwargs, lambda _, stream=stream: stream)
            stream = hidden(block(*args, **kwargs))
        return stream

    def first_block(self) -> "Replay":
        """Block `start` alone, ready to run on a stream of the caller's; `final` and `stream` have no columns."""
        kept = {self.start: self.kept[self.start]} if self.start in self.kept else {}
        nothing = self.final[:, :0]
        return replace(self, calls=self.calls[:1], kept=kept, final=nothing, stream=nothing)

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
        column0 = {site: (given[rows], gave[rows]) for site, (given, gave) in self.column0.items()}
        picked = replace(self, first=self.first[rows], final=self.final[rows], stream=self.stream[rows])
        return replace(picked, calls=calls, kept=kept, column0=column0)

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
        return replace(later, start=start, calls=calls, kept=kept)


@quick_products()
def logits_of(lm: LanguageModel, final: Tensor) -> Tensor:
    """[.., vocabulary] from the residual stream after the final norm, [.., d_model]."""
    head = get_module(lm.model, lm.architecture.head)
    product: Callable[..., Tensor] = _InPieces.apply
    logits: Tensor = product(final, head.weight) if _by_pieces(head, final) else head(final)
    cap = getattr(lm.model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


class _InPieces(torch.autograd.Function):
    """x [n, d_model] Wᵀ, for a W [vocabulary, d_model] that takes no gradient, some of its rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        logits = x.new_empty(len(x), len(weight))
        for begin in range(0, len(weight), PIECE):
            torch.mm(x, weight[begin : begin + PIECE].T, out=logits[:, begin : begin + PIECE])
        return logits

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        return grad_outputs[0] @ ctx.saved_tensors[0], None


def _by_pieces(head: torch.nn.Module, final: Tensor) -> bool:
    """Whether the head does no more than a product, and of the kind that a processor does slowly as a whole."""
    plain = type(head) is torch.nn.Linear and head.bias is None and not (head._forward_hooks or head._forward_pre_hooks)
    learns = torch.is_grad_enabled() and head.weight.requires_grad
    float32 = final.dtype == head.weight.dtype == torch.float32
    return plain and not learns and not faster() and float32 and final.device.type == "cpu" and final.ndim == 2


@torch.no_grad()
@quick_products()
def columns(lm: LanguageModel, rows: Rows, first: Sequence[int], last: Sequence[int]) -> Columns:
    """One clean run of `rows` up to token `last[row]`, which runs each distinct text before token `first[row]` once.

    `first[row]` is 1 or more, and column 0 is the token before it. Raises CannotReplay for a model that gives other
    logits this way.
    """
    ids = rows.ids.tolist()

    # 1) The texts up to column 0, each distinct one once.
    which, seen, before = _first_pass(lm, [ids[row][:begin] for row, begin in enumerate(first)])
    final = before.last_hidden_state[which, -1:]  # [rows, 1, d_model]

    # 2) Columns 1, 2, … of the rows that have them.
    longer = [row for row in range(len(ids)) if last[row] >= first[row]]
    if longer:
        cache, begins = before.past_key_values, [first[row] for row in longer]
        cache.batch_select_indices(which[longer].to(lm.device))
        parts = [ids[row][first[row] : last[row] + 1] for row in longer]
        after = _second_pass(lm, parts, begins, seen[which[longer]], cache)
        final = torch.cat((final, final.new_zeros(len(ids), after.shape[1], after.shape[2])), 1)
        final[longer, 1:] = after

    # 3) Check one row against the whole model.
    clean = Columns(lm, torch.tensor(first, device=lm.device) - 1, final)
    row = longer[0] if longer else 0
    _check(clean, rows, last, row, final[row, last[row] - first[row] + 1])
    return clean


@torch.no_grad()
@quick_products()
def replay(
    lm: LanguageModel, rows: Rows, first: Sequence[int], last: Sequence[int], start: int, sites: Sequence[str] = ()
) -> Replay:
    """Get ready to run blocks `start`, … again on tokens `first[row]` to `last[row]` of each row.

    - `rows`: the texts. `first`, `last`: a position for each row.
    - `start`: the first block to run again; the number of blocks for the final norm alone.
    - `sites`: modules whose input and output at column 0 are kept as well.

    Raises CannotReplay for a model that gives other logits this way.
    """
    ids = rows.ids.tolist()

    # 1) Clean pass over the texts before column 0, each distinct one once: keys and values of every block.
    which, seen, before = _first_pass(lm, [ids[row][:begin] for row, begin in enumerate(first)])
    cache, kept = None, {}
    if before is not None:
        cache = before.past_key_values
        cache.batch_select_indices(which.to(lm.device))
        kept = {layer: (each.keys, each.values) for layer, each in enumerate(cache.layers) if layer >= start}

    # 2) Clean pass over columns 0, 1, … behind them, with the arguments of each block's call.
    blocks = [lm.architecture.block.format(layer) for layer in range(start, lm.layers)]
    trace = Trace(lm.model, [*blocks, lm.architecture.final_norm], inputs=True, outputs=False)
    # Copies, since Falcon adds to an output in place.
    captured = Trace(lm.model, sites, inputs=True, clone=True) if sites else None
    parts = [ids[row][begin : end + 1] for row, (begin, end) in enumerate(zip(first, last, strict=True))]
    final = _while_traced([trace, captured], lambda: _second_pass(lm, parts, first, seen[which], cache))

    # 3) What a replay needs: the stream that enters the first block, the calls without it and without the cache.
    stream = trace[next(iter(trace))].input
    calls = [with_input(*trace[block].inputs, lambda _: stream.new_empty(0)) for block in blocks]
    calls = [_mapped(call, lambda value: _CACHE if hasattr(value, "get_seq_length") else value) for call in calls]
    column0 = {} if captured is None else {site: _first_column(captured[site], len(first)) for site in sites}
    ready = Replay(lm, torch.tensor(first, device=lm.device), final, start, stream, calls, kept, column0)

    # 4) Check the row with the longest text before column 0 against the whole model.
    row = max(range(len(first)), key=first.__getitem__)
    one = ready.of(torch.tensor([row], device=lm.device))
    _check(ready, rows, last, row, one.run(one.stream)[0, last[row] - first[row]])
    return ready


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


def _first_pass(lm: LanguageModel, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Any]:
    """Run each distinct text once. Returns which of them each row has [rows], their mask [distinct, tokens], and the
    output with its cache (None where all texts are empty). Raises CannotReplay for a model without such a cache."""
    from transformers import DynamicCache

    number = {text: i for i, text in enumerate(dict.fromkeys(map(tuple, texts)))}
    which = torch.tensor([number[tuple(text)] for text in texts])
    ids, seen = _padded(list(number), left=True)
    if not ids.shape[1]:
        return which, seen, None
    output = lm.model.base_model(**_inputs(lm, ids, seen, (seen.cumsum(1) - 1).clamp_min(0)), use_cache=True)
    if not isinstance(getattr(output, "past_key_values", None), DynamicCache):
        raise CannotReplay("it keeps no keys and values of earlier tokens")
    return which, seen, output


def _second_pass(
    lm: LanguageModel, parts: Sequence[Sequence[int]], first: Sequence[int], seen: Tensor, cache: Any
) -> Tensor:
    """[rows, columns, d_model] after the final norm.

    - `parts`: the token ids of each row's columns. `first`: the position of its column 0.
    - `cache`, `seen`: keys and values of the earlier tokens, and their mask [rows, tokens].
    """
    ids, live = _padded(parts)
    positions = torch.tensor(first)[:, None] + (live.cumsum(1) - 1).clamp_min(0)  # padding stays within the model's
    given = _inputs(lm, ids, torch.cat((seen, live), 1), positions)
    final: Tensor = lm.model.base_model(**given, past_key_values=cache, use_cache=True).last_hidden_state
    return final


def _inputs(lm: LanguageModel, ids: Tensor, mask: Tensor, positions: Tensor) -> dict[str, Tensor]:
    given = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(lm.model.base_model.forward).parameters:  # Bloom counts the mask itself
        given["position_ids"] = positions
    return {name: value.to(lm.device) for name, value in given.items()}


def _padded(texts: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """(ids, mask), each [texts, longest], padded on the right or the left."""
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(ids.shape[1] - len(text), None) if left else slice(len(text))
        ids[row, place], mask[row, place] = torch.tensor(text, dtype=torch.long), 1
    return ids, mask


def _check(clean: Columns, rows: Rows, last: Sequence[int], row: int, final: Tensor) -> None:
    """Raise CannotReplay unless one row is as in the whole model and every row is finite (a softmax over padding alone
    gives NaN).

    - `clean`: the run to check. `rows`, `last`: as it was given them.
    - `row`, `final`: the row to compare, and its last token after the final norm [d_model].
    """
    at = clean.at(torch.arange(len(last), device=clean.first.device), torch.tensor(last, device=clean.first.device))
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(clean.lm.model.forward).parameters else {}
    wanted = clean.lm.model(input_ids=rows.ids[row : row + 1, : last[row] + 1], use_cache=False, **few).logits[0, -1]
    apart = ((logits_of(clean.lm, final) - wanted).abs().max() / wanted.abs().max()).item()
    if not (apart <= TOLERANCE[clean.lm.dtype] and clean.final[at].isfinite().all()):
        raise CannotReplay("run in parts it gives other logits than as a whole")


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The arguments of a call with `change` applied to each, inside tuples, lists and dicts too."""
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return type(value)(_mapped(item, change) for item in value) if type(value) in (tuple, list) else change(value)
