"""Replay: the same as the whole model, in every family, from every block; and a refusal where it is not."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from editkit.models.columns import columns
from editkit.models.head import logits_of
from editkit.models.load import LanguageModel
from editkit.models.passes import CannotReplay
from editkit.models.replay import replay
from editkit.models.tokens import Rows, tokenise
from editkit.nethook import Trace, get_module, get_parameter, requires_grad
from editkit.testing.tiny import SITES, tiny_lm
from editkit.testing.untouched import count_hooks, everything

FAMILIES = list(SITES)
TEXTS = [
    "The Eiffel Tower is located in the city of Rome",
    "On a long day of the summer near the old river they said it. The Eiffel Tower is in the city of Rome and more",
    "Tower is",
    "Because of this. The Eiffel Tower is located in",
]
CLOSE = 5e-6  # of the largest logit; both are float32


def ragged(lm: LanguageModel) -> tuple[Rows, list[int], list[int]]:
    """(rows, first, last): changes at a row's very start, in its middle (behind a window of 8), and at its end."""
    rows = tokenise(lm, TEXTS)
    last = [rows.last(row) for row in range(len(TEXTS))]
    return rows, [3, last[1] - 4, 0, last[3]], last


def whole(lm: LanguageModel, rows: Rows, site: str, first: list[int], change: Tensor) -> Tensor:
    """Logits of the whole model with `change` added to what enters `site` at token `first` of each row."""

    def add(h: Tensor) -> Tensor:
        h = h.clone()
        h[torch.arange(len(first)), torch.tensor(first)] += change
        return h

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(Trace(lm.model, site, outputs=False, edit_input=add))
        logits: Tensor = lm.model(**rows.inputs(), use_cache=False).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_from_every_block_it_is_the_whole_model(family: str) -> None:
    lm = tiny_lm(family)
    rows, first, last = ragged(lm)
    hooks = count_hooks(lm.model)
    for start in range(lm.layers + 1):
        ready = replay(lm, rows, first, last, start)
        change = torch.randn(len(first), ready.stream.shape[-1], generator=torch.Generator().manual_seed(start))
        site = lm.architecture.block.format(start) if start < lm.layers else lm.architecture.final_norm
        wanted = whole(lm, rows, site, first, change)
        with torch.no_grad():
            found = logits_of(lm, ready.run(torch.cat((ready.stream[:, :1] + change[:, None], ready.stream[:, 1:]), 1)))
        for row, (begin, end) in enumerate(zip(first, last, strict=True)):
            apart = (found[row, : end - begin + 1] - wanted[row, begin : end + 1]).abs().max()
            assert apart <= CLOSE * wanted.abs().max(), (family, start, row)
        assert (wanted[0, first[0]] - whole(lm, rows, site, first, 0 * change)[0, first[0]]).abs().max() > 0.1
    assert count_hooks(lm.model) == hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_some_of_the_rows_give_the_same_as_all(family: str) -> None:
    lm = tiny_lm(family)
    rows, first, last = ragged(lm)
    ready = replay(lm, rows, first, last, 1)
    kept = torch.tensor([3, 1])
    some = ready.of(kept)
    with torch.no_grad():
        wanted, found = ready.run(ready.stream)[kept], some.run(some.stream)
    assert torch.equal(some.first, ready.first[kept])
    assert (found - wanted).abs().max() <= CLOSE * wanted.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(family: str) -> None:
    lm = tiny_lm(family)
    rows, first, last = ragged(lm)
    at = torch.tensor(last)
    each = torch.arange(len(last))
    block = lm.architecture.block.format(1)
    with Trace(lm.model, block, outputs=False, grads=True) as trace:
        torch.autograd.backward(lm.model(**rows.inputs(), use_cache=False).logits[each, at].logsumexp(-1).sum())
    wanted = torch.stack([trace.grad[row, begin] for row, begin in enumerate(first)])
    ready = replay(lm, rows, first, last, 2)
    stream = ready.stream.clone().requires_grad_()
    final = ready.run(stream)[ready.at(each, at)]
    (gradient,) = torch.autograd.grad(logits_of(lm, final).logsumexp(-1).sum(), stream)
    assert (gradient[:, 0] - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    lm.model.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
def test_columns_give_the_logits_of_whole_rows(family: str) -> None:
    """Targets of one token and of several behind one prompt, and another prompt."""
    lm = tiny_lm(family)
    rows = tokenise(lm, [TEXTS[0], TEXTS[0] + " and Paris again", TEXTS[3]])
    shared = rows.last(0)
    first, last = [shared, shared, rows.last(2)], [shared - 1, rows.last(1), rows.last(2)]
    with torch.no_grad():
        wanted = lm.model(**rows.inputs(), use_cache=False).logits
        clean = columns(lm, rows, first, last)
        for row, (begin, end) in enumerate(zip(first, last, strict=True)):
            at = torch.arange(begin - 1, end + 1)
            found = logits_of(lm, clean.final[clean.at(torch.full_like(at, row), at)])
            assert (found - wanted[row, at]).abs().max() <= CLOSE * wanted.abs().max()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_backends(attention: str) -> None:
    lm = tiny_lm("llama")
    lm.model.set_attn_implementation(attention)
    rows, first, last = ragged(lm)
    ready = replay(lm, rows, first, last, 1)
    wanted = whole(lm, rows, lm.architecture.block.format(1), first, torch.ones(32))
    stream = ready.stream.clone()
    stream[:, 0] += 1
    with torch.no_grad():
        found = logits_of(lm, ready.run(stream))
    for row, (begin, end) in enumerate(zip(first, last, strict=True)):
        assert (found[row, : end - begin + 1] - wanted[row, begin : end + 1]).abs().max() < CLOSE * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_as_it_can_be(dtype: torch.dtype) -> None:
    lm = tiny_lm("qwen3", dtype=dtype)
    rows, first, last = ragged(lm)
    ready = replay(lm, rows, first, last, 1)
    wanted = whole(lm, rows, lm.architecture.block.format(1), first, torch.zeros(32, dtype=dtype))
    with torch.no_grad():
        found = logits_of(lm, ready.run(ready.stream))
    apart = (found[0, : last[0] - first[0] + 1] - wanted[0, first[0] : last[0] + 1]).abs().max()
    assert apart < 16 * torch.finfo(dtype).eps * wanted.abs().max()


def test_a_head_in_pieces_gives_what_it_gives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("editkit.models.head.PIECE", 100)  # the last piece is a shorter one
    lm = tiny_lm("gpt2")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    weight = get_parameter(lm.model, "lm_head.weight").detach().double()
    up = torch.randn(5, len(weight), generator=torch.Generator().manual_seed(1))
    given = x.clone().requires_grad_()
    with requires_grad(lm.model, only=[]):
        found = logits_of(lm, given)
        (gradient,) = torch.autograd.grad((found * up).sum(), given)
    assert len(weight) % 100 and (found.double() - x.double() @ weight.T).abs().max() < 1e-5
    assert (gradient.double() - up.double() @ weight).abs().max() < 1e-4


def test_a_head_that_learns_or_is_watched_is_called() -> None:
    lm = tiny_lm("gpt2")
    x = torch.randn(5, 32)
    (gradient,) = torch.autograd.grad(logits_of(lm, x).sum(), get_parameter(lm.model, "lm_head.weight"))
    assert gradient.abs().sum() > 0
    with torch.no_grad(), Trace(lm.model, "lm_head") as trace:
        assert torch.equal(logits_of(lm, x), trace.output)


def test_a_text_before_the_change_is_run_once() -> None:
    lm = tiny_lm("gpt2")
    rows = tokenise(lm, [TEXTS[0]] * 3)
    seen: list[tuple[int, ...]] = []
    embedding = get_module(lm.model, "transformer.wte")
    handle = embedding.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    replay(lm, rows, [4, 4, 5], [6, 6, 6], 1)
    handle.remove()
    assert seen[:2] == [(1, 5), (3, 3)]  # the longer prefix holds the shorter one; then the columns of every row


def test_a_model_that_does_something_between_its_parts_is_refused() -> None:
    lm = tiny_lm("gpt2")
    rows, first, last = ragged(lm)
    before = everything(lm.model)

    def doubled(module: nn.Module, args: Any, output: Any) -> None:
        output.last_hidden_state = 2 * output.last_hidden_state

    handle = get_module(lm.model, "transformer").register_forward_hook(doubled)
    with pytest.raises(CannotReplay, match="other logits than as a whole"):
        replay(lm, rows, first, last, 1)
    handle.remove()
    replay(lm, rows, first, last, 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in everything(lm.model).items())
