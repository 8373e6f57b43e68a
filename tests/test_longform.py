"""Long answers: ROUGE-L against rouge-score, F1 against a plain reading of SQuAD; what is said, and how much of it.

`python -m tests.test_longform`, with rouge-score installed, writes fixtures/rouge.json: its figures of a few pairs, for
where it is not installed.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from editkit.corpora import atlas_prose
from editkit.data.cases import PARAPHRASE, PORTABILITY, REWRITE, Case, Probe
from editkit.data.kinds import SUB_QUESTION
from editkit.facts import Fact
from editkit.metrics.longform import FIGURES, NEAR, Overlap, common_subsequence, rouge_l, token_f1
from editkit.metrics.measure import look, rows_of, scores_of_rows, values_of_rows
from editkit.models.generate import generate
from editkit.models.tokens import in_form, spaced, token_counts
from editkit.settings import MeasureSettings
from editkit.testing.tiny import tiny_lm
from tests.records import EDITEVERY, UNKE
from tests.run_folders import really_run, record_of, score_of
from tests.test_natural import squad

FIXTURE = Path(__file__).parent / "fixtures" / "rouge.json"
ODD = ["naïve", "it's", "e-mail", "3,000", "NASA.", "«oui»", "日本", "_", "x²", "İzmir"]


def pairs(count: int) -> list[tuple[str, str]]:
    """(said, answer): sentences, with words left out, put in, changed in place and repeated."""
    rng = random.Random(0)
    sentences = [line for line in atlas_prose() if line]
    found: list[tuple[str, str]] = [("", "words"), ("words", ""), ("…", "!"), ("same words", "Same words.")]
    while len(found) < count:
        words = rng.choice(sentences).split()[: rng.randrange(1, 40)]
        said = [word for word in words if rng.random() < 0.7]
        for _ in range(rng.randrange(6)):
            said.insert(rng.randrange(len(said) + 1), rng.choice([*ODD, *words]))
        if rng.random() < 0.3:
            rng.shuffle(said)
        found.append((" ".join(said), " ".join(words)))
    return found


def by_rouge_score(said: str, answer: str) -> Overlap:
    """Google's figures."""
    from rouge_score import rouge_scorer  # pyright: ignore[reportMissingImports]

    return Overlap(*rouge_scorer.RougeScorer(["rougeL"]).score(answer, said)["rougeL"])


def test_rouge_l_is_that_of_rouge_score() -> None:
    pytest.importorskip("rouge_score", reason="rouge-score is not installed: its figures of a few pairs are compared")
    for said, answer in pairs(400):
        assert rouge_l(said, answer) == pytest.approx(by_rouge_score(said, answer), abs=1e-6), (said, answer)


def test_rouge_l_is_what_rouge_score_gave() -> None:
    kept = json.loads(FIXTURE.read_text(encoding="utf-8"))
    assert len(kept) == 40 and len({tuple(each["score"]) for each in kept}) > 30
    for each in kept:
        assert rouge_l(each["said"], each["answer"]) == pytest.approx(each["score"], abs=1e-6), each


