"""The hook layer: each promise of Trace, and each fault found in earlier hook layers (finding N), by name."""

import collections
import copy
import gc
import re
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput
from transformers.pytorch_utils import Conv1D

from editkit.nethook import (
    HookError,
    NameNotFound,
    Trace,
    TraceDict,
    get_module,
    get_parameter,
    hidden,
    replace_module,
    replaced,
    requires_grad,
    select,
    with_hidden,
)
from tests.families import SITES, build

IDS = torch.arange(2, 16).view(2, 7)
MLP = "transformer.h.1.mlp"
DOWN = "transformer.h.1.mlp.c_proj"
BLOCKS = [f"transformer.h.{i}" for i in range(3)]


@pytest.fixture(scope="module")
def gpt2():
    return build("gpt2")


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slowed down by threads waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_left_behind(request):
    """No test may leave a hook or a changed flag on the shared models."""
    torch.manual_seed(0)
    models = [request.getfixturevalue(name) for name in ("gpt2", "llama") if name in request.fixturenames]
    before = [count_hooks(model) for model in models]
    yield
    assert [count_hooks(model) for model in models] == before
    assert all(p.requires_grad for model in models for p in model.parameters())
    for model in models:
        model.zero_grad()


def count_hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return (output * torch.linspace(-1, 1, output.shape[-1])).pow(2).mean()


def uneven(h: torch.Tensor) -> torch.Tensor:
    """A change that no normalisation takes out again."""
    return h + torch.linspace(-1, 1, h.shape[-1], dtype=h.dtype) ** 3


def named_sites(kinds=("block", "attention", "mlp", "down_projection")):
    return [
        pytest.param(family, name.format(1), id=f"{family}-{kind}")
        for family, sites in SITES.items()
        for kind in kinds
        if (name := getattr(sites, kind)) is not None
    ]


_BUILT: dict[str, nn.Module] = {}


def shared(family: str) -> nn.Module:
    return _BUILT.setdefault(family, build(family))


# ── every family ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("family", "site"), named_sites())
def test_edit_takes_effect_and_is_undone(family, site):
    model = shared(family)
    before, hooks = logits(model), count_hooks(model)
    with Trace(model, site, edit=uneven, clone=True) as t:
        during = logits(model)
    assert (during - before).abs().max() > 1e-3
    assert torch.equal(logits(model), before) and count_hooks(model) == hooks
    assert t.output.shape[-1] == model.config.hidden_size


@pytest.mark.parametrize(("family", "site"), named_sites())
def test_gradient_equals_autograd(family, site):
    model, seen = shared(family), []

    def watch(module, args, output):
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
def test_rank_one_sum_equals_the_weight_gradient(family, site):
    """Σ over tokens of g kᵀ, from one captured forward and backward, is autograd's gradient of W."""
    model = shared(family)
    weight = get_parameter(model, f"{site}.weight")
    with Trace(model, site, inputs=True, grads=True) as t:
        loss_of(logits(model)).backward()
    k, g = t.input.flatten(0, -2), t.grad.flatten(0, -2)  # [rows, d_ff], [rows, d_model]
    product = k.T @ g if isinstance(get_module(model, site), Conv1D) else g.T @ k
    assert torch.allclose(product, weight.grad, atol=1e-6, rtol=1e-4)
    model.zero_grad()


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 3), lambda: Conv1D(3, 5)], ids=["Linear", "Conv1D"])
def test_rank_one_sum_in_either_orientation(make):
    net = nn.Sequential(make(), nn.Tanh())
    with Trace(net, "0", inputs=True, grads=True) as t:
        net(torch.randn(2, 4, 5)).pow(2).sum().backward()
    product = torch.einsum("btk,btm->km", t.input, t.grad)
    expected = net[0].weight.grad if isinstance(net[0], Conv1D) else net[0].weight.grad.T
    assert torch.allclose(product, expected, atol=1e-5)


@pytest.mark.parametrize("family", SITES)
def test_captured_values_are_the_models_own(family):
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


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────


def test_v01_tied_parameter_names(gpt2):
    tied = get_parameter(gpt2, "lm_head.weight")
    assert tied is get_parameter(gpt2, "transformer.wte.weight")
    assert isinstance(tied, nn.Parameter)
    both = select(gpt2, re.compile(r".*(wte|lm_head)\.weight"), kind="parameter")
    assert both == ["transformer.wte.weight"]
    assert select(gpt2, "lm_head.*", kind="parameter") == ["lm_head.weight"]


