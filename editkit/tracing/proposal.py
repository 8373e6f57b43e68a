"""Which blocks to edit, from an average trace, with the evidence; or from the trace of one prompt, as a first guess."""

from dataclasses import dataclass

import torch

from editkit.errors import EditkitError
from editkit.shown import Rows, Shown, counted
from editkit.tracing.average import AverageTrace
from editkit.tracing.prompt import PARTS, Traced

WHERE = PARTS.index("last subject token")


@dataclass(frozen=True, repr=False)
class Proposal(Shown):
    """Consecutive blocks to edit, for `method.layer` or `method.layers`, with the evidence.

    Effects are indirect effects of MLP outputs at the last subject token, averaged over facts.
    """

    layers: tuple[int, ...]
    effect: float  # mean over the proposed blocks
    low: float  # 95 % bootstrap interval over facts
    high: float
    by_block: tuple[float, ...]  # the effect of each block of the model
    rival: tuple[int, ...]  # the second best choice of as many blocks
    margin: float  # effect minus the rival's, on the same bootstrap samples
    margin_low: float
    margin_high: float
    support: float  # share of bootstrap samples in which these blocks have the largest effect
    total_effect: float
    facts: int

    def shown(self) -> tuple[str, Rows]:
        """The blocks, their effect, and how sure it is."""
        rows = [("effect", f"{self.effect:.3f} [{self.low:.3f}, {self.high:.3f}] of {self.total_effect:.3f}")]
        rows.append(("next best", f"{_named(self.rival)}, {self.margin:.3f} below"))
        rows.append(("support", f"{self.support:.0%} of bootstrap samples of {counted(self.facts, 'fact')}"))
        return f"Proposal: {_named(self.layers)}", rows

    def __str__(self) -> str:
        share = self.effect / self.total_effect if self.total_effect > 0 else float("nan")
        return (
            f"Edit {_named(self.layers)}: there the MLPs' clean outputs at the subject's last token bring back "
            f"{self.effect:.3f} [{self.low:.3f}, {self.high:.3f}] of P(answer), {share:.0%} of the "
            f"{self.total_effect:.3f} that the corruption takes ({self.facts} facts). "
            f"The best other choice, {_named(self.rival)}, is {self.margin:.3f} "
            f"[{self.margin_low:.3f}, {self.margin_high:.3f}] below; "
            f"{_named(self.layers)} came first in {self.support:.0%} of bootstrap samples."
        )


def propose_layers(average: AverageTrace, n: int = 1) -> Proposal:
    """Propose the `n` consecutive blocks whose MLP outputs at the last subject token have the largest mean effect.

    The last block is left out, since its output at the subject reaches no other token. If the trace used a window of
    more than one block, a block's effect is that of the window around it. Raises EditkitError when the trace has no
    "mlp", or too few blocks for a choice.
    """
    if "mlp" not in average.effect:
        raise EditkitError(f"A proposal is made from the kind 'mlp'; the trace has {', '.join(average.effect)}.")
    if average.layers - 1 - n < 1 or n < 1:
        raise EditkitError(
            f"{n} of the {average.layers - 1} blocks that can be edited were asked for: nothing to choose."
        )
    # 1) the effect of each choice of n blocks, over all facts and in each bootstrap sample
    each = average.resampled("mlp")[:, WHERE, :-1].unfold(1, n, 1).mean(-1)  # [resamples, choices]
    mean = average.mean("mlp")[WHERE]
    choices = mean[:-1].unfold(0, n, 1).mean(-1)  # [choices]
    # 2) the best two, and the interval of their difference
    order = choices.argsort(descending=True).tolist()
    best, second = order[0], order[1]
    bounds = torch.tensor([0.025, 0.975], dtype=each.dtype)
    low, high = each[:, best].quantile(bounds).tolist()
    margin_low, margin_high = (each[:, best] - each[:, second]).quantile(bounds).tolist()
    return Proposal(
        layers=tuple(range(best, best + n)),
        effect=choices[best].item(),
        low=low,
        high=high,
        by_block=tuple(mean.tolist()),
        rival=tuple(range(second, second + n)),
        margin=(choices[best] - choices[second]).item(),
        margin_low=margin_low,
        margin_high=margin_high,
        support=(each.argmax(1) == best).double().mean().item(),
        total_effect=average.total_effect,
        facts=len(average.texts),
    )


def proposed_block(traced: Traced) -> int:
    """The block whose MLP output at the last subject token has the largest indirect effect; the last block is left out.

    One prompt says less than an average (`propose_layers`). Raises EditkitError where the trace has no "mlp", or the
    model one block.
    """
    if "mlp" not in traced.probability:
        raise EditkitError(f"A proposal is made from the kind 'mlp'; the trace has {', '.join(traced.probability)}.")
    effect = traced.indirect_effect("mlp")[traced.subject[1], :-1]
    if not len(effect):
        raise EditkitError("The model has one block: nothing to choose.")
    return int(effect.argmax())


def _named(layers: tuple[int, ...]) -> str:
    return f"block {layers[0]}" if len(layers) == 1 else f"blocks {layers[0]} to {layers[-1]}"
