"""Every metric against its value on paper, from a model whose next-token probabilities are a table written here."""

import json
import math
import random
from collections.abc import Mapping
from typing import Any

import numpy
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from editkit.data.cases import (
    ATTRIBUTE,
    HOP,
    MULTI_HOP,
    NEIGHBORHOOD,
    PARAPHRASE,
    PORTABILITY,
    REWRITE,
    SAME_SUBJECT,
    UNSEEN,
    Case,
    Probe,
)
from editkit.facts import Fact
from editkit.metrics.counterfact import ES, NS, PS, S
from editkit.metrics.drift import KL, PERPLEXITY
from editkit.metrics.fluency import consistency, ngram_entropy, words
from editkit.metrics.generation import exact
from editkit.metrics.measure import look, rows_of, scores_of_rows, values_of_rows
from editkit.metrics.metric import Average, Metric, Protocol, Score
from editkit.metrics.running_text import Drift
from editkit.metrics.scoring import score_probes
from editkit.metrics.summary import RESAMPLES, summary
from editkit.models.architecture import architecture_of
from editkit.models.generate import generate, generate_batch
from editkit.models.load import LanguageModel
from editkit.settings import MeasureSettings
from editkit.testing.tiny import SITES, tiny_lm
from tests.present import present

WORDS = ["<end>", "Tower", "Louvre", "is", "in", "lies", "was", "Rome", "Paris", "New", "York", "speaks", "has", "."]
REST = 1e-12  # of every token that a row does not name, before it is normalised

# P(next | last): all that this model knows.
BEFORE = {
    "in": {"Paris": 0.5, "Rome": 0.25, "New": 0.125, "York": 0.125},
    "is": {"Rome": 0.5, "Paris": 0.5},
    "lies": {"New": 0.5, "Paris": 0.3, "Rome": 0.2},
    "New": {"York": 0.5, "Rome": 0.25, "Paris": 0.25},
    "speaks": {"Paris": 0.75, "Rome": 0.25},
    "has": {"Rome": 0.6, "Paris": 0.4},
    "was": {"Paris": 0.9, "Rome": 0.1},
    "Paris": {".": 1.0},
    "Rome": {".": 1.0},
    "York": {".": 1.0},
    ".": {"<end>": 1.0},
}
AFTER = BEFORE | {
    "in": {"Rome": 0.75, "Paris": 0.125, "New": 0.125},
    "was": {"Paris": 0.4, "Rome": 0.6},
    "lies": {"Paris": 0.6, "New": 0.4},
    "speaks": {"Paris": 0.375, "Rome": 0.625},
}


def table_lm(table: Mapping[str, Mapping[str, float]]) -> LanguageModel:
    """A GPT-2 without blocks to speak of: the residual is the token's own axis, and the head reads the table."""
    size = len(WORDS)
    config = GPT2Config(vocab_size=size, n_embd=size, n_layer=1, n_head=1, n_positions=64, tie_word_embeddings=False)
    config.eos_token_id = WORDS.index("<end>")
    model = GPT2LMHeadModel(config).eval()
    rows = torch.full((size, size), REST, dtype=torch.float64)
    for last, found in table.items():
        for word, p in found.items():
            rows[WORDS.index(last), WORDS.index(word)] = p
    log_p = (rows / rows.sum(1, keepdim=True)).log()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight.copy_(10 * torch.eye(size))
        # Layer norm of 10 e_t is s (e_t − 1/size) with s = 10 / its standard deviation; a bias makes it s e_t.
        deviation = math.sqrt(100 / size - (10 / size) ** 2 + config.layer_norm_epsilon)
        model.transformer.ln_f.weight.fill_(1)
        model.transformer.ln_f.bias.fill_(10 / deviation / size)
        model.lm_head.weight.copy_((log_p.T * deviation / 10).float())
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<end>", eos_token="<end>", pad_token="<end>")
    return LanguageModel("table", model, tokenizer, architecture_of("gpt2"))