def test_v02_replace_a_top_level_module():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    old, new = net[0], nn.Identity()
    assert replace_module(net, "0", new) is old and net[0] is new
    with pytest.raises(HookError, match="cannot replace the model itself"):
        replace_module(net, "", new)


def test_replaced_restores_after_an_error(gpt2):
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
def test_unknown_names_teach(gpt2, ask, wanted):
    with pytest.raises(NameNotFound, match=wanted) as caught:
        ask(gpt2)
    assert isinstance(caught.value, LookupError) and isinstance(caught.value, HookError)


def test_select_globs(gpt2):
    assert select(gpt2, "transformer.h.*") == BLOCKS
    assert select(gpt2, "transformer.h.[0-1]") == BLOCKS[:2]
    assert select(gpt2, "transformer.h.?.mlp") == [f"{b}.mlp" for b in BLOCKS]
    assert len(select(gpt2, "**.mlp.**")) == 3 * len(list(get_module(gpt2, MLP).children()))
    assert select(gpt2, re.compile(r".*\.h\.\d\.attn")) == [f"{b}.attn" for b in BLOCKS]
    assert select(gpt2, "**.c_proj.bias", kind="parameter")[1] == "transformer.h.0.mlp.c_proj.bias"


def test_requires_grad_restores_every_flag(gpt2):
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


# ── tensor or tuple ──────────────────────────────────────────────────────────────────────────────────────

Pair = collections.namedtuple("Pair", "scores hidden")


def test_hidden_and_back():
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


# ── findings ─────────────────────────────────────────────────────────────────────────────────────────────


def test_v03_keyword_inputs(llama):
    site = "model.layers.1.self_attn"
    with Trace(llama, ["model.layers.1.input_layernorm", site], inputs=True) as t:
        logits(llama)
    assert t[site].input.shape == (2, 7, 32)
    assert torch.equal(t[site].input, t["model.layers.1.input_layernorm"].output)
    args, kwargs = t[site].inputs
    assert args == () and kwargs["hidden_states"] is t[site].input and "attention_mask" in kwargs

    class Keywords(nn.Module):
        def forward(self, mask, hidden_states):
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


def test_v04_outputs_that_hold_none_or_are_named_tuples(gpt2, llama):
    with Trace(llama, "model.layers.1.self_attn", grads=True, clone=True) as t:
        loss_of(logits(llama)).backward()
    assert t.output.shape == t.grad.shape == (2, 7, 32)
    with Trace(gpt2, "") as t:  # the root gives a ModelOutput with a cache in it
        given = gpt2(IDS)
    assert torch.equal(t.output, given.logits) and given.past_key_values is not None

    class Named(nn.Module):
        def forward(self, x):
            return Pair(None, x)

    net = nn.Sequential(Named())
    with Trace(net, "0", edit=uneven, clone=True) as t:
        result = net(torch.zeros(1, 3))
    assert isinstance(result, Pair) and torch.equal(result.hidden, t.output)


def test_v05_edit_functions(gpt2):
    class Adder:
        seen = None

        def plain(self, h):
            return uneven(h)

        def with_site(self, h, site):
            self.seen = site
            return uneven(h)

        def __call__(self, h, scale=1.0):
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

    def forgets(h):
        h.mul_(2)

    bad = {
        "edit at 'transformer.h.1.mlp' returned NoneType: return the changed tensor": forgets,
        r"returned \(\[2, 7, 31\], .*: shape, dtype and device must stay \(\[2, 7, 32\]": lambda h: h[..., :-1],
        "torch.float64": lambda h: h.double(),
        "meta": lambda h: h.to("meta"),
        "returned tuple": lambda h: (h, None),
    }
    for message, edit in bad.items():
        for option in ("edit", "edit_input"):
            expected = pytest.raises(HookError, match=message.replace("edit at", f"{option} at"))
            with expected, torch.no_grad(), Trace(gpt2, MLP, **{option: edit}):
                logits(gpt2)


def test_v06_a_site_that_never_runs(gpt2):
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


def test_v07_clone_and_detach_reach_into_tuples(llama):
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


def test_v08_a_failing_set_up_leaves_no_hook(gpt2):
    hooks = count_hooks(gpt2)
    with pytest.raises(NameNotFound), Trace(gpt2, [MLP, "transformer.h.99"], stop=True):
        pass
    assert count_hooks(gpt2) == hooks

    class Unhookable(nn.Module):
        def register_forward_hook(self, *args, **kwargs):
            raise ZeroDivisionError

    net = nn.Sequential(nn.Linear(1, 1), Unhookable())
    with pytest.raises(ZeroDivisionError), Trace(net, ["0", "1"]):
        pass
    assert count_hooks(net) == 0


