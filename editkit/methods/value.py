"""The value side that ROME, MEMIT, PMET and AlphaEdit share: a δ that makes the model say the new target.

δ [d_model] starts at 0, is added to the output of a module (the edited block's down-projection) at the lookup token
of every row, and minimises, over rows = contexts × prompt and one row "{subject} is a",

    −mean log p(target) + kl_factor · KL(before ‖ after, at the subject) + weight_decay · ‖δ‖ / ‖v0‖²

with Adam; ‖δ‖ is held under clamp · ‖v0‖ after each step (ROME section 3.1 and the authors' code).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from tqdm import tqdm

from editkit.facts import Fact, lookup_position
from editkit.models.load import LanguageModel
from editkit.models.tokens import Rows, Scored, continued, spaced, tokenise
from editkit.nethook import Trace, requires_grad
from editkit.settings import ValueSettings

KL_PROMPT = "{} is a"


@dataclass(frozen=True)
class FactRows:
    """The rows of one fact's optimisation: contexts × (prompt + target), then the KL row."""

    scored: Scored
    lookup: Tensor  # [rows] position of the lookup token
    contexts: int  # rows before the KL row

    @property
    def index(self) -> tuple[Tensor, Tensor]:
        """(row, lookup position) of every row."""
        return torch.arange(len(self.lookup), device=self.lookup.device), self.lookup


def rows_of(lm: LanguageModel, fact: Fact, token: str, templates: Sequence[str]) -> FactRows:
    """Rows of `fact` in `templates` (the bare "{}" first). Raises FactError when a lookup token cannot be found."""
    prompts = [context.replace("{}", fact.prompt) for context in templates] + [KL_PROMPT]
    targets = [spaced(fact.target_new)] * len(templates) + [""]
    scored = continued(lm, [fact.filled(prompt) for prompt in prompts], targets)
    lookup = [lookup_position(scored.rows, row, prompt, fact.subject, token) for row, prompt in enumerate(prompts)]
    return FactRows(scored, torch.tensor(lookup, device=lm.device), len(templates))


def by_token(tensor: Tensor, rows: Rows) -> Tensor:
    """A view [rows, tokens, d] of what passed through a module, where the family (OPT) flattens rows and tokens too."""
    return tensor.view(*rows.ids.shape, -1)


@torch.no_grad()
def keys_and_values(lm: LanguageModel, site: str, rows: FactRows) -> tuple[Tensor, Tensor]:
    """k [contexts, d_ff] and m = W k + b [contexts, d_model] at the lookup token, float64 on the CPU."""
    with Trace(lm.model, site, inputs=True, outputs=True, stop=True) as trace:
        lm.model(**rows.scored.rows.inputs(), use_cache=False)
    kept = slice(0, rows.contexts)
    keys = by_token(trace[site].input, rows.scored.rows)[rows.index][kept]
    values = by_token(trace[site].output, rows.scored.rows)[rows.index][kept]
    return keys.double().cpu(), values.double().cpu()


@torch.no_grad()
def at_lookup(
    lm: LanguageModel, site: str, facts: Sequence[Fact], templates: Sequence[str], token: str, *, inputs: bool = False
) -> Tensor:
    """The input or output of `site` at the lookup token, [facts, templates, d] in float64 on the CPU."""
    asked = [(fact, context.replace("{}", fact.prompt)) for fact in facts for context in templates]
    found = []
    for first in range(0, len(asked), 64):
        part = asked[first : first + 64]
        rows = tokenise(lm, [fact.filled(prompt) for fact, prompt in part])
        at = [lookup_position(rows, i, prompt, fact.subject, token) for i, (fact, prompt) in enumerate(part)]
        with Trace(lm.model, site, inputs=inputs, outputs=not inputs, stop=True) as trace:
            lm.model(**rows.inputs(), use_cache=False)
        captured = by_token(trace.input if inputs else trace.output, rows)
        found.append(captured[torch.arange(len(part)), torch.tensor(at)].double().cpu())
    return torch.cat(found).view(len(facts), len(templates), -1)


@dataclass(frozen=True)
class Optimised:
    """What the optimisation found."""

    delta: Tensor  # [sites, d_model] float64 on the CPU
    steps: list[dict[str, float]]  # loss terms before each step
    clamp_hit: bool


