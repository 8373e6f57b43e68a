"""Edits as values: sums and multiples, files put together in order, and what an edit looks like inside.

An edit of one base is a vector: ΔW adds, scales and cuts to a rank without a model at hand. What was computed
one on top of the other is another matter: such edits are put together in their order by `apply_files`, or by a Session.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from editkit.edits.edit import Applied, Delta, Edit, base_of
from editkit.errors import EditkitError
from editkit.models.load import LanguageModel
from editkit.models.snapshot import digest
from editkit.nethook import get_parameter


def combined(edits: Sequence[Edit], factors: Sequence[float]) -> Edit:
    """Σ factor · edit, as one edit of the base that all of them were computed for.

    Factors stay factors (their ranks add); with a dense change among them, the sum is dense. Raises EditkitError
    when the edits are of different bases.
    """
    scaled = []
    for edit, factor in zip(edits, factors, strict=True):
        if edit.base.digest != edits[0].base.digest:
            raise EditkitError(
                f"Edits of different bases cannot be added: '{edits[0].base.name}' {edits[0].base.digest[:12]} and "
                f"'{edit.base.name}' {edit.base.digest[:12]}. Edits computed one on top of the other go into a "
                "Session, or through editkit.apply_files in their order."
            )
        scaled += [replace(delta, left=factor * delta.left) for delta in edit.deltas]
    of = [{"factor": f, "digest": e.digest, "provenance": e.provenance} for e, f in zip(edits, factors, strict=True)]
    return Edit(joined(scaled), edits[0].base, {"method": "combined", "of": of}, edits[0].parents)


def joined(deltas: Iterable[Delta]) -> tuple[Delta, ...]:
    """One delta a module: the sum of all that change it."""
    found: dict[str, Delta] = {}
    for delta in deltas:
        found[delta.module] = _sum(found[delta.module], delta) if delta.module in found else delta
    return tuple(found.values())


def _sum(a: Delta, b: Delta) -> Delta:
    if a.right is None or b.right is None:
        return replace(a, left=(a.change() + b.change()).float(), right=None)
    return replace(a, left=torch.cat([a.left, b.left], 1), right=torch.cat([a.right, b.right]))


def compressed(edit: Edit, rank: int) -> Edit:
    """The edit with each ΔW cut to its `rank` largest singular values; provenance has the relative error made."""
    deltas, errors = [], {}
    for delta in edit.deltas:
        u, s, vt = delta.svd()
        deltas.append(replace(delta, left=(u[:, :rank] * s[:rank]).float(), right=vt[:rank].float()))
        errors[delta.parameter] = (s[rank:].norm() / s.norm().clamp_min(1e-300)).item()
    cut = {"rank": rank, "relative_error": errors}
    return replace(edit, deltas=tuple(deltas), provenance=edit.provenance | {"compressed": cut})


@contextlib.contextmanager
def apply_files(paths: Sequence[str | Path], lm: LanguageModel) -> Iterator[Applied]:
    """The edits of several files on `lm` inside the `with`, in the stated order; restored and verified after it.

    W = cast(W0 + Σ ΔW), cast once. Each edit must be of `lm` itself, or have been computed on top of exactly the
    files before it (its `parents`). Raises EditkitError naming the first file for which neither holds, EditFileError
    for one that cannot be read; nothing is applied then.
    """
    if not paths:
        raise EditkitError("No edit file was given: name one or several.")
    base = base_of(lm)
    before: list[str] = []
    deltas: list[Delta] = []
    for path in paths:
        edit = Edit.load(path)
        alone = edit.base.digest == base.digest and not edit.parents
        if not alone and not (before and edit.parents == tuple(before)):
            raise EditkitError(
                f"'{path}' was computed for '{edit.base.name}' {edit.base.digest[:12]} on top of "
                f"{[d[:12] for d in edit.parents] or 'nothing'}; here it comes on '{lm.name}' {base.digest[:12]}, "
                f"on top of {[d[:12] for d in before] or 'nothing'}. Give all files in the order they were made, "
                "on their own base."
            )
        before.append(edit.digest)
        deltas += list(edit.deltas)
    weights = {delta.parameter: get_parameter(lm.model, delta.parameter) for delta in deltas}
    now = tuple(replace(delta, before=digest(weights[delta.parameter])) for delta in joined(deltas))
    with Edit(now, base, {"method": "files", "digests": before}).applied(lm) as applied:
        yield applied


@dataclass(frozen=True)
class Spectrum:
    """What one ΔW looks like inside."""

    parameter: str
    values: tuple[float, ...]  # singular values, largest first
    norm: float  # Frobenius
    relative_norm: float | None  # ‖ΔW‖ / ‖W‖, where a model was given
    rounding_error: float | None  # ‖(cast(W + ΔW) − W) − ΔW‖ / ‖ΔW‖: what rounding to the weight's dtype loses

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values' shares (Roy and Vetterli 2007)."""
        values = torch.tensor(self.values, dtype=torch.float64)
        return torch.special.entr(values / values.sum()).sum().exp().item() if values.sum() > 0 else 0.0


def spectra(edit: Edit, lm: LanguageModel | None = None) -> list[Spectrum]:
    """A Spectrum for each weight that the edit changes; with `lm`, its base, against the weights. `lm` is only read."""
    found = []
    for delta in edit.deltas:
        values, norm, relative, lost = delta.svd()[1], delta.norm(), None, None
        if lm is not None:
            weight = get_parameter(lm.model, delta.parameter).detach()
            change = delta.matrix().to(weight.device, torch.float64)
            written = (weight.double() + change).to(weight.dtype).double() - weight.double()
            relative = norm / weight.double().norm().item()
            lost = ((written - change).norm() / change.norm()).item() if norm else 0.0
        found.append(Spectrum(delta.parameter, tuple(values.tolist()), norm, relative, lost))
    return found


def alignment(delta: Delta, moment: Tensor) -> float:
    """How much of ΔW lies where running text has keys: E‖ΔW k‖² over ‖ΔW‖² times the mean of C's eigenvalues.

    `moment`: C = E[k kᵀ] [d_ff, d_ff]. 1 for a ΔW that looks everywhere alike, 0 for one in C's null space, at most
    C's largest eigenvalue over its mean one.
    """
    change = delta.change()
    energy = torch.einsum("df,fg,dg->", change, moment.double().cpu(), change)
    return (energy / (change.square().sum() * moment.diagonal().double().mean().cpu())).item()
