"""Keys and values read from one pass equal those of a pass each, also while one block after the other is written."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from editkit.facts import Fact
from editkit.methods.shared import sites
from editkit.methods.shared.sites import Lookups, at_lookup
from editkit.models.load import LanguageModel
from editkit.nethook import get_module, get_parameter
from editkit.testing.tiny import DENSE, tiny_lm
from editkit.testing.untouched import count_hooks

FAMILIES = DENSE  # test_expert_edits.py has the mixtures of experts
CONTEXTS = ["{}", "The old town. {}", "Because I was there for a long time then. {}"]
FACTS = [
    Fact("{} is located in the city of", "The Eiffel Tower", "Rome"),  # subject at the very start
    Fact("The city that has the {}", "Big Ben", "Oslo"),  # at the very end
    Fact("The mother tongue of {} is", "Victor Hugo", "English"),
]
LAYERS = [0, 2]  # a block between them is not written


@contextmanager
def written(lm: LanguageModel, layer: int) -> Iterator[None]:
    """In the body the block's down-projection is another."""
    weight = get_parameter(lm.model, f"{lm.architecture.down(layer)}.weight")
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype) / 4)
        yield
        weight.copy_(before)


@contextmanager
def passes(lm: LanguageModel) -> Iterator[list[int]]:
    """[how often the model runs from its embedding]."""
    count = [0]

    def add(*_: object) -> None:
        count[0] += 1

    handle = get_module(lm.model, lm.architecture.embedding).register_forward_hook(add)
    yield count
    handle.remove()


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


@pytest.mark.cells
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_equals_a_pass_each(family: str, dtype: torch.dtype) -> None:
    lm = tiny_lm(family, dtype=dtype)
    last = LAYERS[-1]
    target, attention = lm.architecture.target_site(last), lm.architecture.attention.format(last)
    hooks = count_hooks(lm.model)
    with passes(lm) as count:
        lookups = Lookups(lm, FACTS, CONTEXTS, "subject_last", LAYERS, target, [attention])
        once = count[0]
        for site in (target, attention):
            wanted = at_lookup(lm, site, FACTS, CONTEXTS[:1], "subject_last").output[:, 0]
            assert close(lookups.start(site), wanted, 1e-5)
        before = count[0]
        first, start = lookups.keys(LAYERS[0]), lookups.values()
        assert count[0] == before and torch.equal(start, lookups.start(target))
        assert close(first, at_lookup(lm, lm.architecture.down(0), FACTS, CONTEXTS, "subject_last").input, 1e-5)
        with written(lm, LAYERS[0]):
            before = count[0]
            keys, values = lookups.keys(last), lookups.values()
            assert count[0] == before and once == 2  # the bare prompts, and the others
            slow = Lookups(lm, FACTS, CONTEXTS, "subject_last", [last], target, keep=False)
            wanted = slow.keys(last)
            assert close(keys, wanted, 1e-5) and close(values, slow.values(), 1e-5)
        assert not close(keys, at_lookup(lm, lm.architecture.down(last), FACTS, CONTEXTS, "subject_last").input, 1e-3)
    assert count_hooks(lm.model) == hooks


def test_two_writes_in_turn() -> None:
    """Each block is passed with all lower ones written, over parts of two rows."""
    lm = tiny_lm("gpt2")
    target = lm.architecture.target_site(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sites, "ROWS", 2)
        fast = Lookups(lm, FACTS, CONTEXTS, "subject_last", [0, 1, 2], target)
        slow = Lookups(lm, FACTS, CONTEXTS, "subject_last", [0, 1, 2], target, keep=False)
        assert close(fast.keys(0), slow.keys(0), 1e-5) and close(fast.values(), slow.values(), 1e-5)
        with written(lm, 0):
            assert close(fast.keys(1), slow.keys(1), 1e-5) and close(fast.values(), slow.values(), 1e-5)
            with written(lm, 1):
                assert close(fast.keys(2), slow.keys(2), 1e-5) and close(fast.values(), slow.values(), 1e-5)


def both_ways(lm: LanguageModel) -> int:
    """Assert that keys and values of the second block are right; the passes that they took."""
    target = lm.architecture.target_site(1)
    lookups = Lookups(lm, FACTS, CONTEXTS, "subject_last", [0, 1], target)
    lookups.keys(0)
    lookups.values()
    with written(lm, 0), passes(lm) as count:
        keys, values = lookups.keys(1), lookups.values()
        taken = count[0]
        assert close(keys, at_lookup(lm, lm.architecture.down(1), FACTS, CONTEXTS, "subject_last").input, 1e-5)
        assert close(values, at_lookup(lm, target, FACTS, CONTEXTS[:1], "subject_last").output[:, 0], 1e-5)
    return taken


def test_what_takes_too_much_memory_is_read_in_passes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert both_ways(tiny_lm("gpt2")) == 0
    monkeypatch.setattr(sites, "KEPT_BYTES", 1000)
    assert both_ways(tiny_lm("gpt2")) == 2


def test_blocks_that_cannot_run_alone_are_read_in_passes_of_their_own() -> None:
    """A model that tells its blocks something beside their arguments: whether it begins at the embedding."""
    lm = tiny_lm("gpt2")
    fresh = [False]

    def begin(*_: object) -> None:
        fresh[0] = True

    def scaled(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        was, fresh[0] = fresh[0], False
        return 2 * output if was else output

    handles = [
        get_module(lm.model, lm.architecture.embedding).register_forward_hook(begin),
        get_module(lm.model, lm.architecture.down(1)).register_forward_hook(scaled),
    ]
    assert both_ways(lm) == 2
    for handle in handles:
        handle.remove()
