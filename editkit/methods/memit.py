"""MEMIT: many facts over a range of blocks (Meng et al. 2023, arXiv 2210.07229), and EMMET (Gupta et al. 2024,
arXiv 2403.14236).

With K [d_ff, n] the keys of the facts at a block, R [d_model, n] the residuals to write there (spread.py), C = E[k kᵀ]:

    memit   ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹                   least squares: old keys keep their values, new ones get R
    emmet   ΔW = R (Kᵀ C'⁻¹ K + ε I)⁻¹ Kᵀ C'⁻¹         equality: the new keys get R (ε = 0), old ones move least

with C' = λ C. MEMIT writes a range, EMMET one block. By Woodbury's identity

    Kᵀ (λ C + K Kᵀ)⁻¹ = (λ I + Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹

so both need one n × n solve and the Cholesky factor of C; with more facts than d_ff, MEMIT solves in d_ff instead.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from editkit.edits.edit import Edit, base_of
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods.shared.contexts import given_or_drawn
from editkit.methods.shared.prelude import Moments, checked_facts, factor_moments, provenance
from editkit.methods.shared.spread import compute_z, layers_of, spread
from editkit.models.load import LanguageModel
from editkit.moments import Factored
from editkit.settings import EmmetSettings, MemitSettings


def memit(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: MemitSettings | None = None,
    *,
    seed: int = 0,
    moments: Moments = None,
    contexts: Sequence[str] | None = None,
    progress: bool = True,
) -> Edit:
    """One edit for all of `facts` at once. Arguments and errors as for `rome`."""
    return _write(lm, facts, settings or MemitSettings(), "memit", seed, moments, contexts, progress)


def emmet(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: EmmetSettings | None = None,
    *,
    seed: int = 0,
    moments: Moments = None,
    contexts: Sequence[str] | None = None,
    progress: bool = True,
) -> Edit:
    """One edit of one block for all of `facts` at once. Arguments and errors as for `rome`."""
    return _write(lm, facts, settings or EmmetSettings(), "emmet", seed, moments, contexts, progress)


def _write(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: MemitSettings,
    name: str,
    seed: int,
    moments: Moments,
    contexts: Sequence[str] | None,
    progress: bool,
) -> Edit:
    facts = checked_facts(lm, facts)
    settings = settings.resolved(lm.name, lm.layers)
    layers = layers_of(lm, settings)
    if isinstance(settings, EmmetSettings) and len(layers) > 1:
        raise EditkitError(f"EMMET writes one block; layers {layers} were asked for. Give one, or use method=memit.")
    base = base_of(lm)
    factored, described = factor_moments(lm, layers, moments, seed, progress)
    templates = given_or_drawn(lm, contexts, settings.contexts, seed)
    target_site = lm.architecture.target_site(layers[-1])
    sites = [lm.architecture.down(layers[-1])]
    z, reports = compute_z(
        lm, facts, layers[-1], sites, target_site, settings, templates, progress, weights=base.digest
    )
    weight = settings.mom2_update_weight
    assert weight is not None  # resolved

    def solve(layer: int, keys: Tensor) -> Tensor:
        if isinstance(settings, EmmetSettings):
            return equality(factored[layer], keys, weight, settings.epsilon if len(facts) > 1 else 0.0)
        return least_squares(factored[layer], keys, weight)

    deltas, _, written = spread(lm, facts, base, layers, target_site, z, templates, settings.fact_token, solve)
    how = provenance(
        name, settings, facts, seed, moments=described, contexts=templates, reports=reports, layers=written
    )
    return Edit(deltas, base, how)


def least_squares(factored: Factored, keys: Tensor, weight: float) -> Tensor:
    """Kᵀ (λ C + K Kᵀ)⁻¹ [n, d_ff] in float64, from K [d_ff, n], by the smaller of two solves."""
    n, d_ff = keys.shape[1], keys.shape[0]
    if n < d_ff:
        weighed = factored.solve(keys)  # C⁻¹ K
        inner = weight * torch.eye(n, dtype=keys.dtype) + keys.T @ weighed
        return torch.linalg.solve(inner, weighed.T)
    return torch.linalg.solve(weight * factored.matrix(d_ff) + keys @ keys.T, keys).T


def equality(factored: Factored, keys: Tensor, weight: float, epsilon: float) -> Tensor:
    """(Kᵀ (λC)⁻¹ K + ε I)⁻¹ Kᵀ (λC)⁻¹ [n, d_ff] in float64, from K [d_ff, n].

    Raises EditkitError when the keys depend on each other and ε is 0.
    """
    weighed = factored.solve(keys) / weight
    inner = keys.T @ weighed + epsilon * torch.eye(keys.shape[1], dtype=keys.dtype)
    solved, failed = torch.linalg.solve_ex(inner, weighed.T)
    if failed:
        raise EditkitError(
            "Keys of these facts depend on each other, so their values cannot all be held exactly. Set "
            "method.epsilon to 0.1, or leave out facts of one subject."
        )
    return solved
