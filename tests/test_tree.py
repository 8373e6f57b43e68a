"""Texts as trees: each token once, in packs; and in every family the hidden states are those of the text alone."""

from typing import Any

import pytest
import torch
from torch import nn

from editkit.models import columns as reading
from editkit.models import passes
from editkit.models.columns import Packed, columns
from editkit.models.head import logits_of
from editkit.models.load import LanguageModel
from editkit.models.passes import CannotReplay, Columns
from editkit.models.replay import replay
from editkit.models.tokens import Rows, tokenise
from editkit.models.tree import Tree, room
from editkit.nethook import get_module
from editkit.testing.tiny import SITES, tiny_lm
from editkit.testing.untouched import count_hooks

FAMILIES = list(SITES)
CLOSE = 5e-6  # of the largest logit; both are float32
TEXTS = [
    "The Louvre is in",
    "The Louvre stands in the city",
    "The Eiffel Tower is in",
    "The Eiffel Tower is in Rome. The Louvre stands in the city",
    "Tower",
    "The Louvre is in",
]


def wide_lm(family: str) -> LanguageModel:
    """A tiny model whose window, if it has one, holds the texts; GPT-Neo's is made with the model."""
    lm = tiny_lm(family)
    config: Any = lm.model.config
    if getattr(config, "sliding_window", None):
        config.sliding_window = 100
    if family == "gpt_neo":
        for number in range(lm.layers):
            attention: Any = get_module(lm.model, f"transformer.h.{number}.attn.attention")
            attention.bias = torch.tril(torch.ones_like(attention.bias))
        config.window_size = 100
    return lm


def asked(lm: LanguageModel, texts: list[str] = TEXTS) -> tuple[Rows, list[int], list[int]]:
    """(rows, first, last): the last two tokens of each row are read, or its only one."""
    rows = tokenise(lm, texts)
    last = [rows.last(row) for row in range(len(texts))]
    return rows, [max(1, end) for end in last], last


@pytest.mark.parametrize("most", [1, 5, 8, 100])
def test_a_tree_holds_each_text_and_no_beginning_twice(most: int) -> None:
    texts = [[1, 2, 3, 4], [1, 2, 3], [1, 2, 9], [7], [1, 2, 3, 4], [], [1, 5, 3, 4, 4, 4]]
    tree = Tree.of(texts, most)
    longest = max(map(len, texts))
    for text, pack, nodes, length in zip(texts, tree.pack, tree.nodes, tree.lengths, strict=True):
        mine = nodes[longest - length :]
        assert tree.ids[pack, mine].tolist() == text and tree.depth[pack, mine].tolist() == list(range(len(text)))
        for depth, node in enumerate(mine.tolist()):
            assert tree.sees[pack, node].nonzero()[:, 0].tolist() == sorted(mine[: depth + 1].tolist())
    for pack in range(len(tree.ids)):
        beginnings = {
            tuple(t[: end + 1]) for t, p in zip(texts, tree.pack, strict=True) if p == pack for end in range(len(t))
        }
        used = {
            int(n)
            for row, p, k in zip(tree.nodes, tree.pack, tree.lengths, strict=True)
            if p == pack
            for n in row[longest - k :]
        }
        assert len(used) == len(beginnings) <= tree.ids.shape[1] <= max(longest, most)
    assert most < 100 or tree.ids.shape == (1, 11)


