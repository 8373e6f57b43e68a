"""What the model says about a prompt: both targets' likelihood, the most likely next tokens, a greedy continuation.

The formulas of the metrics are in the files of the protocols; they work on what is kept of this (`measure`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from editkit.data.cases import Probe
from editkit.models.generate import generate
from editkit.models.load import LanguageModel
from editkit.models.precision import widened
from editkit.models.replay import CannotReplay, columns, logits_of
from editkit.models.tokens import Scored, encode_with_targets, spaced, tokenise

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
            found: Tensor = lm.model(**scored.rows.inputs(), use_cache=False).logits[row, at].float()
            return found
        return logits_of(lm, clean.final[clean.at(row, at)]).float()


def score_probes(lm: LanguageModel, probes: Sequence[Probe]) -> list[ProbeScore]:
    """Both targets of every probe under the model as it is now."""
    known = [i for i, probe in enumerate(probes) if probe.target_true]
    prompts = [p.prompt for p in probes] + [probes[i].prompt for i in known]
    targets = [p.target_new for p in probes] + [probes[i].target_true for i in known]
    scores = score_targets(lm, prompts, targets)
    true = dict(zip(known, scores[len(probes) :], strict=True))
    return [ProbeScore(p, true.get(i), scores[i]) for i, p in enumerate(probes)]


def top_next(lm: LanguageModel, prompt: str, k: int = 5) -> list[tuple[str, float]]:
    """The k most likely next tokens after `prompt`, as (text, probability)."""
    rows = tokenise(lm, [prompt])
    with torch.inference_mode(), widened(lm):
        logits = lm.model(**rows.inputs(), use_cache=False).logits[0, rows.last(0)].float()
    values, tokens = logits.softmax(-1).topk(k)
    return [(str(lm.tokenizer.decode([t])), float(v)) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]


def continuation(lm: LanguageModel, prompt: str, tokens: int) -> str:
    """The greedy continuation of `prompt`, without it."""
    (text,) = generate(lm, [prompt], tokens)
    return text
