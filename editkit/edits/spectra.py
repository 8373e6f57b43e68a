"""Spectra: what the ΔW of an edit look like inside, and where they lie among the keys of running text."""

from dataclasses import dataclass

import torch
from torch import Tensor

from editkit.edits.delta import Delta
from editkit.edits.edit import Edit
from editkit.models.load import LanguageModel
from editkit.models.offload import values_of
from editkit.models.quantized import is_quantized
from editkit.nethook import get_module


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
            weight = values_of(lm.model, delta.parameter)
            change = delta.matrix().to(weight.device, torch.float64)
            quantized = is_quantized(get_module(lm.model, delta.module))
            dtype = lm.dtype if quantized and lm.edited == "wide" else weight.dtype
            written = (weight.double() + change).to(dtype).double() - weight.double()
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
