"""The findings about earlier hook layers that concern writing, restoring, comparing and batching.

V12, V16, V18, V19 and V25; the others are in test_nethook.py under their numbers. V12 and V19 are also shown on whole
models in test_snapshot.py (`test_subtraction_does_not_give_the_bits_back`, `test_every_bit_is_back`).
"""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from editkit.edits import Edit, base_of, low_rank_delta
from editkit.models.architecture import architecture_of, families
from editkit.models.load import LanguageModel
from editkit.models.snapshot import Snapshot, bits, same_bits
from editkit.models.tokens import tokenise
from editkit.nethook import get_parameter
from editkit.testing.tiny import SITES, build, byte_level_tokenizer, tiny_lm


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_v12_subtracting_does_not_restore_and_a_snapshot_does(dtype: torch.dtype) -> None:
    net = nn.Linear(256, 256, bias=False).to(dtype)
    with torch.no_grad():
        net.weight.copy_(0.02 * drawn(256, 256, seed=0))
    delta = (0.02 * drawn(256, 256, seed=1)).to(dtype)
    before = net.weight.detach().clone()
    snapshot = Snapshot.take(net, ["weight"])
    with torch.no_grad():
        net.weight += delta
        net.weight -= delta
    unequal = (bits(net.weight) != bits(before)).float().mean()
    assert unequal > 0.05 and snapshot.verify().unequal == ("weight",)
    snapshot.restore()
    assert same_bits(net.weight, before) and snapshot.verify().exact


def test_v16_post_accumulate_hooks_see_backward_and_not_autograd_grad() -> None:
    """So gradients of parameters that are watched must come from backward(); the hook may free them at once."""
    net, seen = nn.Linear(3, 2), []

    def frees(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        seen.append(parameter.grad.clone())
        parameter.grad = None

    handle = net.weight.register_post_accumulate_grad_hook(frees)
    x = drawn(4, 3, seed=0)
    (expected,) = torch.autograd.grad(net(x).pow(2).sum(), net.weight)
    assert not seen
    net(x).pow(2).sum().backward()
    assert len(seen) == 1 and torch.equal(seen[0], expected) and net.weight.grad is None
    handle.remove()
    net(x).pow(2).sum().backward()
    assert len(seen) == 1 and net.weight.grad is not None
    with pytest.raises(RuntimeError, match="require"):
        nn.Linear(1, 1).requires_grad_(False).weight.register_post_accumulate_grad_hook(frees)


def edit_of(lm: LanguageModel, layer: int = 1) -> Edit:
    site = lm.architecture.down(layer)
    d_ff, d_model = lm.model.config.n_inner, lm.model.config.n_embd
    return Edit((low_rank_delta(lm, site, drawn(d_model, 1, seed=0), drawn(1, d_ff, seed=1)),), base_of(lm))


@pytest.mark.parametrize("how", ["Snapshot.restore", "Snapshot as context", "Edit.applied", "Edit.apply"])
@pytest.mark.parametrize("raised", [False, True])
def test_v18_writing_and_restoring_keep_the_parameter_and_the_optimisers_reference(
    how: str, raised: type[BaseException] | None
) -> None:
    lm = tiny_lm("gpt2")
    name = lm.architecture.down(1) + ".weight"
    weight, edit = get_parameter(lm.model, name), edit_of(lm)
    optimiser = torch.optim.SGD(lm.model.parameters(), lr=0.1)
    everyone = {n: (id(p), p.data_ptr()) for n, p in lm.model.named_parameters(remove_duplicate=False)}
    listed = [id(p) for group in optimiser.param_groups for p in group["params"]]

    def changed(value: Tensor) -> bool:
        return not same_bits(value, before)

    before = weight.detach().clone()
    try:
        if how == "Edit.applied":
            with edit.applied(lm):
                assert changed(weight)
                if raised:
                    raise ZeroDivisionError
        elif how == "Snapshot as context":
            with Snapshot.take(lm.model, [name]):
                weight.data.mul_(2)
                if raised:
                    raise ZeroDivisionError
        else:
            snapshot = edit.apply(lm) if how == "Edit.apply" else Snapshot.take(lm.model, [name])
            with torch.no_grad():
                weight.mul_(2)
            assert changed(weight)
            snapshot.restore()
    except ZeroDivisionError:
        assert raised
    assert not changed(weight)
    assert get_parameter(lm.model, name) is weight and isinstance(weight, nn.Parameter) and weight.requires_grad
    assert {n: (id(p), p.data_ptr()) for n, p in lm.model.named_parameters(remove_duplicate=False)} == everyone
    assert [id(p) for group in optimiser.param_groups for p in group["params"]] == listed

    # And the reference is live: a step of the optimiser still moves the model's own weight.
    lm.model(torch.arange(6)[None]).logits.pow(2).mean().backward()
    optimiser.step()
    assert changed(get_parameter(lm.model, name))


def test_v18_a_write_meanwhile_does_not_give_silently_wrong_gradients() -> None:
    """An edit between forward and backward is refused by torch: `.data.mul_()` would give the edited weight's gradient.

    A write that goes round the version counter passes unnoticed.
    """
    lm = tiny_lm("gpt2")
    loss = lm.model(torch.arange(6)[None]).logits.pow(2).mean()
    edit = edit_of(lm)
    with edit.applied(lm), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_v19_verify_compares_bits() -> None:
    """A NaN equals itself and -0.0 is not 0.0, nor is a NaN another NaN."""
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[float("nan"), 0.0], [-0.0, 1.0]]))
    snapshot = Snapshot.take(net, ["weight"])
    elsewhere = Snapshot.take(net, [])  # by digest
    assert not torch.equal(net.weight, net.weight.clone())  # the fault: identical NaNs are "unequal"
    assert snapshot.verify().exact and elsewhere.verify().exact

    for row, column, value in ((0, 1, -0.0), (1, 0, 0.0)):
        kept = net.weight.detach().clone()
        with torch.no_grad():
            net.weight[row, column] = value
        assert torch.equal(net.weight.nan_to_num(), kept.nan_to_num())  # the fault: 0.0 "equals" -0.0
        assert snapshot.verify().unequal == elsewhere.verify().unequal == ("weight",)
        snapshot.restore()
        assert snapshot.verify().exact and elsewhere.verify().exact

    with torch.no_grad():
        net.weight.view(torch.int32)[0, 0] ^= 1  # still a NaN, with another payload
    assert net.weight[0, 0].isnan() and snapshot.verify().unequal == ("weight",)