def test_v09_generation_keeps_every_step(gpt2):
    with Trace(gpt2, [MLP, DOWN], calls="all", inputs=True) as t:
        gpt2.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(IDS))
    assert [tuple(call.output.shape) for call in t[MLP].calls] == [(2, 7, 32)] + 3 * [(2, 1, 32)]
    assert t[MLP].count == 4 and [c.count for c in t[DOWN].calls] == [1, 2, 3, 4]
    assert torch.equal(t[MLP].output, t[MLP].calls[-1].output)
    with Trace(gpt2, MLP) as t:
        logits(gpt2, IDS[:, :3])
        logits(gpt2)
    with pytest.warns(UserWarning, match="ran 2 times; this is the last: see calls='all'"):
        assert t.output.shape == (2, 7, 32)
    assert len(t.calls) == 1 and t.count == 2


@pytest.mark.filterwarnings("ignore")
def test_v10_compiled_models_are_refused(gpt2):
    compiled = torch.compile(gpt2, backend="eager")
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


def test_v11_offloaded_weights_are_refused():
    net = nn.Sequential(nn.Linear(2, 2, device="meta"))
    with pytest.raises(HookError, match=r"'0.weight' is offloaded \(meta device\): .*align_module_device"):
        get_parameter(net, "0.weight")
    assert get_parameter(net, "0.weight", allow_meta=True) is net[0].weight
    with requires_grad(net):
        assert not net[0].weight.requires_grad


def test_quantised_weights_are_refused():
    class Params4bit(nn.Parameter):
        pass

    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].weight = Params4bit(torch.zeros(2, 1, dtype=torch.uint8), requires_grad=False)
    net[1].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.float8_e4m3fn), requires_grad=False)
    for name in ("0.weight", "1.weight"):
        with pytest.raises(HookError, match=f"'{name}' is quantised .*: load in float32"):
            get_parameter(net, name)
    assert get_parameter(net, "2.weight") is net[2].weight


def test_v13_gradients_before_an_in_place_change():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 1))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(net)
    reference[1].inplace = False
    seen = reference[0](x)
    (expected,) = torch.autograd.grad(reference[2](reference[1](seen)).sum(), seen)
    for frozen in (False, True):
        with requires_grad(net, only=[] if frozen else ["0.weight"]):
            for leaf in (False, True):
                with Trace(net, "0", grads=True, leaf=leaf, clone=True) as t:
                    net(x).sum().backward()
                assert torch.equal(t.grad, expected) and torch.equal(t.output, seen)
    assert (expected == 0).any() and (expected != 0).any()


def test_v14_gradients_where_the_input_is_a_keyword(llama):
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
    with Trace(llama, site, edit_grad=lambda g: None, outputs=False):
        loss = loss_of(logits(llama))
    with pytest.raises(HookError, match=r"edit_grad at 'model.layers.1.self_attn' returned NoneType"):
        loss.backward()


def test_edited_gradients_reach_what_is_below(gpt2):
    weight = get_parameter(gpt2, f"{DOWN}.weight")
    loss_of(logits(gpt2)).backward()
    plain = weight.grad.clone()
    gpt2.zero_grad()
    with Trace(gpt2, DOWN, edit_grad=lambda g: 2 * g):
        loss_of(logits(gpt2)).backward()
    assert torch.allclose(weight.grad, 2 * plain, rtol=1e-5)


def test_v15_frozen_models_and_leaves(gpt2):
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


def test_a_leaf_frees_the_graph_below(gpt2):
    alive = []
    handle = gpt2.transformer.h[0].register_forward_hook(lambda m, a, o: alive.append(weakref.ref(o)))
    for leaf in (False, True):
        with Trace(gpt2, BLOCKS[1], grads=True, leaf=leaf):
            loss = loss_of(logits(gpt2))
        assert (alive.pop()() is None) == leaf
    del loss
    handle.remove()


def test_gradient_needs_a_graph(gpt2):
    refused = pytest.raises(HookError, match=r"No gradient can reach 'transformer.h.1.mlp': gradients are off")
    with refused, torch.no_grad(), Trace(gpt2, MLP, grads=True):
        logits(gpt2)

    class Counts(nn.Module):
        def forward(self, x):
            return x.long()

    net = nn.Sequential(Counts())
    with pytest.raises(HookError, match=r"its output is torch.int64"), Trace(net, "0", grads=True):
        net(torch.zeros(1))


