"""The hook layer on random module trees: whatever happens, nothing is left behind."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from editkit.models.snapshot import same_bits
from editkit.nethook import HookError, NameNotFound, Trace, hidden
from tests.trees import (
    EDITS,
    GOOD,
    STABLE,
    Noted,
    Spec,
    grown,
    hooks_of,
    quiet_run,
    run,
    trees,
)


class Boom(Exception):
    pass


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


def options_of(drawn: dict[str, Any], names: list[str], fault: str, error: BaseException | None) -> dict[str, Any]:
    options = {k: v for k, v in drawn.items() if k not in ("sites", "by_site")}
    sites = list(dict.fromkeys(names[i % len(names)] for i in drawn["sites"]))
    sites += {"unknown site": ["no.such"], "idle site": ["idle.0"]}.get(fault, [])
    for option in ("edit", "edit_input", "edit_grad"):
        change: Any = EDITS.get(drawn[option])
        if option == fault:

            def fail(h: torch.Tensor) -> None:
                assert error is not None
                raise error

            change = fail

        options[option] = {sites[0]: change} if change and drawn["by_site"] else change
    if fault == "bad option":
        options["calls"] = "first"
    return {"sites": sites, **options}


def add_others(model: nn.Module, where: list[int], called: list[str]) -> list[Any]:
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


def nest(
    model: nn.Module, each: list[dict[str, Any]], body: Callable[[list[Trace]], None], opened: list[Trace]
) -> None:
    if not each:
        body(opened)
        return
    with Trace(model, **each[0]) as t:
        nest(model, each[1:], body, [*opened, t])


# Torch warns once about backward hooks where no input needs gradients; numbers of runs are warned of by `count`.
@pytest.mark.filterwarnings("ignore")
@settings(STABLE, max_examples=300)
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
    spec: list[Spec],
    nested: list[dict[str, Any]],
    fault: str,
    kind: type[BaseException],
    armed: int,
    others: list[int],
    meanwhile: bool,
    grad: bool,
    training: bool,
) -> None:
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

    escaped: BaseException | None = None
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


@settings(STABLE, max_examples=60)
@given(
    spec=st.lists(trees, min_size=1, max_size=3),
    sites=st.lists(st.integers(0, 60), min_size=2, max_size=4),
    order=st.randoms(use_true_random=False),
    stop=st.booleans(),
)
def test_traces_may_close_in_any_order(spec: list[Spec], sites: list[int], order: random.Random, stop: bool) -> None:
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


@settings(STABLE, max_examples=60)
@given(
    spec=st.lists(trees, min_size=1, max_size=3),
    drawn=traces,
    fails_at=st.integers(0, 12),
    kind=st.sampled_from([Boom, KeyboardInterrupt]),
)
def test_a_set_up_cut_short_leaves_no_hook(
    spec: list[Spec], drawn: dict[str, Any], fails_at: int, kind: type[BaseException]
) -> None:
    """The registration itself fails, at any of its steps."""
    model = grown(spec)
    names = [name for name, _ in model.named_modules()]
    hooks = hooks_of(model)
    steps = 0

    def failing(register: Callable[..., Any]) -> Callable[..., Any]:
        def registers(*args: Any, **kwargs: Any) -> Any:
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