def by_table(a: Sequence[str], b: Sequence[str]) -> int:
    """The longest common subsequence by the textbook's table (Cormen et al., section 15.4)."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, start=1):
        for j, y in enumerate(b, start=1):
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


def test_the_rows_of_bits_are_the_table() -> None:
    rng = random.Random(0)
    for _ in range(300):
        a, b = (rng.choices("abcde"[: rng.randrange(1, 6)], k=rng.randrange(0, 90)) for _ in range(2))
        assert common_subsequence(a, b) == by_table(a, b), (a, b)


def test_f1_against_a_plain_reading() -> None:
    for said, answer in pairs(200):
        left, shared = squad(answer).split(), 0
        for word in squad(said).split():
            if word in left:
                left.remove(word)
                shared += 1
        p, r = (shared / max(len(squad(text).split()), 1) for text in (said, answer))
        assert token_f1(said, answer) == pytest.approx((p, r, 2 * p * r / (p + r) if shared else 0.0)), (said, answer)


# --- what is said ---------------------------------------------------------------------------------------------------

ONLY = MeasureSettings(generate=3, natural=0, fluency=0, distracted=False)


def long_case() -> Case:
    fact = Fact("{}", "What did the sailor see", "The sea was grey and the ship went home to Rome at night")
    probes = (
        Probe(REWRITE, fact.text, "", fact.target_new, group="news", long=True),
        Probe(PARAPHRASE, "Tell what the sailor saw", "", fact.target_new, long=True),
        Probe(PORTABILITY, "Where did the ship go", "", "to Rome", ("Rome",), SUB_QUESTION, long=True),
        Probe(PORTABILITY, "What is it", "", "a ship"),
    )
    return Case((fact,), probes, "1")


@pytest.mark.parametrize("form", ["bare", "qa"])
@pytest.mark.parametrize("most", [0, 5])
def test_each_long_answer_is_said_as_long_as_itself(form: str, most: int) -> None:
    lm, case = tiny_lm("gpt2"), long_case()
    seen = look(lm, case, replace(ONLY, form=form, natural=most))
    rows = rows_of(case, seen, seen)
    for row, probe in zip(rows[:3], case.probes, strict=False):
        (count,) = token_counts(lm, [spaced(probe.target_new)])
        (said,) = generate(lm, [in_form(lm, probe.prompt, form)], count + ONLY.generate)
        assert row["long_answer_before"] == said
    assert len(rows[2]["said_before"]) > len(rows[2]["long_answer_before"])  # the case's longest answer is longer
    assert (rows[0]["answer_before"] is None) == (most == 0)
    assert "long_answer_before" not in rows[3]
    silent = look(lm, case, replace(ONLY, generate=0))
    assert rows_of(case, silent, silent)[0]["long_answer_after"] is None


def test_the_metrics_are_means_over_rows() -> None:
    case, lm = long_case(), tiny_lm("gpt2")
    seen = look(lm, case, ONLY)
    said = ["", "The sea was red, the ship went home", "to see Rome", ""]
    rows = rows_of(case, seen, replace(seen, long=(case.fact.target_new, *said[1:])))
    values = values_of_rows(rows)
    assert values["longform.rouge_L_after"] == values["longform.rouge_L_news_after"] == values["longform.f1_after"] == 1
    answer = case.fact.target_new
    for name, (_, value) in FIGURES.items():
        assert values[f"longform.{name}_paraphrase_after"] == value(said[1], answer)
        # The best of two spellings: "to Rome" and "Rome".
        best = max(value(said[2], text) for text in ("to Rome", "Rome"))
        assert values[f"longform.{name}_portability_after"] == best
    assert 0 < rouge_l(said[1], answer).recall < rouge_l(said[1], answer).f < 1
    none = [row for row in rows if row["prompt"] == "What is it"]
    assert {s.value for s in scores_of_rows(none) if s.metric in NEAR.values()} == {None}


# --- a run ----------------------------------------------------------------------------------------------------------

# Answers that the bundled model's 256 positions hold.
FACTS = {
    "Describe the lake": "The lake is deep and cold, and few people go there",
    "Describe the hill": "The hill is low, and sheep eat its grass all year",
    "Describe the wood": "In the wood live owls that hunt mice at night",
}
FAST = ["method=anyedit", "method.steps=2", "method.window=6", "moments.tokens=2000", "task.measure.natural=4"]


def test_benchmark_and_lifelong_runs_score_long_answers(tmp_path: Path) -> None:
    """Two cases of EditEverything alone, and two of UnKE in a row, with ME-PPL's form as the text of drift."""
    every = [
        EDITEVERY | {"id": i, "question": question, "answer": answer, "category": "news" if i else "math"}
        for i, (question, answer) in enumerate(FACTS.items())
    ]
    unke = [
        UNKE
        | {"id": i, "question": question, "answer": answer, "sub_question": ["What is it?"], "sub_answer": ["It is."]}
        for i, (question, answer) in enumerate(FACTS.items())
    ]
    texts = [{"Corpus": "C4", "Text": line} for line in atlas_prose()[:20]] + [{"Corpus": "C4", "Text": ""}]
    for name, records in (("every", every), ("unke", unke), ("texts", texts)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")

    data = ["data=editevery", f"data.path={tmp_path / 'every.json'}", "data.limit=2"]
    record = record_of(really_run(tmp_path / "benchmark", "task=benchmark", *data, *FAST))
    assert record["reversal"]["exact"] and not record["data"]["failed"]
    for when in ("before", "after"):
        found = score_of(record, "longform.rouge_L", when)
        assert found["n"] == 2 and 0 <= found["mean"] < 1
    parts = [s.get("part") for s in record["scores"] if (s["metric"], s["when"]) == ("longform.f1", "after")]
    assert parts == [None, "math", "news"]

    data = [
        "data=unke",
        f"data.path={tmp_path / 'unke.json'}",
        "data.limit=2",
        f"task.text=me_ppl:{tmp_path / 'texts.json'}",
    ]
    lifelong = ["task=lifelong", "task.every=2", "task.untouched=1", "task.alarm.tokens=128"]
    record = record_of(really_run(tmp_path / "lifelong", *lifelong, *data, *FAST))
    assert record["reversal"]["exact"] and not record["data"]["failed"] and record["edit"]["count"] == 2
    asked = "retention"
    assert score_of(record, "longform.rouge_L", asked=asked)["n"] == 2
    assert score_of(record, "longform.f1_portability", asked=asked)["n"] == 2
    assert (
        f"{len(texts) - 1} of {len(texts)} texts" in record["data"]["text"]
        and "Text: is empty" in record["data"]["text"]
    )
    assert score_of(record, "drift.KL")["mean"] > 0


if __name__ == "__main__":
    chosen = [{"said": a, "answer": b, "score": list(by_rouge_score(a, b))} for a, b in pairs(40)]
    FIXTURE.write_text(json.dumps(chosen, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
