"""CounterFact's metrics (ROME, arXiv 2202.05262, section 3.3 and its code).

For a probe, both targets are scored after the prompt by their negative log-likelihood *per token*:

    ES, PS   share of rewrite (paraphrase) probes with NLL(target_new) < NLL(target_true)
    NS       share of neighborhood probes with NLL(target_true) < NLL(target_new)
    EM PM NM mean of p(target_new) − p(target_true) with p = exp(−NLL per token), as in ROME's `summarize.py`: of a
             target of several tokens the geometric mean. The other way round for neighborhood probes
    EA PA NA share of probes where greedy decoding gives the answer wanted, teacher-forced (every token the argmax)
    S        3 / (1/ES + 1/PS + 1/NS) of the averages (ROME, table 1); 0 where one of them is 0

A tie counts as failure. Where target_true is unknown, target_new has won when greedy decoding gives it.

Beside CounterFact's own, by the same rule:

    p_new           probability of target_new, all of its tokens, after the rewrite prompt
    unseen_PS       paraphrases whose phrasing the model has never seen (the atlas)
    NS_distracted   neighborhood prompts with the new fact put in front (CounterFact+, arXiv 2305.17553)
    attribute       prompts about subjects that have the new object already: p(target_new), as above
    same_subject    share of the subject's other answers that are given; after: of those that were given before
    portability     share of prompts whose answer follows, where the new answer is likelier; asked only where the
                    unedited model gives the old one
"""

import math
from collections.abc import Callable, Sequence

from editkit.data.kinds import (
    ATTRIBUTE,
    DISTRACTED,
    NEIGHBORHOOD,
    PARAPHRASE,
    PORTABILITY,
    REWRITE,
    SAME_SUBJECT,
    UNSEEN,
)
from editkit.metrics.metric import AFTER, DIFFERENCE, PROBABILITY, Formula, Metric, Protocol, register
from editkit.metrics.row_stats import Row, mean, of_kind

COUNTERFACT = Protocol("counterfact", "CounterFact (ROME): the likelihood of two answers compared")

Value = Callable[[Row, str], float | bool | None]  # of a row, before or after


def new_wins(row: Row, when: str) -> bool:
    """NLL(target_new) < NLL(target_true); against an unknown target_true: greedy decoding gives the new."""
    if row[f"nll_true_{when}"] is None:
        return bool(row[f"greedy_new_{when}"])
    return bool(row[f"nll_new_{when}"] < row[f"nll_true_{when}"])


def true_wins(row: Row, when: str) -> bool | None:
    """NLL(target_true) < NLL(target_new); None where target_true is unknown."""
    true = row[f"nll_true_{when}"]
    return None if true is None else bool(true < row[f"nll_new_{when}"])


def p_new_per_token(row: Row, when: str) -> float:
    """exp(−NLL per token) of target_new."""
    return math.exp(-row[f"nll_new_{when}"])


def margin(row: Row, when: str) -> float | None:
    """p(target_new) − p(target_true), per token."""
    true = row[f"nll_true_{when}"]
    return None if true is None else p_new_per_token(row, when) - math.exp(-true)


def margin_of_true(row: Row, when: str) -> float | None:
    """p(target_true) − p(target_new), per token."""
    found = margin(row, when)
    return None if found is None else -found


def new_given(row: Row, when: str) -> bool | None:
    """Every token of target_new is the argmax."""
    return row[f"greedy_new_{when}"]  # type: ignore[no-any-return]


def true_given(row: Row, when: str) -> bool | None:
    """Every token of target_true is the argmax."""
    return row[f"greedy_true_{when}"]  # type: ignore[no-any-return]


def mean_over(kind: str, value: Value) -> Formula:
    """The formula of a metric that is the mean of `value` over a case's rows of one kind."""

    def formula(rows: Sequence[Row], when: str) -> float | None:
        return mean(of_kind(rows, kind), lambda row: value(row, when))

    return formula


