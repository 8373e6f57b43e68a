"""AlphaEdit: null-space constrained editing (Fang et al. 2024, arXiv 2410.02355).

With P the projector on the directions in which running text has next to no keys (eigenvectors of C = E[k kᵀ] with an
eigenvalue under a threshold), K the keys of these facts and K_p those of the facts edited before:

    ΔW = R Kᵀ P (P (K Kᵀ + K_p K_pᵀ) P + l2 · I)⁻¹

which is the transpose of the paper's Δᵀ = (P (K Kᵀ + K_p K_pᵀ) + l2 · I)⁻¹ P K Rᵀ, made symmetric: its range lies
in P's, where both agree. K_p is kept in each edit's `memory` and handed back as `earlier`, never in a global.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from editkit.edits.edit import Edit, base_of
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods.shared.contexts import given_or_drawn
from editkit.methods.shared.prelude import Moments, checked_facts, find_moments, provenance
from editkit.methods.shared.spread import compute_z, layers_of, spread
from editkit.models.load import LanguageModel
from editkit.moments import SecondMoment
from editkit.settings import AlphaEditSettings


def alphaedit(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: AlphaEditSettings | None = None,
    *,
    seed: int = 0,
    moments: Moments = None,
    contexts: Sequence[str] | None = None,
    progress: bool = True,
    earlier: Sequence[Edit] = (),
) -> Edit:
    """One edit for all of `facts` at once. Arguments and errors as for `rome`.

    `earlier`: this method's edits that `lm` already holds; their keys are kept where they are. Raises
    EditkitError when the null space is empty.
    """
    facts = checked_facts(lm, facts)
    settings = (settings or AlphaEditSettings()).resolved(lm.name, lm.layers)
    layers = layers_of(lm, settings)
    l2 = settings.l2
    assert l2 is not None  # resolved
    base = base_of(lm)
    found, described = find_moments(lm, layers, moments, seed, progress)
    bases = {layer: null_space(found[layer], layer, settings.threshold, settings.fraction) for layer in layers}
    templates = given_or_drawn(lm, contexts, settings.contexts, seed)
    target_site = lm.architecture.target_site(layers[-1])
    sites = [lm.architecture.down(layers[-1])]
    z, reports = compute_z(
        lm, facts, layers[-1], sites, target_site, settings, templates, progress, weights=base.digest
    )

    def solve(layer: int, keys: Tensor) -> Tensor:
        name = lm.architecture.down(layer)
        before = [edit.memory[name].double() for edit in earlier if name in edit.memory and settings.keep_earlier]
        return constrained(bases[layer], keys, torch.cat([keys, *before], 1), l2)

    deltas, keys, written = spread(lm, facts, base, layers, target_site, z, templates, settings.fact_token, solve)
    for report in written:
        report["null_space"] = bases[report["layer"]].shape[1]
    how = provenance(
        "alphaedit", settings, facts, seed, moments=described, contexts=templates, reports=reports, layers=written
    )
    memory = {lm.architecture.down(layer): k.float() for layer, k in keys.items()}
    return Edit(deltas, base, how, memory=memory)


def null_space(moment: SecondMoment | None, layer: int, threshold: float, fraction: float | None) -> Tensor:
    """An orthonormal basis [d_ff, rank] of C's null space: eigenvalues under `threshold`, or the least `fraction`.

    Raises EditkitError for an empty one, naming the eigenvalues that there are.
    """
    if moment is None:
        raise EditkitError("AlphaEdit needs second moments: moments.enabled=false leaves no null space. Turn it on.")
    values, vectors = moment.eigenvectors
    rank = int((values < threshold).sum()) if fraction is None else round(fraction * len(values))
    if rank == 0:
        raise EditkitError(
            f"The null space at layer {layer} is empty: C's eigenvalues go from {values[0]:.3g} to "
            f"{values[-1]:.3g} and none is under method.threshold={threshold:g}. Raise it, or give method.fraction=0.5."
        )
    return vectors[:, :rank]


def constrained(basis: Tensor, keys: Tensor, held: Tensor, l2: float) -> Tensor:
    """Kᵀ P (P H Hᵀ P + l2 I)⁻¹ [n, d_ff] in float64, with P = B Bᵀ, K [d_ff, n] and H [d_ff, m] = K and K_p.

    Solved in the smaller of rank(P) and m dimensions (Woodbury).
    """
    k, h = basis.T @ keys, basis.T @ held  # [rank, n], [rank, m]
    rank, m = h.shape
    if m < rank:
        inner = l2 * torch.eye(m, dtype=h.dtype) + h.T @ h
        solved = (k - h @ torch.linalg.solve(inner, h.T @ k)) / l2
    else:
        solved = torch.linalg.solve(l2 * torch.eye(rank, dtype=h.dtype) + h @ h.T, k)
    return (basis @ solved).T
