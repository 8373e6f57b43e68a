"""ROME: rank-one model editing (Meng et al. 2022, arXiv 2202.05262); R-ROME is the same with one setting (r_rome.py).

One block's down-projection W [d_model, d_ff] is read as a key-value memory. With the subject's key
k [d_ff], the value v* [d_model] that makes the model say the new target, and C = E[k kᵀ]:

    ΔW = r uᵀ / (k · u),     u = C⁻¹ k*,     r = v* − (what W gives for k, bias included)

    keys="mixed"  (rome, the authors' code)   k* = mean over contexts,  k = bare prompt's,  r = δ
    keys="mean"   (r_rome, the default)       k* = k = mean over contexts,  r = v0 + δ − mean(m)

v* = v0 + δ with δ of shared/value.py, added to the down-projection's output.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from editkit.edits import Edit, low_rank_delta, routing_report
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.shared.anchor import anchored
from editkit.methods.shared.engine import rows_of
from editkit.methods.shared.prelude import Given, Moments, prepare
from editkit.methods.shared.value import Optimised, compute_deltas, named
from editkit.models.evalmode import in_eval_mode
from editkit.models.experts import down_of, site_of
from editkit.models.load import LanguageModel
from editkit.moments import Factored
from editkit.settings import EASYEDIT, Constants, ValueSettings, require_one_of

Update = tuple[Tensor, Tensor, dict[str, Any]]  # left [d_model] and right [d_ff] in float64, and a health report

# The authors' hparams files. The atlas model's are our own, measured (its card): the parts of its state are as large as
# ‖v0‖, and the published step of 0.5 in each coordinate takes the subject's other attributes along.
CONSTANTS = Constants(
    default={"clamp": 4.0, "steps": 20, "lr": 0.5, "weight_decay": 0.5},
    published={
        "atlas": {"layer": 4, "clamp": 8.0, "steps": 60, "lr": 0.2, "weight_decay": 0.02},
        "gpt2-medium": {"layer": 8, "clamp": 3.0},
        "gpt2-large": {"layer": 12},
        "gpt2-xl": {"layer": 17},
        "gpt-j-6b": {"layer": 5},
        "gpt-neox-20b": {"layer": 15},
        "Llama-3-8B": {"layer": 5},
        # EasyEdit's files; the authors of ROME have none for these models.
        "Llama-2-7B": {"layer": 5, **EASYEDIT},
        "Llama-3.2-3B": {"layer": 5, **EASYEDIT},
        "Qwen2.5-7B": {"layer": 5, **EASYEDIT},
    },
    blocks="layer",
)


@dataclass(frozen=True)
class RomeSettings(ValueSettings):
    """ROME (arXiv 2202.05262) and R-ROME (arXiv 2403.07175); constants of the authors' code."""

    constants: ClassVar[Constants] = CONSTANTS

    keys: str = "mixed"  # mixed: the paper's code (mean key in u, bare key in k·u); mean: one key on both sides
    layer: int | None = None  # block whose down-projection is edited

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self.keys, "method.keys", ("mixed", "mean"))


@in_eval_mode
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
    - `seed`: of contexts and running text.
    - `moments`: how to collect C, or {layer: SecondMoment}.
    - `contexts`: templates with one `{}`, the bare "{}" first; None draws them with `seed`.
    - `progress`: show a bar with the loss of each step.

    The model is left bit for bit as it was. Raises ModelError for a layer it does not have, FactError for a
    fact it cannot place or that contradicts another, EditkitError when the update is not finite or the key is
    degenerate.
    """
    given = prepare(
        lm, facts, settings or RomeSettings(), seed=seed, moments=moments, contexts=contexts, progress=progress
    )
    facts, updates = given.facts, list[Update]()
    with ExitStack() as undo:  # earlier facts stay applied while the later ones are computed
        for number, fact in enumerate(facts):
            updates += _updates(lm, [fact], given, progress)
            if number + 1 < len(facts):
                left, right, _ = updates[-1]
                delta = low_rank_delta(lm, down_of(lm, given.layers[0]), left[:, None], right[None])
                undo.enter_context(Edit((delta,), given.base).applied(lm, check=False))
    return _edit(lm, facts, updates, given)


@in_eval_mode
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
    given = prepare(
        lm,
        facts,
        settings or RomeSettings(),
        seed=seed,
        moments=moments,
        contexts=contexts,
        progress=progress,
        contradictions=True,
    )
    updates = _updates(lm, given.facts, given, progress)
    return [_edit(lm, [fact], [update], given) for fact, update in zip(given.facts, updates, strict=True)]


def _edit(lm: LanguageModel, facts: Sequence[Fact], updates: Sequence[Update], given: Given[RomeSettings]) -> Edit:
    """The updates of one weight as one Edit."""
    lefts, rights, reports = zip(*updates, strict=True)
    delta = low_rank_delta(lm, down_of(lm, given.layers[0]), torch.stack(lefts, 1), torch.stack(rights))
    name = "r_rome" if given.settings.keys == "mean" else "rome"
    routing = routing_report(lm, Edit((delta,), given.base), [fact.text for fact in facts])
    return Edit((delta,), given.base, given.provenance(name, facts=facts, reports=list(reports), **routing))


def _updates(lm: LanguageModel, facts: Sequence[Fact], given: Given[RomeSettings], progress: bool) -> list[Update]:
    """A rank-one update for each fact, all for the model as it is now."""
    settings, (layer,) = given.settings, given.layers
    factored = given.factored[layer]  # before the values, so that a C which cannot be factored fails at once
    jobs = [rows_of(lm, fact, settings.fact_token, given.templates) for fact in facts]
    found = compute_deltas(lm, layer, [site_of(lm, layer)], jobs, None, settings, name=named(facts), progress=progress)
    return [_update(fact, each, settings, factored) for fact, each in zip(facts, found, strict=True)]


def _update(fact: Fact, found: Optimised, settings: RomeSettings, factored: Factored) -> Update:
    """One update with its health report. Raises EditkitError for a degenerate key."""
    assert found.clean is not None
    (k_bare, k_mean), (v_bare, v_mean) = found.clean
    (delta,), (value_norm,), (skipped,) = anchored(v_bare[None], found.delta[:1], settings.anchor)
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
        "value_norm": value_norm.item(),
        "skipped": bool(skipped),
        "clamp_hit": found.clamp_hit,
        "steps": found.steps,
    }
    return residual / k_dot_u, u, report


register("rome", rome, RomeSettings)
