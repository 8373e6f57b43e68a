"""The hook layer on random module trees: nothing is left behind, and what was captured is what happened."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from editkit.nethook import HookError, NameNotFound, Trace, hidden, with_hidden
from editkit.snapshot import same_bits

WIDTH = 4
STABLE = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}  # equal on every machine


# ── random trees ─────────────────────────────────────────────────────────────────────────────────────────


class Audit:
    """What really happened, noted by the modules themselves and therefore independent of any hook."""

    def __init__(self) -> None:
        self.ran: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}  # in forward: the input and the output
        self.came_out: dict[nn.Module, list[Tensor]] = {}  # what the caller was given, and gives to the next

    def note(self, where: dict, module: nn.Module, *values: Any) -> None:
        kept = tuple(hidden(v).detach().clone() for v in values)
        where.setdefault(module, []).append(kept if len(kept) > 1 else kept[0])


class Noted(nn.Module):
    """Notes the input and the output of its own `run`; `armed` makes it fail."""

    def __init__(self) -> None:
        super().__init__()
        self.audit: Audit | None = None
        self.armed: BaseException | None = None

    def forward(self, hidden_states):
        if self.armed:
            raise self.armed
        if self.audit is None:
            return self.run(hidden_states)
        given = hidden(hidden_states).detach().clone()  # before anything is changed in place
        result = self.run(hidden_states)
        self.audit.note(self.audit.ran, self, given, result)
        return result

    def run(self, h):
        raise NotImplementedError


class Leaf(Noted):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def run(self, h):
        return self.inner(h)


class Tupled(Leaf):
    """Gives (None, hidden) as attention modules may."""

    def run(self, h):
        return None, self.inner(h)


class Chain(Noted):
    """Runs its parts one after the other, every other one by keyword, and takes tuples apart in between."""

    def __init__(self, parts: list[nn.Module], idle: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({f"part_{i}": part for i, part in enumerate(parts)})
        self.idle = nn.ModuleList(idle)  # registered and never called

    def run(self, h):
        for i, part in enumerate(self.parts.values()):
            h = hidden(h)
            h = part(hidden_states=h) if i % 2 and isinstance(part, Noted) else part(h)
            if self.audit is not None:
                self.audit.note(self.audit.came_out, part, h)
        return h


class First(Noted):
    """After each part of a Sequential: gives on the hidden tensor alone, and notes what it received."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.received_from = (part,)  # in a tuple, so that it is not a sub-module

    def run(self, h):
        if self.audit is not None:
            self.audit.note(self.audit.came_out, self.received_from[0], h)
        return hidden(h)


LEAVES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "relu": nn.ReLU,
    "in-place relu": lambda: nn.ReLU(inplace=True),
    "identity": nn.Identity,
    "dropout": lambda: nn.Dropout(0.3),
}

plain = st.sampled_from(sorted(LEAVES))
leaves = st.tuples(st.sampled_from(["plain", "noted", "tupled"]), plain) | st.tuples(
    st.just("again"), st.integers(0, 20)
)
trees = st.recursive(
    leaves,
    lambda child: st.tuples(st.sampled_from(["sequential", "chain", "idle"]), st.lists(child, min_size=1, max_size=4)),
    max_leaves=8,
)


