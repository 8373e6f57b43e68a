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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from editkit.edits.edit import Base, Edit, base_of, low_rank_delta
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods.shared.contexts import given_or_drawn
from editkit.methods.shared.engine import rows_of
from editkit.methods.shared.prelude import Moments, checked_facts, factor_moments, provenance
from editkit.methods.shared.value import Optimised, compute_deltas, named
from editkit.models.load import LanguageModel
from editkit.moments import Factored
from editkit.settings import RomeSettings, RRomeSettings

Update = tuple[Tensor, Tensor, dict[str, Any]]  # left [d_model] and right [d_ff] in float64, and a health report


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
    given = _given(lm, settings, seed, moments, contexts, progress)
    updates: list[Update] = []
    with ExitStack() as undo:  # earlier facts stay applied while the later ones are computed
        for number, fact in enumerate(facts):
            updates += _updates(lm, [fact], given, progress, changed=number > 0)
            if number + 1 < len(facts):
                left, right, _ = updates[-1]
                delta = low_rank_delta(lm, lm.architecture.down(given.layer), left[:, None], right[None])
                undo.enter_context(Edit((delta,), given.base).applied(lm, check=False))
    return _edit(lm, facts, updates, given, seed)


def rome_each(
    lm: LanguageModel,
    facts: Sequence[Fact],
    settings: RomeSettings | None = None,
    *,
    seed: int = 0,
    moments: Moments = None,
    contexts: Sequence[str] | None = None,
    progress: bool = True,
) -> list[Edit]:
    """An edit for each fact alone: `[rome(lm, fact) for fact in facts]`, with all values optimised together.

    Each edit is for the model as it is; the facts may contradict each other. R-ROME with RRomeSettings. Arguments
    and errors as for `rome`.
    """
    for fact in facts:
        fact.check_targets(lm)
    given = _given(lm, settings, seed, moments, contexts, progress)
    updates = _updates(lm, facts, given, progress)
    return [_edit(lm, [fact], [update], given, seed) for fact, update in zip(facts, updates, strict=True)]


def r_rome(
    lm: LanguageModel, facts: Fact | Sequence[Fact], settings: RRomeSettings | None = None, **options: Any
) -> Edit:
    """`rome` with the context-mean key on both sides (Gupta et al. 2024): the recommended default.

    It removes the tiny k · u that make single ROME edits collapse a model. Arguments as for `rome`.
    """
    return rome(lm, facts, settings or RRomeSettings(), **options)


class _Given(NamedTuple):
    """What the updates of all facts share."""

    settings: RomeSettings  # resolved
    layer: int
    base: Base
    factored: Factored
    described: dict[str, Any]  # the moments, for the record
    templates: list[str]


def _given(
    lm: LanguageModel,
    settings: RomeSettings | None,
    seed: int,
    moments: Moments,
    contexts: Sequence[str] | None,
    progress: bool,
) -> _Given:
    settings = (settings or RomeSettings()).resolved(lm.name, lm.layers)
    assert settings.layer is not None
    layer = lm.check_layer(settings.layer)
    base = base_of(lm)
    factored, described = factor_moments(lm, [layer], moments, seed, progress)
    templates = given_or_drawn(lm, contexts, settings.contexts, seed)
    return _Given(settings, layer, base, factored[layer], described, templates)


def _edit(lm: LanguageModel, facts: Sequence[Fact], updates: Sequence[Update], given: _Given, seed: int) -> Edit:
    """The updates of one weight as one Edit."""
    lefts, rights, reports = zip(*updates, strict=True)
    delta = low_rank_delta(lm, lm.architecture.down(given.layer), torch.stack(lefts, 1), torch.stack(rights))
    name = "r_rome" if given.settings.keys == "mean" else "rome"
    said = {"moments": given.described, "contexts": given.templates, "reports": list(reports)}
    return Edit((delta,), given.base, provenance(name, given.settings, facts, seed, **said))


def _updates(
    lm: LanguageModel, facts: Sequence[Fact], given: _Given, progress: bool, *, changed: bool = False
) -> list[Update]:
    """A rank-one update for each fact, all for the model as it is now: `changed` since the base was taken, or not."""
    settings, layer, templates = given.settings, given.layer, given.templates
    site = lm.architecture.down(layer)
    jobs = [rows_of(lm, fact, settings.fact_token, templates) for fact in facts]
    weights = lm.digest if changed and settings.cache else given.base.digest
    found = compute_deltas(
        lm, layer, [site], jobs, None, settings, name=named(facts), progress=progress, weights=weights
    )
    return [_update(fact, each, settings, given.factored) for fact, each in zip(facts, found, strict=True)]


def _update(fact: Fact, found: Optimised, settings: RomeSettings, factored: Factored) -> Update:
    """One update with its health report. Raises EditkitError for a degenerate key."""
    assert found.clean is not None
    (k_bare, k_mean), (v_bare, v_mean) = found.clean
    delta = found.delta[0]
    u = factored.solve(k_mean)
    u = u / u.norm()
    if settings.keys == "mean":
        k, residual = k_mean, v_bare + delta - v_mean
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
        "v0_norm": v_bare.norm().item(),
        "delta_norm": delta.norm().item(),
        "clamp_hit": found.clamp_hit,
        "steps": found.steps,
    }
    return residual / k_dot_u, u, report