def test_gradient_arrives_after_the_body(gpt2):
    with Trace(gpt2, MLP, grads=True) as t:
        loss = loss_of(logits(gpt2))
    with pytest.raises(HookError, match=r"No gradient has reached 'transformer.h.1.mlp': call backward\(\)"):
        _ = t.grad
    loss.backward(retain_graph=True)
    first = t.grad
    (2 * loss).backward()
    assert torch.allclose(t.grad, 2 * first)  # of the latest backward, not summed


def test_v17_parametrised_weights_are_refused():
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    net = nn.Sequential(nn.Linear(2, 2))
    original = net[0].weight
    parametrize.register_parametrization(net[0], "weight", Double())
    with pytest.raises(HookError, match=r"'0.weight' is parametrised.*: call parametrize.remove_parametrizations"):
        get_parameter(net, "0.weight")
    assert get_parameter(net, "0.bias") is net[0].bias
    assert get_parameter(net, "0.parametrizations.weight.original") is original


@pytest.mark.parametrize("installed_first", [True, False])
def test_v20_edits_show_in_the_models_own_hidden_states(installed_first):
    model = build("gpt2")
    if installed_first:
        model(IDS, output_hidden_states=True)
    with torch.no_grad(), Trace(model, BLOCKS[0], edit=uneven) as t:
        states = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], t.output)
    assert len(model(IDS, output_hidden_states=True).hidden_states) == 4  # their hooks are still theirs


def test_v21_activation_checkpointing_inside_a_block(gpt2):
    model = build("gpt2").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(
        HookError, match=r"'transformer.h.1.mlp' runs twice under activation checkpointing: trace 'transformer.h.1' or"
    ):
        Trace(model, MLP).__enter__()
    with Trace(model, BLOCKS[1], grads=True) as t:
        loss_of(logits(model)).backward()
    assert t.count == 1 and t.grad.any()
    with Trace(model.eval(), MLP):
        logits(model)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    net = Checkpointed()
    with pytest.raises(HookError, match="'inner' ran again during backward"), Trace(net, "inner"):
        net(torch.zeros(1, 2)).sum().backward()


def test_v22_stop_refuses_the_callers_cache(gpt2):
    cache = gpt2(IDS, use_cache=True).past_key_values
    lengths = [layer.get_seq_length() for layer in cache.layers]
    for call in (lambda: gpt2(IDS, past_key_values=cache), lambda: gpt2(IDS, cache)):
        with (
            pytest.raises(HookError, match=r"stop=True would leave the given cache half filled.*use_cache=False"),
            Trace(gpt2, MLP, stop=True),
        ):
            call()
    assert [layer.get_seq_length() for layer in cache.layers] == lengths
    with Trace(gpt2, MLP, stop=True):
        gpt2(IDS)  # a cache of the model's own is dropped with the call


def test_v23_stale_captures_are_noticed():
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


def test_v23_a_real_model_that_adds_in_place():
    """Falcon adds the attention's output into its MLP's."""
    model = shared("falcon")
    with Trace(model, MLP) as t:
        logits(model)
    with pytest.raises(HookError, match="changed in place"):
        _ = t.output
    with Trace(model, [MLP, f"{MLP}.dense_4h_to_h"], clone=True) as t:
        logits(model)
    assert torch.equal(t[MLP].output, t[f"{MLP}.dense_4h_to_h"].output)


def test_v24_a_deep_copy_carries_only_dead_hooks(gpt2):
    before = logits(gpt2)
    with Trace(gpt2, MLP, edit=uneven, stop=True, calls="all") as t:
        twin = copy.deepcopy(gpt2)
        during = logits(twin)
        logits(gpt2)
    assert t.count == 1
    assert torch.equal(during, before) and torch.equal(logits(twin), before)


# ── Trace ────────────────────────────────────────────────────────────────────────────────────────────────


def test_stop_leaves_after_the_last_site_in_execution_order(gpt2):
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


def test_only_the_trace_that_stopped_catches_it(gpt2):
    with Trace(gpt2, BLOCKS[0], stop=True) as outer:
        with Trace(gpt2, [BLOCKS[0], BLOCKS[2]]) as inner:
            logits(gpt2)
        raise AssertionError("the inner trace swallowed the outer one's stop")
    assert list(outer) == [BLOCKS[0]] and not list(inner)
    with Trace(gpt2, BLOCKS[0]) as outer, Trace(gpt2, BLOCKS[0], stop=True):
        logits(gpt2)
    assert outer.count == 1