FACT = Fact("The {} is in", "Tower", "Rome", "Paris")
CASE = Case(
    (FACT,),
    (
        Probe(REWRITE, "Tower in", "Paris", "Rome"),
        Probe(PARAPHRASE, "Tower was", "Paris", "Rome"),
        Probe(PARAPHRASE, "Tower is", "Paris", "Rome"),  # a tie
        Probe(UNSEEN, "Tower has", "Paris", "Rome"),
        Probe(NEIGHBORHOOD, "Louvre speaks", "Paris", "Rome"),
        Probe(NEIGHBORHOOD, "Louvre was", "Paris", "Rome"),
        Probe(SAME_SUBJECT, "Tower speaks", "Paris", "Rome"),  # said before
        Probe(SAME_SUBJECT, "Tower has", "Paris", "Rome"),  # not said before
        Probe(PORTABILITY, "Tower was", "Paris", "Rome"),  # said before
        Probe(PORTABILITY, "Tower has", "Paris", "Rome"),  # not said before: not asked
        Probe(ATTRIBUTE, "Louvre in", "Paris", "Rome"),
        Probe(MULTI_HOP, "Tower lies", "Paris", "York", ("New York",)),
        Probe(MULTI_HOP, "Tower speaks", "Paris", "York"),
    ),
)


Figures = tuple[dict[str, float | None], list[dict[str, Any]]]  # every value of a case, and its rows


@pytest.fixture(scope="module")
def values() -> Figures:
    settings = MeasureSettings(generate=1, fluency=0, distracted=False)
    before, after = (look(table_lm(table), CASE, settings) for table in (BEFORE, AFTER))
    rows = rows_of(CASE, before, after)
    return values_of_rows(rows), rows


def test_nll_is_a_mean_over_tokens_and_probability_a_product() -> None:
    probes = [Probe(REWRITE, "Tower lies", "New York", "Paris"), Probe(REWRITE, "Tower in", "New York", "Rome")]
    long, short = score_probes(table_lm(BEFORE), probes)
    long_true, short_true = present(long.true), present(short.true)
    assert long_true.nll == pytest.approx(math.log(2), rel=1e-5)  # (ln 2 + ln 2) / 2
    assert long_true.probability == pytest.approx(1 / 4, rel=1e-5)
    assert short_true.nll == pytest.approx((math.log(8) + math.log(2)) / 2, rel=1e-5)
    assert short_true.probability == pytest.approx(1 / 16, rel=1e-5)
    # Summed, New York would lose to Rome by 4; a token, it is ln 4 against ln 4.
    assert short.new.nll == pytest.approx(math.log(4), rel=1e-5)


def test_a_tie_fails_in_both_directions() -> None:
    (tie,) = score_probes(table_lm(BEFORE), [Probe(REWRITE, "Tower is", "Paris", "Rome")])
    assert present(tie.true).nll == tie.new.nll and not tie.new_wins and not tie.true_wins


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("counterfact.ES", 0, 1),
        ("counterfact.EM", 0.25 - 0.5, 0.75 - 0.125),
        ("counterfact.EA", 0, 1),
        ("counterfact.PS", 0, 0.5),  # the tie never counts
        ("counterfact.PM", (0.1 - 0.9) / 2, (0.6 - 0.4) / 2),
        ("counterfact.unseen_PS", 1, 1),
        ("counterfact.NS", 1, 0),
        ("counterfact.NM", (0.5 + 0.8) / 2, (0.375 - 0.625 + 0.4 - 0.6) / 2),
        ("counterfact.NA", 1, 0),
        ("counterfact.same_subject", 0.5, 0),  # of the one that was said before
        ("counterfact.portability", 0, 1),
        ("counterfact.attribute", 0.25, 0.75),
        ("zsre.efficacy", 0, 1),
        ("zsre.specificity", 1, 0),
        ("easyedit.reliability", 0, 1),
        ("easyedit.portability", 0.5, 1),
        ("easyedit.locality", 1, 1 / 4),  # of four that must stay, "Tower has" says the same
        ("generation.rewrite", 0, 1),
        ("generation.neighborhood", 1, 0),
        ("generation.portability", 0, 1),  # of the one whose old answer was said
        ("generation.attribute", 0, 1),
        ("generation.multi_hop", 0.5, 0),
        ("mquake.multi_hop", 1, 0),  # "New York" is an alias, said before after the first of two questions
    ],
)
def test_on_paper(values: Figures, name: str, before: float, after: float) -> None:
    found, _ = values
    assert found[f"{name}_before"] == pytest.approx(before, abs=1e-5)
    assert found[f"{name}_after"] == pytest.approx(after, abs=1e-5)


