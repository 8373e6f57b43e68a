"""Values in a notebook: readable, escaped, short however much they hold."""

from pathlib import Path

import torch

from editkit import Edit, Fact, Session
from editkit.edits import base_of, low_rank_delta
from editkit.methods.ft import FtSettings
from editkit.moments.cache import second_moments
from editkit.runs.record import Record, read_record
from editkit.settings import MomentSettings
from editkit.shown import Rows, Shown
from editkit.testing.tiny import tiny_lm
from tests.test_peft import edit_of

FACT = Fact("{} is in", "The <b>Eiffel</b> Tower", "Rome", "Paris")


def test_an_edit() -> None:
    lm = tiny_lm("gpt2")
    edit = edit_of(lm)
    assert repr(edit).startswith(
        "<Edit by random: fact The Eiffel Tower is in → Rome, weight transformer.h.0.mlp.c_proj"
    )
    assert "rank 3" in repr(edit) and "tensor(" not in repr(edit) and len(repr(edit)) < 500
    with edit.applied(lm) as applied:
        assert repr(applied) == "<Applied: state on the model>"
    assert "all equal, bit for bit" in repr(applied)


def test_many_facts_are_cut_short() -> None:
    lm = tiny_lm("gpt2")
    facts = [{"prompt": "{} is in", "subject": f"S{i}", "target_new": "Rome", "target_true": ""} for i in range(1000)]
    delta = low_rank_delta(lm, lm.architecture.down(0), torch.ones(32, 1), torch.ones(1, 64))
    edit = Edit((delta,), base_of(lm), {"method": "x", "facts": facts})
    assert "and 995 more" in repr(edit) and len(repr(edit)) < 600


def test_html_is_escaped() -> None:
    class Sly(Shown):
        def shown(self) -> tuple[str, Rows]:
            return "<i>", [("<a>", "<script>alert(1)</script>")]

    found = Sly()._repr_html_()
    assert "<script" not in found and "&lt;script&gt;" in found and "<i>" not in found and "<a>" not in found
    assert "<b>Eiffel" not in FACT._repr_html_() and "Rome" in FACT._repr_html_()
    assert eval(repr(FACT)) == FACT  # a fact is written as it is typed


def test_a_session_and_a_second_moment() -> None:
    lm = tiny_lm("gpt2")
    with Session(lm, "ft", FtSettings(layer=1, steps=1), progress=False) as session:
        session.edit(Fact("{} is in", "Big Ben", "Rome"))
        assert repr(session) == "<Session of ft: model tiny-gpt2, in force 1 step, step 0 Big Ben → Rome>"
    moment = second_moments(lm, [1], MomentSettings(tokens=2000), progress=False)[1]
    assert repr(moment).startswith("<SecondMoment: module transformer.h.1.mlp.c_proj, keys ")
    assert "source atlas" in repr(moment)


def test_a_record(real_runs: dict[str, Path]) -> None:
    record = Record(**read_record(real_runs["edit"] / "record.json"))
    assert repr(record).startswith("<Record of task=edit: model atlas, method ") and "restored bit for bit" in repr(
        record
    )