def grow(spec: tuple, made: list[nn.Module]) -> nn.Module:
    """The module of `spec`; "again" is one of those already made, so that a module may have several places."""
    kind, what = spec
    if kind == "again":
        return made[what % len(made)] if made else nn.Identity()
    if kind in ("sequential", "chain", "idle"):
        parts = [grow(each, made) for each in what]
        if kind == "sequential":
            module: nn.Module = nn.Sequential(*(p for part in parts for p in (part, First(part))))
        else:
            idle = parts[len(parts) // 2 :] if kind == "idle" and len(parts) > 1 else []
            module = Chain(parts[: len(parts) - len(idle)], idle)
    else:
        inner = LEAVES[what]()
        module = {"plain": lambda m: m, "noted": Leaf, "tupled": Tupled}[kind](inner)
    made.append(module)
    return module


def grown(spec: list[tuple], audit: Audit | None = None, training: bool = False) -> Chain:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: list[nn.Module] = []
        model = Chain([grow(each, made) for each in spec], [nn.Linear(WIDTH, WIDTH)])
        for module in model.modules():
            if isinstance(module, Noted):
                module.audit = audit
    return model.train(training)


def given_input() -> Tensor:
    """[batch, tokens, width]; new each time, since a module may change it in place."""
    return torch.linspace(-1, 2, 2 * 3 * WIDTH).sin().view(2, 3, WIDTH)


def run(model: nn.Module) -> Any:
    torch.manual_seed(1)  # dropout in training
    return model(given_input())


def quiet_run(model: nn.Module) -> Tensor:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return hidden(run(model)).clone()


def hooks_of(model: nn.Module) -> dict:
    """Every table of hooks, in order, on modules, parameters and torch itself; and all that hangs on a module."""
    found: dict[Any, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name, "attributes"] = sorted(vars(module))
        for table, value in vars(module).items():
            if "hook" in table:
                items = list(value.items()) if isinstance(value, dict) else value
                found[name, table] = items
    for name, parameter in model.named_parameters():
        tables = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
        found[name, "tensor hooks"] = [list(table.items()) if table else [] for table in tables]
        found[name, "flag"] = parameter.requires_grad
    for table, value in vars(torch_module).items():
        if table.startswith("_global_") and "hook" in table:
            found["torch", table] = list(value.items()) if isinstance(value, dict) else value
    return found


# ── nothing is left behind ───────────────────────────────────────────────────────────────────────────────


class Boom(Exception):
    pass


EDITS: dict[str, Callable] = {
    "doubles": lambda h: 2 * h,
    "tells its site": lambda h, site: h + len(site),
    "in place": lambda h: h.mul_(0.5),
    "same": lambda h: h,
    "forgets": lambda h: None,
    "cuts": lambda h: h[..., :-1],
}

GOOD = ["doubles", "tells its site", "in place", "same"]
edits = st.sampled_from([None, *GOOD, None, *GOOD, None, *GOOD, "forgets", "cuts"])
traces = st.fixed_dictionaries(
    {
        "sites": st.lists(st.integers(0, 60), min_size=1, max_size=4),
        "edit": edits,
        "edit_input": edits,
        "edit_grad": edits,
        "positions": st.sampled_from([None, None, None, None, -1, slice(1, 3), [0, 2], 9]),
        "calls": st.sampled_from(["last", "all"]),
        "when": st.sampled_from(["after_edit", "before_edit"]),
        "by_site": st.booleans(),
        **{flag: st.booleans() for flag in ("inputs", "outputs", "grads", "clone", "leaf", "detach")},
        "stop": st.sampled_from([False, False, True]),
    }
)
FAULTS = ["none", "before", "after", "edit", "edit_grad", "forward", "unknown site", "idle site", "bad option"]


def options_of(drawn: dict, names: list[str], fault: str, error: BaseException | None) -> dict:
    options = {k: v for k, v in drawn.items() if k not in ("sites", "by_site")}
    sites = list(dict.fromkeys(names[i % len(names)] for i in drawn["sites"]))
    sites += {"unknown site": ["no.such"], "idle site": ["idle.0"]}.get(fault, [])
    for option in ("edit", "edit_input", "edit_grad"):
        change = EDITS.get(drawn[option])
        if option == fault:

            def change(h):
                raise error

        options[option] = {sites[0]: change} if change and drawn["by_site"] else change
    if fault == "bad option":
        options["calls"] = "first"
    return {"sites": sites, **options}


def add_others(model: nn.Module, where: list[int], called: list[str]) -> list:
    """Hooks of every kind that are somebody else's. Module backward hooks forbid in-place successors."""
    modules = list(model.modules())
    kinds = [
        lambda m: m.register_forward_hook(lambda *_: called.append("after")),
        lambda m: m.register_forward_hook(lambda m, a, k, o: called.append("with"), with_kwargs=True, prepend=True),
        lambda m: m.register_forward_hook(lambda *_: called.append("always"), always_call=True),
        lambda m: m.register_forward_pre_hook(lambda *_: called.append("before")),
        lambda m: m.register_forward_pre_hook(lambda m, a, k: called.append("pre"), with_kwargs=True),
    ]
    if not any(getattr(m, "inplace", False) for m in modules):
        kinds += [lambda m: m.register_full_backward_pre_hook(lambda *_: called.append("backward"))]
        kinds += [lambda m: m.register_full_backward_hook(lambda *_: called.append("backward"))]
    return [kinds[(i // len(modules)) % len(kinds)](modules[i % len(modules)]) for i in where]


def nest(model: nn.Module, each: list[dict], body: Callable[[list[Trace]], None], opened: list[Trace]) -> None:
    if not each:
        body(opened)
        return
    with Trace(model, **each[0]) as t:
        nest(model, each[1:], body, [*opened, t])


# Torch warns once about backward hooks where no input needs gradients; numbers of runs are warned of by `count`.
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, **STABLE)
@given(
    spec=st.lists(trees, min_size=1, max_size=4),
    nested=st.lists(traces, min_size=1, max_size=3),
    fault=st.sampled_from(FAULTS),
    kind=st.sampled_from([Boom, KeyboardInterrupt, SystemExit]),
    armed=st.integers(0, 20),
    others=st.lists(st.integers(0, 400), max_size=4),
    meanwhile=st.booleans(),
    grad=st.booleans(),
    training=st.booleans(),
)
def test_whatever_happens_the_hooks_are_what_they_were(
    spec, nested, fault, kind, armed, others, meanwhile, grad, training
):
    called: list[str] = []
    model, error = grown(spec, training=training), kind("planned")
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    handles = add_others(model, others, called)
    before = quiet_run(model)
    usual, weights, hooks = list(called), [p.clone() for p in model.parameters()], hooks_of(model)
    each = [options_of(drawn, names, fault if i == len(nested) - 1 else "", error) for i, drawn in enumerate(nested)]

    def body(opened: list[Trace]) -> None:
        if meanwhile:  # somebody else comes, and goes, while traces are open
            model.register_forward_hook(lambda *_: None, prepend=True).remove()
        if fault == "before":
            raise error
        if fault == "forward":
            noted = [m for m in model.modules() if isinstance(m, Noted)]
            noted[armed % len(noted)].armed = error
        result = hidden(run(model))
        if result.requires_grad:
            result.sum().backward()
        if fault == "after":
            raise error
        assert any(model._forward_hooks or m._forward_hooks for m in model.modules())

    escaped = None
    try:
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(grad):
            nest(model, each, body, [])
    except (Boom, KeyboardInterrupt, SystemExit) as raised:
        escaped = raised
        assert raised is error
    except HookError as raised:
        escaped = raised
    except RuntimeError as raised:  # a model that torch cannot differentiate: changed in place after it was saved
        escaped = raised
        assert "modified by an inplace operation" in str(raised) or "a view" in str(raised)
    for module in model.modules():
        if isinstance(module, Noted):
            module.armed = None
    if fault == "idle site" and not any(drawn["stop"] for drawn in nested):
        assert escaped is not None
    if fault == "bad option":
        assert isinstance(escaped, HookError)
    if fault == "unknown site":
        assert isinstance(escaped, NameNotFound)
    if fault == "before":
        assert escaped is error

    assert hooks_of(model) == hooks
    called.clear()
    assert same_bits(quiet_run(model), before)
    assert called == usual
    assert all(same_bits(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    for handle in handles:
        handle.remove()
    assert not any(value for (_, table), value in hooks_of(model).items() if table.endswith("_hooks"))


@settings(max_examples=60, **STABLE)
@given(
    spec=st.lists(trees, min_size=1, max_size=3),
    sites=st.lists(st.integers(0, 60), min_size=2, max_size=4),
    order=st.randoms(use_true_random=False),
    stop=st.booleans(),
)
def test_traces_may_close_in_any_order(spec, sites, order, stop):
    model = grown(spec)
    names = [name for name, _ in model.named_modules()]
    before, hooks = quiet_run(model), hooks_of(model)
    opened = [Trace(model, names[i % len(names)], edit=lambda h: h + 1, inputs=True, stop=stop) for i in sites]
    for t in opened:
        t.__enter__()
    order.shuffle(opened)
    own = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for t in opened:
        t.__exit__(Boom, Boom(), None)
        left = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        assert sum(own) - sum(left) == 4 + stop
        own = left
    assert hooks_of(model) == hooks and same_bits(quiet_run(model), before)


@settings(max_examples=60, **STABLE)
@given(
    spec=st.lists(trees, min_size=1, max_size=3),
    drawn=traces,
    fails_at=st.integers(0, 12),
    kind=st.sampled_from([Boom, KeyboardInterrupt]),
)
def test_a_set_up_cut_short_leaves_no_hook(spec, drawn, fails_at, kind):
    """The registration itself fails, at any of its steps."""
    model = grown(spec)
    names = [name for name, _ in model.named_modules()]
    hooks = hooks_of(model)
    steps = 0

    def failing(register):
        def registers(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps > fails_at:
                raise kind
            return register(*args, **kwargs)

        return registers

    with pytest.MonkeyPatch.context() as patch:
        for method in ("register_forward_hook", "register_forward_pre_hook"):
            patch.setattr(nn.Module, method, failing(getattr(nn.Module, method)))
        try:
            with Trace(model, **options_of(drawn, names, "none", None)):
                raise Boom
        except (Boom, KeyboardInterrupt):
            pass
    assert hooks_of(model) == hooks


# ── what was captured is what happened ───────────────────────────────────────────────────────────────────

captures = st.fixed_dictionaries(
    {
        "sites": st.lists(st.integers(0, 60), min_size=1, max_size=5),
        "edit": st.none() | st.sampled_from(GOOD),
        "edit_input": st.none() | st.sampled_from(GOOD),
        "when": st.sampled_from(["after_edit", "before_edit"]),
        "grads": st.booleans(),
    }
)


def apply(option: str, given: dict, site: str, h: Tensor) -> Tensor:
    """What `given` makes of `h`, without the hook layer."""
    if given[option] is None:
        return h
    change, h = EDITS[given[option]], h.clone()
    return change(h, site) if given[option] == "tells its site" else change(h)


@settings(max_examples=150, **STABLE)
@given(spec=st.lists(trees, min_size=1, max_size=4), nested=st.lists(captures, min_size=1, max_size=3))
def test_captures_are_what_the_modules_themselves_saw(spec, nested):
    """Under nested edits: "after_edit" is what the next module received, and "before_edit" what `forward` gave.

    Of nested traces the one entered last is nearest to the module: it edits an output first, and an input first too.
    """
    audit = Audit()
    model = grown(spec, audit)
    names = [n for n, m in model.named_modules() if isinstance(m, (Leaf, Chain)) and not n.startswith("idle")]
    each = [g | {"sites": list(dict.fromkeys(names[i % len(names)] for i in g["sites"]))} for g in nested]
    each = [
        g | {k: EDITS.get(g[k]) for k in ("edit", "edit_input")} | {"inputs": True, "calls": "all", "clone": True}
        for g in each
    ]
    try:
        with torch.random.fork_rng(devices=[]), ExitStack() as stack:
            opened = [stack.enter_context(Trace(model, **g)) for g in each]
            run(model)
    except HookError as error:
        assert "Never ran" in str(error)  # sites inside an idle part
        return
    for i, t in enumerate(opened):
        for site in t:
            module = model.get_submodule(site)
            calls = t[site].calls
            raw = audit.ran[module]
            assert len(calls) == len(raw) == t[site].count
            inner = [(n, e) for n, e in zip(nested[i + 1 :], each[i + 1 :], strict=True) if site in e["sites"]]
            own = (nested[i], each[i])
            outer = [(n, e) for n, e in zip(nested[:i], each[:i], strict=True) if site in e["sites"]]
            for number, (call, (went_in, gave)) in enumerate(zip(calls, raw, strict=True)):
                if nested[i]["when"] == "after_edit":
                    assert same_bits(call.input, went_in)
                    if module in audit.came_out:  # not the model, nor what a Sequential gives its caller
                        assert same_bits(call.output, audit.came_out[module][number])
                else:
                    expected = gave
                    for n, _ in reversed(inner):
                        expected = apply("edit", n, site, expected)
                    assert same_bits(call.output, expected)
                    # What this trace's own and the outer edits make of its input is what the module was given.
                    expected = call.input
                    for n, _ in (own, *reversed(outer)):
                        expected = apply("edit_input", n, site, expected)
                    assert same_bits(expected, went_in)


@settings(max_examples=60, **STABLE)
@given(spec=st.lists(trees, min_size=1, max_size=4), sites=st.lists(st.integers(0, 60), min_size=1, max_size=5))
def test_looking_changes_nothing(spec, sites):
    """Captures without edits: the same bits, and gradients of the same bits, as without a trace."""
    model = grown(spec)
    names = [n for n, m in model.named_modules() if not isinstance(m, First) and not n.startswith("idle")]
    sites = list(dict.fromkeys(names[i % len(names)] for i in sites))

    def figures() -> list[Tensor]:
        model.zero_grad()
        result = hidden(run(model))
        try:
            result.sum().backward()
        except RuntimeError:  # nothing trainable ran, or torch cannot differentiate it
            return [result.detach()]
        return [result.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    with torch.random.fork_rng(devices=[]):
        expected = figures()
        try:
            with Trace(model, sites, inputs=True, clone=True):
                found = figures()
        except HookError as error:
            assert "Never ran" in str(error)
            return
    assert len(found) == len(expected) and all(map(same_bits, found, expected))


@settings(max_examples=100, **STABLE)
@given(
    shape=st.lists(st.sampled_from(["tensor", "none", "number", "nested"]), max_size=4),
    container=st.sampled_from([tuple, list, dict]),
)
def test_hidden_is_the_first_tensor_and_only_it_is_exchanged(shape, container):
    values = {"none": None, "number": 3, "nested": [torch.ones(1)]}
    items = [torch.full((1,), float(i)) if kind == "tensor" else values[kind] for i, kind in enumerate(shape)]
    output = {str(i): v for i, v in enumerate(items)} if container is dict else container(items)
    tensors = [i for i, kind in enumerate(shape) if kind == "tensor"]
    if not tensors:
        with pytest.raises(HookError):
            hidden(output)
        return
    new = torch.zeros(1)
    changed = with_hidden(output, new)
    assert hidden(output) is items[tensors[0]] and hidden(changed) is new and type(changed) is container
    got = list(changed.values()) if container is dict else list(changed)
    assert all(a is b for i, (a, b) in enumerate(zip(got, items, strict=True)) if i != tensors[0])
