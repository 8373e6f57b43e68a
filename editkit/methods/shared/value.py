"""The value side that ROME, MEMIT, PMET and AlphaEdit share: a δ that makes the model say the new target.

δ [d_model] starts at 0, is added to the output of a module (the edited block's down-projection) at the lookup token
of every row, and minimises, over rows = contexts × prompt and one row "{subject} is a",

    −mean log p(target) + kl_factor · KL(edited ‖ clean, at the subject) + weight_decay · ‖δ‖ / ‖v0‖²

until that loss is under stop_loss; ‖δ‖ is held under clamp · ‖v0‖ after each step (ROME section 3.1 and the authors'
code). A solver takes the steps (solvers.py): Adam, or descent, which needs no weight decay. The δ of many facts are
optimised side by side, each with its own rows, clamp and stop; an engine (engine.py) runs the model.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import kl_div, log_softmax

from editkit.facts import Fact
from editkit.methods.shared.engine import AtLookup, Batch, Engine, FactRows, FullDepth, Replayed, bytes_of
from editkit.methods.shared.solvers import Solver, solver
from editkit.models.experts import down_of, keys_of
from editkit.models.load import LanguageModel
from editkit.models.passes import CannotReplay
from editkit.models.precision import widened
from editkit.nethook import requires_grad
from editkit.progress import Bar
from editkit.settings import ValueSettings

CPU_BYTES = 2**29  # a batch's share of memory: about what one fact takes at full depth; a larger one is no faster
Show = Callable[[float, int, int], None]  # (mean loss, steps taken since, facts ended since)
LIKE = 1.1  # how much longer the longest rows of a batch may be than the shortest, and one token
READ_EVERY = {"cpu": 1, "cuda": 5}  # steps between two looks at the losses: each look waits for an accelerator


def keyed(lm: LanguageModel, layer: int, at: AtLookup) -> AtLookup:
    """The keys and values of block `layer`, from the input and output of its site (models/experts.py)."""
    return AtLookup(keys_of(lm, down_of(lm, layer), at.input), at.output)


def named(facts: Sequence[Fact]) -> str:
    """What a progress bar calls them."""
    return facts[0].subject if len(facts) == 1 else f"{len(facts)} facts"


@dataclass
class Optimised:
    """The result of the optimisation for one fact."""

    delta: Tensor  # [sites, d_model] float64 on the CPU
    steps: list[dict[str, float]] = field(default_factory=list)  # loss terms before each step
    clamp_hit: bool = False
    # Where no norms were given: at the site without δ, [2, d], the bare prompt's and the contexts' mean.
    clean: AtLookup | None = None


def compute_deltas(
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
    stop_likeliest: int | None = None,
) -> list[Optimised]:
    """For each fact a δ [sites, d_model], by the solver that the settings name.

    A half model on the CPU runs in float32 (models/precision.py).

    - `layer`, `sites`: the edited block, and its modules to whose outputs a δ is added.
    - `jobs`: the rows of each fact.
    - `norms` [facts, sites]: ‖v0‖. If None (one site only), use ‖v0‖ of the bare prompt, and return keys and values
      of the clean pass as `clean`.
    - `settings`: resolved.
    - `name`, `progress`: the label of the progress bar, and whether to show it.
    - `nll_weight`: weight of the NLL once the target is the likeliest answer in every row.
    - `stop_kl`: if given, a fact also stops when the target is the likeliest answer and KL ≤ stop_kl.
    - `stop_likeliest`: if given, a fact also stops at the so many-th step at which the target is the likeliest answer.

    As many facts are optimised together as memory takes; a batch that runs out of memory is halved.
    """
    loss = _Loss(settings, nll_weight, stop_kl, stop_likeliest)
    with widened(lm), requires_grad(lm.model, only=[]):
        return _in_batches(lm, layer, sites, jobs, norms, loss, name, progress)


def _in_batches(
    lm: LanguageModel,
    layer: int,
    sites: Sequence[str],
    jobs: Sequence[FactRows],
    norms: Tensor | None,
    loss: "_Loss",
    name: str,
    progress: bool,
) -> list[Optimised]:
    """`compute_deltas`, batch after batch: facts of like length together, the shortest first."""
    results: dict[int, Optimised] = {}
    engine: type[FullDepth] | type[Replayed] = FullDepth if loss.settings.engine == "full" else Replayed
    waiting = sorted(range(len(jobs)), key=lambda i: (jobs[i].columns, max(jobs[i].lookup)))
    most = len(jobs)
    with _Bar(name, len(jobs), loss.steps, progress) as bar:
        while waiting:
            # 1) The facts of this batch.
            fitting = 1 if engine is FullDepth else min(most, _fitting(lm, layer, [jobs[i] for i in waiting]))
            part = waiting[:fitting]
            try:
                # 2) One clean pass.
                with torch.no_grad():
                    ready = engine(lm, layer, sites, Batch([jobs[i] for i in part]))
                clean = [keyed(lm, layer, at) for at in ready.clean()] if norms is None else None
                v0_norms = norms[part] if norms is not None else torch.stack([_bare_norm(at) for at in clean or ()])
                # 3) The solver's loop.
                done = _together(lm, ready, v0_norms, loss, bar.show)
            # 4) Where that fails: again at full depth, or with half of the facts.
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
            for result, at in zip(done, clean or (), strict=clean is not None):
                result.clean = AtLookup(*(torch.stack((side[0], side.mean(0))) for side in at))
            results |= dict(zip(part, done, strict=True))
            waiting = waiting[len(part) :]
    return [results[i] for i in range(len(jobs))]


def _bare_norm(clean: AtLookup) -> Tensor:
    """‖v0‖ [1] of one fact: the norm of the site's output for the bare prompt, which is the first template."""
    norm: Tensor = clean.output[:1].norm(dim=-1)
    return norm


