"""The checks of a method: on every family and in every dtype that is asked for.

- untouched: computing an edit leaves bits, objects, flags, .grad, modes, hooks and the random state as they were;
- seeded: the same seed gives the same bytes, whatever the global random state;
- shapes: each ΔW has the shape of its weight, and is finite;
- saved: a file gives the same edit back, byte for byte;
- restored: applied and taken off again, every bit is back; under an exception too;
- effective: log p(target_new) rises on average.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from editkit.edits.edit import Edit
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods import Method, get_method
from editkit.models.architecture import as_matrix, orientation
from editkit.models.load import LanguageModel
from editkit.models.offload import values_of
from editkit.models.snapshot import digests, tensors_of
from editkit.models.tokens import encode_with_targets, spaced
from editkit.nethook import get_module
from editkit.settings import MethodSettings, MomentSettings
from editkit.testing.conformance import Conformance, Finding
from editkit.testing.tiny import SITES, tiny_lm
from editkit.testing.untouched import untouched

# The subject stands last: attention with random weights carries next to nothing from it to a later token.
FACTS = (Fact("The city of {}", "The Eiffel Tower", "Rome"), Fact("The capital of {}", "France", "Madrid"))
TOKENS = 2048  # of running text for second moments
DTYPES = (torch.float32, torch.bfloat16)


def check_method(
    method: str | Method,
    settings: MethodSettings | None = None,
    *,
    families: Sequence[str] = tuple(SITES),
    dtypes: Sequence[torch.dtype] = DTYPES,
    facts: Sequence[Fact] = FACTS,
    effective: bool = True,
) -> Conformance:
    """Run all checks of a method on tiny random models.

    - `method`: a registered name, or what `editkit.methods.register` returned.
    - `settings`: its settings; None: its defaults, with block 1 where it has a `layer` or `layers`. Give few steps.
    - `families`, `dtypes`: of the models; a family is a name of `editkit.testing.SITES`.
    - `facts`: what is edited at once; give one for a method that takes one.
    - `effective`: ask that the edits raise log p(target_new). Random weights need larger steps than trained ones.

    A cell that the method refuses with an EditkitError counts as refused, not as failed; any other exception fails.
    Raises ConfigError for an unknown method.
    """
    found = method if isinstance(method, Method) else get_method(method)
    conformance = Conformance(f"method '{found.name}'")
    for family in families:
        for dtype in dtypes:
            lm = tiny_lm(family, dtype=dtype)
            cell = f"{family} in {str(dtype).removeprefix('torch.')}"
            check_cell(conformance, cell, lm, found, settings or _small(found), list(facts), effective)
    return conformance


def _small(method: Method) -> MethodSettings:
    """The method's defaults, on block 1."""
    names = {each.name for each in fields(method.settings)}
    block: dict[str, Any] = {"layers": [1]} if "layers" in names else {"layer": 1} if "layer" in names else {}
    return method.settings(**block)


def check_cell(
    found: Conformance,
    cell: str,
    lm: LanguageModel,
    method: Method,
    settings: MethodSettings,
    facts: list[Fact],
    effective: bool = True,
) -> None:
    """All checks of one cell, a method on a model, added to `found`."""
    moments = MomentSettings(tokens=TOKENS)
    edits: list[Edit] = []

    def compute() -> None:
        edits.append(method(lm, facts, settings, moments=moments, seed=3, progress=False))

    # 1) Computed, and refused or not.
    before = digests(tensors_of(lm.model))
    try:
        compute()
    except EditkitError as error:
        found.refuse(cell, error)
        found.run("untouched", cell, lambda: _equal(before, digests(tensors_of(lm.model)), "a refused edit changed"))
        return
    except Exception as error:
        found.findings.append(Finding("computed", cell, f"{type(error).__name__}: {error}"))
        return
    edit = edits[0]

    # 2) The model, and the bytes.
    def as_it_was() -> None:
        _equal(before, digests(tensors_of(lm.model)), "computing the edit changed")
        site = next(iter(edit.modules), lm.architecture.down(1))
        with untouched(lm, site):
            compute()

    def seeded() -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(12345)
            compute()
        assert edits[-1].to_bytes() == edit.to_bytes(), "the same seed gave other bytes"

    found.run("untouched", cell, as_it_was)
    found.run("seeded", cell, seeded)

    # 3) The edit as a value.
    found.run("shapes", cell, lambda: _shapes(lm, edit))
    found.run("saved", cell, lambda: _saved(edit))

    # 4) On the model and off it.
    found.run("restored", cell, lambda: _restored(lm, edit, before))
    if effective:
        found.run("effective", cell, lambda: _effective(lm, edit, facts))


def _equal(before: dict[str, str], after: dict[str, str], what: str) -> None:
    changed = [name for name in {*before, *after} if before.get(name) != after.get(name)]
    assert not changed, f"{what} {', '.join(sorted(changed)[:3])}"


def _shapes(lm: LanguageModel, edit: Edit) -> None:
    assert edit.deltas or edit.installed, "the edit is empty"
    for delta in edit.deltas:
        module = get_module(lm.model, delta.module)
        if delta.experts is not None:
            continue  # a slice of one weight for all experts: `apply` checks it
        weight = as_matrix(values_of(lm.model, delta.parameter), orientation(module, delta.module))
        assert delta.change().shape == weight.shape, f"ΔW of {delta.parameter} is {list(delta.change().shape)}"
        assert delta.change().isfinite().all(), f"ΔW of {delta.parameter} is not finite"


def _saved(edit: Edit) -> None:
    with TemporaryDirectory() as folder:
        again = Edit.load(edit.save(Path(folder) / "edit.safetensors"))
    assert again.to_bytes() == edit.to_bytes() and again.digest == edit.digest, "a saved edit is another one"


def _restored(lm: LanguageModel, edit: Edit, before: dict[str, str]) -> None:
    with edit.applied(lm) as applied:
        inside = lm.digest
    assert applied.reversal is not None and applied.reversal.exact, str(applied.reversal)
    assert lm.digest != inside, "the edit changed nothing"
    try:
        with edit.applied(lm):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    _equal(before, digests(tensors_of(lm.model)), "after an interrupt differ")


def _effective(lm: LanguageModel, edit: Edit, facts: list[Fact]) -> None:
    before = log_p(lm, facts).mean()
    with edit.applied(lm):
        after = log_p(lm, facts).mean()
    assert after > before, f"mean log p(target_new) goes from {before:.3f} to {after:.3f}"


def log_p(lm: LanguageModel, facts: Sequence[Fact]) -> Tensor:
    """log p(target_new) of each fact, [facts]."""
    scored = encode_with_targets(lm, [fact.text for fact in facts], [spaced(fact.target_new) for fact in facts])
    row, at, token = scored.pick()
    with torch.no_grad():
        found = lm.model(**scored.rows.inputs(), use_cache=False).logits[row, at].float().log_softmax(-1)
    return torch.zeros(len(facts)).index_add(0, row, found[torch.arange(len(token)), token])