def test_teacher_forced_tokens_are_counted_one_by_one() -> None:
    case = Case(
        (FACT,), (Probe(REWRITE, "Tower lies", "Paris", "New Rome"), Probe(NEIGHBORHOOD, "in", "New York", "Rome"))
    )
    settings = MeasureSettings(generate=0, fluency=0, distracted=False)
    table = BEFORE | {"lies": {"New": 0.6, "Paris": 0.4}, "New": {"York": 0.6, "Rome": 0.4}}
    moved = table | {"New": {"York": 0.4, "Rome": 0.6}}
    before, after = (look(table_lm(t), case, settings) for t in (table, moved))
    found = values_of_rows(rows_of(case, before, after))
    assert (found["zsre.efficacy_before"], found["zsre.efficacy_after"]) == (0.5, 1.0)  # New right, Rome not yet
    assert (found["zsre.specificity_before"], found["zsre.specificity_after"]) == (0.5, 0.0)
    assert found["easyedit.locality_after"] == 0.5  # Paris at the first token as before; York has become Rome
    assert found["generation.rewrite_before"] is None


def test_margins_are_of_probabilities_a_token_as_in_the_reference() -> None:
    case = Case(
        (FACT,), (Probe(REWRITE, "Tower lies", "New York", "Paris"), Probe(NEIGHBORHOOD, "lies", "New York", "Paris"))
    )
    before = look(table_lm(BEFORE), case, MeasureSettings(generate=0, fluency=0, distracted=False))
    found = values_of_rows(rows_of(case, before, before))
    # p(New) = p(York after New) = 1/2: 1/2 a token, where the whole target has 1/4
    assert found["counterfact.EM_before"] == pytest.approx(0.3 - 0.5, abs=1e-5)
    assert found["counterfact.NM_before"] == pytest.approx(0.5 - 0.3, abs=1e-5)


def test_parts_of_locality_and_portability_have_their_own_figures() -> None:
    probes = (
        Probe(SAME_SUBJECT, "Tower speaks", "Paris", "Rome", group="Relation_Specificity"),
        Probe(NEIGHBORHOOD, "Louvre has", "Paris", "Rome", group="Forgetfulness"),
        Probe(PORTABILITY, "Tower was", "", "Rome", group="Reasoning"),
        Probe(PORTABILITY, "Tower lies", "", "Rome", group="Subject_Aliasing"),
    )
    case = Case((FACT,), probes)
    before, after = (look(table_lm(t), case, MeasureSettings(fluency=0)) for t in (BEFORE, AFTER))
    found = values_of_rows(rows_of(case, before, after))
    expected = {"locality": 1 / 2, "locality_Relation_Specificity": 0, "locality_Forgetfulness": 1}
    expected |= {"portability": 1 / 2, "portability_Reasoning": 1, "portability_Subject_Aliasing": 0}
    assert {name: found[f"easyedit.{name}_after"] for name in expected} == expected
    parts = {
        (s.metric.name, s.metric.part): s.value
        for s in scores_of_rows(rows_of(case, before, after))
        if s.when == "after"
    }
    assert parts["easyedit.portability", "Reasoning"] == 1 and parts["easyedit.locality", ""] == 1 / 2
    assert found["generation.portability_after"] == 1 / 2  # no old answer is known: both are asked


def test_a_chain_is_known_where_every_hop_is() -> None:
    hops = [Probe(PORTABILITY, f"Tower {word}", "", "Rome", group=HOP) for word in ("in", "was", "lies")]
    for kept, share, whole in ((hops, 2 / 3, 0), (hops[:2], 1, 1)):
        case = Case((FACT,), tuple(kept))
        before, after = (look(table_lm(t), case, MeasureSettings(fluency=0)) for t in (BEFORE, AFTER))
        found = values_of_rows(rows_of(case, before, after))
        assert (found["mquake.hops_before"], found["mquake.instance_before"]) == (0, 0)
        assert found["mquake.hops_after"] == pytest.approx(share) and found["mquake.instance_after"] == whole


