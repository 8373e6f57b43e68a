"""What Trace captures and how edits change it. Findings by number."""

import collections
import gc
import weakref
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from editkit.nethook import (
    HookError,
    Trace,
    hidden,
    with_hidden,
)
from editkit.testing.tiny import build
from tests.hooking import BLOCKS, DOWN, IDS, MLP, logits, loss_of, uneven

Pair = collections.namedtuple("Pair", "scores hidden")


def test_hidden_and_back() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    model_output = BaseModelOutput(last_hidden_state=x, hidden_states=(x,))
    for output in (x, (x, None), (None, x), [x, y], Pair(None, x), {"a": None, "b": x}, model_output):
        assert hidden(output) is x
        changed = with_hidden(output, y)
        assert type(changed) is type(output) and hidden(changed) is y and hidden(output) is x
        assert with_hidden(output, x) is output
    assert model_output.last_hidden_state is x and with_hidden(model_output, y).last_hidden_state is y
    assert with_hidden((None, x, y), y)[2] is y
    for nothing in (None, (), (None, [x]), {"a": 1}):
        with pytest.raises(HookError, match="no tensor at its top level"):
            hidden(nothing)
        with pytest.raises(HookError, match="no tensor at its top level"):
            with_hidden(nothing, x)


def test_v03_keyword_inputs(llama: PreTrainedModel) -> None:
    site = "model.layers.1.self_attn"
    with Trace(llama, ["model.layers.1.input_layernorm", site], inputs=True) as t:
        logits(llama)
    assert t[site].input.shape == (2, 7, 32)
    assert torch.equal(t[site].input, t["model.layers.1.input_layernorm"].output)
    args, kwargs = t[site].inputs
    assert args == () and kwargs["hidden_states"] is t[site].input and "attention_mask" in kwargs

    class Keywords(nn.Module):
        def forward(self, mask: torch.Tensor, hidden_states: torch.Tensor) -> Any:
            return hidden_states * mask

    net, mask, h = nn.Sequential(Keywords()), torch.ones(1), torch.randn(1, 2, 3)
    with Trace(net, "0", inputs=True) as t:
        net[0](mask=mask, hidden_states=h)  # named hidden_states, though not the first tensor
    assert torch.equal(t.input, h)

    before = logits(llama)
    with Trace(llama, site, inputs=True, edit_input=uneven) as t:
        assert not torch.equal(logits(llama), before)
    with Trace(llama, site, inputs=True, edit_input=uneven, when="before_edit") as early:
        logits(llama)
    assert torch.equal(t.input, uneven(early.input))


