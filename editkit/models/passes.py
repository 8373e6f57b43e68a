"""Clean passes over texts and their beginnings, and the check that a model run in parts is the whole model."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache as cached
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from editkit.errors import ModelError
from editkit.models.head import logits_of
from editkit.models.load import LanguageModel
from editkit.models.tokens import Rows
from editkit.models.tree import Tree, room
from editkit.models.wrapped import adapters_of

# How far a replayed row may be from the whole model, relative to its largest logit; some families attend in float32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

QUANTISED_INPUTS = 5e-2  # of bitsandbytes' 8-bit layers, which round their inputs to int8: a last bit may become a step


def tolerance(lm: LanguageModel) -> float:
    """How far the model run in parts may be from the whole, relative to its largest logit."""
    return max(TOLERANCE[lm.dtype], QUANTISED_INPUTS if "bnb-8bit" in (lm.quantization or "") else 0.0)


KeysAndValues = dict[int, tuple[Tensor, Tensor]]  # of each block, [rows, heads, tokens, d_head]


class CannotReplay(ModelError):
    """This model does not do what replay relies on; the message says where it differs."""


@cached
def _recorded_cache() -> Any:
    """The class of a cache that also keeps what it handed out last, uncut by a window: all tokens' keys and values."""
    from transformers import DynamicCache

    class RecordedCache(DynamicCache):  # type: ignore[misc]
        def __init__(self, model: Any) -> None:
            super().__init__(config=model.config)
            self.seen: KeysAndValues = {}

        def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.seen[layer] = super().update(keys, values, layer, *args, **kwargs)
            return self.seen[layer]

    return RecordedCache


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

    def ends(self, last: Sequence[int]) -> Tensor:
        """[rows, d_model] of token `last[row]`."""
        rows = torch.arange(len(last), device=self.first.device)
        return self.final[self.at(rows, torch.tensor(last, device=self.first.device))]


Found = TypeVar("Found")
refused: WeakKeyDictionary[Any, object] = WeakKeyDictionary()  # models that gave other logits in packs, as they were


def packed_or_not(lm: LanguageModel, texts: Sequence[Sequence[int]], run: Callable[[int], Found]) -> Found:
    """`run(most)` with packs of at most `most` tokens where the model takes them; else, or where that raises
    CannotReplay, `run(0)`. A model that was refused is not asked again until something about it changes."""
    split = hasattr(lm.model, "_hf_hook")  # by accelerate, which does not know where a pack's masks belong
    most, state = 0 if split else room(lm, max(map(len, texts))), state_of(lm)
    if most and any(texts) and refused.get(lm.model) != state:
        try:
            return run(most)
        except CannotReplay:
            found = run(0)  # raises where packs are not to blame
            refused[lm.model] = state
            return found
    return run(0)


def state_of(lm: LanguageModel) -> object:
    """What decides how a model runs, but for its weights: attention, precision, adapters, and every hook on it."""
    hooks = [
        number
        for module in lm.model.modules()
        for each in (module._forward_hooks, module._forward_pre_hooks)
        for number in each
    ]
    modes = lm.model.training, adapters_of(lm.model)
    return lm.model.config._attn_implementation, lm.dtype, lm.device, modes, tuple(hooks)


def earlier(lm: LanguageModel, texts: Sequence[Sequence[int]], most: int) -> tuple[Tensor, Any]:
    """Run the texts once, and what they share once. Returns their mask [rows, tokens], padded on the left, and their
    keys and values.

    - `texts`: some may be empty. `most`: tokens of a pack at most; 0: each distinct text is a row of its own.
    """
    cache = _recorded_cache()(lm.model)
    if not most:
        which, seen, output = first_pass(lm, texts)
        if output is not None:
            cache = output.past_key_values
            select(cache, which)
        return seen[which], cache
    from transformers import DynamicCache

    tree = Tree.of(texts, most)
    found: Any = DynamicCache()
    lm.model.base_model(**tree.inputs(lm), **_with_cache(lm, found))
    for layer, each in enumerate(found.layers):
        cache.update(tree.of_texts(each.keys), tree.of_texts(each.values), layer)
    tokens = torch.arange(tree.nodes.shape[1])
    return (tokens >= len(tokens) - tree.lengths[:, None]).long(), cache


