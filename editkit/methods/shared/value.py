"""The value side that ROME, MEMIT, PMET and AlphaEdit share: a δ that makes the model say the new target.

δ [d_model] starts at 0, is added to the output of a module (the edited block's down-projection) at the lookup token
of every row, and minimises, over rows = contexts × prompt and one row "{subject} is a",

    −mean log p(target) + kl_factor · KL(edited ‖ clean, at the subject) + weight_decay · ‖δ‖ / ‖v0‖²

with Adam; ‖δ‖ is held under clamp · ‖v0‖ after each step (ROME section 3.1 and the authors' code). The δ of many
facts are optimised side by side, each with its own rows, clamp and stop; an engine (engine.py) runs the model.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import kl_div, log_softmax
from tqdm import tqdm

from editkit.facts import Fact
from editkit.methods.cache import cached, key_of
from editkit.methods.shared.engine import AtLookup, Batch, Engine, FactRows, FullDepth, Replayed, bytes_of
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.replay import CannotReplay
from editkit.models.tokens import tokenise, unflatten
from editkit.nethook import Trace, requires_grad
from editkit.settings import ValueSettings

CPU_BYTES = 2**29  # a batch's share of memory: about what one fact takes at full depth; a larger one is no faster
Show = Callable[[float, int, int], None]  # (mean loss, steps taken since, facts ended since)
LIKE = 1.1  # how much longer the longest rows of a batch may be than the shortest, and one token
READ_EVERY = {"cpu": 1, "cuda": 5}  # steps between two looks at the losses: each look waits for an accelerator


@torch.no_grad()
def at_lookup(lm: LanguageModel, site: str, facts: Sequence[Fact], templates: Sequence[str], token: str) -> AtLookup:
    """Input and output of `site` at the lookup token of each fact in each template.

    The pass ends at the site and at the lookup token: nothing behind either can reach it.
    """
    asked = [(fact, context.replace("{}", fact.prompt)) for fact in facts for context in templates]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    order = sorted(range(len(asked)), key=lambda i: len(asked[i][1]) + len(asked[i][0].subject))
    for begin in range(0, len(order), 64):
        part = order[begin : begin + 64]
        rows = tokenise(lm, [asked[i][0].filled(asked[i][1]) for i in part])
        at = [lookup_position(rows, row, asked[i][1], asked[i][0].subject, token) for row, i in enumerate(part)]
        inputs = {name: value[:, : max(at) + 1] for name, value in rows.inputs().items()}
        with Trace(lm.model, site, inputs=True, outputs=True, stop=True) as trace:
            lm.model(**inputs, use_cache=False)
        index = torch.arange(len(part)), torch.tensor(at)
        both = [unflatten(each, len(part))[index].double().cpu() for each in (trace.input, trace.output)]
        found |= {i: (both[0][row], both[1][row]) for row, i in enumerate(part)}
    shape = (len(facts), len(templates), -1)
    return AtLookup(*(torch.stack([found[i][side] for i in range(len(asked))]).view(shape) for side in (0, 1)))


def named(facts: Sequence[Fact]) -> str:
    """What a progress bar calls them."""
    return facts[0].subject if len(facts) == 1 else f"{len(facts)} facts"


@dataclass
class Optimised:
    """What the optimisation found for one fact."""

    delta: Tensor  # [sites, d_model] float64 on the CPU
    steps: list[dict[str, float]] = field(default_factory=list)  # loss terms before each step
    clamp_hit: bool = False
    # Where no norms were given: at the site while there was no δ, [2, d], the bare prompt's and the contexts' mean.
    clean: AtLookup | None = None


def optimise(
    lm: LanguageModel,
    layer: int,
    sites: Sequence[str],
    jobs: Sequence[FactRows],
    norms: Tensor | None,
    settings: ValueSettings,
    *,
    name: str,
    progress: bool,
    nll_weight: float = 1.0,
    stop_kl: float | None = None,
    weights: str | None = None,
) -> list[Optimised]:
    """For each of `jobs` a δ for each of `sites` (modules of block `layer`) by Adam. `settings` are resolved.

    `norms` [facts, sites] are the ‖v0‖; None, with one site, takes its output for the bare prompt, and keeps what
    passed there. The NLL counts `nll_weight` once the target is the likeliest answer in every row; with `stop_kl` a
    fact ends then, besides by its loss, when its KL is no more than that. As many facts go together as memory takes; a
    batch that runs out of it is halved. `weights`, the digest of the model as it is now, is needed for
    `settings.cache` (cache.py).
    """

    def compute() -> list[Optimised]:
        return _optimised(lm, layer, sites, jobs, norms, settings, name, progress, nll_weight, stop_kl)

    if not settings.cache or weights is None:
        return compute()
    key = key_of(lm, layer, sites, jobs, norms, settings, nll_weight=nll_weight, stop_kl=stop_kl)
    return cached(lm, weights, key, compute, Optimised)


def _optimised(
    lm: LanguageModel,
    layer: int,
    sites: Sequence[str],
    jobs: Sequence[FactRows],
    norms: Tensor | None,
    settings: ValueSettings,
    name: str,
    progress: bool,
    nll_weight: float,
    stop_kl: float | None,
) -> list[Optimised]:
    found: dict[int, Optimised] = {}
    engine: type[FullDepth] | type[Replayed] = FullDepth if settings.engine == "full" else Replayed
    waiting = sorted(range(len(jobs)), key=lambda i: (jobs[i].columns, max(jobs[i].lookup)))
    most = len(jobs)
    assert settings.steps
    single = len(jobs) == 1
    total = settings.steps if single else len(jobs)
    bar = tqdm(total=total, desc=f"value for {name}", disable=not progress, leave=False)

    def show(loss: float, steps: int, ended: int) -> None:
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update(steps if single else ended)

    with requires_grad(lm.model, only=[]), bar:
        while waiting:
            part = waiting[: 1 if engine is FullDepth else min(most, _fitting(lm, layer, [jobs[i] for i in waiting]))]
            try:
                with torch.no_grad():
                    ready = engine(lm, layer, sites, Batch([jobs[i] for i in part]))
                if norms is None:
                    clean: list[AtLookup | None] = list(ready.clean())
                    sizes = torch.stack([at.output[:1].norm(dim=-1) for at in clean if at is not None])
                else:
                    clean, sizes = [None] * len(part), norms[part]
                results = _together(lm, ready, sizes, settings, nll_weight, stop_kl, show)
                for result, at in zip(results, clean, strict=True):
                    if at is not None:
                        result.clean = AtLookup(*(torch.stack((side[0], side.mean(0))) for side in at))
            except CannotReplay as error:
                warnings.warn(
                    f"The family '{lm.architecture.family}' runs at full depth, which is slow: {error}", stacklevel=2
                )
                engine = FullDepth
                continue
            except RuntimeError as error:
                if len(part) == 1 or not _out_of_memory(error):
                    raise
                most = len(part) // 2
                continue
            found |= dict(zip(part, results, strict=True))
            waiting = waiting[len(part) :]
    return [found[i] for i in range(len(jobs))]


def _together(
    lm: LanguageModel,
    engine: Engine,
    norms: Tensor,
    settings: ValueSettings,
    nll_weight: float,
    stop_kl: float | None,
    show: Show,
) -> list[Optimised]:
    """The facts of one batch. Those that have ended are frozen, and leave when the losses are read."""
    limit, lr, decay_factor, steps = settings.clamp, settings.lr, settings.weight_decay, settings.steps
    assert steps and limit and lr and decay_factor is not None  # resolved by the method
    device, count = lm.device, len(norms)
    wide = torch.promote_types(lm.dtype, torch.float32)  # losses and δ, whatever the model's dtype
    v0 = norms.T[..., None].to(device, wide)  # [sites, facts, 1]
    delta = torch.zeros(*v0.shape[:2], lm.model.config.get_text_config().hidden_size, dtype=wide, device=device)
    optimizer = torch.optim.Adam([delta], lr=lr)
    found = [Optimised(delta[:, i]) for i in range(count)]
    running = list(range(count))  # which facts the rows of `delta` belong to
    alive = torch.ones(count, dtype=torch.bool, device=device)
    hit = torch.zeros_like(alive)
    kl_before: Tensor | None = None
    unread: list[tuple[Tensor, Tensor]] = []  # (loss terms [4, facts], alive before)
    every = READ_EVERY.get(device.type, 5)

    for step in range(steps):
        nll, after, said = _answers(engine.logits(delta).to(wide), engine.batch)
        kl_before = after.detach() if kl_before is None else kl_before
        kl = kl_div(kl_before, after, log_target=True, reduction="none").sum(-1)  # KL(edited ‖ clean)
        sizes = delta.norm(dim=-1, keepdim=True)  # [sites, facts, 1]
        decay = (decay_factor * sizes / v0**2).sum((0, 2))
        weight = torch.where(said, nll_weight, 1.0)
        loss = weight * nll + settings.kl_factor * kl
        terms = torch.stack((loss + decay, nll, settings.kl_factor * kl, decay)).detach()
        unread.append((terms, alive))
        alive = alive & ~(terms[0] < settings.stop_loss)
        if stop_kl is not None:
            alive = alive & ~(said & (kl.detach() <= stop_kl))
        if (step + 1) % every == 0 or step == steps - 1:
            over = step == steps - 1
            kept = [i for i, on in enumerate(alive.tolist()) if on and not over]
            show(_read(found, running, unread, delta, hit, set(kept)), len(unread), len(running) - len(kept))
            unread = []
            if not kept:
                break
            gradient = engine.gradient(loss[kept].sum())[:, kept]
            if len(kept) < len(running):
                state = optimizer.state[delta]
                delta, v0, sizes, hit, alive = delta[:, kept], v0[:, kept], sizes[:, kept], hit[kept], alive[kept]
                optimizer = torch.optim.Adam([delta], lr=lr)
                if state:
                    optimizer.state[delta] = {k: v if v.ndim == 0 else v[:, kept] for k, v in state.items()}
                running, kl_before = [running[i] for i in kept], kl_before[kept]
                with torch.no_grad():
                    engine = engine.some(kept)
        else:
            gradient = engine.gradient(loss.sum())
        # The norm has no gradient at 0; torch takes 0 there.
        delta.grad = gradient + decay_factor / v0**2 * delta / torch.where(sizes > 0, sizes, 1.0)
        before = delta.clone()
        optimizer.step()
        over_limit = delta.norm(dim=-1, keepdim=True) / (limit * v0)
        delta.div_(over_limit.clamp_min(1.0))
        torch.where(alive[:, None], delta, before, out=delta)
        hit = hit | (alive & (over_limit[..., 0] > 1).any(0))
    return found


class _LogP(torch.autograd.Function):
    """Of log-softmax(logits [n, vocabulary]): at `token` of the first rows, whether it is the highest there, and the
    other rows whole. The table is the loop's largest: it is turned in place, forward and backward, which is once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token: Tensor) -> tuple[Tensor, ...]:
        ctx.mark_dirty(logits)
        ctx.set_materialize_grads(False)
        for part in logits.split(8 if logits.device.type == "cpu" else len(logits)):
            part.copy_(log_softmax(part, -1))
        ctx.save_for_backward(logits, token)
        targets, after = logits[: len(token)], logits[len(token) :].clone()
        of_token = targets.gather(1, token[:, None])[:, 0]
        likeliest = of_token >= targets.amax(-1)
        ctx.mark_non_differentiable(likeliest)
        return of_token, likeliest, after, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_token: Tensor, _: None, after: Tensor, __: None) -> tuple[Tensor, None]:
        log_p, token = ctx.saved_tensors
        # d log p_i / d logit_j = [i = j] − p_j
        grad = log_p.detach().exp_().mul_(-torch.cat((of_token, after.sum(-1)))[:, None])
        grad[: len(token)].scatter_add_(1, token[:, None], of_token[:, None])
        grad[len(token) :] += after
        return grad, None


