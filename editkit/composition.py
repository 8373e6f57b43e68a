"""Composition: the weights of a session, put together from those of its begin and its steps.

With W0 the weights at the session's begin and Δ_j its steps in force, in the order they were made,

    W = cast(T(W0, Σ_j Δ_j))          summed in float64, cast once; T is a transform (prune, rect, sphere) or nothing

Σ begins with the sum of the folded steps (folded.py), where a session has such. T is of Σ as a dense matrix in
float32, and not of the steps' factors, so that it is the same whether steps are folded or not.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from editkit.edits.base import Base
from editkit.edits.delta import Delta, joined
from editkit.edits.edit import Edit
from editkit.errors import EditkitError
from editkit.folded import Folded
from editkit.methods.shared.transforms import TRANSFORMS
from editkit.models.architecture import as_stored
from editkit.models.installed import Installed, install, installed_on
from editkit.models.load import LanguageModel
from editkit.models.offload import values_of, write_values
from editkit.models.quantized import edited_module, is_quantized
from editkit.models.snapshot import uninterrupted
from editkit.models.wrapped import require_editable
from editkit.nethook import get_module, replace_module

Sums = dict[str, Tensor]  # Σ ΔW [d_model, d_ff] of each parameter, in float64


class Composition:
    """The weights of `lm`, which is as it was at the session's begin, `base`; `transform`: a name of TRANSFORMS."""

    def __init__(self, lm: LanguageModel, base: Base, transform: str | None) -> None:
        self.lm, self.base, self.transform = lm, base, transform
        self._installed = installed_on(lm.model)
        self._began: dict[str, Tensor] = {}  # W0 of every parameter that a step has changed
        self._modules: dict[str, nn.Module] = {}  # that hold the quantised ones among them at W0
        self._latest: tuple[Folded, list[Edit], Sums] = Folded(), [], {}  # one step more adds to these sums

    def total(self, folded: Folded, steps: Sequence[Edit]) -> Edit:
        """The sum as one edit of the base, transformed. Where a transform looks at weights, they are the base's."""
        how: dict[str, Any] = {"method": "session", "steps": [step.provenance for step in steps]}
        if folded.steps or self.transform is not None:
            sums, first = self._added(folded, steps), _first(folded, steps)
            deltas = tuple(replace(first[name], left=total.float(), right=None) for name, total in sums.items())
        else:
            deltas = joined(delta for step in steps for delta in step.deltas)
        if folded.steps:
            how["folded"] = {"steps": folded.steps, "facts": folded.facts, "chain": folded.chain}
        one = Edit(deltas, self.base, how, installed=_contents(steps))
        if self.transform is None or not deltas:
            return one
        with self.unchanged():
            self._copy({**self._began, **self._modules})
            return TRANSFORMS[self.transform](self.lm, one)

    def sums(self, folded: Folded, steps: Sequence[Edit]) -> Sums:
        """Σ ΔW of each parameter."""
        if self.transform is not None:
            return {delta.parameter: delta.change() for delta in self.total(folded, steps).deltas}
        return self._added(folded, steps)

    def _added(self, folded: Folded, steps: Sequence[Edit]) -> Sums:
        """Σ ΔW of each parameter, not transformed."""
        before, summed, known = self._latest
        if before is folded and all(a is b for a, b in zip(summed, steps, strict=False)) and len(summed) <= len(steps):
            sums = dict(known)
        else:
            summed, sums = [], {delta.parameter: delta.left for delta in folded.sums}
        for step in steps[len(summed) :]:
            for delta in step.deltas:
                change = delta.change()
                sums[delta.parameter] = sums[delta.parameter] + change if delta.parameter in sums else change
        self._latest = folded, list(steps), sums
        return sums

    def folds(self, folded: Folded, steps: Sequence[Edit]) -> None:
        """Note that the steps of the latest sums are now `folded` and `steps`: the sums are the same."""
        self._latest = folded, list(steps), self._latest[2]

    def norms(self, folded: Folded, steps: Sequence[Edit]) -> dict[str, tuple[float, float]]:
        """(‖Σ ΔW‖, ‖W0‖) of each parameter that has been changed (Frobenius)."""
        changed = self.sums(folded, steps)
        zero = torch.zeros(())
        return {
            name: (changed.get(name, zero).norm().item(), start.double().norm().item())
            for name, start in self._began.items()
        }

    def write(self, folded: Folded, steps: Sequence[Edit]) -> None:
        """Bring the weights to W0 and the steps, those of parameters without a step back to W0, and put on the model
        what the steps install.

        Raises EditkitError for a result that is not finite; nothing is written then.
        """
        stored = _first(folded, steps)
        for name in stored:
            if name not in self._began:  # no step has touched it: it is W0
                module = get_module(self.lm.model, stored[name].module)
                if is_quantized(module):
                    self._modules[name] = module
                self._began[name] = values_of(self.lm.model, name).clone()
        for name in self._began:
            require_editable(self.lm.model, name.rpartition(".")[0])
        values: dict[str, Tensor | nn.Module] = {**self._began, **self._modules}
        for name, total in self.sums(folded, steps).items():
            start = self._began[name]
            change = as_stored(total, stored[name].orientation, stored[name].experts)
            changed = start.double() + change.to(start.device)
            if not changed.to(start.dtype).isfinite().all():
                raise EditkitError(f"{name} is not finite in {start.dtype} with this step; the step was not taken.")
            if name in self._modules:
                module, way, site = self._modules[name], self.lm.edited, stored[name].module
                values[name] = edited_module(module, total.float(), None, way, self.lm.dtype, site)
            else:
                values[name] = changed.to(start.dtype)
        self._copy(values, [*self._installed, *_contents(steps)])

    @contextlib.contextmanager
    def unchanged(self, *, if_it_fails: bool = False) -> Iterator[None]:
        """The weights as they were, after the body; or after an exception in it alone."""
        now, on = {name: self._now(name) for name in self._began}, installed_on(self.lm.model)
        try:
            yield
        except BaseException:
            self._copy({**self._began, **self._modules, **now}, on)
            raise
        if not if_it_fails:
            self._copy({**self._began, **self._modules, **now}, on)

    def _copy(self, values: Mapping[str, Tensor | nn.Module], contents: Sequence[Installed] | None = None) -> None:
        """Give the parameters these values; a quantised one is given its module, or what takes that one's place. With
        `contents`, they are all that is in force besides weights."""
        with uninterrupted():
            if contents is not None:
                install(self.lm.model, contents)
            for name, value in values.items():
                if isinstance(value, nn.Module):
                    replace_module(self.lm.model, name.rpartition(".")[0], value)
                else:
                    write_values(self.lm.model, name, value)

    def _now(self, name: str) -> Tensor | nn.Module:
        """What `_copy` takes to leave the parameter as it is now."""
        if name in self._modules:
            return get_module(self.lm.model, name.rpartition(".")[0])
        return values_of(self.lm.model, name).clone()


def _first(folded: Folded, steps: Sequence[Edit]) -> dict[str, Delta]:
    """The first change of each parameter."""
    found: dict[str, Delta] = {}
    for delta in (*folded.sums, *(delta for step in steps for delta in step.deltas)):
        found.setdefault(delta.parameter, delta)
    return found


def _contents(steps: Sequence[Edit]) -> tuple[Installed, ...]:
    """What the steps install, in their order."""
    return tuple(each for step in steps for each in step.installed)


def distance(a: Sums, b: Sums) -> float:
    """‖a − b‖ / ‖b‖ over all parameters; 0 where b has none."""
    zero = torch.zeros(())
    apart = sum((a.get(n, zero) - b.get(n, zero)).square().sum().item() for n in {*a, *b})
    size = sum(t.square().sum().item() for t in b.values())
    return (apart / size) ** 0.5 if size else 0.0
