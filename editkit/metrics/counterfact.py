"""CounterFact's metrics (ROME, arXiv 2202.05262, section 3.3 and its code).

For a probe, both targets are scored after the prompt by their negative log-likelihood *per token*:

    ES, PS   share of rewrite (paraphrase) probes with NLL(target_new) < NLL(target_true)
    NS       share of neighborhood probes with NLL(target_true) < NLL(target_new)
    EM PM NM mean of p(target_new) − p(target_true) with p = exp(−NLL per token), as in ROME's `summarize.py`: of a
             target of several tokens the geometric mean. The other way round for neighborhood probes
    EA PA NA share of probes where greedy decoding says the answer wanted, teacher-forced (every token the argmax)

A tie counts as failure. Where target_true is unknown, target_new has won when greedy decoding says it.

Beside CounterFact's own, by the same rule:

    unseen_PS       paraphrases whose phrasing the model has never seen (the atlas)
    NS_distracted   neighborhood prompts with the new fact put in front (CounterFact+, arXiv 2305.17553)
    attribute       prompts about subjects that have the new object already: p(target_new), as above
    same_subject    share of the subject's other answers that are said; after: of those that were said before
    portability     share of prompts whose answer follows, where the new answer is likelier; asked only where the
                    unedited model says the old one
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from editkit.data.cases import (
    ATTRIBUTE,
    NEIGHBORHOOD,
    PARAPHRASE,
    PORTABILITY,
    REWRITE,
    SAME_SUBJECT,
    UNSEEN,
    Probe,
)
from editkit.metrics.generation import DISTRACTED
from editkit.metrics.row_stats import Row, mean, of_kind
from editkit.models.load import LanguageModel
from editkit.models.precision import widened
from editkit.models.replay import CannotReplay, columns, logits_of
from editkit.models.tokens import Scored, encode_with_targets, spaced

BATCH = 64  # rows; sorted by length so that little is padding


@dataclass(frozen=True)
class TargetScore:
    """How the model rates one target after one prompt."""

    nll: float  # mean over the target's tokens, nats
    probability: float  # of the whole target
    greedy: bool  # every token is the argmax
    said: tuple[int, ...] = ()  # the argmax at each of the target's tokens, teacher-forced
    right: float = 0.0  # share of the target's tokens that are the argmax


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
        scored = encode_with_targets(lm, [prompts[i] for i in chunk], [spaced(targets[i]) for i in chunk])
        row, at, token = scored.pick()
        logits = _picked(lm, scored, row, at)
        log_p = log_softmax(logits, -1).gather(1, token[:, None])[:, 0].double().cpu()
        said = logits.argmax(-1).cpu()
        best, row = said == token.cpu(), row.cpu()
        for number, i in enumerate(chunk):
            mine = row == number
            total, count = log_p[mine].sum(), int(mine.sum())
            scores[i] = TargetScore(
                nll=-total.item() / count,
                probability=total.exp().item(),
                greedy=bool(best[mine].all()),
                said=tuple(said[mine].tolist()),
                right=best[mine].double().mean().item(),
            )
    return [scores[i] for i in range(len(prompts))]


@torch.inference_mode()
def _picked(lm: LanguageModel, scored: Scored, row: Tensor, at: Tensor) -> Tensor:
    """[picked, vocabulary] in float32: the logits of those tokens and no other."""
    first, last = [found[0] for found in scored.positions], [found[-1] - 1 for found in scored.positions]
    with widened(lm):
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


def values(rows: Sequence[Row], when: str) -> dict[str, float | None]:
    """One case's values; `when` is before or after."""

    def new_wins(row: Row) -> bool:
        if row[f"nll_true_{when}"] is None:
            return bool(row[f"greedy_new_{when}"])
        return bool(row[f"nll_new_{when}"] < row[f"nll_true_{when}"])

    def true_wins(row: Row) -> bool | None:
        true = row[f"nll_true_{when}"]
        return None if true is None else bool(true < row[f"nll_new_{when}"])

    def p_new(row: Row) -> float:
        return math.exp(-row[f"nll_new_{when}"])

    def margin(row: Row) -> float | None:
        true = row[f"nll_true_{when}"]
        return None if true is None else p_new(row) - math.exp(-true)

    def less(row: Row) -> float | None:
        found = margin(row)
        return None if found is None else -found

    found: dict[str, float | None] = {}
    for letter, kind in (("E", REWRITE), ("P", PARAPHRASE)):
        asked = of_kind(rows, kind)
        found[f"{letter}S"] = mean(asked, new_wins)
        found[f"{letter}M"] = mean(asked, margin)
        found[f"{letter}A"] = mean(asked, lambda row: row[f"greedy_new_{when}"])
    near = of_kind(rows, NEIGHBORHOOD)
    found |= {"NS": mean(near, true_wins), "NM": mean(near, less)}
    found["NA"] = mean(near, lambda row: row[f"greedy_true_{when}"])
    found["NS_distracted"] = mean(of_kind(rows, DISTRACTED), true_wins)
    found["unseen_PS"] = mean(of_kind(rows, UNSEEN), new_wins)
    found["attribute"] = mean(of_kind(rows, ATTRIBUTE), p_new)
    same = of_kind(rows, SAME_SUBJECT)
    said = [row for row in same if row["greedy_true_before"]]
    found["same_subject"] = mean(said if when == "after" else same, lambda row: row[f"greedy_true_{when}"])
    known = [row for row in of_kind(rows, PORTABILITY) if row["greedy_true_before"]]
    found["portability"] = mean(known, new_wins)
    return found
