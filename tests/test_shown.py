"""Values in a notebook: readable, escaped, short however much they hold."""

from pathlib import Path

import torch

import editkit
from editkit import Edit, Fact, Session, lenses
from editkit.edits import base_of, low_rank_delta
from editkit.methods.ft import FtSettings
from editkit.models.snapshot import Snapshot
from editkit.moments.cache import second_moments
from editkit.nethook import InstrumentedModel, Trace
from editkit.runs.record import Record, read_record
from editkit.settings import MomentSettings, TraceSettings
from editkit.shown import Rows, Shown
from editkit.testing.tiny import tiny_lm
from editkit.tracing import PARTS, AverageTrace, propose_layers
from editkit.tracing import trace as causal_trace
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


def test_a_trace_shows_its_sites_and_completes_their_names() -> None:
    lm = tiny_lm("gpt2")
    sites = [f"transformer.h.{layer}.mlp" for layer in range(3)]
    trace = Trace(lm.model, sites, inputs=True, grads=True)
    assert "Trace of 3 sites: transformer.h.0.mlp, did not run; " in repr(trace)
    with trace:
        logits = lm.model(input_ids=torch.arange(2, 9)[None], use_cache=False).logits
        assert "Trace of 3 sites, open" in repr(trace)
    assert "transformer.h.0.mlp, 1 run, input [1, 7, 32] float32, output [1, 7, 32] float32;" in repr(trace)
    logits.sum().backward()
    lm.model.zero_grad()
    table = trace._repr_html_()
    assert table.count("<tr>") == 4 and table.count("[1, 7, 32] float32") == 9 and "tensor(" not in table
    assert (
        repr(trace[sites[1]])
        == "<Record: "
        + ", ".join([sites[1], "1 run", *(f"{kind} [1, 7, 32] float32" for kind in ("input", "output", "grad"))])
        + ">"
    )
    assert trace._ipython_key_completions_() == sites


def test_many_sites_are_cut_short_and_an_instrumented_model_is_used_like_the_model() -> None:
    lm = tiny_lm("gpt2")
    with InstrumentedModel(lm.model, retain="transformer.h.*.mlp.*") as im:
        im.add("<louder>", "transformer.h.0.mlp", edit=lambda h: 2 * h)
        count = len(im.retained)
        assert "rules: <louder> (on): " in repr(im) and f"and {count - 8} more sites" in repr(im)
        assert "<louder>" not in im._repr_html_() and "&lt;louder&gt;" in im._repr_html_()
        assert {"generate", "retain", "config"} <= {*dir(im)} and im._ipython_key_completions_() == im.retained
    assert "closed" in repr(im)


def test_what_is_traced_and_predicted_shows_no_tensors() -> None:
    lm, fact = tiny_lm("gpt2"), Fact("The tower {} is in", "of Rome", "Spain", "Italy")
    edit = edit_of(lm)
    settings = TraceSettings(samples=2)
    traced = causal_trace(lm, fact, settings, progress=False)
    effect = torch.rand(2, len(PARTS), 3, dtype=torch.float64)
    average = AverageTrace((fact.text,) * 2, torch.ones(2), torch.zeros(2), {"mlp": effect}, 1)
    words = ["Rome", "Spain"]
    shown = {
        lm: "<LanguageModel: tiny-gpt2, family gpt2, blocks 3, parameters ",
        edit.deltas[0]: "<Delta: weight transformer.h.0.mlp.c_proj.weight, ΔW [32, 64], rank 1, ‖ΔW‖ ",
        traced: f"<Trace of a prompt: prompt {''.join(traced.starred)}, answer ",
        average: "<Average trace: facts 2 traced, 0 skipped, total effect ",
        propose_layers(average): "<Proposal: block ",
        lenses.logit_lens(lm, fact.text, words): f"<Logit lens: prompt {fact.text}, Rome P ",
        lenses.attention_to_subject(lm, fact): f"<Attention to the subject: prompt {fact.text}, share ",
        lenses.stream_change(lm, edit, fact.text): f"<Change of the residual stream: text {fact.text}, largest ",
        lenses.side_effects(lm, edit, words): "<Predicted side effects: ",
    }
    for value, begins in shown.items():
        text = repr(value)
        assert text.startswith(begins) and "tensor(" not in text and len(text) < 500, text
        assert value._repr_html_().startswith("<table>")
    block = traced.probability["mlp"].amax(0).argmax()
    assert f"block {block} put back" in repr(traced).split("mlp ")[1]
    snapshot = Snapshot.take(lm.model, [edit.parameters[0]])
    assert repr(snapshot).startswith("<Snapshot: clones 1, 8,192 bytes: transformer.h.0.mlp.c_proj.weight, digests of ")


def test_rooms_are_there_without_an_import_of_their_own() -> None:
    assert callable(editkit.plots.trace_map) and editkit.lenses is lenses
    assert {"plots", "testing", "load", "Edit"} <= {*dir(editkit)}