def test_rows_keep_what_is_needed_to_dispute_a_figure(values: Figures) -> None:
    found, rows = values
    assert values_of_rows(json.loads(json.dumps(rows))) == found
    for row in rows:
        for which, target in (("true", row["target_true"]), ("new", row["target_new"])):
            tokens = [WORDS.index(word) for word in target.split()]
            for when in ("before", "after"):
                said = row[f"argmax_{which}_{when}"]
                right = [a == b for a, b in zip(said, tokens, strict=True)]
                assert row[f"right_{which}_{when}"] == sum(right) / len(right)
                assert row[f"greedy_{which}_{when}"] == all(right)


def test_an_unknown_truth_is_judged_by_what_is_said() -> None:
    case = Case((FACT,), (Probe(REWRITE, "Tower in", "", "Rome"),))
    before, after = (look(table_lm(t), case, MeasureSettings(fluency=0)) for t in (BEFORE, AFTER))
    found = values_of_rows(rows_of(case, before, after))
    assert (found["counterfact.ES_before"], found["counterfact.ES_after"]) == (0, 1)
    assert found["counterfact.EM_after"] is None


def test_distracted_neighbors_have_the_new_fact_in_front() -> None:
    case = Case((FACT,), (Probe(NEIGHBORHOOD, "Louvre was", "Paris", "Rome"),))
    before, after = (look(table_lm(t), case, MeasureSettings(generate=0, fluency=0)) for t in (BEFORE, AFTER))
    rows = rows_of(case, before, after)
    assert [row["prompt"] for row in rows] == ["Louvre was", "The Tower is in Rome. Louvre was"]
    assert values_of_rows(rows)["counterfact.NS_distracted_before"] == 1.0


@pytest.mark.parametrize(
    ("said", "answers", "right"),
    [
        (" Rome is a city", ["Rome"], True),
        (" rome.", ["Rome"], True),
        ("  New\nYork,", ["New York"], True),
        (" Romeo", ["Rome"], False),
        (" the city of Rome", ["Rome"], False),
        (" UK", ["United Kingdom", "UK"], True),
        (" U.K. and", ["U.K."], True),
        ("", ["Rome"], False),
        (" the Netherlands", ["Netherlands"], False),
        (" Compie\u0300gne", ["Compi\u00e8gne"], True),
        ("巴黎的首都", ["巴黎"], True),
        ("Париж", ["Пари"], False),
    ],
)
def test_an_exact_match_begins_with_the_answer(said: str, answers: list[str], right: bool) -> None:
    assert exact(said, answers) is right


def test_entropy_on_paper() -> None:
    # a b a b a: bigrams ab ba ab ba, one bit; trigrams aba bab aba, log2 3 − 2/3
    h3 = math.log2(3) - 2 / 3
    assert ngram_entropy("a b a b a") == pytest.approx((2 / 3 * 1 + 4 / 3 * h3) / 2)
    assert ngram_entropy("word " * 50) == 0 and ngram_entropy("") == 0
    text = " ".join(random.Random(0).choices("abcdefgh", k=200))
    words = text.split()
    by_hand = []
    for size in (2, 3):
        grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
        shares = [grams.count(gram) / len(grams) for gram in set(grams)]
        by_hand.append(-sum(p * math.log2(p) for p in shares))
    assert ngram_entropy(text) == pytest.approx((2 / 3 * by_hand[0] + 4 / 3 * by_hand[1]) / 2)


def test_words_are_cut_as_by_nltk() -> None:
    said = "It isn't the Doge's well-known 3,000 seats, is it?"
    assert words(said) == ["It", "is", "n't", "the", "Doge", "'s", "well-known", "3,000", "seats", ",", "is", "it", "?"]
    assert words("U.S. ... end") == ["U.S", ".", "...", "end"]


