"""What gradient-trained methods lower: the NLL of the new target, teacher-forced at its own positions.

Each token of target_new is predicted from the position before it, the true earlier tokens given ("FT-M"). The first
public code of FT scored all target tokens at the prompt's last position, which is another objective as soon as a
target has two tokens. The loss of a batch is the mean over facts of the mean over the fact's target tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.models.load import LanguageModel
from editkit.models.tokens import Scored, encode_with_targets, spaced
from editkit.progress import Bar
from editkit.settings import TuningSettings


def targets_after_prompts(lm: LanguageModel, facts: Sequence[Fact]) -> Scored:
    """Rows of prompt + target_new, the target's tokens scored."""
    return encode_with_targets(lm, [fact.text for fact in facts], [spaced(fact.target_new) for fact in facts])


def nll_of_rows(logits: Tensor, scored: Scored) -> Tensor:
    """Mean NLL per scored token of each row, in nats: [rows], in float32 or wider."""
    row, at, token = scored.pick()
    picked = logits[row, at]
    picked = picked if picked.dtype == torch.float64 else picked.float()
    log_p = log_softmax(picked, -1).gather(1, token[:, None])[:, 0]
    rows = len(scored.positions)
    sums = torch.zeros(rows, dtype=log_p.dtype, device=log_p.device).index_add(0, row, log_p)
    return -sums / torch.bincount(row, minlength=rows)


def mean_of_rows(logits: Tensor, scored: Scored) -> Tensor:
    """Mean over rows of their mean NLL."""
    return nll_of_rows(logits, scored).mean()


def mean_of_tokens(logits: Tensor, scored: Scored) -> Tensor:
    """Mean NLL over all scored tokens of the rows."""
    counts = torch.tensor([len(positions) for positions in scored.positions], device=logits.device)
    return (nll_of_rows(logits, scored) * counts).sum() / counts.sum()


def descend(
    lm: LanguageModel,
    facts: Sequence[Fact],
    settings: TuningSettings,
    *,
    step: Callable[[], None] | None = None,
    progress: bool,
    batches: Callable[[], list[Scored]] | None = None,
    loss_of: Callable[[Tensor, Scored], Tensor] = mean_of_rows,
) -> list[dict[str, float]]:
    """Lower the targets' NLL in up to `settings.steps` passes over the facts; the loss of each pass, before its steps.

    - `step`: called after each backward pass.
    - `batches`: gives those of the next pass; None takes the facts in their order, `settings.batch` at a time.
    - `loss_of`: the loss of a batch from its logits.

    Each batch calls backward once, then `step`, unless its loss is under `settings.stop_loss` already; the passes
    end when their mean is (the reference's `ft_main.py` does both). Raises EditkitError for a loss that is not finite.
    """
    size, stop_loss = settings.batch, settings.stop_loss
    if batches is None:
        fixed = [targets_after_prompts(lm, facts[i : i + size]) for i in range(0, len(facts), size)]
        batches = fixed.copy
    losses: list[dict[str, float]] = []
    name = facts[0].subject if len(facts) == 1 else f"{len(facts)} facts"
    with Bar(range(settings.steps), desc=f"tuning for {name}", disable=not progress, leave=False, delay=1) as bar:
        for number in bar:
            total = 0.0
            for scored in batches():
                loss = loss_of(lm.model(**scored.rows.inputs(), use_cache=False).logits, scored)
                value = loss.item()  # the one wait for an accelerator
                if not math.isfinite(value):
                    raise EditkitError(
                        f"The loss is {value} at step {number + 1} of the tuning for {name}; nothing was "
                        "changed. Lower method.lr, or load the model in float32."
                    )
                total += value * len(scored.positions)
                if value >= stop_loss:
                    loss.backward()
                    if step is not None:
                        step()
            losses.append({"loss": total / len(facts)})
            bar.set_postfix(loss=f"{losses[-1]['loss']:.3f}")
            if losses[-1]["loss"] < stop_loss:
                break
    return losses


@contextmanager
def kept_grads(model: torch.nn.Module) -> Iterator[None]:
    """`.grad` of every parameter is set aside in the body, and put back on every exit."""
    held = [(p, p.grad) for p in model.parameters()]
    try:
        for parameter, _ in held:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in held:
            parameter.grad = grad