def _answers(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """From the logits that `batch` lists, for each fact: the mean NLL of the target, the log-probabilities at the KL
    position, and whether the target is the likeliest answer in every row. Nothing here waits for an accelerator."""
    count = len(batch.facts)
    of_token, likeliest, after, _ = _LogP.apply(logits, batch.token)
    missed = logits.new_zeros(count).index_add(0, batch.fact, (~likeliest).to(logits.dtype))
    share = batch.share.to(logits.dtype)
    return -logits.new_zeros(count).index_add(0, batch.fact, of_token * share), after, missed == 0


def _read(
    found: list[Optimised],
    running: list[int],
    unread: list[tuple[Tensor, Tensor]],
    delta: Tensor,
    hit: Tensor,
    kept: set[int],
) -> float:
    """Bring the losses of the latest steps, and the facts that have ended, to the CPU. The latest mean loss."""
    values = torch.stack([terms for terms, _ in unread]).tolist()  # [steps, 4, facts]
    was_alive = torch.stack([alive for _, alive in unread]).tolist()
    deltas, hits = delta.detach().double().cpu(), hit.tolist()
    for place, fact in enumerate(running):
        for terms, alive in zip(values, was_alive, strict=True):
            if alive[place]:
                of = [each[place] for each in terms]
                found[fact].steps.append(dict(zip(("loss", "nll", "kl", "weight_decay"), of, strict=True)))
        if place not in kept:
            found[fact].delta, found[fact].clamp_hit = deltas[:, place].clone(), hits[place]
    losses = [values[-1][0][place] for place in range(len(running))]
    return sum(losses) / len(losses)


def _fitting(lm: LanguageModel, layer: int, jobs: Sequence[FactRows]) -> int:
    """How many of `jobs` (by columns, the shortest first), at least one, fit into memory and are of like length.

    All rows of a batch are padded to its longest, so a batch of unlike facts would do more work than they do alone.
    """
    room = torch.cuda.mem_get_info(lm.device)[0] // 2 if lm.device.type == "cuda" else CPU_BYTES
    count = 1
    while count < len(jobs):
        more = jobs[: count + 1]
        if more[-1].columns > LIKE * more[0].columns + 1 or bytes_of(lm, more, layer) > room:
            break
        count += 1
    return count


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