def test_when_and_nested_traces(gpt2):
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


@pytest.mark.parametrize("where", ["body", "edit", "model", "interrupt"])
def test_exceptions_leave_no_hook(gpt2, where):
    error = KeyboardInterrupt if where == "interrupt" else ZeroDivisionError

    def fails(h):
        raise error

    hooks = count_hooks(gpt2)
    options = {"edit": fails} if where in ("edit", "interrupt") else {}
    with pytest.raises(error), Trace(gpt2, [*BLOCKS, MLP], inputs=True, grads=True, stop=True, **options):
        assert count_hooks(gpt2) == hooks + 17
        if where == "body":
            raise error
        if where == "model":
            handle = gpt2.transformer.h[1].ln_1.register_forward_hook(lambda *_: fails(0))
            try:
                logits(gpt2)
            finally:
                handle.remove()
        logits(gpt2)
    assert count_hooks(gpt2) == hooks


def test_hooks_of_others_stay(gpt2):
    seen = []
    handle = get_module(gpt2, MLP).register_forward_hook(lambda *_: seen.append(1))
    with Trace(gpt2, MLP, edit=uneven):
        logits(gpt2)
    logits(gpt2)
    assert len(seen) == 2 and count_hooks(gpt2) >= 1
    handle.remove()


def test_other_threads_are_left_alone(gpt2):
    before, elsewhere = logits(gpt2), []
    with Trace(gpt2, MLP, edit=uneven, calls="all") as t:
        thread = threading.Thread(target=lambda: elsewhere.append(logits(gpt2)))
        thread.start()
        thread.join()
        assert not torch.equal(logits(gpt2), before)
    assert torch.equal(elsewhere[0], before) and t.count == 1


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
def test_positions(gpt2, positions, shape):
    with Trace(gpt2, MLP, inputs=True, grads=True) as full:
        loss_of(logits(gpt2)).backward()
    with Trace(gpt2, MLP, inputs=True, grads=True, positions=positions) as t:
        loss_of(logits(gpt2)).backward()
    for what in ("input", "output", "grad"):
        kept = getattr(t, what)
        assert kept.shape == shape and torch.equal(kept, getattr(full, what)[:, positions])
        assert kept.untyped_storage().nbytes() == kept.nbytes  # nothing of the rest is held


def test_positions_that_cannot_be(gpt2):
    refused = pytest.raises(HookError, match=r"positions=7 at 'transformer.h.1.mlp' of shape \[2, 7, 32\]")
    with refused, Trace(gpt2, MLP, positions=7):
        logits(gpt2)
    opt = shared("opt")  # flattens batch and tokens inside its blocks
    refused = pytest.raises(HookError, match=r"dim 1; 'model.decoder.layers.1.fc2' gives \[14, 32\]")
    with refused, Trace(opt, "model.decoder.layers.1.fc2", positions=-1):
        logits(opt)
    with Trace(gpt2, "transformer.wte", inputs=True, positions=-1, dtype=torch.float16) as t:
        logits(gpt2)
    assert torch.equal(t.input, IDS[:, -1])
    assert t.input.dtype == torch.int64 and t.output.dtype == torch.float16  # ids stay integers


def test_device_and_dtype(gpt2):
    with Trace(gpt2, MLP, inputs=True, grads=True, device="meta", dtype=torch.bfloat16) as t:
        loss_of(logits(gpt2)).backward()
    for kept in (t.input, t.output, t.grad):
        assert kept.device.type == "meta" and kept.dtype == torch.bfloat16


def test_captures_are_freed_with_the_trace(gpt2):
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


def test_reading_what_is_not_there(gpt2):
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


def test_bad_options(gpt2):
    with pytest.raises(HookError, match="given no site"):
        Trace(gpt2, [])
    with pytest.raises(HookError, match="calls='first', when='after_edit': give 'last' or 'all'"):
        Trace(gpt2, MLP, calls="first")
    net = nn.Sequential(nn.Identity())
    with pytest.raises(HookError, match="The call of '0' holds no tensor"), Trace(net, "0", inputs=True):
        net(None)


def test_a_trace_can_be_entered_again(gpt2):
    trace = Trace(gpt2, MLP)
    for length in (7, 3):
        with trace:
            logits(gpt2, IDS[:, :length])
        assert trace.output.shape == (2, length, 32) and trace.count == 1
