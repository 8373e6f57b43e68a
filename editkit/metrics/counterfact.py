"""CounterFact's metrics (ROME, arXiv 2202.05262, section 3.3 and its code).

For a probe, both targets are scored after the prompt by their negative log-likelihood *per token*:

    ES, PS   share of rewrite (paraphrase) probes with NLL(target_new) < NLL(target_true)
    NS       share of neighborhood probes with NLL(target_true) < NLL(target_new)

A tie counts as failure in both. Beside them: the whole target's probability exp(−sum of NLL), and whether
greedy decoding says the target (every token the argmax).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from editkit.data.cases import Probe
from editkit.models.load import LanguageModel
from editkit.models.tokens import Scored, continued, spaced
from editkit.replay import CannotReplay, columns, logits_of

BATCH = 64  # rows; sorted by length so that little is padding


@dataclass(frozen=True)
class TargetScore:
    """How the model rates one target after one prompt."""

    nll: float  # mean over the target's tokens, nats
    probability: float  # of the whole target
    greedy: bool  # every token is the argmax


@dataclass(frozen=True)
class ProbeScore:
    """Both targets of one probe; `true` is None where target_true is unknown."""

    probe: Probe
    true: TargetScore | None
    new: TargetScore

    @property
    def new_wins(self) -> bool:
        """NLL(target_new) < NLL(target_true); against an unknown target_true: greedy decoding says the new."""
        return self.new.greedy if self.true is None else self.new.nll < self.true.nll

    @property
    def true_wins(self) -> bool:
        """NLL(target_true) < NLL(target_new)."""
        return self.true is not None and self.true.nll < self.new.nll


def score_targets(lm: LanguageModel, prompts: Sequence[str], targets: Sequence[str]) -> list[TargetScore]:
    """Each target after its prompt, in the order given. A prompt is run once for all of its targets."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i], len(targets[i])))
    scores: dict[int, TargetScore] = {}
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        scored = continued(lm, [prompts[i] for i in chunk], [spaced(targets[i]) for i in chunk])
        row, at, token = scored.pick()
        logits = _picked(lm, scored, row, at)
        log_p = log_softmax(logits, -1).gather(1, token[:, None])[:, 0].double().cpu()
        best = (logits.argmax(-1) == token).cpu()
        row = row.cpu()
        for number, i in enumerate(chunk):
            mine = row == number
            total, count = log_p[mine].sum(), int(mine.sum())
            scores[i] = TargetScore(-total.item() / count, total.exp().item(), bool(best[mine].all()))
    return [scores[i] for i in range(len(prompts))]


@torch.inference_mode()
def _picked(lm: LanguageModel, scored: Scored, row: Tensor, at: Tensor) -> Tensor:
    """[picked, vocabulary] in float32: the logits of those tokens and no other."""
    first, last = [found[0] for found in scored.positions], [found[-1] - 1 for found in scored.positions]
    try:
        clean = columns(lm, scored.rows, first, last)
    except CannotReplay:
        return lm.model(**scored.rows.inputs(), use_cache=False).logits[row, at].float()
    return logits_of(lm, clean.final[clean.at(row, at)]).float()


def score_probes(lm: LanguageModel, probes: Sequence[Probe]) -> list[ProbeScore]:
    """Both targets of every probe under the model as it is now."""
    known = [i for i, probe in enumerate(probes) if probe.target_true]
    prompts = [p.prompt for p in probes] + [probes[i].prompt for i in known]
    targets = [p.target_new for p in probes] + [probes[i].target_true for i in known]
    scores = score_targets(lm, prompts, targets)
    true = dict(zip(known, scores[len(probes) :], strict=True))
    return [ProbeScore(p, true.get(i), scores[i]) for i, p in enumerate(probes)]


def share(outcomes: Iterable[bool]) -> float | None:
    """The mean of outcomes, None when there are none."""
    found = list(outcomes)
    return sum(found) / len(found) if found else None