def test_v04_outputs_that_hold_none_or_are_named_tuples(gpt2: PreTrainedModel, llama: PreTrainedModel) -> None:
    with Trace(llama, "model.layers.1.self_attn", grads=True, clone=True) as t:
        loss_of(logits(llama)).backward()
    assert t.output.shape == t.grad.shape == (2, 7, 32)
    with Trace(gpt2, "") as t:  # the root gives a ModelOutput with a cache in it
        given = gpt2(IDS)
    assert torch.equal(t.output, given.logits) and given.past_key_values is not None

    class Named(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return Pair(None, x)

    net = nn.Sequential(Named())
    with Trace(net, "0", edit=uneven, clone=True) as t:
        result = net(torch.zeros(1, 3))
    assert isinstance(result, Pair) and torch.equal(result.hidden, t.output)


def test_v05_edit_functions(gpt2: PreTrainedModel) -> None:
    class Adder:
        seen = None

        def plain(self, h: torch.Tensor) -> torch.Tensor:
            return uneven(h)

        def with_site(self, h: torch.Tensor, site: str) -> torch.Tensor:
            self.seen = site
            return uneven(h)

        def __call__(self, h: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return uneven(h) * scale

    adder, results = Adder(), []
    everything = lambda *args: uneven(*args)  # noqa: E731
    for edit in (adder.plain, adder.with_site, adder, everything, {MLP: uneven}):
        with Trace(gpt2, MLP, edit=edit):
            results.append(logits(gpt2))
    assert adder.seen == MLP
    assert all(torch.equal(r, results[0]) for r in results) and not torch.equal(results[0], logits(gpt2))
    with Trace(gpt2, MLP, edit=torch.zeros_like) as t:  # a builtin without a signature
        logits(gpt2)
    assert not t.output.any()

    def forgets(h: torch.Tensor) -> None:
        h.mul_(2)

    bad: dict[str, Any] = {
        "edit at 'transformer.h.1.mlp' returned NoneType: return the changed tensor": forgets,
        r"returned \(\[2, 7, 31\], .*: shape, dtype and device must stay \(\[2, 7, 32\]": lambda h: h[..., :-1],
        "torch.float64": lambda h: h.double(),
        "meta": lambda h: h.to("meta"),
        "returned tuple": lambda h: (h, None),
    }
    for message, edit in bad.items():
        for option in ("edit", "edit_input"):
            expected = pytest.raises(HookError, match=message.replace("edit at", f"{option} at"))
            options: dict[str, Any] = {option: edit}
            with expected, torch.no_grad(), Trace(gpt2, MLP, **options):
                logits(gpt2)


def test_v07_clone_and_detach_reach_into_tuples(llama: PreTrainedModel) -> None:
    site = "model.layers.1.self_attn"
    with (
        Trace(llama, site) as aliased,
        Trace(llama, site, clone=True) as cloned,
        Trace(llama, site, detach=False) as live,
    ):
        logits(llama)
    assert aliased.output.data_ptr() == live.output.data_ptr() != cloned.output.data_ptr()
    assert live.output.grad_fn is not None
    assert not aliased.output.requires_grad and not cloned.output.requires_grad


def test_v09_generation_keeps_every_step(gpt2: PreTrainedModel) -> None:
    with Trace(gpt2, [MLP, DOWN], calls="all", inputs=True) as t:
        cast(Any, gpt2).generate(
            IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(IDS)
        )
    assert [tuple(call.output.shape) for call in t[MLP].calls] == [(2, 7, 32)] + 3 * [(2, 1, 32)]
    assert t[MLP].count == 4 and [c.count for c in t[DOWN].calls] == [1, 2, 3, 4]
    assert torch.equal(t[MLP].output, t[MLP].calls[-1].output)
    with Trace(gpt2, MLP) as t:
        logits(gpt2, IDS[:, :3])
        logits(gpt2)
    with pytest.warns(UserWarning, match="ran 2 times; this is the last: see calls='all'"):
        assert t.output.shape == (2, 7, 32)
    assert len(t.calls) == 1 and t.count == 2


@pytest.mark.parametrize("installed_first", [True, False])
def test_v20_edits_show_in_the_models_own_hidden_states(installed_first: bool) -> None:
    model = build("gpt2")
    if installed_first:
        model(IDS, output_hidden_states=True)
    with torch.no_grad(), Trace(model, BLOCKS[0], edit=uneven) as t:
        states = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], t.output)
    assert len(model(IDS, output_hidden_states=True).hidden_states) == 4  # their hooks are still theirs


def test_v23_stale_captures_are_noticed() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    x = torch.randn(4, 3)
    with torch.no_grad():
        with Trace(net, ["0", "1"], inputs=True) as t:
            net(x)
        for read in (lambda: t["0"].output, lambda: t["1"].input, lambda: t["1"].inputs):
            with pytest.raises(HookError, match=r"changed in place after capture; pass clone=True"):
                read()
        assert torch.equal(t["1"].output, net(x)) and torch.equal(t["0"].input, x)
        with Trace(net, ["0", "1"], inputs=True, clone=True) as t:
            net(x)
        assert torch.equal(t["0"].output, net[0](x)) and torch.equal(t["1"].input, net[0](x))
    with torch.inference_mode(), Trace(net, "1") as t:
        net(x)
    assert torch.equal(t.output, net(x))


def test_v23_a_real_model_that_adds_in_place() -> None:
    """Falcon adds the attention's output into its MLP's."""
    model = build("falcon")
    with Trace(model, MLP) as t:
        logits(model)
    with pytest.raises(HookError, match="changed in place"):
        _ = t.output
    with Trace(model, [MLP, f"{MLP}.dense_4h_to_h"], clone=True) as t:
        logits(model)
    assert torch.equal(t[MLP].output, t[f"{MLP}.dense_4h_to_h"].output)


