"""Probes by template: does an edit hold as knowledge, or only as what follows a prompt?

The prompts are those of `editkit/data/templates/`, asked where `task.measure.probes` names them. Targets are compared
as CounterFact's are, by their NLL per token. Nine methods collapse under the first two (arXiv 2510.00625).

    negation              "It is not true that S R": right is anything but the new object. Counted: the old object is
                          likelier than the new one (that the old fact is not true is what the edit says). A model that
                          passes over "not" has 1 before the edit and 0 after it; so the figure before is no knowledge,
                          and a fall is the finding
    negation_free         in free generation: the continuation does not begin with the new object. Near 1 before
    fact_check            "Is it true that S R O? Answer yes or no:", of the new object (yes) and of the old one (no).
                          Before the edit both are the other way round, so a model that knows has 0 before and should
                          have 1 after; who always says the same has 1/2, as has a coin
    reversed              "O R' …" of the new and of the old object: the subject is likelier behind the new one. Two
                          prompts are compared, as most objects have many subjects. A model that knows has 0 before, a
                          coin 1/2; one that stores facts in one direction stays where it was (arXiv 2310.10322)
    alias                 the rewrite prompt with another name of the subject: the new object is likelier. Asked where
                          the unedited model gives the old one for that name, so nearly 0 before
    second_language       the same in another language; each language has a figure too
    repeat_old            "Repeat this sentence: S R O. S R" with the old object: the old object is likelier. Who
                          follows instructions has 1 before and after; an edit that answers whatever is asked has 0
    distracting_context   a true sentence about a neighbor, with the old object, in front of the rewrite prompt: the new
                          object is likelier. 0 before; what is lost against ES is the context's doing

What is said freely to fact_check and to the last four has figures in `generation`, `natural` and `judged`.
"""

from collections.abc import Sequence

from editkit.data.kinds import (
    ALIAS,
    DISTRACTING_CONTEXT,
    FACT_CHECK,
    FROM_NEW,
    FROM_OLD,
    NEGATION,
    REPEAT_OLD,
    REVERSED,
    SECOND_LANGUAGE,
)
from editkit.metrics.counterfact import mean_over, new_wins, true_wins
from editkit.metrics.metric import Formula, Metric, Protocol, register
from editkit.metrics.row_stats import Row, mean, of_kind

PROBES = Protocol("probes", "Probes by template: the edit asked for in other ways")


def known_before(kind: str) -> Formula:
    """The share of a case's rows of one kind in which the new object wins, of those known before the edit."""

    def formula(rows: Sequence[Row], when: str) -> float | None:
        return mean((row for row in of_kind(rows, kind) if row["greedy_true_before"]), lambda row: new_wins(row, when))

    return formula


def not_said(row: Row, when: str) -> bool | None:
    """The continuation does not begin with the new object; None where nothing was said freely."""
    said = row[f"exact_{when}"]
    return None if said is None else not said


def subject_follows(rows: Sequence[Row], when: str) -> float | None:
    """The share of a case's facts whose subject is likelier behind the new object than behind the old one."""
    sides = (of_kind(rows, REVERSED, FROM_NEW), of_kind(rows, REVERSED, FROM_OLD))
    pairs = list(zip(*sides, strict=True))
    wins = [new[f"nll_new_{when}"] < old[f"nll_new_{when}"] for new, old in pairs]
    return sum(wins) / len(wins) if wins else None


def _metric(short: str, meaning: str, formula: Formula, parts_of: Sequence[str] = ()) -> Metric:
    return register(Metric(PROBES, short, meaning), formula, parts_of=parts_of)


_DECLARED = (
    _metric(
        NEGATION,
        'share of "It is not true that …" after which the old object is likelier than the new one',
        mean_over(NEGATION, true_wins),
    ),
    _metric(
        FACT_CHECK,
        'share of "Is it true that …?" whose right one of yes and no is likelier; 1/2 is chance',
        mean_over(FACT_CHECK, new_wins),
    ),
    _metric(
        REVERSED,
        "share of facts whose subject is likelier behind the new object than behind the old one",
        subject_follows,
    ),
    _metric(
        ALIAS,
        "share of prompts with another name of the subject, known before, whose new object is likelier",
        known_before(ALIAS),
    ),
    _metric(
        SECOND_LANGUAGE,
        "share of prompts in another language, known before, whose new object is likelier",
        known_before(SECOND_LANGUAGE),
        parts_of=(SECOND_LANGUAGE,),
    ),
    _metric(
        REPEAT_OLD,
        "share of instructions to repeat the old answer after which the old object is likelier",
        mean_over(REPEAT_OLD, true_wins),
    ),
    _metric(
        DISTRACTING_CONTEXT,
        "share of prompts behind a sentence with the old object whose new object is likelier",
        mean_over(DISTRACTING_CONTEXT, new_wins),
    ),
)
OF_TEMPLATES = {metric.short: metric for metric in _DECLARED}  # by the kind of prompt: its template's name
NEGATION_FREE = _metric(
    "negation_free",
    'share of "It is not true that …" not continued with the new object',
    mean_over(NEGATION, not_said),
)
