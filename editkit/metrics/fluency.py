"""GE and RS of CounterFact (ROME, section 3.3 and its code): is the text still text, and is it about the new fact?

    GE   mean over texts of (2/3 · H₂ + 4/3 · H₃) / 2, H_n the entropy in bits of the text's n-grams: low where the
         model repeats itself. Tables print it × 100
    RS   cosine of TF-IDF vectors: all texts of the case together, against its references together

A text is its prompt and what is sampled after it from the five most likely tokens, 100 tokens in all, going on behind
an end token, as in the reference: entropies grow with length, so another length gives other figures.

Words of GE are cut as nltk cuts them for the reference, but for a few: clitics ("'s", "n't") alone, "well-known" and
"3,000" whole, each other mark alone. On 400 passages of WikiText-2 of 80 words GE × 100 differs from that of nltk's
words by 0.01 in the mean, standard deviation 0.2; words cut at every mark would raise it by 4. Words of RS are
scikit-learn's: two letters or digits or more, in lower case. The reference's inverse document frequencies are of all
its snippets; here they are of the case's references, smoothed as scikit-learn does, so RS is comparable only among runs
with the same references.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from editkit.data.kinds import GENERATION, REFERENCE
from editkit.metrics.counterfact import COUNTERFACT
from editkit.metrics.metric import BITS, COSINE, Metric, register
from editkit.metrics.row_stats import Row, mean, of_kind

WEIGHTS = {2: 2 / 3, 3: 4 / 3}
WORD = re.compile(r"\w+?(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b|\w+(?:[-./@]\w+|[,:](?=\d)\w+)*|\.\.\.|--|[^\w\s]")


def words(text: str) -> list[str]:
    """The words of GE.

    >>> words("It isn't Rome's well-known dome, is it?")
    ['It', 'is', "n't", 'Rome', "'s", 'well-known', 'dome', ',', 'is', 'it', '?']
    """
    return WORD.findall(text)


def terms(text: str) -> list[str]:
    """The words of RS: scikit-learn's."""
    return re.findall(r"\b\w\w+\b", text.lower())


def ngram_entropy(text: str) -> float:
    """(2/3 · H₂ + 4/3 · H₃) / 2 in bits; 0 for a text of fewer than two words."""
    found = words(text)
    bits = {2: _entropy(list(pairwise(found))), 3: _entropy(list(zip(found, found[1:], found[2:], strict=False)))}
    return sum(WEIGHTS[n] * bits[n] for n in bits) / len(bits)


def consistency(texts: Sequence[str], references: Sequence[str]) -> float:
    """The cosine of the texts' and the references' TF-IDF vectors; 0 where they have no word in common."""
    seen = Counter(term for text in references for term in set(terms(text)))

    def vector(many: Sequence[str]) -> dict[str, float]:
        counts = Counter(term for text in many for term in terms(text))
        return {term: n * (math.log((1 + len(references)) / (1 + seen[term])) + 1) for term, n in counts.items()}

    a, b = vector(texts), vector(references)
    size = math.hypot(*a.values()) * math.hypot(*b.values())
    return sum(a[term] * b.get(term, 0.0) for term in a) / size if size else 0.0


def _entropy(items: Sequence[object]) -> float:
    counts = Counter(items)
    return -sum(n / len(items) * math.log2(n / len(items)) for n in counts.values()) if items else 0.0


def _entropy_of(rows: Sequence[Row], when: str) -> float | None:
    return mean(of_kind(rows, GENERATION), lambda row: ngram_entropy(row[f"text_{when}"]))


def _consistency_of(rows: Sequence[Row], when: str) -> float | None:
    texts = [row[f"text_{when}"] for row in of_kind(rows, GENERATION)]
    references = [row["prompt"] for row in of_kind(rows, REFERENCE)]
    return consistency(texts, references) if texts and references else None


GE = register(
    Metric(COUNTERFACT, "GE", "entropy of n-grams in sampled text, in bits; low where the text repeats itself",
           unit=BITS, range=(0.0, None)),
    _entropy_of,
)  # fmt: skip
RS = register(
    Metric(COUNTERFACT, "RS", "cosine of the TF-IDF vectors of sampled text and of reference texts", unit=COSINE),
    _consistency_of,
)
