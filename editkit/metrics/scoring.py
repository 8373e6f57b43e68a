"""What the model says about a prompt: both targets' likelihood, the most likely next tokens, a greedy continuation.

The formulas of the metrics are in the files of the protocols; they work on what is kept of this (`measure`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from editkit.data.cases import Probe
from editkit.models.columns import Below, columns
from editkit.models.evalmode import in_eval_mode
from editkit.models.generate import generate
from editkit.models.head import logits_of
from editkit.models.load import LanguageModel
from editkit.models.passes import CannotReplay
from editkit.models.precision import widened
from editkit.models.tokens import Scored, encode_with_targets, spaced, tokenise

BATCH = 128  # rows; sorted by length, so that little is padding where rows are padded
HEAD_ROWS = 64  # places whose logits are in memory at once


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


@in_eval_mode
def score_targets(
    lm: LanguageModel, prompts: Sequence[str], targets: Sequence[str], below: Below | None = None
) -> list[TargetScore]:
    """Each target after its prompt, in the order given. What texts share from their beginning is run once.

    `below`: of `lm`; the same texts are then run again from its block on only.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i], len(targets[i])))
    scores: dict[int, TargetScore] = {}
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        scored = encode_with_targets(lm, [prompts[i] for i in chunk], [spaced(targets[i]) for i in chunk])
        log_p, said, best = _read(lm, scored, below)
        begin = 0
        for i, positions in zip(chunk, scored.positions, strict=True):
            mine = slice(begin, begin := begin + len(positions))
            total, right = log_p[mine].sum(), best[mine]
            scores[i] = TargetScore(
                nll=-total.item() / len(positions),
                probability=total.exp().item(),
                greedy=bool(right.all()),
                said=tuple(said[mine].tolist()),
                right=right.double().mean().item(),
            )
    return [scores[i] for i in range(len(prompts))]


@torch.inference_mode()
def _read(lm: LanguageModel, scored: Scored, below: Below | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each target token, [tokens] each: its log-probability in float64, the argmax in its place, and whether they
    are one."""
    first, last = [found[0] for found in scored.positions], [found[-1] - 1 for found in scored.positions]
    row, at, token = scored.pick()
    log_p, said = torch.zeros(len(row), device=lm.device), torch.zeros_like(token)
    if below is not None:
        below.refresh()
    with widened(lm):
        try:
            clean = columns(lm, scored.rows, first, last, below)
        except CannotReplay:
            read, of = lm.model(**scored.rows.inputs(), use_cache=False).logits[row, at], torch.arange(len(row))
            head: Callable[[Tensor], Tensor] = Tensor.float
        else:
            # The first tokens of two targets of one prompt are read in one place.
            places, of = torch.stack(clean.at(row, at)).unique(dim=1, return_inverse=True)
            read, head = clean.final[places[0], places[1]], partial(logits_of, lm)
        of = of.to(lm.device)
        for begin in range(0, len(read), HEAD_ROWS):
            some = read[begin : begin + HEAD_ROWS]
            some = some if len(some) > 1 else some.repeat(2, 1)  # a product of one row breaks ties between columns
            logits = head(some).float()
            here = (begin <= of) & (of < begin + HEAD_ROWS)
            log_p[here] = log_softmax(logits, -1)[of[here] - begin, token[here]]
            said[here] = logits.argmax(-1)[of[here] - begin]
    return log_p.double().cpu(), said.cpu(), (said == token).cpu()


def score_probes(lm: LanguageModel, probes: Sequence[Probe], below: Below | None = None) -> list[ProbeScore]:
    """Both targets of every probe under the model as it is now. `below`: see `score_targets`."""
    known = [i for i, probe in enumerate(probes) if probe.target_true]
    prompts = [p.prompt for p in probes] + [probes[i].prompt for i in known]
    targets = [p.target_new for p in probes] + [probes[i].target_true for i in known]
    scores = score_targets(lm, prompts, targets, below)
    true = dict(zip(known, scores[len(probes) :], strict=True))
    return [ProbeScore(p, true.get(i), scores[i]) for i, p in enumerate(probes)]


@in_eval_mode
def top_next(lm: LanguageModel, prompt: str, k: int = 5) -> list[tuple[str, float]]:
    """The k most likely next tokens after `prompt`, as (text, probability)."""
    rows = tokenise(lm, [prompt])
    with torch.inference_mode(), widened(lm):
        logits = lm.model(**rows.inputs(), use_cache=False).logits[0, rows.last(0)].float()
    values, tokens = logits.softmax(-1).topk(k)
    return [(str(lm.tokenizer.decode([t])), float(v)) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]


@in_eval_mode
def continuation(lm: LanguageModel, prompt: str, tokens: int) -> str:
    """The greedy continuation of `prompt`, without it."""
    (text,) = generate(lm, [prompt], tokens)
    return text