def test_consistency_on_paper() -> None:
    # "rome" in both references: weight 1; "old" and "big" in one of two: ln(3/2) + 1; "unknown" in none: ln 3 + 1.
    # Marks and single letters are no words.
    w, unseen = math.log(3 / 2) + 1, math.log(3) + 1
    references, texts = ["Rome, a old", "Rome big"], ["rome rome old; a unknown."]
    expected = (2 * 2 + w * w) / (math.hypot(2, w, unseen) * math.hypot(2, w, w))
    assert consistency(texts, references) == pytest.approx(expected)
    assert consistency(references, references) == pytest.approx(1) and consistency(["nothing"], references) == 0


def test_texts_are_scored_where_there_are_prompts_and_references() -> None:
    case = Case(
        (FACT,), (Probe(REWRITE, "Tower in", "Paris", "Rome"),), generation=("Tower in",), references=("Rome .",)
    )
    before, after = (look(table_lm(t), case, MeasureSettings(fluency=6)) for t in (BEFORE, AFTER))
    rows = rows_of(case, before, after)
    assert before.texts[0].startswith("Tower in") and len(rows) == 3
    look_further = look(table_lm(BEFORE), case, MeasureSettings(fluency=5))
    first, *rest = look_further.texts[0].removeprefix("Tower in").split()
    assert first in ("Paris", "Rome", "New", "York") and len(rest) <= 2  # five tokens, of which two are the prompt's
    found = values_of_rows(rows)
    assert present(found["counterfact.GE_before"]) > 0 and found["counterfact.RS_after"] is not None


# --- averages -----------------------------------------------------------------------------------------------------


A, B = (Metric(Protocol("test"), name) for name in "ab")


def cases(*rows: Mapping[Metric, float | None]) -> list[list[Score]]:
    return [[Score(metric, "after", value) for metric, value in row.items()] for row in rows]


def averages(rows: list[list[Score]]) -> dict[Metric, Average]:
    return {score.metric: present(score.average) for score in summary(rows)}


def test_averages_are_over_cases_and_leave_out_those_without_a_value() -> None:
    found = averages(cases({A: 1.0, B: None}, {A: 0.0, B: 0.5}, {A: None, B: None}, {A: 0.5}))
    assert found[A].mean == 0.5 and found[A].n == 3
    assert found[B].mean == 0.5 and found[B].n == 1 and found[B].low == found[B].high == 0.5
    assert found[B].interval is None  # one case has no interval
    assert summary(cases({A: None})) == [] and summary([]) == []


def test_intervals_are_those_of_a_plain_bootstrap() -> None:
    rng = random.Random(1)
    values = [rng.random() if rng.random() < 0.8 else None for _ in range(40)]
    found = averages(cases(*({A: v} for v in values)))[A]
    drawn = numpy.random.default_rng(0).integers(40, size=(RESAMPLES, 40))
    means = []
    for resample in drawn:
        there = [v for i in resample if (v := values[i]) is not None]
        means.append(sum(there) / len(there))
    assert (found.low, found.high) == pytest.approx(numpy.quantile(means, [0.025, 0.975]))


def test_s_is_the_harmonic_mean_of_the_averages() -> None:
    rows = ((1.0, 0.5, 0.75), (1.0, 1.0, 0.25), (0.0, 0.0, 1.0))
    found = averages(cases(*(dict(zip((ES, PS, NS), row, strict=True)) for row in rows)))[S]
    assert found.mean == pytest.approx(3 / (1 / (2 / 3) + 1 / 0.5 + 1 / (2 / 3))) and found.n == 3
    drawn = numpy.random.default_rng(0).integers(3, size=(RESAMPLES, 3))
    columns = numpy.array(rows)
    each = []
    for resample in drawn:
        means = columns[resample].mean(0)
        each.append(3 / (1 / means).sum() if (means > 0).all() else 0.0)
    assert (found.low, found.high) == pytest.approx(numpy.quantile(each, [0.025, 0.975]))


# --- side by side -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SITES)
def test_continuations_side_by_side_are_those_one_by_one(family: str) -> None:
    lm = tiny_lm(family)
    prompts = ["Rome", "The capital of France is", "A long prompt about nothing in particular goes on", "It"]
    assert generate_batch(lm, prompts, 6) == generate(lm, prompts, 6)


