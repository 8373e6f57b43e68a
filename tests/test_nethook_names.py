"""Modules and parameters by name; what is refused. Findings by number."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from editkit.nethook import (
    HookError,
    NameNotFound,
    Trace,
    get_module,
    get_parameter,
    replace_module,
    replaced,
    requires_grad,
    select,
)
from tests.hooking import BLOCKS, DOWN, MLP, logits, uneven


def test_v01_tied_parameter_names(gpt2: PreTrainedModel) -> None:
    tied = get_parameter(gpt2, "lm_head.weight")
    assert tied is get_parameter(gpt2, "transformer.wte.weight")
    assert isinstance(tied, nn.Parameter)
    both = select(gpt2, re.compile(r".*(wte|lm_head)\.weight"), kind="parameter")
    assert both == ["transformer.wte.weight"]
    assert select(gpt2, "lm_head.*", kind="parameter") == ["lm_head.weight"]


def test_v02_replace_a_top_level_module() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    old, new = net[0], nn.Identity()
    assert replace_module(net, "0", new) is old and net[0] is new
    with pytest.raises(HookError, match="cannot replace the model itself"):
        replace_module(net, "", new)


def test_replaced_restores_after_an_error(gpt2: PreTrainedModel) -> None:
    old = get_module(gpt2, MLP)
    before = logits(gpt2)
    with pytest.raises(ZeroDivisionError), replaced(gpt2, MLP, nn.Identity()) as new:
        assert get_module(gpt2, MLP) is new and not torch.equal(logits(gpt2), before)
        raise ZeroDivisionError
    assert get_module(gpt2, MLP) is old and torch.equal(logits(gpt2), before)


@pytest.mark.parametrize(
    ("ask", "wanted"),
    [
        (
            lambda m: get_module(m, "transformer.h.1.mpl"),
            r"GPT2LMHeadModel has no module .*mean 'transformer.h.1.mlp'\?",
        ),
        (
            lambda m: get_parameter(m, "transformer.h.1.mlp.c_proj.wieght"),
            r"mean 'transformer.h.1.mlp.c_proj.weight'\?",
        ),
        (lambda m: get_parameter(m, "transformer.hh.1.mlp.c_proj.weight"), r"mean 'transformer.h.1.mlp.c_proj.weight'"),
        (lambda m: get_parameter(m, MLP), "has no parameter 'transformer.h.1.mlp'"),
        (lambda m: get_module(m, "module.transformer.h.1.mlp"), r"did you mean 'transformer.h.1.mlp'\?"),
        (lambda m: get_module(m, "zzz"), "it has transformer, transformer.wte"),
        (lambda m: get_module(m, "transformer.h.*"), r"use select\(model, 'transformer.h.\*'\)"),
        (lambda m: select(m, "transformer.h.*.mpl"), r"matches 'transformer.h.\*.mpl' as a whole: names look like"),
        (lambda m: select(m, re.compile("mlp")), "as a whole"),
        (lambda m: Trace(m, "transformer.h.9").__enter__(), "did you mean 'transformer.h."),
        (lambda m: Trace(m, MLP, edit={DOWN: uneven}), r"edit names \['transformer.h.1.mlp.c_proj'\]"),
        (
            lambda m: Trace(m, MLP)[DOWN],
            "'transformer.h.1.mlp.c_proj' is not traced here: the sites are transformer.h.1",
        ),
    ],
)
def test_unknown_names_teach(gpt2: PreTrainedModel, ask: Callable[[nn.Module], object], wanted: str) -> None:
    with pytest.raises(NameNotFound, match=wanted) as caught:
        ask(gpt2)
    assert isinstance(caught.value, LookupError) and isinstance(caught.value, HookError)


def test_select_globs(gpt2: PreTrainedModel) -> None:
    assert select(gpt2, "transformer.h.*") == BLOCKS
    assert select(gpt2, "transformer.h.[0-1]") == BLOCKS[:2]
    assert select(gpt2, "transformer.h.?.mlp") == [f"{b}.mlp" for b in BLOCKS]
    assert len(select(gpt2, "**.mlp.**")) == 3 * len(list(get_module(gpt2, MLP).children()))
    assert select(gpt2, re.compile(r".*\.h\.\d\.attn")) == [f"{b}.attn" for b in BLOCKS]
    assert select(gpt2, "**.c_proj.bias", kind="parameter")[1] == "transformer.h.0.mlp.c_proj.bias"


def test_requires_grad_restores_every_flag(gpt2: PreTrainedModel) -> None:
    gpt2.get_parameter("transformer.wpe.weight").requires_grad_(False)
    flags = [p.requires_grad for p in gpt2.parameters()]
    with pytest.raises(ZeroDivisionError), requires_grad(gpt2, only=[f"{DOWN}.weight", "lm_head.weight"]):
        on = {n for n, p in gpt2.named_parameters() if p.requires_grad}
        assert on == {f"{DOWN}.weight", "transformer.wte.weight"}
        raise ZeroDivisionError
    assert [p.requires_grad for p in gpt2.parameters()] == flags
    with pytest.raises(NameNotFound), requires_grad(gpt2, only=["nope"]):
        pass
    assert [p.requires_grad for p in gpt2.parameters()] == flags
    with requires_grad(gpt2, only=f"{DOWN}.weight"):
        assert sum(p.requires_grad for p in gpt2.parameters()) == 1
    gpt2.get_parameter("transformer.wpe.weight").requires_grad_(True)


def test_v11_offloaded_weights_are_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2, device="meta"))
    with pytest.raises(HookError, match=r"'0.weight' is offloaded \(meta device\): .*align_module_device"):
        get_parameter(net, "0.weight")
    assert get_parameter(net, "0.weight", allow_meta=True) is net[0].weight
    with requires_grad(net):
        assert not net[0].weight.requires_grad


def test_quantised_weights_are_refused() -> None:
    class Params4bit(nn.Parameter):
        pass

    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].weight = Params4bit(torch.zeros(2, 1, dtype=torch.uint8), requires_grad=False)
    net[1].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.float8_e4m3fn), requires_grad=False)
    for name in ("0.weight", "1.weight"):
        with pytest.raises(HookError, match=f"'{name}' is quantised .*: load in float32"):
            get_parameter(net, name)
    assert get_parameter(net, "2.weight") is net[2].weight


def test_v17_parametrised_weights_are_refused() -> None:
    class Double(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    net = nn.Sequential(nn.Linear(2, 2))
    original = net[0].weight
    parametrize.register_parametrization(net[0], "weight", Double())
    with pytest.raises(HookError, match=r"'0.weight' is parametrised.*: call parametrize.remove_parametrizations"):
        get_parameter(net, "0.weight")
    assert get_parameter(net, "0.bias") is net[0].bias
    assert get_parameter(net, "0.parametrizations.weight.original") is original
