"""Did the edit land? If it did not: why, and what to try, in plain words.

An edit has landed when the model says the new answer (every token of it is the argmax, teacher-forced) and gives it a
lower NLL per token than the old one, where the old one is known. Everything is read from what a run keeps: the
rewrite rows of its case (measure.py) and the provenance of its edit. A reason is given only where its evidence is.

    evidence                                              reason, and what to try
    NLL the same to the bit at every step                 the block cannot reach the answer: an earlier block
    clamp hit, loss over stop_loss                        the clamp held δ back: a larger clamp
    share of entries at ±epsilon (FT-L)                   epsilon held ΔW back: a larger epsilon
    loss down by less than 2 % of its start               it never came down: a larger lr, another block
    last step reached, loss over stop_loss                steps ran out: more steps while it falls, else another
                                                          block or method
    value found, its write a small share (MEMIT's kind)   the solve held ΔW back: a smaller weight of old keys
    old answer not said before the edit                   subject unknown: a model that knows it
    four target tokens or more                            a long answer: a shorter one
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editkit.metrics.row_stats import Row, of_kind

FLAT = 0.02  # of the first loss: less than this is not "coming down"
PATIENCE = 2, 60  # times the steps taken, steps: a loss that needs more than both at its last pace hardly falls
SAID = math.log(2)  # NLL per token under which the answer has more than half of the probability
MANY_TOKENS = 4  # a target this long needs as many right steps in a row
HALF = 0.5  # of a residual written, or of the entries of ΔW at their bound


@dataclass(frozen=True)
class Verdict:
    """Whether an edit landed; if not, why and what to try. Each text is one sentence without a line break."""

    landed: bool
    summary: str
    reasons: tuple[str, ...] = ()
    try_: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The summary, then one line a reason ("Why: …") and one with the advice ("Try: …"); not wrapped."""
        advice = [f"Try: {'; '.join(self.try_)}."] if self.try_ else []
        return [self.summary, *(f"Why: {reason}" for reason in self.reasons), *advice]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def verdict(
    rows: Sequence[Row], provenance: Mapping[str, Any], target_tokens: int | Sequence[int] | None = None
) -> Verdict:
    """Judge one edit from its rows and its provenance.

    - `rows`: the rows of one case, as `rows_of` and cases.parquet have them; those of kind "rewrite" count, one a fact,
      in the order of the facts. Needed columns: target_true, target_new, and for _before and _after: nll and greedy
      of _new and _true. `right_new_after` is used where it is there.
    - `provenance`: `edit.provenance`, or `edit.provenance` of a record: settings, reports, layers; all may be absent.
    - `target_tokens`: how many tokens each fact's target_new has; None: as many as `argmax_new_after` has.

    Returns the verdict. An edit of several facts has landed when each has; the reasons are those of the facts that did
    not. Raises ValueError when no row is of kind "rewrite".

        found = verdict(rows_of(case, before, after), edit.provenance)
        for line in found.lines():
            say(textwrap.fill(line, 80))
    """
    asked = of_kind(rows, "rewrite")
    if not asked:
        raise ValueError("No row of kind 'rewrite': pass all rows of the case.")
    reports = list(provenance.get("reports") or [])
    if len(reports) != len(asked):  # methods that tune on all facts together report once
        reports = [reports[0] if reports else {}] * len(asked)
    counts = [target_tokens] * len(asked) if isinstance(target_tokens, int | None) else list(target_tokens)
    reasons: list[str] = []
    advice: list[str] = []
    summary, missed = "", 0
    for row, report, count in zip(asked, reports, counts, strict=True):
        if _landed(row):
            continue
        missed += 1
        tokens = len(row.get("argmax_new_after") or ()) if count is None else count
        moved = _degree(row)
        if len(asked) > 1:
            reasons.append(moved)
        else:
            summary = f"The edit did not land: {moved}"
        for reason, try_ in _causes(row, report, provenance, tokens):
            reasons.append(reason)
            advice += try_
    if not missed:
        return Verdict(True, _praise(asked))
    if len(asked) > 1:
        summary = f"The edit did not land for {missed} of {len(asked)} facts."
    return Verdict(False, summary, tuple(dict.fromkeys(reasons)), tuple(dict.fromkeys(advice)))


_Cause = tuple[str, list[str]]  # the reason, and what to try


def _landed(row: Row) -> bool:
    """The new answer is said, and likelier per token than the old one. NaN is never likelier."""
    true, new = row["nll_true_after"], row["nll_new_after"]
    return bool(row["greedy_new_after"]) and (math.isfinite(new) if true is None else new < true)


def _praise(rows: Sequence[Row]) -> str:
    if len(rows) > 1:
        return f"The edit landed: the model says the new answer for all {len(rows)} facts."
    row = rows[0]
    text = f"The edit landed: the model says {_quoted(row['target_new'])}"
    if row["greedy_new_before"]:
        return text + ", as it did before the edit."
    return text + (f"; it did not know {_quoted(row['target_true'])} before." if _unknown(row) else ".")


def _degree(row: Row) -> str:
    """How far the answer moved."""
    before, after, true = row["nll_new_before"], row["nll_new_after"], row["nll_true_after"]
    new, old = _quoted(row["target_new"]), _quoted(row["target_true"])
    if not math.isfinite(after):
        return "the edited model gives no number for its answers."
    against = "" if true is None else f"; {old} has {_p(true)}"
    if row["greedy_new_after"]:
        return f"{new} is the likeliest at each token, but has only {_p(after)} per token{against}."
    if true is not None and after < true:
        return f"{new} is now likelier than {old} ({_p(after)} per token against {_p(true)}), but is not said."
    if before - after > FLAT * before:
        return f"the probability of {new} rose, but not enough: per token {_p(before)} → {_p(after)}{against}."
    return f"the probability of {new} did not rise: per token {_p(before)} → {_p(after)}{against}."


