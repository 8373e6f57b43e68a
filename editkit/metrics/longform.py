"""Long answers: how near the model's own text comes to the text that was written (UnKE, AKEW, EditEverything).

The continuation is greedy, of the prompt in the form of `measure.form`, and as long as the answer, plus
`measure.generate` tokens. No text of a hundred words is said again word for word, so words are compared:

    rouge_L         F-measure of the longest common subsequence of words: of L words, P = L / words said,
                    R = L / words of the answer, F = 2 P R / (P + R)
    rouge_L_recall  R alone, which UnKE's and AnyEdit's tables call ROUGE-L (of another package's words)
    f1              F-measure of the words in common, in any order, normalised as SQuAD does (`natural.normalised`)

Words of ROUGE are those of Google's rouge-score 0.1.2 without stemming: runs of a to z and digits, in lower case. So
rouge_L is its `rougeL`, to the last digit; the package is not needed for it (it would bring nltk along). A text in
another script has no such word, and rouge_L is 0: use f1 there.

A metric is the mean over prompts whose answer is a text (`Probe.long`): rewrite prompts, paraphrases, and prompts about
parts of the text (kind portability). EditEverything's categories have figures of their own.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from editkit.data.kinds import PARAPHRASE, PORTABILITY, REWRITE
from editkit.metrics.metric import Formula, Metric, Protocol, register
from editkit.metrics.natural import normalised
from editkit.metrics.row_stats import Row, mean, of_kind

LONGFORM = Protocol("longform", "Long answers: how near the greedy continuation comes to the text that was written")


class Overlap(NamedTuple):
    """What two texts share."""

    precision: float  # of the words said
    recall: float  # of the words of the answer
    f: float  # harmonic mean of the two; 0 where nothing is shared


def rouge_l(said: str, answer: str) -> Overlap:
    """ROUGE-L of what was said against the answer.

    >>> rouge_l("the cat sat", "The cat, black, sat down.")
    Overlap(precision=1.0, recall=0.6, f=0.75)
    """
    a, b = _words(said), _words(answer)
    return _overlap(common_subsequence(a, b), len(a), len(b))


def token_f1(said: str, answer: str) -> Overlap:
    """Words in common, in any order, as SQuAD counts them.

    >>> token_f1("sat the cat", "A cat sat down.").f
    0.8
    """
    a, b = normalised(said).split(), normalised(answer).split()
    return _overlap((Counter(a) & Counter(b)).total(), len(a), len(b))


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence, by rows of bits (Hyyrö 2004): some 50 times sooner than a table.

    >>> common_subsequence(list("abcbdab"), list("bdcaba"))
    4
    """
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(a)) - 1
    row = every  # bit i is 0 where the subsequence grows at word i of `a`
    for word in b:
        hits = row & places.get(word, 0)
        row = ((row + hits) | (row - hits)) & every
    return len(a) - row.bit_count()


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _overlap(shared: int, said: int, answer: int) -> Overlap:
    if not shared:
        return Overlap(0.0, 0.0, 0.0)
    precision, recall = shared / said, shared / answer
    return Overlap(precision, recall, 2 * precision * recall / (precision + recall))


Value = Callable[[str, str], float]

# Of each figure: how a table calls it, and its value of what was said and the answer.
FIGURES: dict[str, tuple[str, Value]] = {
    "rouge_L": ("ROUGE-L (F)", lambda said, answer: rouge_l(said, answer).f),
    "rouge_L_recall": ("ROUGE-L (recall)", lambda said, answer: rouge_l(said, answer).recall),
    "f1": ("F1 of words", lambda said, answer: token_f1(said, answer).f),
}
ASKED = {
    REWRITE: "rewrite prompts",
    PARAPHRASE: "paraphrases",
    PORTABILITY: "prompts about parts of the text",
}


def _formula(kind: str, value: Value) -> Formula:
    """The mean of a figure over a case's rows of one kind whose answer is a text, the best of its spellings."""

    def near(row: Row, when: str) -> float | None:
        said = row.get(f"long_answer_{when}")
        return None if said is None else max(value(said, text) for text in (row["target_new"], *row["aliases"]))

    return lambda rows, when: mean(of_kind(rows, kind), lambda row: near(row, when))


NEAR = {
    (name, kind): register(
        Metric(
            LONGFORM,
            name if kind == REWRITE else f"{name}_{kind}",
            f"{title} of the continuation of {prompts} against the answer",
        ),
        _formula(kind, value),
        parts_of=[REWRITE] if kind == REWRITE else (),
    )
    for name, (title, value) in FIGURES.items()
    for kind, prompts in ASKED.items()
}
