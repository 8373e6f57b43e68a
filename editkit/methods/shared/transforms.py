"""Transforms of a finished edit: RECT, PRUNE and SPHERE.

    rect    keep the share of ΔW's entries that are largest in |ΔW / W|, drop the others
            (Gu et al. 2024, arXiv 2401.04700)
    prune   singular values σ of the total ΔW above σmax(W0) become  ln σ − ln σmax + σmax, added to W0
            (Ma et al. 2024, arXiv 2405.16821)
    sphere  ΔW ← ΔW (I − ½ U Uᵀ): half of what lies in the directions U [d_ff, r] that the rows of W, each brought to
            length 1, share most: the eigenvectors of their Gram matrix that hold half of its trace (SPHERE, 2026)

All are of an edit as a whole against the weights it was computed for. PRUNE is of the *total* of a session against
the weights that the session began with: one public copy adds its result to the edited weights, which counts it twice.
SPHERE's W is likewise the one that the session began with; the source takes the edited one at each step.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from editkit.edits import Delta, Edit, dense_delta, low_rank_delta
from editkit.models.architecture import as_matrix
from editkit.models.load import LanguageModel
from editkit.models.offload import values_of

RECT_KEPT = 0.4
SPHERE_ENERGY = 0.5  # of the trace, that the directions U hold
SPHERE_STRENGTH = 0.5  # the share of ΔW in them that is taken away


def rect(lm: LanguageModel, edit: Edit, *, kept: float = RECT_KEPT) -> Edit:
    """The edit with all but the share `kept` of each ΔW's entries set to 0. `lm` holds the weights before it."""

    def one(delta: Delta) -> Delta:
        w, change = _weight(lm, delta), delta.change()
        relative = (change / w).abs().nan_to_num(nan=0.0, posinf=float("inf"))  # 0 / 0 changes nothing
        count = max(1, round(kept * change.numel()))
        threshold = relative.flatten().kthvalue(change.numel() - count + 1).values
        return dense_delta(lm, delta.module, torch.where(relative >= threshold, change, 0.0))

    return _transformed(edit, tuple(map(one, edit.deltas)), {"name": "rect", "kept": kept})


def prune(lm: LanguageModel, edit: Edit) -> Edit:
    """The edit with its largest singular values pulled back to σmax(W0). `lm` holds W0."""

    def one(delta: Delta) -> Delta:
        largest = torch.linalg.matrix_norm(_weight(lm, delta), ord=2)
        u, s, vt = delta.svd()
        if not (s > largest).any():
            return delta
        s = torch.where(s > largest, s.log() - largest.log() + largest, s)
        if delta.right is None:
            return dense_delta(lm, delta.module, (u * s) @ vt)
        return low_rank_delta(lm, delta.module, u * s, vt)

    return _transformed(edit, tuple(map(one, edit.deltas)), {"name": "prune"})


def sphere(lm: LanguageModel, edit: Edit) -> Edit:
    """The edit with half of what lies in W's principal directions taken away. `lm` holds the weights before it."""

    def one(delta: Delta) -> Delta:
        rows = torch.nn.functional.normalize(_weight(lm, delta), dim=1)
        _, s, vt = torch.linalg.svd(rows, full_matrices=False)
        share = s.square().cumsum(0) / s.square().sum()
        u = vt[: int((share < SPHERE_ENERGY).sum()) + 1]  # [r, d_ff]
        if delta.right is None:
            change = delta.left.double()
            return dense_delta(lm, delta.module, change - SPHERE_STRENGTH * (change @ u.T) @ u)
        right = delta.right.double()
        return low_rank_delta(lm, delta.module, delta.left, right - SPHERE_STRENGTH * (right @ u.T) @ u)

    how = {"name": "sphere", "energy": SPHERE_ENERGY, "strength": SPHERE_STRENGTH}
    return _transformed(edit, tuple(map(one, edit.deltas)), how)


TRANSFORMS = {"rect": rect, "prune": prune, "sphere": sphere}


def _weight(lm: LanguageModel, delta: Delta) -> Tensor:
    """W [d_model, d_ff] in float64 on the CPU."""
    return as_matrix(values_of(lm.model, delta.parameter).double().cpu(), delta.orientation)


def _transformed(edit: Edit, deltas: tuple[Delta, ...], how: dict[str, Any]) -> Edit:
    return replace(edit, deltas=deltas, provenance=edit.provenance | {"transform": how})