def first_pass(lm: LanguageModel, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Any]:
    """Run each distinct text once. Returns which of them each row has [rows], their mask [distinct, tokens], and the
    output with its cache (None where all texts are empty). Raises CannotReplay for a model without such a cache."""
    number = {text: i for i, text in enumerate(dict.fromkeys(map(tuple, texts)))}
    which = torch.tensor([number[tuple(text)] for text in texts])
    ids, seen = _padded(list(number), left=True)
    if not ids.shape[1]:
        return which, seen, None
    given = _inputs(lm, ids, seen, (seen.cumsum(1) - 1).clamp_min(0))
    output = lm.model.base_model(**given, **_with_cache(lm, _recorded_cache()(lm.model)))
    if not getattr(getattr(output, "past_key_values", None), "seen", None):
        raise CannotReplay("it keeps no keys and values of earlier tokens")
    return which, seen, output


def select(cache: Any, rows: Tensor) -> None:
    """Keep these rows of a cache. Each block's keys and values lie where the block does."""
    on: dict[torch.device, Tensor] = {}
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            device = layer.keys.device
            layer.batch_select_indices(on.setdefault(device, rows.to(device)))


def second_pass(
    lm: LanguageModel, parts: Sequence[Sequence[int]], first: Sequence[int], seen: Tensor, cache: Any
) -> Tensor:
    """[rows, columns, d_model] after the final norm.

    - `parts`: the token ids of each row's columns. `first`: the position of its column 0.
    - `cache`, `seen`: keys and values of the earlier tokens, and their mask [rows, tokens].
    """
    ids, live = _padded(parts)
    positions = torch.tensor(first)[:, None] + (live.cumsum(1) - 1).clamp_min(0)  # padding stays within the model's
    given = _inputs(lm, ids, torch.cat((seen, live), 1), positions)
    final: Tensor = lm.model.base_model(**given, **_with_cache(lm, cache)).last_hidden_state
    return final.to(lm.device)  # of a split model


def _with_cache(lm: LanguageModel, cache: Any) -> dict[str, Any]:
    """The arguments of a forward with this cache: transformers 5.24 has renamed `past_key_values` to `cache`."""
    return {"cache" if _takes(lm, "cache") else "past_key_values": cache, "use_cache": True}


def _takes(lm: LanguageModel, name: str) -> bool:
    return name in inspect.signature(lm.model.base_model.forward).parameters


def _inputs(lm: LanguageModel, ids: Tensor, mask: Tensor, positions: Tensor) -> dict[str, Tensor]:
    given = {"input_ids": ids, "attention_mask": mask}
    if _takes(lm, "position_ids"):  # Bloom counts the mask itself
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


def check(lm: LanguageModel, rows: Rows, ends: Tensor, last: Sequence[int], row: int, found: Tensor) -> None:
    """Raise CannotReplay unless one row is as in the whole model and every row is finite (a softmax over padding alone
    gives NaN).

    - `rows`: the texts. `last`: the token of each that is looked at.
    - `ends`: that token after the final norm, as it was found in parts, [rows, d_model].
    - `row`, `found`: the row to compare, and its [d_model].
    """
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(lm.model.forward).parameters else {}
    wanted = lm.model(input_ids=rows.ids[row : row + 1, : last[row] + 1], use_cache=False, **few).logits[0, -1]
    apart = ((logits_of(lm, found) - wanted).abs().max() / wanted.abs().max()).item()
    if not (apart <= tolerance(lm) and ends.isfinite().all()):
        raise CannotReplay("run in parts it gives other logits than as a whole")
