"""RippleEdits (arXiv 2307.12976, section 5): the share of tests passed, by criterion.

A test has one prompt or several, and conditions: prompts that the unedited model must answer, so that what it did not
know is not laid to the edit. Tests whose conditions do not all hold are left out. A test is passed with one of its
prompts answered (OR) or with all (AND). A case's value is the share of its tests that are passed.

A prompt is answered where the free continuation begins with an answer or one of its other spellings
(`generation.exact`); the source asks whether prompt and continuation together hold it.
"""

from collections.abc import Sequence

from editkit.data.kinds import CONDITION
from editkit.metrics.metric import Formula, Metric, Protocol, register
from editkit.metrics.row_stats import Row

RIPPLE = Protocol("ripple", "RippleEdits: tests passed, of those whose conditions the unedited model meets")

# By the benchmark's name of the criterion: the paper's, and what it asks.
CRITERIA = {
    "Logical_Generalization": ("logical_generalization", "what follows from the new fact by the relation's own logic"),
    "Compositionality_I": ("compositionality_1", "what follows by a relation of the new object"),
    "Compositionality_II": ("compositionality_2", "what follows for another subject, by a relation to this one"),
    "Subject_Aliasing": ("subject_aliasing", "the new fact under the subject's other names"),
    "Forgetfulness": ("preservation", "the relation's other objects, which stay"),
    "Relation_Specificity": ("relation_specificity", "the subject's other relations, which stay"),
}


def passed(criterion: str) -> Formula:
    """The share of a criterion's tests that are passed."""

    def formula(rows: Sequence[Row], when: str) -> float | None:
        tests: dict[int, list[Row]] = {}
        for row in rows:
            if row.get("test") is not None and row["group"] == criterion:
                tests.setdefault(row["test"], []).append(row)
        found = [one for test in tests.values() if (one := _passed(test, when)) is not None]
        return sum(found) / len(found) if found else None

    return formula


def _passed(test: Sequence[Row], when: str) -> bool | None:
    """Whether a test is passed; None where it does not count, or nothing was said freely."""
    met = [row["exact_before"] for row in test if row["kind"] == CONDITION]
    asked = [row for row in test if row["kind"] != CONDITION]
    answered = [row[f"exact_{when}"] for row in asked]
    if not all(met) or None in answered:
        return None
    return all(answered) if asked[0]["every"] else any(answered)


PASSED = {
    name: register(Metric(RIPPLE, short, f"share of tests passed that ask {what}"), passed(name))
    for name, (short, what) in CRITERIA.items()
}
