"""ROME: rank-one model editing (Meng et al. 2022, arXiv 2202.05262), and R-ROME (arXiv 2403.07175).

One block's down-projection W [d_model, d_ff] is read as a key-value memory. With the subject's key
k [d_ff], the value v* [d_model] that makes the model say the new target, and C = E[k kᵀ]:

    ΔW = r uᵀ / (k · u),     u = C⁻¹ k*,     r = v* − (what W gives for k, bias included)

    keys="mixed"  (rome, the authors' code)   k* = mean over contexts,  k = bare prompt's,  r = δ
    keys="mean"   (r_rome, the default)       k* = k = mean over contexts,  r = v0 + δ − mean(m)

v* = v0 + δ with δ of value.py, added to the down-projection's output.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from editkit.edit import Edit, base_of, low_rank_delta
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods.common import Moments, checked_facts, factor_moments, provenance
from editkit.methods.contexts import context_templates
from editkit.methods.value import keys_and_values, optimise, rows_of
from editkit.models.load import LanguageModel
from editkit.moments import Factored
from editkit.settings import RomeSettings, RRomeSettings


def rome(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: RomeSettings | None = None,
    *,
    seed: int = 0,
    moments: Moments = None,
    contexts: Sequence[str] | None = None,
    progress: bool = True,
) -> Edit:
    """The ROME edit for one fact, or for several written one after the other.

    - `settings`: see RomeSettings; None for a field takes the model's constant.
    - `moments`: how to collect C, or {layer: SecondMoment}.
    - `contexts`: templates with one `{}`, the bare "{}" first; None draws them with `seed`.
    - `progress`: show a bar with the loss of each step.

    The model is left bit for bit as it was. Raises ModelError for a layer it does not have, FactError for a
    fact it cannot place or that contradicts another, EditkitError when the update is not finite or the key is
    degenerate.
    """
    facts = checked_facts(lm, facts)
    settings = (settings or RomeSettings()).resolved(lm.name, lm.layers)
    assert settings.layer is not None
    layer = lm.check_layer(settings.layer)
    site = lm.architecture.down(layer)

    base = base_of(lm)
    factored, described = factor_moments(lm, [layer], moments, seed, progress)
    templates = list(contexts) if contexts is not None else context_templates(lm, settings.contexts, seed)
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    reports: list[dict[str, Any]] = []
    with ExitStack() as undo:  # earlier facts stay applied while the later ones are computed
        for number, fact in enumerate(facts):
            left, right, report = _one(lm, site, fact, settings, templates, factored[layer], progress)
            lefts.append(left)
            rights.append(right)
            reports.append(report)
            if number + 1 < len(facts):
                step = Edit((low_rank_delta(lm, site, left[:, None], right[None]),), base)
                undo.enter_context(step.applied(lm, check=False))
    delta = low_rank_delta(lm, site, torch.stack(lefts, 1), torch.stack(rights))
    name = "r_rome" if settings.keys == "mean" else "rome"
    how = provenance(name, settings, facts, seed, moments=described, contexts=templates, reports=reports)
    return Edit((delta,), base, how)


def r_rome(
    lm: LanguageModel, facts: Fact | Sequence[Fact], settings: RRomeSettings | None = None, **options: Any
) -> Edit:
    """`rome` with the context-mean key on both sides (Gupta et al. 2024): the recommended default.

    It removes the tiny k · u that make single ROME edits collapse a model. Arguments as for `rome`.
    """
    return rome(lm, facts, settings or RRomeSettings(), **options)


def _one(
    lm: LanguageModel,
    site: str,
    fact: Fact,
    settings: RomeSettings,
    templates: list[str],
    factored: Factored,
    progress: bool,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """One rank-one update as (left [d_model], right [d_ff]) in float64, with its health report."""
    rows = rows_of(lm, fact, settings.token, templates)
    keys, values = keys_and_values(lm, site, rows)  # [contexts, d_ff], [contexts, d_model], float64
    v0_norm = values[0].norm().item()
    found = optimise(lm, [site], rows, [v0_norm], settings, name=fact.subject, progress=progress)
    delta = found.delta[0]
    k_mean, k_bare = keys.mean(0), keys[0]
    u = factored.solve(k_mean)
    u = u / u.norm()
    if settings.keys == "mean":
        k, residual = k_mean, values[0] + delta - values.mean(0)
    else:
        k, residual = k_bare, delta
    k_dot_u = (k @ u).item()
    if not abs(k_dot_u) > 1e-8 * k.norm().item():
        raise EditkitError(
            f"k·u is {k_dot_u:.2e} for {fact.text!r}: the key has almost no part along its own direction, and the "
            "update would be enormous. Use method=r_rome, more moments.tokens, or a larger moments.ridge."
        )
    report = {
        "k_dot_u": k_dot_u,
        "k_norm": k.norm().item(),
        "cos_bare_mean": torch.cosine_similarity(k_bare, k_mean, dim=0).item(),
        "v0_norm": v0_norm,
        "delta_norm": delta.norm().item(),
        "clamp_hit": found.clamp_hit,
        "steps": found.steps,
    }
    return residual / k_dot_u, u, report