def test_when_and_nested_traces(gpt2: PreTrainedModel) -> None:
    with torch.no_grad():
        with Trace(gpt2, MLP) as plain:
            logits(gpt2)
        first = Trace(gpt2, MLP, edit=uneven, when="before_edit")
        with first as early, Trace(gpt2, MLP, edit=lambda h: 2 * h) as late, Trace(gpt2, MLP) as last:
            logits(gpt2)
        with Trace(gpt2, MLP, edit=lambda h: h.mul_(2), when="before_edit") as in_place:
            logits(gpt2)
    assert torch.equal(late.output, last.output) and not torch.equal(late.output, 2 * plain.output)
    assert torch.equal(early.output, 2 * plain.output)  # the edit entered last comes first
    assert torch.equal(late.output, uneven(2 * plain.output))
    with pytest.raises(HookError, match="changed in place"):
        _ = in_place.output


@pytest.mark.parametrize(
    ("positions", "shape"),
    [
        (-1, (2, 32)),
        (slice(2, 5), (2, 3, 32)),
        ([0, 6], (2, 2, 32)),
        (torch.tensor([3]), (2, 1, 32)),
        (torch.arange(7) > 4, (2, 2, 32)),
    ],
)
def test_positions(gpt2: PreTrainedModel, positions: Any, shape: tuple[int, ...]) -> None:
    with Trace(gpt2, MLP, inputs=True, grads=True) as full:
        loss_of(logits(gpt2)).backward()
    with Trace(gpt2, MLP, inputs=True, grads=True, positions=positions) as t:
        loss_of(logits(gpt2)).backward()
    for what in ("input", "output", "grad"):
        kept = getattr(t, what)
        assert kept.shape == shape and torch.equal(kept, getattr(full, what)[:, positions])
        assert kept.untyped_storage().nbytes() == kept.nbytes  # nothing of the rest is held


def test_positions_that_cannot_be(gpt2: PreTrainedModel) -> None:
    refused = pytest.raises(HookError, match=r"positions=7 at 'transformer.h.1.mlp' of shape \[2, 7, 32\]")
    with refused, Trace(gpt2, MLP, positions=7):
        logits(gpt2)
    opt = build("opt")  # flattens batch and tokens inside its blocks
    refused = pytest.raises(HookError, match=r"dim 1; 'model.decoder.layers.1.fc2' gives \[14, 32\]")
    with refused, Trace(opt, "model.decoder.layers.1.fc2", positions=-1):
        logits(opt)
    with Trace(gpt2, "transformer.wte", inputs=True, positions=-1, dtype=torch.float16) as t:
        logits(gpt2)
    assert torch.equal(t.input, IDS[:, -1])
    assert t.input.dtype == torch.int64 and t.output.dtype == torch.float16  # ids stay integers


def test_device_and_dtype(gpt2: PreTrainedModel) -> None:
    with Trace(gpt2, MLP, inputs=True, grads=True, device="meta", dtype=torch.bfloat16) as t:
        loss_of(logits(gpt2)).backward()
    for kept in (t.input, t.output, t.grad):
        assert kept.device.type == "meta" and kept.dtype == torch.bfloat16


def test_captures_are_freed_with_the_trace(gpt2: PreTrainedModel) -> None:
    gc.collect()
    gc.disable()
    try:
        with Trace(gpt2, MLP, inputs=True, grads=True, calls="all") as t:
            loss_of(logits(gpt2)).backward()
        held = [weakref.ref(x) for x in (t, t.input, t.output, t.grad, t[MLP])]
        del t
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()


def test_reading_what_is_not_there(gpt2: PreTrainedModel) -> None:
    with Trace(gpt2, MLP, outputs=False) as t:
        with pytest.raises(HookError, match=r"'transformer.h.1.mlp' has not run yet"):
            _ = t.output
        logits(gpt2)
    for what, option in (("output", "outputs"), ("input", "inputs"), ("inputs", "inputs"), ("grad", "grads")):
        with pytest.raises(
            HookError, match=f"The {what} of 'transformer.h.1.mlp' was not asked for: pass {option}=True"
        ):
            getattr(t, what)
    with Trace(gpt2, BLOCKS) as t:
        logits(gpt2)
    with pytest.raises(HookError, match=r"This trace has 3 sites: say which, as in t\['transformer.h.0'\].output"):
        _ = t.output
    with pytest.raises(HookError, match="already open"), t, t:
        pass
