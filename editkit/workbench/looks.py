"""What the model says with and without an edit, and what was predicted before the edit was applied."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from editkit.data.atlas import atlas_case
from editkit.data.cases import Probe
from editkit.data.kinds import NEIGHBORHOOD, PARAPHRASE, PORTABILITY, REWRITE, SAME_SUBJECT, STAY, UNSEEN, heading
from editkit.doctor import ENORMOUS
from editkit.edits import Edit, relative_norm
from editkit.facts import Fact
from editkit.lenses import side_effects
from editkit.metrics.scoring import ProbeScore, TargetScore, score_probes, top_next
from editkit.models.generate import generate_batch
from editkit.models.load import LanguageModel
from editkit.numbers import number
from editkit.workbench.bench import Bench

MOST = {PARAPHRASE: 2, UNSEEN: 1, NEIGHBORHOOD: 4, SAME_SUBJECT: 3, PORTABILITY: 2}  # prompts of a kind
SAID = 5  # tokens said freely after each prompt
NEXT = 5  # likeliest next tokens
SURE = 0.5  # of the likeliest next token: under it the model is not sure
WATCHED = "watched"  # prompts of the user's own, which must stay


def probes_of(bench: Bench, fact: Fact, watched: Sequence[tuple[str, str]]) -> list[Probe]:
    """The prompts that show what an edit of `fact` does: its own, those that the atlas has for it, the watched ones.

    A watched prompt without an answer must keep the token that the model, as it is now, says first.
    """
    found = [Probe(REWRITE, fact.text, fact.target_true, fact.target_new)]
    each = bench.atlas_fact(fact)
    if each is not None and fact.target_new.strip() != each.object:
        case = atlas_case(bench.atlas, each, random.Random(f"{fact.text}|{fact.target_new}"), fact.target_new)
        for kind, most in MOST.items():
            found += [probe for probe in case.probes if probe.kind == kind and probe.prompt != fact.text][:most]
    for prompt, answer in watched:
        kept = answer or top_next(bench.lm, prompt, 1)[0][0].strip() or fact.target_new
        found.append(Probe(WATCHED, prompt, kept, fact.target_new))
    return found


def stays(probe: Probe) -> bool:
    """Whether the true answer of the prompt must stay."""
    return probe.kind in (*STAY, WATCHED)


@dataclass(frozen=True)
class Said:
    """What the model, as it was then, said to each prompt, and the likeliest next tokens after the first."""

    scores: tuple[ProbeScore, ...]
    texts: tuple[str, ...]
    next: tuple[tuple[str, float], ...]

    @classmethod
    def now(cls, lm: LanguageModel, probes: Sequence[Probe]) -> "Said":
        """Ask the model as it is now."""
        prompts = [probe.prompt for probe in probes]
        scores, texts = score_probes(lm, probes), generate_batch(lm, prompts, SAID)
        return cls(tuple(scores), tuple(texts), tuple(top_next(lm, prompts[0], NEXT)))


def compared(probes: Sequence[Probe], before: Said, after: Said, predicted: Sequence[Any] | None) -> dict[str, Any]:
    """Before and after of each prompt, as a page shows them. `predicted`: the rows of `predicted_rows`."""
    rows = []
    for i, probe in enumerate(probes):
        b, a = before.scores[i], after.scores[i]
        row = {
            "kind": probe.kind,
            "heading": heading(probe.kind) if probe.kind != WATCHED else "watched (must stay)",
            "stays": stays(probe),
            "prompt": probe.prompt,
            "true": probe.target_true,
            "new": probe.target_new,
            "before": _side(b, before.texts[i]),
            "after": _side(a, after.texts[i]),
            "happened": _wanted(probe, b).nll - _wanted(probe, a).nll,
        }
        rows.append(row | ({"predicted": predicted[i]["change"]} if predicted else {}))
    return {"rows": rows, "next": {"before": before.next, "after": after.next}}


def _side(score: ProbeScore, text: str) -> dict[str, Any]:
    true = None if score.true is None else score.true.probability
    return {"said": text, "p_true": true, "p_new": score.new.probability}


def _wanted(probe: Probe, score: ProbeScore) -> TargetScore:
    """The score of the answer that is wanted: the true one where it must stay."""
    return score.true if stays(probe) and score.true is not None else score.new


def predicted_rows(lm: LanguageModel, edit: Edit, probes: Sequence[Probe]) -> list[dict[str, Any]]:
    """What the edit will do to each prompt, from the model without it (lenses/prediction.py).

    Of each: how far the output of the edited weights moves, relative to its size; the cosine of its key with the edited
    fact's; and the change of log p of the answer that is wanted, to first order.
    """
    wanted = [probe.target_true if stays(probe) else probe.target_new for probe in probes]
    found = side_effects(lm, edit, [probe.prompt for probe in probes], wanted)
    assert found.drop is not None
    columns = zip(found.relative.tolist(), found.cosine.tolist(), found.drop.tolist(), strict=True)
    return [
        {
            "heading": heading(probe.kind) if probe.kind != WATCHED else "watched (must stay)",
            "stays": stays(probe),
            "prompt": probe.prompt,
            "answer": answer,
            "moves": moves,
            "cosine": cosine,
            "change": -drop,
        }
        for probe, answer, (moves, cosine, drop) in zip(probes, wanted, columns, strict=True)
    ]


def described(lm: LanguageModel, edit: Edit) -> dict[str, Any]:
    """An edit in short: its rows as a notebook shows them, its size, how its value was found."""
    title, rows = edit.shown()
    size = relative_norm(lm, edit)
    for report in edit.provenance.get("reports", []):
        steps = report.get("steps") or []
        if steps:
            rows = [*rows, ("loss", f"{steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f} in {len(steps)} steps")]
    notes = []
    if size > ENORMOUS:
        notes.append(f"‖ΔW‖/‖W‖ is {number(size, 3)}, over {ENORMOUS:g}: edits of this size usually break a model.")
    return {"title": title, "rows": rows, "size": size, "notes": notes, "digest": edit.digest,
            "installs": bool(edit.installed)}  # fmt: skip


def knows(
    fact: Fact, top: Sequence[tuple[str, float]], true: TargetScore | None, new: TargetScore | None
) -> tuple[str, str]:
    """Does the model know the fact? "yes", "no" or "unsure", or "new" where it says the new answer; and a sentence.

    `top`: its likeliest next tokens. `true`, `new`: how it rates the two answers, where they are known.
    """
    token, share = top[0]
    says = f"“{token.strip() or token}” with {number(share, 3)}"
    if new is not None and new.greedy:
        return "new", f"It says the new answer, “{fact.target_new.strip()}”, with {number(new.probability, 3)}."
    if true is None:
        if share >= SURE:
            return "unsure", f"Its next token is {says}: it is confident. No true answer was given to compare with."
        return "no", f"Its likeliest next token is {says}: it does not seem to know an answer."
    answer = fact.target_true.strip()
    if true.greedy:
        return "yes", f"It knows this: it says “{answer}”, with a probability of {number(true.probability, 3)}."
    return "no", (
        f"It does not know this: its likeliest next token is {says}; “{answer}” has a probability of "
        f"{number(true.probability, 3)}. An edit can write the fact, but a trace of what it does not know shows little."
    )