class _Bar:
    """A progress bar: of steps for one fact, of facts for several."""

    def __init__(self, name: str, facts: int, steps: int, progress: bool) -> None:
        self._single = facts == 1
        total = steps if self._single else facts
        self._bar = Bar(total=total, desc=f"value for {name}", disable=not progress, leave=False)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, loss: float, steps: int, ended: int) -> None:
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self._bar.update(steps if self._single else ended)


class _Loss:
    """The loss of each fact and its end, from resolved `settings`. The other arguments are those of compute_deltas."""

    def __init__(
        self, settings: ValueSettings, nll_weight: float, stop_kl: float | None, stop_likeliest: int | None
    ) -> None:
        assert settings.steps and settings.solver  # resolved by the method
        self.settings, self.steps = settings, settings.steps
        self._nll_weight, self._stop_kl, self._stop_likeliest = nll_weight, stop_kl, stop_likeliest

    def of(self, nll: Tensor, kl: Tensor, decay: Tensor, likeliest: Tensor) -> tuple[Tensor, Tensor]:
        """From the terms of each fact [facts]: the loss without weight decay, which backward takes, and the terms for
        the report [4, facts]: the loss, NLL, weighted KL and weight decay."""
        kl = self.settings.kl_factor * kl
        loss = torch.where(likeliest, self._nll_weight, 1.0) * nll + kl
        return loss, torch.stack((loss + decay, nll, kl, decay)).detach()

    def ended(self, terms: Tensor, kl: Tensor, likeliest: Tensor, times: Tensor) -> Tensor:
        """[facts], True where the loss is under `stop_loss`, or the KL is low enough, or the target has been the
        likeliest answer so many `times`."""
        ended = terms[0] < self.settings.stop_loss
        if self._stop_kl is not None:
            ended = ended | (likeliest & (kl.detach() <= self._stop_kl))
        return ended if self._stop_likeliest is None else ended | (times >= self._stop_likeliest)


def _together(lm: LanguageModel, engine: Engine, norms: Tensor, loss: _Loss, show: Show) -> list[Optimised]:
    """Optimise the δ of one batch side by side.

    - `engine`: runs the model on the rows of the batch.
    - `norms`: ‖v0‖ [facts, sites].
    - `show`: told of the losses whenever they are read.

    A fact that has ended is frozen at once, and leaves the batch when the losses are read: each look waits once for an
    accelerator, so there is one every few steps.
    """
    assert loss.settings.solver  # resolved by the method
    batch = solver(loss.settings.solver, lm, norms, loss.settings)
    results = [Optimised(batch.delta[:, i]) for i in batch.facts]
    unread: list[Tensor] = []  # of each step [5, facts]: the loss terms, and which facts were alive
    every = READ_EVERY.get(lm.device.type, 5)
    clean: Tensor | None = None  # log-probabilities at the KL position without δ, [facts, vocabulary]; [0, ..] without
    times = torch.zeros_like(batch.alive, dtype=torch.long)  # at how many steps the target was the likeliest, [facts]

    for step in range(loss.steps):
        # 1) Run the rows, with the δ of their facts.
        logits = engine.logits(batch.delta).to(batch.delta.dtype)
        nll, log_p, likeliest = _answers(logits, engine.batch)

        # 2) The losses of each fact.
        clean = log_p.detach() if clean is None else clean
        of_rows = kl_div(clean, log_p, log_target=True, reduction="none").sum(-1)  # KL(edited ‖ clean)
        kl = torch.zeros_like(nll).index_add(0, engine.batch.kl_fact, of_rows)
        losses, terms = loss.of(nll, kl, batch.decay(), likeliest)
        unread.append(torch.cat((terms, batch.alive[None].to(terms.dtype))))

        # 3) Which facts have ended: their δ no longer changes.
        times = times + likeliest
        batch.alive = batch.alive & ~loss.ended(terms, kl, likeliest, times) & ~batch.stuck()
        kept = list(range(len(batch.facts)))
        last = step == loss.steps - 1
        if last or (step + 1) % every == 0:
            mean, alive = _look(unread, batch, results)
            kept = [] if last else alive
            show(mean, len(unread), len(batch.facts) - len(kept))
            unread = []
        if len(kept) == len(batch.facts):
            gradient = engine.gradient(losses.sum())
        else:
            _end(batch, terms[0], kept, results)
            if not kept:
                break
            gradient = engine.gradient(losses[kept].sum())[:, kept]
            batch.keep(kept)
            clean, terms, times = clean[kept] if len(clean) else clean, terms[:, kept], times[kept]
            with torch.no_grad():
                engine = engine.some(kept)

        # 4) A step, under the clamp.
        batch.step(terms[0], gradient)
    return results


