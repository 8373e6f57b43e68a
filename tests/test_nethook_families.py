"""Trace on every family: edits take effect and are undone, gradients equal autograd's."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from editkit.nethook import Trace, TraceDict, get_module, get_parameter, hidden, with_hidden
from editkit.testing.tiny import SITES, build
from editkit.testing.untouched import count_hooks
from tests.hooking import logits, loss_of, uneven


def named_sites(kinds: Sequence[str] = ("block", "attention", "mlp", "down_projection")) -> list[Any]:
    return [
        pytest.param(family, name.format(1), id=f"{family}-{kind}")
        for family, sites in SITES.items()
        for kind in kinds
        if (name := getattr(sites, kind)) is not None
    ]


_BUILT: dict[str, nn.Module] = {}


def shared(family: str) -> nn.Module:
    return _BUILT.setdefault(family, build(family))


@pytest.mark.cells
@pytest.mark.parametrize(("family", "site"), named_sites())
def test_edit_takes_effect_and_is_undone(family: str, site: str) -> None:
    model = shared(family)
    before, hooks = logits(model), count_hooks(model)
    with Trace(model, site, edit=uneven, clone=True) as t:
        during = logits(model)
    assert (during - before).abs().max() > 1e-3
    assert torch.equal(logits(model), before) and count_hooks(model) == hooks
    assert t.output.shape[-1] == cast(Any, model).config.hidden_size


@pytest.mark.cells
@pytest.mark.parametrize(("family", "site"), named_sites())
def test_gradient_equals_autograd(family: str, site: str) -> None:
    model, seen = shared(family), []

    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        seen.append(hidden(output).clone())
        return with_hidden(output, seen[0])

    handle = get_module(model, site).register_forward_hook(watch)
    loss = loss_of(logits(model))
    handle.remove()
    (expected,) = torch.autograd.grad(loss, seen[0])
    with Trace(model, site, grads=True, outputs=False) as t:
        loss_of(logits(model)).backward()
    assert expected.any() and torch.allclose(t.grad, expected, atol=1e-7, rtol=1e-5)
    model.zero_grad()


@pytest.mark.parametrize(("family", "site"), named_sites(["down_projection"]))
def test_rank_one_sum_equals_the_weight_gradient(family: str, site: str) -> None:
    """Σ over tokens of g kᵀ, from one captured forward and backward, is autograd's gradient of W."""
    model = shared(family)
    weight = get_parameter(model, f"{site}.weight")
    with Trace(model, site, inputs=True, grads=True) as t:
        loss_of(logits(model)).backward()
    k, g = t.input.flatten(0, -2), t.grad.flatten(0, -2)  # [rows, d_ff], [rows, d_model]
    product = k.T @ g if isinstance(get_module(model, site), Conv1D) else g.T @ k
    assert weight.grad is not None and torch.allclose(product, weight.grad, atol=1e-6, rtol=1e-4)
    model.zero_grad()


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 3), lambda: Conv1D(3, 5)], ids=["Linear", "Conv1D"])
def test_rank_one_sum_in_either_orientation(make: Callable[[], nn.Module]) -> None:
    module: Any = make()
    net = nn.Sequential(module, nn.Tanh())
    with Trace(net, "0", inputs=True, grads=True) as t:
        net(torch.randn(2, 4, 5)).pow(2).sum().backward()
    product = torch.einsum("btk,btm->km", t.input, t.grad)
    expected: Any = module.weight.grad if isinstance(module, Conv1D) else module.weight.grad.T
    assert torch.allclose(product, expected, atol=1e-5)


@pytest.mark.parametrize("family", SITES)
def test_captured_values_are_the_models_own(family: str) -> None:
    """Attention and blocks, tensor or tuple: what is captured is what a plain hook sees."""
    model, sites = shared(family), SITES[family]
    names = [name.format(i) for i in range(2) for name in sites if name]
    plain = {}
    handles = [
        get_module(model, n).register_forward_hook(lambda m, a, o, n=n: plain.update({n: hidden(o).clone()}))
        for n in names
    ]
    with torch.no_grad():
        logits(model)
        for handle in handles:
            handle.remove()
        with TraceDict(model, names, inputs=True, clone=True) as t:
            logits(model)
    assert sorted(t) == sorted(names)
    for name in names:
        assert torch.equal(t[name].output, plain[name]) and t[name].input.numel()
