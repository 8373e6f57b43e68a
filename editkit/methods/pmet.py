"""PMET: precise model editing (Li et al. 2023, arXiv 2308.08742).

Two δ are optimised together, at the attention's and at the MLP's output of the last block of the range; only the MLP's
is written, so that what attention can do by itself is not forced into the MLP. The residual is shared out by the
square root, and the solve is MEMIT's:

    R = (v0 + δ_mlp − m now) / √(blocks left),     ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹

Once the target is the likeliest answer the NLL counts a tenth, and the loop ends when the KL is under 0.01.
"""

import math
from collections.abc import Sequence

from editkit.edits.edit import Edit, base_of
from editkit.facts import Fact
from editkit.methods.memit import least_squares
from editkit.methods.shared.contexts import given_or_drawn
from editkit.methods.shared.prelude import Moments, checked_facts, factor_moments, provenance
from editkit.methods.shared.spread import compute_z, layers_of, spread
from editkit.models.load import LanguageModel
from editkit.settings import PmetSettings


def pmet(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: PmetSettings | None = None,
    *,
    seed: int = 0,
    moments: Moments = None,
    contexts: Sequence[str] | None = None,
    progress: bool = True,
) -> Edit:
    """One edit for all of `facts` at once. Arguments and errors as for `rome`."""
    facts = checked_facts(lm, facts)
    settings = (settings or PmetSettings()).resolved(lm.name, lm.layers)
    layers = layers_of(lm, settings)
    base = base_of(lm)
    factored, described = factor_moments(lm, layers, moments, seed, progress)
    templates = given_or_drawn(lm, contexts, settings.contexts, seed)
    weight = settings.mom2_update_weight
    assert weight is not None  # resolved

    down = lm.architecture.down(layers[-1])
    sites = [lm.architecture.attention.format(layers[-1]), down]
    z, reports = compute_z(
        lm,
        facts,
        layers[-1],
        sites,
        down,
        settings,
        templates,
        progress,
        weights=base.digest,
        nll_weight=settings.nll_weight,
        stop_kl=settings.stop_kl,
    )
    deltas, _, written = spread(
        lm,
        facts,
        base,
        layers,
        down,
        z,
        templates,
        settings.fact_token,
        lambda layer, keys: least_squares(factored[layer], keys, weight),
        share=math.sqrt,
    )
    how = provenance(
        "pmet", settings, facts, seed, moments=described, contexts=templates, reports=reports, layers=written
    )
    return Edit(deltas, base, how)
