"""Gradients at sites, their edits, and graphs cut at a leaf. Findings by number."""

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from editkit.nethook import HookError, Trace, get_parameter, requires_grad
from tests.hooking import BLOCKS, DOWN, MLP, logits, loss_of


def test_v13_gradients_before_an_in_place_change() -> None:
    torch.manual_seed(0)  # some of the ReLU's inputs must be positive, and some not
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 1))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(net)
    reference[1] = nn.ReLU()
    seen = reference[0](x)
    (expected,) = torch.autograd.grad(reference[2](reference[1](seen)).sum(), seen)
    for frozen in (False, True):
        with requires_grad(net, only=[] if frozen else ["0.weight"]):
            for leaf in (False, True):
                with Trace(net, "0", grads=True, leaf=leaf, clone=True) as t:
                    net(x).sum().backward()
                assert torch.equal(t.grad, expected) and torch.equal(t.output, seen)
    assert (expected == 0).any() and (expected != 0).any()


def test_v14_gradients_where_the_input_is_a_keyword(llama: PreTrainedModel) -> None:
    site = "model.layers.1.self_attn"
    with Trace(llama, site, grads=True) as plain:
        loss_of(logits(llama)).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Trace(llama, site, grads=True, edit_grad=lambda g: 3 * g) as after:
            loss_of(logits(llama)).backward()
        with Trace(llama, site, grads=True, edit_grad=lambda g, site: 3 * g, when="before_edit") as early:
            loss_of(logits(llama)).backward()
    assert torch.equal(after.grad, 3 * plain.grad) and torch.equal(early.grad, plain.grad)
    with Trace(llama, site, edit_grad=cast(Any, lambda g: None), outputs=False):
        loss = loss_of(logits(llama))
    with pytest.raises(HookError, match=r"edit_grad at 'model.layers.1.self_attn' returned NoneType"):
        loss.backward()


def test_edited_gradients_reach_what_is_below(gpt2: PreTrainedModel) -> None:
    weight = get_parameter(gpt2, f"{DOWN}.weight")
    loss_of(logits(gpt2)).backward()
    assert weight.grad is not None
    plain = weight.grad.clone()
    gpt2.zero_grad()
    with Trace(gpt2, DOWN, edit_grad=lambda g: 2 * g):
        loss_of(logits(gpt2)).backward()
    assert weight.grad is not None and torch.allclose(weight.grad, 2 * plain, rtol=1e-5)


class TwoWays(nn.Module):
    """Two modules on one input; autograd hands the gradient of a sum to both as one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self.a(x) + self.b(x)
        return total


@pytest.mark.parametrize("weighted", [False, True], ids=["expanded", "shared"])
def test_a_gradient_changed_in_place_is_changed_at_its_site_alone(weighted: bool) -> None:
    net, x = TwoWays(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.arange(12.0).view(4, 3)  # a plain sum's gradient is one number, expanded

    def grads_with(change: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        net.zero_grad()
        with Trace(net, "a", edit_grad=change):
            out = net(x)
            ((out * weights) if weighted else out).sum().backward()
        grads = [net.a.weight.grad, net.b.weight.grad]
        return [grad.clone() for grad in grads if grad is not None]

    plain, anew, in_place = grads_with(lambda g: g), grads_with(lambda g: 0.5 * g), grads_with(lambda g: g.mul_(0.5))
    assert torch.equal(anew[0], 0.5 * plain[0]) and torch.equal(anew[1], plain[1])
    assert torch.equal(in_place[0], anew[0]) and torch.equal(in_place[1], anew[1])


def test_v15_frozen_models_and_leaves(gpt2: PreTrainedModel) -> None:
    with Trace(gpt2, BLOCKS, grads=True) as expected:
        loss_of(logits(gpt2)).backward()
    gpt2.zero_grad()
    with requires_grad(gpt2, only=[]), Trace(gpt2, BLOCKS, grads=True) as t:
        loss_of(logits(gpt2)).backward()
    for block in BLOCKS:
        assert torch.allclose(t[block].grad, expected[block].grad, atol=1e-8)
    # Only block 1 trains: block 0 has a gradient all the same.
    with requires_grad(gpt2, only=[f"{DOWN}.weight"]), Trace(gpt2, BLOCKS[:1], grads=True) as t:
        loss_of(logits(gpt2)).backward()
    assert torch.allclose(t.grad, expected[BLOCKS[0]].grad, atol=1e-8)
    gpt2.zero_grad()
    with Trace(gpt2, BLOCKS[1:], grads=True, leaf=True, detach=False) as t:
        loss_of(logits(gpt2)).backward()
    below, above = (get_parameter(gpt2, f"{block}.ln_1.weight") for block in (BLOCKS[0], BLOCKS[2]))
    assert below.grad is None and above.grad is not None
    for block in BLOCKS[1:]:
        assert torch.allclose(t[block].grad, expected[block].grad, atol=1e-8)


def test_a_leaf_frees_the_graph_below(gpt2: PreTrainedModel) -> None:
    alive = []
    handle = gpt2.get_submodule("transformer.h.0").register_forward_hook(lambda m, a, o: alive.append(weakref.ref(o)))
    for leaf in (False, True):
        with Trace(gpt2, BLOCKS[1], grads=True, leaf=leaf):
            loss = loss_of(logits(gpt2))
        assert (alive.pop()() is None) == leaf
    del loss
    handle.remove()


def test_gradient_needs_a_graph(gpt2: PreTrainedModel) -> None:
    refused = pytest.raises(HookError, match=r"No gradient can reach 'transformer.h.1.mlp': gradients are off")
    with refused, torch.no_grad(), Trace(gpt2, MLP, grads=True):
        logits(gpt2)

    class Counts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.long()

    net = nn.Sequential(Counts())
    with pytest.raises(HookError, match=r"its output is torch.int64"), Trace(net, "0", grads=True):
        net(torch.zeros(1))


def test_gradient_arrives_after_the_body(gpt2: PreTrainedModel) -> None:
    with Trace(gpt2, MLP, grads=True) as t:
        loss = loss_of(logits(gpt2))
    with pytest.raises(HookError, match=r"No gradient has reached 'transformer.h.1.mlp': call backward\(\)"):
        _ = t.grad
    loss.backward(retain_graph=True)
    first = t.grad
    (2 * loss).backward()
    assert torch.allclose(t.grad, 2 * first)  # of the latest backward, not summed
