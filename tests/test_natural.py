"""Free answers to their natural stop: the rule against plain readings of its sources, and one run for two questions."""

import random
import re
import string
from dataclasses import replace

import pytest
import torch

from editkit.data.atlas import atlas_benchmark
from editkit.data.cases import Case, Probe
from editkit.data.kinds import PARAPHRASE, REWRITE
from editkit.errors import ConfigError
from editkit.facts import Fact
from editkit.metrics import natural
from editkit.metrics.measure import Look, look, rows_of, values_of_rows
from editkit.models.generate import end_tokens, generate, room_behind
from editkit.models.load import LanguageModel
from editkit.models.tokens import in_form
from editkit.settings import MeasureSettings
from editkit.testing.tiny import llama_like_tokenizer, tiny_lm

ONLY = MeasureSettings(generate=2, natural=12, fluency=0, distracted=False)


def squad(text: str) -> str:
    """The evaluation of SQuAD (Rajpurkar et al. 2016) step by step, written from its description."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    words = [word for word in re.split(r"\s+", text) if word]
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def plain_reading(said: str, targets: list[str]) -> bool:
    """LocFT-BF's rule, as its paper has it: cut at the first "." or line break, then SQuAD's exact match."""
    answer = ""
    for character in said:
        if character in ".\n":
            break
        answer += character
    return any(squad(answer) == squad(target) for target in targets)


def test_two_hundred_answers_against_a_plain_reading() -> None:
    rng = random.Random(0)
    words = [
        "Rome",
        "the",
        "A",
        "an",
        "Theodore",
        "New York",
        "St.",
        "Paul",
        "U.S.A.",
        "l'Aquila",
        "(north)",
        "and",
        "e-mail",
    ]
    right = 0
    for _ in range(200):
        target = " ".join(rng.sample(words, rng.randint(1, 3)))
        said = rng.choice(["", " ", " The ", "\n"]) + rng.choice([target, target.lower(), target.upper(), "Rome"])
        said += rng.choice(["", ".", ". It is", "\nQ:", " and", "!", ", the"])
        answer = natural.answer_of(said, ended=False)
        assert natural.matches(answer.text, [target, "Rome"]) == plain_reading(said, [target, "Rome"])
        right += natural.matches(answer.text, [target, "Rome"])
    assert 40 < right < 160  # neither side is empty


def greedy_by_hand(lm: LanguageModel, prompt: str, tokens: int) -> tuple[str, str]:
    """(answer, stop) with one full pass for each token."""
    ids = lm.tokenizer(prompt)["input_ids"]
    begin, ends = len(ids), end_tokens(lm)
    for _ in range(tokens):
        with torch.no_grad():
            token = int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            return str(lm.tokenizer.decode(ids[begin:], skip_special_tokens=True)), "end"
        ids = [*ids, token]
        text = str(lm.tokenizer.decode(ids[begin:], skip_special_tokens=True))
        for place, character in enumerate(text):
            if character in ".\n":
                return text[:place], character
    return str(lm.tokenizer.decode(ids[begin:], skip_special_tokens=True)), "limit"


@pytest.mark.parametrize("settings", [ONLY, replace(ONLY, natural=0), replace(ONLY, form="qa")], ids=str)
def test_answers_are_those_of_a_loop_over_full_passes(atlas_lm: LanguageModel, settings: MeasureSettings) -> None:
    case = atlas_benchmark(seed=0)[3]
    case = replace(case, probes=case.probes[:12])
    found = look(atlas_lm, case, settings)
    asked = [in_form(atlas_lm, probe.prompt, settings.form) for probe in case.probes]
    wanted = [greedy_by_hand(atlas_lm, prompt, 12) for prompt in asked]
    assert [tuple(answer) for answer in found.answers] == (wanted if settings.natural else [])
    assert {stop for _, stop in wanted} & {".", "end"}
    longest = generate(atlas_lm, [probe.prompt for probe in case.probes], 12)
    assert all(text.startswith(said) for text, said in zip(longest, found.said, strict=True))
    assert look(atlas_lm, case, replace(settings, generate=0)) == replace(found, said=(), answers=())


def case_of(*prompts: str) -> Case:
    fact = Fact("{} is in", "The Eiffel Tower", "Rome", "Paris")
    probes = [Probe(REWRITE if not n else PARAPHRASE, text, "Paris", "Rome") for n, text in enumerate(prompts)]
    return Case((fact,), tuple(probes), "0")


def scored(said: str, stop: str, continuation: str) -> dict[str, float | None]:
    """The metrics of one case whose only prompt is answered so, before and after."""
    lm = tiny_lm("gpt2")
    case = case_of("The Eiffel Tower is in")
    found = look(lm, case, MeasureSettings(fluency=0, distracted=False))
    given = Look(found.scores, (continuation,), (natural.Answer(said, stop),), ())
    return values_of_rows(rows_of(case, given, given))


def test_what_goes_on_is_counted_by_itself() -> None:
    right, on, wrong = (
        scored(" Rome", ".", " Rome. It"),
        scored(" Rome in France", "limit", " Rome in France"),
        scored(" Paris", "end", " Paris"),
    )
    names = ("natural.rewrite_after", "natural.goes_on_after", "natural.stopped_after", "generation.rewrite_after")
    assert [right[name] for name in names] == [1, 0, 1, 1]
    assert [on[name] for name in names] == [0, 1, 0, 1]
    assert [wrong[name] for name in names] == [0, 0, 1, 0]
    nothing = values_of_rows(
        rows_of(case_of("x"), *[Look(look(tiny_lm("gpt2"), case_of("x"), ONLY).scores, (), (), ())] * 2)
    )
    assert nothing["natural.rewrite_after"] is nothing["natural.goes_on_after"] is None


def test_a_prompt_takes_the_room_that_is_left() -> None:
    lm = tiny_lm("gpt2")
    limit = lm.model.config.max_position_embeddings
    prompt = "Rome"
    while (room := room_behind(lm, [prompt]) or 0) > 3:
        prompt += " is"
    assert len(lm.tokenizer(prompt)["input_ids"]) == limit - room
    case = case_of(prompt)
    case = replace(case, probes=tuple(replace(probe, target_new="a", target_true="b") for probe in case.probes))
    found = look(lm, case, ONLY)
    assert tuple(found.answers[0]) == greedy_by_hand(lm, prompt, room)


def test_forms_of_a_prompt() -> None:
    lm = tiny_lm("llama")
    assert in_form(lm, "Where?", "bare") == "Where?"
    assert in_form(lm, "Where?", "qa") == "Question: Where?\nAnswer:"
    with pytest.raises(ConfigError, match="no chat template.*form=bare or form=qa"):
        in_form(lm, "Where?", "chat")
    tokenizer = type(llama_like_tokenizer())(
        tokenizer_object=llama_like_tokenizer()._tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    text = in_form(replace(lm, tokenizer=tokenizer), "Where?", "chat")
    assert text == "[user] Where? [assistant]"  # the tokenizer puts its own <s> in front
    with pytest.raises(ConfigError, match="measure.form"):
        MeasureSettings(form="poem")
