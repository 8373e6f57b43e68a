"""ROME: rank-one model editing (Meng et al. 2022, arXiv 2202.05262), and R-ROME (arXiv 2403.07175).

One block's down-projection W [d_model, d_ff] is read as a key-value memory. With the subject's key
k [d_ff], the value v* [d_model] that makes the model say the new target, and C = E[k kᵀ]:

    ΔW = r uᵀ / (k · u),     u = C⁻¹ k*,     r = v* − (what W gives for k, bias included)

    keys="mixed"  (rome, the authors' code)   k* = mean over contexts,  k = bare prompt's,  r = δ
    keys="mean"   (r_rome, the default)       k* = k = mean over contexts,  r = v0 + δ − mean(m)

v* = v0 + δ, and δ minimises, over rows = contexts × prompt and one row "{subject} is a",

    −mean log p(target) + kl_factor · KL(before ‖ after, at the subject) + weight_decay · ‖δ‖ / ‖v0‖²

with Adam, ‖δ‖ held under clamp · ‖v0‖ after each step. δ is added at the lookup token of every row.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from tqdm import tqdm

from editkit.edit import Edit, base_of, low_rank_delta
from editkit.errors import EditkitError
from editkit.facts import Fact, lookup_position
from editkit.methods.contexts import context_templates
from editkit.models.load import LanguageModel
from editkit.models.tokens import Scored, continued, spaced
from editkit.moments import Factored, Identity, second_moments
from editkit.nethook import Trace, requires_grad
from editkit.settings import MomentSettings, RomeSettings, RRomeSettings

KL_PROMPT = "{} is a"


def rome(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: RomeSettings | None = None,
    *,
    seed: int = 0,
    moments: MomentSettings | Factored | None = None,
    contexts: Sequence[str] | None = None,
    progress: bool = True,
) -> Edit:
    """The ROME edit for one fact, or for several written one after the other.

    - `settings`: see RomeSettings; None for layer or clamp takes the model's published constant.
    - `moments`: how to collect C, or a factored C to use as it is.
    - `contexts`: templates with one `{}`, the bare "{}" first; None draws them with `seed`.
    - `progress`: show a bar with the loss of each step.

    The model is left bit for bit as it was. Raises ModelError for a layer it does not have, FactError for a
    fact it cannot place, EditkitError when the update is not finite or the key is degenerate.
    """
    facts = [facts] if isinstance(facts, Fact) else list(facts)
    if not facts:
        raise EditkitError("No fact was given: there is nothing to edit.")
    settings = (settings or RomeSettings()).resolved(lm.name, lm.layers)
    assert settings.layer is not None
    layer = lm.check_layer(settings.layer)
    site = lm.architecture.down(layer)
    for fact in facts:
        fact.check_targets(lm)

    base = base_of(lm)
    factored, described = _factored(lm, layer, moments, seed, progress)
    templates = list(contexts) if contexts is not None else context_templates(lm, settings.contexts, seed)
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    reports: list[dict[str, Any]] = []
    with ExitStack() as undo:  # earlier facts stay applied while the later ones are computed
        for number, fact in enumerate(facts):
            left, right, report = _one(lm, site, fact, settings, templates, factored, progress)
            lefts.append(left)
            rights.append(right)
            reports.append(report)
            if number + 1 < len(facts):
                step = Edit((low_rank_delta(lm, site, left[:, None], right[None]),), base)
                undo.enter_context(step.applied(lm, check=False))
    delta = low_rank_delta(lm, site, torch.stack(lefts, 1), torch.stack(rights))
    provenance = {
        "method": "r_rome" if settings.keys == "mean" else "rome",
        "settings": asdict(settings),
        "moments": described,
        "seed": seed,
        "contexts": templates,
        "facts": [asdict(fact) for fact in facts],
        "reports": reports,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return Edit((delta,), base, provenance)


def r_rome(
    lm: LanguageModel, facts: Fact | Sequence[Fact], settings: RRomeSettings | None = None, **options: Any
) -> Edit:
    """`rome` with the context-mean key on both sides (Gupta et al. 2024): the recommended default.

    It removes the tiny k · u that make single ROME edits collapse a model. Arguments as for `rome`.
    """
    return rome(lm, facts, settings or RRomeSettings(), **options)


def _factored(
    lm: LanguageModel, layer: int, moments: MomentSettings | Factored | None, seed: int, progress: bool
) -> tuple[Factored, dict[str, Any]]:
    """The factored C, and what the record says of it."""
    if isinstance(moments, Factored):
        return moments, {"given": True}
    settings = moments or MomentSettings()
    if not settings.enabled:
        return Identity(), asdict(settings)
    moment = second_moments(lm, [layer], settings, seed=seed, progress=progress)[layer]
    factored = moment.factor(settings.ridge)
    found = {"keys": moment.count, "keys_per_dimension": moment.vectors_per_dimension}
    return factored, asdict(settings) | found | {"condition": factored.condition}


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
    rows = _rows(lm, fact, settings.token, templates)
    keys, values = _keys_and_values(lm, site, rows)  # [contexts, d_ff], [contexts, d_model], float64
    optimised = _optimise(lm, site, fact, rows, values[0], settings, progress)
    k_mean, k_bare = keys.mean(0), keys[0]
    u = factored.solve(k_mean)
    u = u / u.norm()
    if settings.keys == "mean":
        k, residual = k_mean, values[0] + optimised.delta - values.mean(0)
    else:
        k, residual = k_bare, optimised.delta
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
        "v0_norm": values[0].norm().item(),
        "delta_norm": optimised.delta.norm().item(),
        "clamp_hit": optimised.clamp_hit,
        "steps": optimised.steps,
    }
    return residual / k_dot_u, u, report


@dataclass(frozen=True)
class _PromptRows:
    """The rows of the optimisation: contexts × (prompt + target), then the KL row."""

    scored: Scored
    lookup: Tensor  # [rows] position of the lookup token
    contexts: int  # rows before the KL row

    @property
    def index(self) -> tuple[Tensor, Tensor]:
        """(row, lookup position) of every row."""
        return torch.arange(len(self.lookup), device=self.lookup.device), self.lookup


def _rows(lm: LanguageModel, fact: Fact, token: str, templates: list[str]) -> _PromptRows:
    prompts = [context.replace("{}", fact.prompt) for context in templates] + [KL_PROMPT]
    targets = [spaced(fact.target_new)] * len(templates) + [""]
    scored = continued(lm, [fact.filled(prompt) for prompt in prompts], targets)
    lookup = [lookup_position(scored.rows, row, prompt, fact.subject, token) for row, prompt in enumerate(prompts)]
    return _PromptRows(scored, torch.tensor(lookup, device=lm.device), len(templates))


@torch.no_grad()
def _keys_and_values(lm: LanguageModel, site: str, rows: _PromptRows) -> tuple[Tensor, Tensor]:
    """k [contexts, d_ff] and m = W k + b [contexts, d_model] at the lookup token, float64 on the CPU."""
    with Trace(lm.model, site, inputs=True, outputs=True, stop=True) as trace:
        lm.model(**rows.scored.rows.inputs(), use_cache=False)
    kept = slice(0, rows.contexts)
    keys, values = trace[site].input[rows.index][kept], trace[site].output[rows.index][kept]
    return keys.double().cpu(), values.double().cpu()


@dataclass(frozen=True)
class _Optimised:
    delta: Tensor  # [d_model] float64 on the CPU
    steps: list[dict[str, float]]  # loss terms before each step
    clamp_hit: bool


def _optimise(
    lm: LanguageModel,
    site: str,
    fact: Fact,
    rows: _PromptRows,
    v0: Tensor,
    settings: RomeSettings,
    progress: bool,
) -> _Optimised:
    """δ by Adam. Each step is one forward with δ added at the site, and a backward down to the site: the
    gradient of δ is the captured output gradient summed over the lookup tokens."""
    row, at, token = rows.scored.pick()
    per_row = torch.bincount(row, minlength=rows.contexts)  # target tokens a row
    kl_row, kl_at = rows.contexts, rows.lookup[-1]
    kl_before: Tensor | None = None
    delta = torch.zeros(len(v0), device=lm.device)
    v0_norm = v0.norm().item()
    limit, lr, decay_factor = settings.clamp, settings.lr, settings.weight_decay
    assert settings.steps and limit and lr and decay_factor is not None  # resolved by `rome`
    optimizer = torch.optim.Adam([delta], lr=lr)
    bound = limit * v0_norm
    steps: list[dict[str, float]] = []
    clamp_hit = False

    def add_delta(output: Tensor) -> Tensor:
        changed = output.clone()
        changed[rows.index] += delta.to(output.dtype)
        return changed

    bar = tqdm(range(settings.steps), desc=f"value for {fact.subject}", disable=not progress, leave=False)
    with requires_grad(lm.model, only=[]), bar:
        for step in bar:
            with Trace(lm.model, site, edit=add_delta, grads=True, leaf=True) as trace:
                logits = lm.model(**rows.scored.rows.inputs(), use_cache=False).logits
                log_p = log_softmax(logits[row, at].float(), -1).gather(1, token[:, None])[:, 0]
                nll = -(torch.zeros(rows.contexts, device=lm.device).index_add(0, row, log_p) / per_row).mean()
                after = log_softmax(logits[kl_row, kl_at].float(), -1)
                kl_before = after.detach() if kl_before is None else kl_before
                kl = settings.kl_factor * kl_div(after, kl_before, log_target=True, reduction="sum")
                (nll + kl).backward()
            size = delta.norm()
            decay = decay_factor * size / v0_norm**2
            loss = (nll + kl + decay).item()
            steps.append({"loss": loss, "nll": nll.item(), "kl": kl.item(), "weight_decay": decay.item()})
            bar.set_postfix(loss=f"{loss:.3f}", p_new=f"{torch.exp(-nll).item():.3f}")
            if loss < settings.stop_loss or step == settings.steps - 1:
                break
            delta.grad = trace.grad[rows.index].float().sum(0)
            if size > 0:  # the norm has no gradient at 0; torch takes 0 there
                delta.grad += decay_factor / v0_norm**2 * delta / size
            optimizer.step()
            if delta.norm() > bound:
                delta.mul_(bound / delta.norm())
                clamp_hit = True
    return _Optimised(delta.double().cpu(), steps, clamp_hit)