def _causes(row: Row, report: Mapping[str, Any], provenance: Mapping[str, Any], tokens: int) -> list[_Cause]:
    """What there is evidence for, of this fact."""
    settings = provenance.get("settings") or {}
    if not math.isfinite(row["nll_new_after"]):
        rate = [f"a smaller learning rate (method.lr below {settings['lr']:g})"] if settings.get("lr") else []
        return [("The update is too large for the weights.", rate)]
    causes = _optimisation(report, settings)
    if not causes:
        causes = _writing(report, provenance.get("layers") or [], settings)
    if _unknown(row):
        old = _quoted(row["target_true"])
        causes.append(
            (
                f"The model did not know the fact before the edit either: it did not say {old} "
                f"({_p(row['nll_true_before'])} per token).",
                ["a subject that the model knows, or a model that knows this subject"],
            )
        )
    if tokens >= MANY_TOKENS:
        right = row.get("right_new_after")
        part = "" if right is None else f"; {round(right * tokens)} of them are"
        text = f"The new answer has {tokens} tokens, and each must be the likeliest in its turn{part}."
        causes.append((text, ["a shorter target_new"]))
    return causes or [
        ("The edit's own report shows nothing wrong.", ["another method, as in method=r_rome or method=ft"])
    ]


def _optimisation(report: Mapping[str, Any], settings: Mapping[str, Any]) -> list[_Cause]:
    """Why the loss of the value, or of the tuning, is not low; nothing where it is."""
    steps = report.get("steps") or []
    if len(steps) < 1 or "steps" not in settings:  # MEND reports its one loss, and optimises nothing
        return []
    loss = [step["loss"] for step in steps]
    stop, most = settings.get("stop_loss", 0.0), settings["steps"]
    if loss[-1] < stop:
        return []
    told = f"{loss[0]:.3f} → {loss[-1]:.3f} in {len(loss)} steps" if len(loss) > 1 else f"{loss[0]:.3f} after no step"
    nll = {step.get("nll") for step in steps}
    if len(steps) > 1 and len(nll) == 1 and None not in nll:  # the last block: later tokens no longer read it
        reach = (
            f"What {_blocks(settings)} writes at the subject's token does not reach the answer: the NLL never moved."
        )
        return [(reach, ["an earlier block" + _block_option(settings)])]
    if report.get("clamp_hit"):
        held = f"The clamp held δ at {settings['clamp']:g} · ‖v0‖ while the loss was still {loss[-1]:.3f}."
        return [(held, [f"a larger clamp (method.clamp above {settings['clamp']:g})"])]
    if report.get("at_bound", 0.0) > HALF:
        bound = settings["epsilon"]
        held = f"epsilon held back {report['at_bound']:.0%} of the entries of ΔW while the loss was {loss[-1]:.3f}."
        return [(held, [f"a larger epsilon (method.epsilon above {bound:g})", "method=ft"])]
    if len(loss) < most:  # it stopped by another rule than the loss, as PMET does
        return []
    if loss[0] - loss[-1] < FLAT * loss[0] and len(loss) > 1:
        rate = f"a larger learning rate (method.lr above {settings['lr']:g})"
        return [(f"The loss never came down ({told}).", [rate, "another block" + _block_option(settings)])]
    recent = max(1, len(loss) // 4)
    pace = (loss[-1 - recent] - loss[-1]) / recent if len(loss) > 1 else math.inf
    if pace * max(PATIENCE[0] * len(loss), PATIENCE[1]) > loss[-1]:
        more = f"more steps (method.steps above {most})"
        return [(f"The steps ran out while the loss was still falling ({told}).", [more])]
    slow = f"The loss was still high at the last step, and hardly falling ({told})."
    return [(slow, ["another block" + _block_option(settings), "another method, as in method=memit or method=ft"])]


def _writing(
    report: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[_Cause]:
    """Why a value that was found is not what the weights give."""
    shares = [layer["written"] for layer in layers if "written" in layer]
    steps = report.get("steps") or []
    if not shares or max(shares) > HALF or not steps or steps[-1].get("nll", math.inf) > SAID:
        return []
    weight = next((name for name in ("mom2_update_weight", "l2") if settings.get(name)), None)
    text = f"A value that says it was found, but the solve wrote at most {max(shares):.1%} of it into the weights."
    advice = ["method=r_rome, which writes all of it"]
    if weight:
        advice.insert(0, f"keeping old keys less strictly (method.{weight} below {settings[weight]:g})")
    return [(text, advice)]


def _unknown(row: Row) -> bool:
    """Whether the model did not say the old answer before; False where it is not given."""
    return row["nll_true_before"] is not None and not row["greedy_true_before"]


def _blocks(settings: Mapping[str, Any]) -> str:
    """Which blocks were written, in words."""
    found = [settings["layer"]] if settings.get("layer") is not None else list(settings.get("layers") or [])
    return f"block{'s' * (len(found) > 1)} {', '.join(map(str, found))}" if found else "the block"


def _block_option(settings: Mapping[str, Any]) -> str:
    """The option that chooses the block, and its value now."""
    name = "layer" if "layer" in settings else "layers"
    now = settings.get(name)
    return "" if now is None else f" (method.{name} is {list(now) if name == 'layers' else now})"


def _quoted(target: str) -> str:
    return repr(target.strip())


def _p(nll: float) -> str:
    """The probability per token (the geometric mean)."""
    return f"{math.exp(-nll):.2g}"
