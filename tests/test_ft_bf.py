"""LocFT-BF against a plain float64 loop, and its replay as state of a session."""

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from editkit import Edit, Fact, Session
from editkit.errors import ConfigError, FactError
from editkit.methods.ft_bf import FtBfSettings, Stored, ft_bf, replayed
from editkit.models.architecture import experts_in, weight_name
from editkit.models.experts import down_of, site_of
from editkit.models.load import LanguageModel
from editkit.models.tokens import tokenise
from editkit.testing.tiny import SITES, tiny_lm
from editkit.testing.untouched import TARGETS, tokens_of, untouched
from tests.conftest import Near
from tests.expert_oracle import memory_of
from tests.present import present

FACT = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
FACTS = [
    FACT,
    replace(FACT, subject="Big Ben", target_new=TARGETS[1]),
    replace(FACT, subject="The Louvre", target_new=TARGETS[2]),
]
PLAIN = FtBfSettings(layer=1, steps=5, lr=2e-3, batch=2, stop_loss=0.0)


def loop(lm: LanguageModel, settings: FtBfSettings, facts: Sequence[Fact]) -> tuple[Tensor, list[float]]:
    """ΔW [d_model, d_ff] and the loss of each pass, by torch.optim.Adam on a copy's own weight, token by token."""
    model = copy.deepcopy(lm.model).double()
    memory = memory_of(model, site_of(lm, present(settings.layer)))
    module = down_of(lm, present(settings.layer))
    weight = model.get_parameter(weight_name(module, experts_in(model.get_submodule(module))))
    start = memory.matrix().detach().clone()
    rows = [tokens_of(lm, fact.text, fact.target_new) for fact in facts]
    if settings.end_of_text:
        rows = [([*ids, lm.tokenizer.eos_token_id], count + 1) for ids, count in rows]
    optimizer, order = torch.optim.Adam([weight], lr=present(settings.lr)), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(settings.steps):
        shuffled = [rows[i] for i in torch.randperm(len(rows), generator=order).tolist()]
        seen = []
        for begin in range(0, len(rows), settings.batch):
            nll = []
            for ids, count in shuffled[begin : begin + settings.batch]:
                p = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
                nll += [-p[i - 1, ids[i]].log() for i in range(len(ids) - count, len(ids))]
            loss = torch.stack(nll).mean()
            seen += [loss.item()] * len(shuffled[begin : begin + settings.batch])
            if loss.item() >= settings.stop_loss:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        losses.append(sum(seen) / len(seen))
        if losses[-1] < settings.stop_loss:
            break
    return (memory.matrix() - start).detach(), losses


def check(near: Near, family: str, edit: Edit, expected: Tensor, losses: list[float]) -> None:
    near("ft_bf", family, edit.deltas[0].change(), expected, 1e-4)
    assert [step["loss"] for step in edit.provenance["reports"][0]["steps"]] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("family", SITES)
def test_equal_to_a_plain_loop(family: str, near: Near) -> None:
    # Padded rows of gemma2 are not numbers in float64: transformers adds two masks of its least number.
    lm = tiny_lm(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    settings = replace(PLAIN, end_of_text=family != "qwen2")
    check(near, family, ft_bf(lm, FACTS, settings, progress=False), *loop(lm, settings, FACTS))


def test_it_stops_where_the_plain_loop_stops(near: Near) -> None:
    lm = tiny_lm("gpt2", dtype=torch.float64)
    settings = replace(PLAIN, steps=30, stop_loss=6.5, lr=5e-3)
    expected, losses = loop(lm, settings, FACTS)
    assert 1 < len(losses) < 30
    check(near, "gpt2", ft_bf(lm, FACTS, settings, progress=False), expected, losses)


def stored(steps: Sequence[Edit]) -> Stored:
    """What a session of these steps has edited."""
    return functools.reduce(Stored.also, steps, Stored())


def test_facts_of_earlier_steps_are_replayed(near: Near) -> None:
    lm = tiny_lm("gpt2", dtype=torch.float64)
    with Session(lm, "ft_bf", PLAIN, progress=False) as session:
        session.edit(FACTS[:2])
        expected, losses = loop(lm, PLAIN, [FACTS[2], *replayed(FACTS[2:], stored(session.steps), 100, 0)])
        step = session.edit(FACTS[2])
        check(near, "gpt2", step, expected, losses)
        assert step.provenance["reports"][0]["replayed"] == 2 and len(step.provenance["facts"]) == 1
    with Session(lm, "ft_bf", replace(PLAIN, replay=0), progress=False) as session:
        session.edit(FACTS[:2])
        assert session.edit(FACTS[2]).provenance["reports"][0]["replayed"] == 0


def test_the_last_answer_of_a_prompt_is_replayed() -> None:
    lm = tiny_lm("gpt2")
    one = ft_bf(lm, FACTS[:2], PLAIN, progress=False)
    two = ft_bf(lm, FACT.with_target("Oslo"), PLAIN, progress=False)
    before = stored([one, two])
    found = replayed(FACTS[2:], before, 5, 0)
    assert {(fact.subject, fact.target_new) for fact in found} == {
        ("The Eiffel Tower", "Oslo"),
        ("Big Ben", TARGETS[1]),
    }
    assert [fact.subject for fact in replayed([FACT.with_target("Rome")], before, 5, 0)] == ["Big Ben"]
    assert len(replayed(FACTS[2:], before, 1, 0)) == 1


def test_undone_and_resumed_a_session_replays_what_its_steps_hold(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    with Session(lm, "ft_bf", PLAIN, progress=False) as session:
        for fact in FACTS:
            session.edit(fact)
        session.undo(1)
        session.save(tmp_path)
        after = session.edit(replace(FACT, subject="Rome"))
    with Session.load(tmp_path, lm, progress=False) as again:
        assert again.edit(replace(FACT, subject="Rome")).to_bytes() == after.to_bytes()


def test_the_model_is_left_as_it_was() -> None:
    lm = tiny_lm("gpt2")
    with untouched(lm, lm.architecture.down(1)):
        assert ft_bf(lm, FACTS, PLAIN, progress=False).norm() > 0


def test_a_free_answer_stops(atlas_lm: LanguageModel) -> None:
    edit = ft_bf(atlas_lm, FACTS, progress=False)
    for fact in FACTS:
        rows = tokenise(atlas_lm, [f"{fact.text} {fact.target_new}"])
        with edit.applied(atlas_lm), torch.no_grad():
            best = atlas_lm.model(**rows.inputs()).logits[0, -1].argmax()
        assert best == atlas_lm.tokenizer.eos_token_id


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="method.replay must be 0 or more"):
        FtBfSettings(replay=-1)
    with pytest.raises(FactError, match="no end-of-text token.*method.end_of_text=false"):
        lm = tiny_lm("llama")
        tokenizer = copy.deepcopy(lm.tokenizer)
        tokenizer.eos_token = None
        ft_bf(LanguageModel(lm.name, lm.model, tokenizer, lm.architecture), FACTS, PLAIN, progress=False)