class _LogP(torch.autograd.Function):
    """log_softmax(logits [n, vocabulary]), in place; backward may run once only. The table is the loop's largest.

    With `token` [targets] for the first rows, returns log p(token) [targets], whether the token is the likeliest
    [targets], all of the other rows [n - targets, vocabulary], and the table itself.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token: Tensor) -> tuple[Tensor, ...]:
        ctx.mark_dirty(logits)
        ctx.set_materialize_grads(False)
        for part in torch.split(logits, 8 if logits.device.type == "cpu" else len(logits)):
            part.copy_(log_softmax(part, -1))
        ctx.save_for_backward(logits, token)
        targets, after = logits[: len(token)], logits[len(token) :].clone()
        of_token = targets.gather(1, token[:, None])[:, 0]
        likeliest = of_token >= targets.amax(-1)
        ctx.mark_non_differentiable(likeliest)
        return of_token, likeliest, after, logits

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, of_token: Tensor, _: None, after: Tensor, __: None
    ) -> tuple[Tensor, None]:
        log_p, token = ctx.saved_tensors
        # d log p_i / d logit_j = [i = j] − p_j
        grad = log_p.detach().exp_().mul_(-torch.cat((of_token, after.sum(-1)))[:, None])
        grad[: len(token)].scatter_add_(1, token[:, None], of_token[:, None])
        grad[len(token) :] += after
        return grad, None


def _answers(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """From the logits that `batch` lists: the mean NLL of each fact's target [facts], the log-probabilities of the KL
    rows [KL rows, vocabulary], and whether the target is the likeliest answer in every row [facts].

    Nothing here waits for an accelerator.
    """
    count = len(batch.facts)
    log_p: Callable[..., tuple[Tensor, ...]] = _LogP.apply
    of_token, likeliest, after, _ = log_p(logits, batch.token)
    missed = logits.new_zeros(count).index_add(0, batch.fact, (~likeliest).to(logits.dtype))
    share = batch.share.to(logits.dtype)
    return -logits.new_zeros(count).index_add(0, batch.fact, of_token * share), after, missed == 0


def _look(unread: list[Tensor], batch: Solver, results: list[Optimised]) -> tuple[float, list[int]]:
    """Bring the losses of the latest steps into `results`. Returns the latest mean loss, and the places of the facts
    that are alive. This is the loop's one wait for an accelerator: all numbers come in one copy.

    - `unread`: of each step [5, facts]: the loss terms, and which facts were alive.
    """
    *steps, alive = torch.cat((*unread, batch.alive[None].to(unread[0].dtype))).tolist()  # [5 · steps + 1, facts]
    for begin in range(0, len(steps), 5):
        *terms, was_alive = steps[begin : begin + 5]
        for place, fact in enumerate(batch.facts):
            if was_alive[place]:
                own = [term[place] for term in terms]
                results[fact].steps.append(dict(zip(("loss", "nll", "kl", "weight_decay"), own, strict=True)))
    losses: list[float] = steps[-5]
    return sum(losses) / len(losses), [place for place, lives in enumerate(alive) if lives]


def _end(batch: Solver, losses: Tensor, kept: list[int], results: list[Optimised]) -> None:
    """Bring the δ of the facts that leave into `results`. `losses` [facts]: at δ. `kept`: places of those that stay."""
    found, hit = batch.result(losses)
    deltas, hits = found.detach().double().cpu(), hit.tolist()
    for place, fact in enumerate(batch.facts):
        if place not in kept:
            results[fact].delta, results[fact].clamp_hit = deltas[:, place].clone(), hits[place]


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
