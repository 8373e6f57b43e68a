"""The verdict on edits that were really made: each cause is provoked on the atlas model and must be named."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from editkit.data.cases import Case, make_case
from editkit.facts import Fact
from editkit.methods import get_method
from editkit.metrics.measure import look, rows_of
from editkit.metrics.verdict import Verdict, verdict
from editkit.models.load import LanguageModel
from editkit.models.tokens import spaced, token_counts
from editkit.settings import MeasureSettings
from tests.covering import spread

FACT = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
UNKNOWN = Fact(FACT.prompt, "The Zorbax Obelisk", "Rome", "Paris")
LONG = FACT.with_target("Vienna or Cairo or London or Lisbon or Rome")
SPORT = Fact("{} plays the sport of", "LeBron James", "football", "basketball")

Judge = Callable[..., Verdict]


@pytest.fixture(scope="module")
def judge(atlas_lm: LanguageModel) -> Judge:
    """Make the edit and judge it; what it writes and reports is as task=edit writes it, read back from JSON."""

    @cache
    def judged(fact: Fact, method: str, options: tuple[tuple[str, Any], ...]) -> Verdict:
        found = get_method(method)
        edit = found(atlas_lm, fact, found.settings(**dict(options)), progress=False)
        rows = measured(atlas_lm, make_case(fact), edit)
        return verdict(json.loads(json.dumps(rows)), json.loads(json.dumps(edit.provenance)))

    return lambda fact, method="r_rome", **options: judged(fact, method, tuple(sorted(options.items())))


def measured(lm: LanguageModel, case: Case, edit: Any) -> list[dict[str, Any]]:
    before = look(lm, case, MeasureSettings())
    with edit.applied(lm):
        return rows_of(case, before, look(lm, case, MeasureSettings()))


@pytest.mark.parametrize("method", ["r_rome", "rome", "memit", "ft"])
def test_an_edit_that_landed_gets_one_line(judge: Judge, method: str) -> None:
    found = judge(FACT, method)
    assert found == Verdict(True, "The edit landed: the model says 'Rome'.")
    assert str(found) == found.summary and found.lines() == [found.summary]


def test_one_line_also_where_the_subject_was_unknown(judge: Judge) -> None:
    assert str(judge(UNKNOWN)) == "The edit landed: the model says 'Rome'; it did not know 'Paris' before."


# The edit, then a part of the summary (how far the answer moved), of each reason, of each advice.
CAUSES: list[tuple[Fact, str, dict[str, Any], str, list[str], list[str]]] = [
    (FACT, "r_rome", {"clamp": 0.01}, "did not rise", ["The clamp held δ at 0.01 ·"], ["method.clamp above 0.01"]),
    (FACT, "r_rome", {"clamp": 1.3}, "rose, but not enough", ["The clamp held δ at 1.3 ·"], ["method.clamp above 1.3"]),
    (FACT, "r_rome", {"steps": 2}, "rose, but not enough", ["still falling"], ["method.steps above 2"]),
    (FACT, "r_rome", {"lr": 1e-4}, "did not rise", ["never came down"], ["method.lr above 0.0001", "another block"]),
    (FACT, "r_rome", {"layer": 7}, "did not rise", ["block 7 writes"], ["an earlier block (method.layer is 7)"]),
    (UNKNOWN, "r_rome", {"clamp": 0.5}, "now likelier", ["The clamp", "did not know"], ["above 0.5", "a subject that"]),
    (
        LONG,
        "r_rome",
        {},
        "rose, but not enough",
        ["hardly falling", "The new answer has"],
        ["another block (method.layer is 4)", "method=memit", "a shorter"],
    ),
    (
        SPORT,
        "r_rome",
        {},
        "now likelier than 'basketball'",
        ["still falling", "did not know", "has 4 tokens, and each must be the likeliest in its turn; 3 of them are"],
        ["method.steps above 60", "a subject that the model knows", "a shorter target_new"],
    ),
    (
        FACT,
        "memit",
        {"mom2_update_weight": 1e6},
        "did not rise",
        ["the solve wrote at most 0.4% of it"],
        ["method.mom2_update_weight below 1e+06", "method=r_rome"],
    ),
    (FACT, "alphaedit", {"l2": 1e5}, "did not rise", ["wrote at most"], ["method.l2 below 100000", "method=r_rome"]),
    (FACT, "ft", {"steps": 1}, "rose, but not enough", ["steps ran out"], ["method.steps above 1"]),
    (FACT, "ft_l", {"epsilon": 1e-3}, "rose, but not", ["of the entries of ΔW"], ["epsilon above 0.001", "method=ft"]),
    (Fact(FACT.prompt, FACT.subject, "Rome"), "r_rome", {"clamp": 0.1}, "rose", ["clamp"], ["clamp above 0.1"]),
    (
        Fact(FACT.prompt, "The Zorbax Obelisk", "Quito", "Paris"),
        "mend",
        {},
        "now likelier than",
        ["did not know", "has 5 tokens"],
        ["a subject that", "a shorter target_new"],
    ),
]


@pytest.mark.parametrize(
    ("fact", "method", "options", "degree", "causes", "advice"),
    spread(CAUSES, 3),
    ids=[f"{fact.subject}-{fact.target_new}-{method}-{options}" for fact, method, options, *_ in CAUSES],
)
def test_each_cause_is_named_and_no_other(
    judge: Judge,
    fact: Fact,
    method: str,
    options: dict[str, Any],
    degree: str,
    causes: list[str],
    advice: list[str],
) -> None:
    found = judge(fact, method, **options)
    told = str(found)
    assert not found.landed and found.summary.startswith("The edit did not land: "), told
    assert degree in found.summary, told
    assert len(found.reasons) == len(causes), told
    assert all(part in reason for part, reason in zip(causes, found.reasons, strict=True)), told
    assert len(found.try_) == len(advice), told
    assert all(part in try_ for part, try_ in zip(advice, found.try_, strict=True)), told
    assert "e-1" not in told  # probabilities are per token, so a long answer does not read 1e-108


def test_the_number_of_tokens_is_the_tokenizers(judge: Judge, atlas_lm: LanguageModel) -> None:
    (tokens,) = token_counts(atlas_lm, [spaced(LONG.target_new)])
    assert tokens >= 12
    assert f"The new answer has {tokens} tokens" in str(judge(LONG))


def test_a_broken_model_is_no_landed_edit(judge: Judge) -> None:
    found = judge(FACT, "ft", steps=1, lr=1e30)
    assert not found.landed
    assert "gives no number" in found.summary and "too large" in found.reasons[0]
    assert found.try_ == ("a smaller learning rate (method.lr below 1e+30)",)


def test_facts_of_one_edit_are_counted(atlas_lm: LanguageModel) -> None:
    method = get_method("r_rome")
    other = Fact("{} is located in the city of", "The Louvre", "Vienna or Cairo or London or Lisbon", "Paris")
    case = Case((FACT, other), make_case(FACT).probes + make_case(other).probes)
    edit = method(atlas_lm, list(case.facts), method.settings(), progress=False)
    found = verdict(measured(atlas_lm, case, edit), edit.provenance)
    assert found.summary == "The edit did not land for 1 of 2 facts."
    assert "a shorter target_new" in found.try_


def test_rows_without_a_rewrite_are_refused() -> None:
    with pytest.raises(ValueError, match="rewrite"):
        verdict([{"kind": "neighborhood"}], {})