def test_greedy_is_greedy_whatever_a_checkpoint_is_used_to() -> None:
    """By a plain loop over the likeliest token; a repetition penalty comes with many instruction-tuned models."""
    lm = tiny_lm("gpt2")
    prompts = ["Rome", "The capital of France is"]
    lm.model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=3)
    habits = lm.model.generation_config.to_dict()
    expected = []
    for prompt in prompts:
        ids = lm.tokenizer(prompt)["input_ids"]
        begin = len(ids)
        with torch.inference_mode():
            for _ in range(8):
                ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(lm.tokenizer.decode(ids[begin:]))
    assert generate_batch(lm, prompts, 8) == generate(lm, prompts, 8) == expected
    assert lm.model.generation_config.to_dict() == habits


def test_each_is_continued_by_its_own_number_of_tokens() -> None:
    lm = tiny_lm("gpt2")
    prompts = ["Rome", "The capital of France is"]
    one, two = generate_batch(lm, prompts[:1], 3), generate_batch(lm, prompts[1:], 7)
    assert generate_batch(lm, prompts, [3, 7]) == one + two and generate_batch(lm, prompts, [0, 0]) == ["", ""]


def test_a_text_may_go_on_behind_an_end_token() -> None:
    lm = table_lm(BEFORE | {"<end>": {"Tower": 1.0}, "Tower": {"in": 1.0}})
    assert generate_batch(lm, ["Louvre was"], 6) == ["Paris ."]
    assert generate_batch(lm, ["Louvre was"], 6, past_end=True) == ["Paris . Tower in Paris"]


def test_sampling_is_seeded_and_leaves_the_global_state(atlas_lm: LanguageModel) -> None:
    prompts = ["Rome is", "The capital of France"]
    state = torch.random.get_rng_state()
    first, again, other = (generate_batch(atlas_lm, prompts, 12, top_k=5, seed=s) for s in (3, 3, 4))
    assert first == again != other and torch.equal(state, torch.random.get_rng_state())


# --- drift --------------------------------------------------------------------------------------------------------


def test_drift_is_that_of_a_plain_loop(atlas_lm: LanguageModel) -> None:
    drift = Drift.take(atlas_lm, tokens=384, length=64)
    weight = atlas_lm.model.get_parameter("transformer.h.2.mlp.c_proj.weight")
    held = weight.detach().clone()
    before = [_log_p(atlas_lm, ids) for ids in drift.blocks]
    try:
        with torch.no_grad():
            weight.mul_(1.3)
        after, scores = [_log_p(atlas_lm, ids) for ids in drift.blocks], drift.measure(atlas_lm)
    finally:
        with torch.no_grad():
            weight.copy_(held)
    kl, nll, n = 0.0, 0.0, 0
    for p, q, ids in zip(before, after, drift.blocks.tolist(), strict=True):
        for place in range(len(ids) - 1):
            kl += sum(math.exp(a) * (a - b) for a, b in zip(p[place].tolist(), q[place].tolist(), strict=True))
            nll -= q[place][ids[place + 1]].item()
            n += 1
    assert n == 6 * 63
    assert [score.metric for score in scores] == [KL, PERPLEXITY]
    found, perplexity = (present(score.average) for score in scores)
    assert found.mean == pytest.approx(kl / n, rel=1e-4) and found.mean > 1e-4
    assert perplexity.mean == pytest.approx(math.exp(nll / n), rel=1e-4)
    low, high = present(found.interval)
    assert found.n == 6 and low <= found.mean <= high
    blocks = [(p.exp() * (p - q))[:-1].sum(-1).mean().item() for p, q in zip(before, after, strict=True)]
    drawn = numpy.random.default_rng(0).integers(6, size=(RESAMPLES, 6))
    means = [sum(blocks[i] for i in resample) / 6 for resample in drawn]
    assert (found.low, found.high) == pytest.approx(numpy.quantile(means, [0.025, 0.975]), rel=1e-3)
    low, high = present(perplexity.interval)
    assert low < perplexity.mean < high
    same = [present(score.average).mean for score in drift.measure(atlas_lm)]
    assert same == [pytest.approx(0, abs=1e-9), pytest.approx(drift.perplexity)]


def _log_p(lm: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = lm.model(ids[None]).logits[0].double().log_softmax(-1)
    return found
