"""A Trace from entry to exit: refusals, early stop, exceptions, other hooks and threads. Findings by number."""

import copy
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from editkit.nethook import HookError, NameNotFound, Trace, get_module, get_parameter
from editkit.testing.tiny import build
from editkit.testing.untouched import count_hooks
from tests.hooking import BLOCKS, DOWN, IDS, MLP, logits, loss_of, uneven


def test_v06_a_site_that_never_runs(gpt2: PreTrainedModel) -> None:
    for stop in (False, True):
        with (
            pytest.raises(
                HookError, match=r"Never ran inside the trace: 'lm_head', 'transformer.ln_f'. Run the model inside"
            ),
            Trace(gpt2, ["lm_head", MLP, "transformer.ln_f"], stop=stop),
        ):
            get_module(gpt2, MLP)(torch.zeros(1, 2, 32))
        with pytest.raises(ZeroDivisionError), Trace(gpt2, MLP, stop=stop):
            raise ZeroDivisionError  # not hidden behind the missing site


def test_v08_a_failing_set_up_leaves_no_hook(gpt2: PreTrainedModel) -> None:
    hooks = count_hooks(gpt2)
    with pytest.raises(NameNotFound), Trace(gpt2, [MLP, "transformer.h.99"], stop=True):
        pass
    assert count_hooks(gpt2) == hooks

    class Unhookable(nn.Module):
        def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
            raise ZeroDivisionError

    net = nn.Sequential(nn.Linear(1, 1), Unhookable())
    with pytest.raises(ZeroDivisionError), Trace(net, ["0", "1"]):
        pass
    assert count_hooks(net) == 0


@pytest.mark.filterwarnings("ignore")
def test_v10_compiled_models_are_refused(gpt2: PreTrainedModel) -> None:
    compiled: Any = torch.compile(gpt2, backend="eager")
    with pytest.raises(HookError, match="is compiled and would ignore the hooks: trace and call the model before"):
        Trace(compiled, MLP).__enter__()
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    net[0].compile(backend="eager")
    for site in ("0", "0.0"):
        with pytest.raises(HookError, match="'0' is compiled"):
            Trace(net, site).__enter__()
    assert count_hooks(net) == 0
    # Edits of weights are honoured in a compiled model, so its parameters may be reached, by either name.
    for prefix in ("", "_orig_mod."):
        assert get_parameter(compiled, f"{prefix}{DOWN}.weight") is get_parameter(gpt2, f"{DOWN}.weight")


def test_v21_activation_checkpointing_inside_a_block(gpt2: PreTrainedModel) -> None:
    model = build("gpt2").train()
    model.gradient_checkpointing_enable()
    twice = "' runs twice under activation checkpointing: "
    hooks_too = "__call__" in vars(GradientCheckpointingLayer)  # before transformers 5.23
    way = "call model.eval" if hooks_too else "trace 'transformer.h.1' or"
    with pytest.raises(HookError, match=f"'transformer.h.1.mlp{twice}{way}"):
        Trace(model, MLP).__enter__()
    if hooks_too:
        with pytest.raises(HookError, match=f"'transformer.h.1{twice}{way}"):
            Trace(model, BLOCKS[1]).__enter__()
    else:
        with Trace(model, BLOCKS[1], grads=True) as t:
            loss_of(logits(model)).backward()
        assert t.count == 1 and t.grad.any()
    with Trace(model.eval(), MLP):
        logits(model)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return output

    net = Checkpointed()
    with pytest.raises(HookError, match="'inner' ran again during backward"), Trace(net, "inner"):
        net(torch.zeros(1, 2)).sum().backward()


def test_v22_stop_refuses_the_callers_cache(gpt2: PreTrainedModel) -> None:
    cache = gpt2(IDS, use_cache=True).past_key_values
    lengths = [layer.get_seq_length() for layer in cache.layers]
    calls: list[Callable[[], Any]] = [lambda: gpt2(IDS, past_key_values=cache), lambda: gpt2(IDS, cache)]
    for call in calls:
        with (
            pytest.raises(HookError, match=r"stop=True would leave the given cache half filled.*use_cache=False"),
            Trace(gpt2, MLP, stop=True),
        ):
            call()
    assert [layer.get_seq_length() for layer in cache.layers] == lengths
    with Trace(gpt2, MLP, stop=True):
        gpt2(IDS)  # a cache of the model's own is dropped with the call


