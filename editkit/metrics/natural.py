"""Free answers to their natural stop: what a reader gets who asks and waits until the model is done.

The continuation is greedy and ends at the end-of-text token, at the first "." or line break, or after
`measure.natural` tokens (32). It is right where all of it is the answer or one of its aliases, both normalised as SQuAD
does: lower case, without punctuation and without "a", "an", "the". This is the rule of LocFT-BF (arXiv 2509.22072),
and stands in for WILD's judge (arXiv 2502.11177). `generation` asks only how the continuation begins: an edited model
may say the answer and go on with something wrong, which `goes_on` counts by itself.

The rule is strict with answers that hold a "." themselves: "St. Paul" ends at "St".
"""

import re
import string
from collections.abc import Sequence
from typing import NamedTuple

from editkit.data.kinds import MULTI_HOP, REWRITE
from editkit.metrics.generation import ASKED_FREELY, answered
from editkit.metrics.metric import Metric, Protocol, register
from editkit.metrics.row_stats import Row, mean, of_kind

NATURAL = Protocol("natural", "Free answers to their natural stop: all that the model says is the wanted answer")
STOPS = (".", "\n")
END, LIMIT = "end", "limit"  # what else ends an answer: the model's end-of-text token, the number of tokens

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Answer(NamedTuple):
    """A free answer."""

    text: str  # up to its stop, without it
    stop: str  # what ended it: ".", "\\n", END or LIMIT


def answer_of(said: str, *, ended: bool) -> Answer:
    r"""The answer in a continuation. `ended`: the model ended it, and not the number of tokens.

    >>> answer_of(" Rome. It is", ended=False)
    Answer(text=' Rome', stop='.')
    >>> answer_of(" Rome", ended=True).stop, answer_of(" Rome and", ended=False).stop
    ('end', 'limit')
    """
    found = min(((place, stop) for stop in STOPS if (place := said.find(stop)) >= 0), default=None)
    if found is None:
        return Answer(said, END if ended else LIMIT)
    return Answer(said[: found[0]], found[1])


def normalised(text: str) -> str:
    """The text as SQuAD compares it.

    >>> normalised(" The Eiffel-Tower, a sight")
    'eiffeltower sight'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def matches(answer: str, wanted: Sequence[str]) -> bool:
    """Whether all of an answer is one of `wanted`.

    >>> matches(" Rome", ["Rome"]), matches(" Rome in Italy", ["Rome"])
    (True, False)
    """
    return normalised(answer) in map(normalised, wanted)


# By the kind of prompt: which answer all of what is said must be. Of multi-hop questions MQuAKE has its own rule.
RIGHT = {
    kind: register(
        Metric(NATURAL, kind, f"share of {prompts} answered with the {wanted} and nothing more"),
        answered(kind, lambda row, when: row.get(f"natural_{when}")),
    )
    for kind, prompts, wanted in ASKED_FREELY
    if kind != MULTI_HOP
}


def _goes_on(rows: Sequence[Row], when: str) -> float | None:
    def on(row: Row) -> bool | None:
        begins, right = row[f"exact_{when}"], row.get(f"natural_{when}")
        return None if begins is None or right is None else begins and not right

    return mean(of_kind(rows, REWRITE), on)


GOES_ON = register(
    Metric(
        NATURAL,
        "goes_on",
        "share of rewrite prompts whose continuation begins with the new object and does not stop behind it",
        better=-1,
    ),
    _goes_on,
)


def _stopped(rows: Sequence[Row], when: str) -> float | None:
    return mean(
        of_kind(rows, REWRITE), lambda row: None if row.get(f"stop_{when}") is None else row[f"stop_{when}"] != LIMIT
    )


STOPPED = register(
    Metric(NATURAL, "stopped", "share of rewrite prompts whose answer ended by itself, not at the limit of tokens"),
    _stopped,
)
