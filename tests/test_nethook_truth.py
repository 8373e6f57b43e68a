"""The hook layer on random module trees: what was captured is what happened."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from editkit.models.snapshot import same_bits
from editkit.nethook import HookError, Trace, hidden, with_hidden
from tests.trees import EDITS, GOOD, STABLE, Audit, Chain, First, Leaf, Spec, grown, run, trees

captures = st.fixed_dictionaries(
    {
        "sites": st.lists(st.integers(0, 60), min_size=1, max_size=5),
        "edit": st.none() | st.sampled_from(GOOD),
        "edit_input": st.none() | st.sampled_from(GOOD),
        "when": st.sampled_from(["after_edit", "before_edit"]),
        "grads": st.booleans(),
    }
)


def apply(option: str, given: dict[str, Any], site: str, h: Tensor) -> Tensor:
    """What `given` makes of `h`, without the hook layer."""
    if given[option] is None:
        return h
    change, h = EDITS[given[option]], h.clone()
    changed: Tensor = change(h, site) if given[option] == "tells its site" else change(h)
    return changed


@settings(STABLE, max_examples=150)
@given(spec=st.lists(trees, min_size=1, max_size=4), nested=st.lists(captures, min_size=1, max_size=3))
def test_captures_are_what_the_modules_themselves_saw(spec: list[Spec], nested: list[dict[str, Any]]) -> None:
    """Under nested edits: "after_edit" is what the next module received, and "before_edit" what `forward` gave.

    Of nested traces the one entered last is nearest to the module: it edits an output first, and an input first too.
    """
    audit = Audit()
    model = grown(spec, audit)
    names = [n for n, m in model.named_modules() if isinstance(m, (Leaf, Chain)) and not n.startswith("idle")]
    each: list[dict[str, Any]] = []
    for wanted in nested:
        options = wanted | {"inputs": True, "calls": "all", "clone": True}
        options |= {"sites": list(dict.fromkeys(names[i % len(names)] for i in wanted["sites"]))}
        options |= {k: EDITS.get(wanted[k]) for k in ("edit", "edit_input")}
        each.append(options)
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


@settings(STABLE, max_examples=60)
@given(spec=st.lists(trees, min_size=1, max_size=4), sites=st.lists(st.integers(0, 60), min_size=1, max_size=5))
def test_looking_changes_nothing(spec: list[Spec], sites: list[int]) -> None:
    """Captures without edits: the same bits, and gradients of the same bits, as without a trace."""
    model = grown(spec)
    names = [n for n, m in model.named_modules() if not isinstance(m, First) and not n.startswith("idle")]
    chosen = list(dict.fromkeys(names[i % len(names)] for i in sites))

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
            with Trace(model, chosen, inputs=True, clone=True):
                found = figures()
        except HookError as error:
            assert "Never ran" in str(error)
            return
    assert len(found) == len(expected) and all(map(same_bits, found, expected))


@settings(STABLE, max_examples=100)
@given(
    shape=st.lists(st.sampled_from(["tensor", "none", "number", "nested"]), max_size=4),
    container=st.sampled_from([tuple, list, dict]),
)
def test_hidden_is_the_first_tensor_and_only_it_is_exchanged(shape: list[str], container: type[Any]) -> None:
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