def optimise(
    lm: LanguageModel,
    sites: Sequence[str],
    rows: FactRows,
    norms: Sequence[float],
    settings: ValueSettings,
    *,
    name: str,
    progress: bool,
    said_weight: float = 1.0,
    stop: Callable[[bool, float], bool] = lambda said, kl: False,
) -> Optimised:
    """A δ for each of `sites`, optimised together, by Adam. `settings` are resolved.

    Each step is one forward with δ added, and a backward down to the first site: the gradient of δ is the
    captured output gradient summed over the lookup tokens. `norms` are the ‖v0‖ of each site. The NLL counts
    `said_weight` once the target is the likeliest answer in every row; `stop(said, kl)` ends the loop besides the loss.
    """
    row, at, token = rows.scored.pick()
    per_row = torch.bincount(row, minlength=rows.contexts)  # target tokens a row
    kl_row, kl_at = rows.contexts, rows.lookup[-1]
    kl_before: Tensor | None = None
    limit, lr, decay_factor = settings.clamp, settings.lr, settings.weight_decay
    assert settings.steps and limit and lr and decay_factor is not None  # resolved by the method
    width = lm.model.config.get_text_config().hidden_size
    wide = torch.promote_types(lm.dtype, torch.float32)  # losses and δ, whatever the model's dtype
    deltas = [torch.zeros(width, dtype=wide, device=lm.device) for _ in sites]
    v0_norm = torch.tensor(norms, dtype=wide, device=lm.device)  # [sites]
    optimizer = torch.optim.Adam(deltas, lr=lr)
    steps: list[dict[str, float]] = []
    clamp_hit = False

    def add_delta(output: Tensor, site: str) -> Tensor:
        changed = output.clone()
        by_token(changed, rows.scored.rows)[rows.index] += deltas[sites.index(site)].to(output.dtype)
        return changed

    bar = tqdm(range(settings.steps), desc=f"value for {name}", disable=not progress, leave=False)
    with requires_grad(lm.model, only=[]), bar:
        for step in bar:
            with Trace(lm.model, sites, outputs=False, edit=add_delta, grads=True, leaf=True) as trace:
                logits = lm.model(**rows.scored.rows.inputs(), use_cache=False).logits
                log_p = log_softmax(logits[row, at].to(wide), -1)
                said = bool((log_p.argmax(-1) == token).all())
                log_p = log_p.gather(1, token[:, None])[:, 0]
                nll = -(log_p.new_zeros(rows.contexts).index_add(0, row, log_p) / per_row).mean()
                after = log_softmax(logits[kl_row, kl_at].to(wide), -1)
                kl_before = after.detach() if kl_before is None else kl_before
                kl = kl_div(after, kl_before, log_target=True, reduction="sum")
                weight = said_weight if said else 1.0
                (weight * nll + settings.kl_factor * kl).backward()
            sizes = torch.stack([delta.norm() for delta in deltas])
            decay = (decay_factor * sizes / v0_norm**2).sum()
            terms = {"nll": nll.item(), "kl": settings.kl_factor * kl.item(), "weight_decay": decay.item()}
            loss = weight * terms["nll"] + terms["kl"] + terms["weight_decay"]
            steps.append({"loss": loss} | terms)
            bar.set_postfix(loss=f"{loss:.3f}", p_new=f"{torch.exp(-nll).item():.3f}")
            if loss < settings.stop_loss or stop(said, kl.item()) or step == settings.steps - 1:
                break
            for site, delta, size, norm in zip(sites, deltas, sizes, v0_norm, strict=True):
                delta.grad = by_token(trace[site].grad, rows.scored.rows)[rows.index].to(wide).sum(0)
                if size > 0:  # the norm has no gradient at 0; torch takes 0 there
                    delta.grad += decay_factor / norm**2 * delta / size
            optimizer.step()
            for delta, norm in zip(deltas, v0_norm, strict=True):
                if delta.norm() > limit * norm:
                    delta.mul_(limit * norm / delta.norm())
                    clamp_hit = True
    return Optimised(torch.stack(deltas).double().cpu(), steps, clamp_hit)