def kept(rows: Sequence[Row], when: str) -> float | None:
    """same_subject: before, the share of answers given; after, the share still given of those given before."""
    asked = of_kind(rows, SAME_SUBJECT)
    known = [row for row in asked if row["greedy_true_before"]]
    return mean(known if when == AFTER else asked, lambda row: true_given(row, when))


def follows(rows: Sequence[Row], when: str) -> float | None:
    """portability: new_wins over the prompts whose old answer the unedited model gives."""
    known = [row for row in of_kind(rows, PORTABILITY) if row["greedy_true_before"]]
    return mean(known, lambda row: new_wins(row, when))


_SIGNED: tuple[float | None, float | None] = (-1.0, 1.0)

ES = register(
    Metric(COUNTERFACT, "ES", "share of rewrite prompts after which the new object is likelier than the old one",
           headline=True),
    mean_over(REWRITE, new_wins),
)  # fmt: skip
EM = register(
    Metric(COUNTERFACT, "EM", "p(new) − p(old), per token, after rewrite prompts", unit=DIFFERENCE, range=_SIGNED),
    mean_over(REWRITE, margin),
)
EA = register(
    Metric(COUNTERFACT, "EA", "share of rewrite prompts after which every token of the new object is the argmax"),
    mean_over(REWRITE, new_given),
)
PS = register(
    Metric(COUNTERFACT, "PS", "share of paraphrases after which the new object is likelier than the old one",
           headline=True),
    mean_over(PARAPHRASE, new_wins),
)  # fmt: skip
PM = register(
    Metric(COUNTERFACT, "PM", "p(new) − p(old), per token, after paraphrases", unit=DIFFERENCE, range=_SIGNED),
    mean_over(PARAPHRASE, margin),
)
PA = register(
    Metric(COUNTERFACT, "PA", "share of paraphrases after which every token of the new object is the argmax"),
    mean_over(PARAPHRASE, new_given),
)
NS = register(
    Metric(COUNTERFACT, "NS", "share of neighborhood prompts after which the old object is still likelier",
           headline=True),
    mean_over(NEIGHBORHOOD, true_wins),
)  # fmt: skip
NM = register(
    Metric(COUNTERFACT, "NM", "p(old) − p(new), per token, after neighborhood prompts", unit=DIFFERENCE, range=_SIGNED),
    mean_over(NEIGHBORHOOD, margin_of_true),
)
NA = register(
    Metric(COUNTERFACT, "NA", "share of neighborhood prompts after which every token of the old object is the argmax"),
    mean_over(NEIGHBORHOOD, true_given),
)
NS_DISTRACTED = register(
    Metric(COUNTERFACT, "NS_distracted", "NS with the new fact put in front of the prompt (CounterFact+)"),
    mean_over(DISTRACTED, true_wins),
)
UNSEEN_PS = register(
    Metric(COUNTERFACT, "unseen_PS", "PS of phrasings that the model has never seen"), mean_over(UNSEEN, new_wins)
)
ATTRIBUTES = register(
    Metric(COUNTERFACT, "attribute", "p(new), per token, after prompts whose subjects have the new object already",
           better=0, unit=PROBABILITY),
    mean_over(ATTRIBUTE, p_new_per_token),
)  # fmt: skip
SAME_SUBJECT_KEPT = register(
    Metric(COUNTERFACT, "same_subject", "share of the subject's other answers still given, of those given before"), kept
)
PORTABLE = register(
    Metric(COUNTERFACT, "portability", "share of prompts one hop on, known before, whose new answer is likelier"),
    follows,
)
P_NEW = register(
    Metric(COUNTERFACT, "p_new", "probability of the new object after the rewrite prompt", unit=PROBABILITY),
    mean_over(REWRITE, lambda row, when: row[f"probability_new_{when}"]),
)
S = register(
    Metric(COUNTERFACT, "S", "harmonic mean of ES, PS and NS", averaged="harmonic mean of averages", headline=True,
           combines=(ES.name, PS.name, NS.name)),
)  # fmt: skip
