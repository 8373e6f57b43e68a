"""select() against a matcher that tries everything, on random names."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from editkit.nethook import HookError, NameNotFound, select

# Equal on every machine, whatever its speed.
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]
STABLE = settings(deadline=None, derandomize=True, suppress_health_check=SLOW)


def matches(pattern: list[str], text: str) -> bool:
    """By trying: `**` takes any characters, `*` any but dots, `?` one but a dot, a set one of its characters."""
    if not pattern:
        return text == ""
    head, rest = pattern[0], pattern[1:]
    if head in ("*", "**"):
        taken = 0
        while True:
            if matches(rest, text[taken:]):
                return True
            if taken == len(text) or (head == "*" and text[taken] == "."):
                return False
            taken += 1
    if head == "?":
        return bool(text) and text[0] != "." and matches(rest, text[1:])
    if head.startswith("["):
        allowed = {chr(c) for c in range(ord(head[1]), ord(head[3]) + 1)} if head[2] == "-" else set(head[1:-1])
        return text[:1] in allowed and text != "" and matches(rest, text[1:])
    return text.startswith(head) and matches(rest, text[len(head) :])


SHARED = "tied"  # the segment at which one module has several places
segments = st.sampled_from(["a", "b", "ab", "mlp", "h_1", "0", "1", "12", "+", "(x)", SHARED, SHARED])
shapes: st.SearchStrategy[Any] = st.recursive(
    st.just({}), lambda child: st.dictionaries(segments, child, min_size=1, max_size=3), max_leaves=10
)
pieces = st.sampled_from(["a", "b", "ab", "mlp", "0", "1", "+", "(x)", ".", ".", "*", "*", "**", "?", "[ab1]", "[0-2]"])


def named_tree(shape: dict[str, Any], shared: nn.Module) -> nn.Module:
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    for name, child in shape.items():
        module.add_module(name, shared if name == SHARED else named_tree(child, shared))
    return module


WAYS = ["keep", "keep", "*", "**", "?", "set", "? for the dot", "prefix"]


def like(name: str, ways: list[str]) -> list[str]:
    """A pattern made from `name`, so that something matches or nearly does."""
    pattern: list[str] = []
    for i, segment in enumerate(name.split(".")):
        way = ways[i % len(ways)]
        if i:
            pattern.append("?" if way == "? for the dot" else ".")
        if way == "set":
            pattern += [f"[{segment[0]}b1]" if segment[0].isalnum() else segment[0], segment[1:]]
        elif way == "prefix":
            pattern += [segment[0], "*"]
        else:
            pattern += {"*": ["*"], "**": ["**"], "?": ["?"] * len(segment)}.get(way, [segment])
    return pattern


@settings(STABLE, max_examples=400)
@given(
    shape=shapes,
    free=st.none() | st.lists(pieces, min_size=1, max_size=6),
    number=st.integers(0, 20),
    ways=st.lists(st.sampled_from(WAYS), min_size=1, max_size=4),
    kind=st.sampled_from(["module", "parameter"]),
)
def test_select_agrees_with_a_matcher_that_tries_everything(
    shape: Any, free: list[str] | None, number: int, ways: list[str], kind: str
) -> None:
    model = named_tree(shape, nn.Linear(1, 1))
    listed = model.named_modules if kind == "module" else model.named_parameters
    names = [(name, id(found)) for name, found in listed(remove_duplicate=False) if name]
    pattern = free or like(names[number % len(names)][0], ways) if names else ["a"]
    for two in (["*", "*"], ["**", "*"], ["*", "**"], ["**", "**"]):  # together they would read as another wildcard
        if any(pattern[i : i + 2] == two for i in range(len(pattern))):
            return
    expected: dict[int, str] = {}
    for name, found in names:
        if matches(pattern, name):
            expected.setdefault(found, name)
    try:
        got = select(model, "".join(pattern), kind=kind)
    except NameNotFound:
        got = []
    assert got == list(expected.values())


def test_the_tried_matcher_itself() -> None:
    for pattern, name, wanted in [
        (["h.", "*", ".mlp"], "h.10.mlp", True),
        (["h", "?", "10.mlp"], "h.10.mlp", False),
        (["h.", "*", ".mlp"], "h.10.x.mlp", False),
        (["h.", "**", ".mlp"], "h.10.x.mlp", True),
        (["h.", "?"], "h.10", False),
        (["h.", "[0-2]"], "h.2", True),
        (["h.", "[0-2]"], "h.3", False),
    ]:
        assert matches(pattern, name) is wanted


def test_a_star_does_not_match_the_model_itself() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)))
    assert select(net, "*") == ["0", "1"]
    assert select(net, "**") == ["0", "1", "1.0"]
    assert select(net, "") == [""]


@pytest.mark.parametrize("pattern", ["[1-0]", "[0", "[]"])
def test_a_set_that_is_none_is_refused_in_words(pattern: str) -> None:
    with pytest.raises(HookError):
        select(nn.Sequential(nn.Linear(1, 1)), pattern)


def test_a_negated_set_is_negated() -> None:
    assert select(nn.Sequential(nn.Identity(), nn.ReLU()), "[!0]") == ["1"]


def test_a_negated_set_stops_at_a_dot() -> None:
    with pytest.raises(NameNotFound):
        select(nn.Sequential(nn.Sequential(nn.Identity())), "0[^a]0")
