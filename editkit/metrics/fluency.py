"""GE and RS of CounterFact (ROME, section 3.3 and its code): is the text still text, and is it about the new fact?

    GE   mean over texts of (2/3 · H₂ + 4/3 · H₃) / 2, H_n the entropy in bits of the text's n-grams: low where the
         model repeats itself. Tables print it × 100
    RS   cosine of TF-IDF vectors: all texts of the case together, against its references together

A text is its prompt and the continuation sampled from the five most likely tokens. Words are runs of letters and
digits, and each other mark is one: the reference takes nltk's, which parts a few contractions otherwise. Its TF-IDF is
fitted on a corpus of its own; here inverse document frequencies are of the case's references, smoothed as scikit-learn
does.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from editkit.metrics.shares import Row, mean, of_kind

GENERATION, REFERENCE = "generation", "reference"  # kinds of rows
WEIGHTS = {2: 2 / 3, 3: 4 / 3}


def values(rows: Sequence[Row], when: str) -> dict[str, float | None]:
    """One case's GE, and RS where the case has references; `when` is before or after."""
    texts = [row[f"text_{when}"] for row in of_kind(rows, GENERATION)]
    references = [row["prompt"] for row in of_kind(rows, REFERENCE)]
    entropy = mean(of_kind(rows, GENERATION), lambda row: ngram_entropy(row[f"text_{when}"]))
    return {"GE": entropy, "RS": consistency(texts, references) if texts and references else None}


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def ngram_entropy(text: str) -> float:
    """(2/3 · H₂ + 4/3 · H₃) / 2 in bits; 0 for a text of fewer than two words."""
    found = words(text)
    bits = {2: _entropy(list(pairwise(found))), 3: _entropy(list(zip(found, found[1:], found[2:], strict=False)))}
    return sum(WEIGHTS[n] * bits[n] for n in bits) / len(bits)


def consistency(texts: Sequence[str], references: Sequence[str]) -> float:
    """The cosine of the texts' and the references' TF-IDF vectors; 0 where they share no word of the references."""
    documents = [set(words(text.lower())) for text in references]
    seen = Counter(word for document in documents for word in document)
    weight = {word: math.log((1 + len(documents)) / (1 + n)) + 1 for word, n in seen.items()}

    def vector(many: Sequence[str]) -> dict[str, float]:
        counts = Counter(word for text in many for word in words(text.lower()) if word in weight)
        return {word: n * weight[word] for word, n in counts.items()}

    a, b = vector(texts), vector(references)
    size = math.hypot(*a.values()) * math.hypot(*b.values())
    return sum(a[word] * b[word] for word in a) / size if size else 0.0


def _entropy(items: Sequence[object]) -> float:
    counts = Counter(items)
    return -sum(n / len(items) * math.log2(n / len(items)) for n in counts.values()) if items else 0.0
