"""Where a prompt's answer comes from: the logit lens and the causal trace, as a page draws them, kind by kind."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from editkit.errors import EditkitError, FactError
from editkit.facts import Fact
from editkit.lenses import logit_lens
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.tokens import tokenise
from editkit.settings import LOOKUP_TOKENS, TRACE_KINDS, TraceSettings
from editkit.tracing import Traced, proposed_block, trace
from editkit.workbench.messages import NO_ANSWER

KINDS = ("mlp", "state", "attention")  # the first is the one that proposes a block
assert set(KINDS) <= set(TRACE_KINDS)
Tell = Callable[[dict[str, Any]], None]


def traced(lm: LanguageModel, fact: Fact, samples: int, seed: int, tell: Tell) -> Traced:
    """The causal trace of a prompt on the model as it is now, with so many samples of noise; `tell` gets each kind as
    soon as it is there."""
    whole: Traced | None = None
    for kind in KINDS:
        one = trace(lm, fact, TraceSettings(kinds=(kind,), samples=samples), seed=seed, progress=False)
        whole = one if whole is None else replace(whole, probability=whole.probability | one.probability)
        tell({"trace": as_json(lm, fact, whole)})
    assert whole is not None
    return whole


def as_json(lm: LanguageModel, fact: Fact, found: Traced) -> dict[str, Any]:
    """A trace as a page draws it: tokens, values by kind, the proposed block, and what each token is called."""
    try:
        proposed: int | None = proposed_block(found)
    except EditkitError:
        proposed = None
    return {
        "tokens": found.tokens,
        "subject": found.subject,
        "answer": found.answer,
        "clean": found.clean,
        "corrupted": found.corrupted,
        "window": found.window,
        "values": {kind: table.tolist() for kind, table in found.probability.items()},
        "proposed": proposed,
        "lookups": lookups(lm, fact),
    }


def lookups(lm: LanguageModel, fact: Fact) -> dict[int, list[str]]:
    """{position: names of the lookup tokens that it is} of a prompt; a method can write at these alone."""
    rows = tokenise(lm, [fact.text])
    found: dict[int, list[str]] = {}
    for name in LOOKUP_TOKENS:
        try:
            found.setdefault(lookup_position(rows, 0, fact.prompt, fact.subject, name), []).append(name)
        except FactError:
            continue  # there is no token after the subject
    return found


def lens(lm: LanguageModel, fact: Fact) -> dict[str, Any]:
    """P(true answer) and P(new answer) after each block at the last token, and the likeliest token there."""
    words = [word for word in (fact.target_true, fact.target_new) if word.strip() and word != NO_ANSWER]
    found = logit_lens(lm, fact.text, words or [fact.subject])
    probability = found.probability.tolist() if words else [[] for _ in found.said]
    return {"words": words, "probability": probability, "said": found.said}