def test_v24_a_deep_copy_carries_only_dead_hooks(gpt2: PreTrainedModel) -> None:
    before = logits(gpt2)
    with Trace(gpt2, MLP, edit=uneven, stop=True, calls="all") as t:
        twin = copy.deepcopy(gpt2)
        during = logits(twin)
        logits(gpt2)
    assert t.count == 1
    assert torch.equal(during, before) and torch.equal(logits(twin), before)


def test_stop_leaves_after_the_last_site_in_execution_order(gpt2: PreTrainedModel) -> None:
    ran, after = [], []
    handles = [
        get_module(gpt2, block).register_forward_pre_hook(lambda m, a, b=block: ran.append(b)) for block in BLOCKS
    ]
    with Trace(gpt2, [f"{BLOCKS[1]}.mlp", f"{BLOCKS[0]}.attn"], stop=True) as t:
        after.append(logits(gpt2))
    for handle in handles:
        handle.remove()
    assert ran == BLOCKS[:2] and not after
    assert list(t) == [f"{BLOCKS[0]}.attn", f"{BLOCKS[1]}.mlp"]
    with Trace(gpt2, t.sites) as full:
        logits(gpt2)
    assert all(torch.equal(t[site].output, full[site].output) for site in t)


def test_only_the_trace_that_stopped_catches_it(gpt2: PreTrainedModel) -> None:
    with Trace(gpt2, BLOCKS[0], stop=True) as outer:
        with Trace(gpt2, [BLOCKS[0], BLOCKS[2]]) as inner:
            logits(gpt2)
        raise AssertionError("the inner trace swallowed the outer one's stop")
    assert list(outer) == [BLOCKS[0]] and not list(inner)
    with Trace(gpt2, BLOCKS[0]) as outer, Trace(gpt2, BLOCKS[0], stop=True):
        logits(gpt2)
    assert outer.count == 1


@pytest.mark.parametrize("where", ["body", "edit", "model", "interrupt"])
def test_exceptions_leave_no_hook(gpt2: PreTrainedModel, where: str) -> None:
    error = KeyboardInterrupt if where == "interrupt" else ZeroDivisionError

    def fails(h: Any) -> Any:
        raise error

    hooks = count_hooks(gpt2)
    options: dict[str, Any] = {"edit": fails} if where in ("edit", "interrupt") else {}
    with pytest.raises(error), Trace(gpt2, [*BLOCKS, MLP], inputs=True, grads=True, stop=True, **options):
        assert count_hooks(gpt2) > hooks
        if where == "body":
            raise error
        if where == "model":
            handle = gpt2.get_submodule("transformer.h.1.ln_1").register_forward_hook(lambda *_: fails(0))
            try:
                logits(gpt2)
            finally:
                handle.remove()
        logits(gpt2)
    assert count_hooks(gpt2) == hooks


def test_hooks_of_others_stay(gpt2: PreTrainedModel) -> None:
    seen = []
    handle = get_module(gpt2, MLP).register_forward_hook(lambda *_: seen.append(1))
    with Trace(gpt2, MLP, edit=uneven):
        logits(gpt2)
    logits(gpt2)
    assert len(seen) == 2 and count_hooks(gpt2) >= 1
    handle.remove()


def test_other_threads_are_left_alone(gpt2: PreTrainedModel) -> None:
    before, elsewhere = logits(gpt2), []
    with Trace(gpt2, MLP, edit=uneven, calls="all") as t:
        thread = threading.Thread(target=lambda: elsewhere.append(logits(gpt2)))
        thread.start()
        thread.join()
        assert not torch.equal(logits(gpt2), before)
    assert torch.equal(elsewhere[0], before) and t.count == 1


def test_bad_options(gpt2: PreTrainedModel) -> None:
    with pytest.raises(HookError, match="given no site"):
        Trace(gpt2, [])
    with pytest.raises(HookError, match="calls='first', when='after_edit': give 'last' or 'all'"):
        Trace(gpt2, MLP, calls=cast(Any, "first"))
    net = nn.Sequential(nn.Identity())
    with pytest.raises(HookError, match="The call of '0' holds no tensor"), Trace(net, "0", inputs=True):
        net(None)


def test_a_trace_can_be_entered_again(gpt2: PreTrainedModel) -> None:
    trace = Trace(gpt2, MLP)
    for length in (7, 3):
        with trace:
            logits(gpt2, IDS[:, :length])
        assert trace.output.shape == (2, length, 32) and trace.count == 1