TEXTS = ["The capital of Atlas", "Who", "A much longer text, of several sentences. It says nothing.", "It is so"]


def language_model(family: str) -> LanguageModel:
    """With the families that editkit edits, their own entry; with the others, one that names the embedding."""
    if family in families():
        return tiny_lm(family)
    tokenizer = byte_level_tokenizer()
    model = build(family, vocab_size=len(tokenizer))
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    architecture = dataclasses.replace(architecture_of("gpt2"), family=family, embedding=embedding)
    return LanguageModel(f"tiny-{family}", model, tokenizer, architecture)


@torch.no_grad()
def last_logits(lm: LanguageModel, texts: list[str]) -> Tensor:
    rows = tokenise(lm, texts)
    logits = lm.model(**rows.inputs(), use_cache=False).logits
    return torch.stack([logits[row, rows.last(row)] for row in range(len(texts))])


@pytest.mark.parametrize("family", SITES)
def test_v25_a_batch_gives_each_text_the_logits_it_has_alone(family: str) -> None:
    """Padding on one side or the other moves no position: absolute, rotary, ALiBi and windowed models alike."""
    lm = language_model(family)
    lengths = tokenise(lm, TEXTS).mask.sum(1)
    assert lengths.max() > 2 * lengths.min()  # there is padding, and beyond the windows of 8
    alone = torch.cat([last_logits(lm, [text]) for text in TEXTS])
    assert torch.allclose(last_logits(lm, TEXTS), alone, atol=2e-5, rtol=1e-4)


def test_v25_left_padding_without_positions_would_show() -> None:
    """The fault itself, so that the test above is known to be able to fail."""
    lm = language_model("gpt2")
    rows = tokenise(lm, TEXTS)
    ids, mask = torch.zeros_like(rows.ids), torch.zeros_like(rows.mask)
    for row in range(len(TEXTS)):
        length = rows.last(row) + 1
        ids[row, -length:], mask[row, -length:] = rows.ids[row, :length], 1
    alone = torch.cat([last_logits(lm, [text]) for text in TEXTS])
    with torch.no_grad():
        padded = lm.model(ids, attention_mask=mask).logits[:, -1]
        placed = lm.model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits[:, -1]
    assert (padded - alone).abs().max() > 1e-2
    assert torch.allclose(placed, alone, atol=2e-5, rtol=1e-4)