@pytest.mark.cells
@pytest.mark.parametrize("packs", ["one", "several"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_gives_the_logits_of_whole_rows(family: str, packs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if packs == "several":
        monkeypatch.setattr("editkit.models.tree.PACK", 24)
    lm = wide_lm(family)
    rows, first, last = asked(lm)
    hooks = count_hooks(lm.model)
    with torch.no_grad():
        wanted = lm.model(**rows.inputs(), use_cache=False).logits
        clean = columns(lm, rows, first, last)
        assert isinstance(clean, Columns if family == "bloom" else Packed)
        assert isinstance(clean, Columns) or (len(clean.tree.ids) == 1) == (packs == "one")
        for row, end in enumerate(last):
            at = torch.arange(first[row] - 1, end + 1)
            found = logits_of(lm, clean.final[clean.at(torch.full_like(at, row), at)])
            assert (found - wanted[row, at]).abs().max() <= CLOSE * wanted.abs().max()
    assert count_hooks(lm.model) == hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_behind_a_tree_is_replay_behind_padded_rows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys, values, streams and columns; a row without a token before its column 0 among them."""
    lm = wide_lm(family)
    rows, _, last = asked(lm)
    first = [max(0, end - number) for number, end in enumerate(last)]
    packed = replay(lm, rows, first, last, 1)
    monkeypatch.setattr(passes, "room", lambda lm, longest: 0)
    plain = replay(lm, rows, first, last, 1)
    assert lm.model not in passes.refused and min(first) == 0
    with torch.no_grad():
        found, wanted = packed.run(packed.stream), plain.run(plain.stream)
    for row, (begin, end) in enumerate(zip(first, last, strict=True)):
        live = slice(end - begin + 1)
        assert (found[row, live] - wanted[row, live]).abs().max() <= 2e-5 * wanted.abs().max()
        for layer, each in plain.kept.items():
            for one, other in zip(packed.kept[layer], each, strict=True):
                one, other = (side[row, :, side.shape[2] - begin :] for side in (one, other))
                assert begin == 0 or (one - other).abs().max() <= 2e-5 * other.abs().max()


def test_texts_longer_than_a_window_are_not_packed() -> None:
    lm = tiny_lm("gemma2")  # a window of 8
    assert room(lm, 8) == 8 and room(lm, 9) == 0
    rows, first, last = asked(lm)
    assert isinstance(columns(lm, rows, first, last), Columns)
    assert isinstance(columns(lm, *asked(lm, TEXTS[:1])), Packed)


def test_a_kernel_that_takes_no_mask_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    assert room(lm, 20) == 256
    monkeypatch.setattr(lm.model.config, "_attn_implementation_internal", "flash_attention_2")
    assert room(lm, 20) == 0


def test_a_model_that_ignores_the_packs_mask_is_run_in_rows_and_not_asked_again() -> None:
    lm = tiny_lm("gpt2")
    rows, first, last = asked(lm)
    seen: list[int] = []

    def causal(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        seen.append(0 if mask is None else mask.ndim)
        return args, kwargs | {"attention_mask": None} if seen[-1] == 4 else kwargs

    handle = get_module(lm.model, "transformer").register_forward_pre_hook(causal, with_kwargs=True)
    with torch.no_grad():
        wanted = lm.model(**rows.inputs(), use_cache=False).logits
        for _ in range(2):
            clean = columns(lm, rows, first, last)
            assert isinstance(clean, Columns)
            found = logits_of(lm, clean.final[clean.at(torch.arange(len(last)), torch.tensor(last))])
            assert (found - wanted[torch.arange(len(last)), last]).abs().max() <= CLOSE * wanted.abs().max()
    assert seen.count(4) == 1
    replay(lm, rows, first, last, 1)
    assert seen.count(4) == 1
    handle.remove()
    assert isinstance(columns(lm, rows, first, last), Packed)


def test_weights_that_are_not_finite_do_not_refuse_packs() -> None:
    lm = tiny_lm("gpt2")
    weight = lm.model.get_parameter("transformer.h.0.mlp.c_proj.weight")
    held = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
        with pytest.raises(CannotReplay):
            columns(lm, *asked(lm))
        weight.copy_(held)
    assert isinstance(columns(lm, *asked(lm)), Packed)


def test_a_model_is_checked_again_for_longer_texts_and_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2")
    checks: list[int] = []
    check = passes.check

    def counting(*args: Any) -> None:
        checks.append(1)
        check(*args)

    monkeypatch.setattr(reading, "check", counting)
    for texts, expected in ((TEXTS[:1], 1), (TEXTS[:1], 1), (TEXTS[:2], 2), (TEXTS[:1], 2)):
        columns(lm, *asked(lm, texts))
        assert len(checks) == expected
    handle = get_module(lm.model, "transformer.h.1").register_forward_hook(lambda *_: None)
    columns(lm, *asked(lm, TEXTS[:1]))
    handle.remove()
    assert len(checks) == 3
