"""The workbench without a browser: a desk's answers, its stack, what it leaves with, and what it refuses."""

import json
import shlex
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.corpora import Atlas
from editkit.edits import Edit, stack
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.lenses import side_effects
from editkit.methods.ft_l import FtLSettings, ft_l
from editkit.models.generate import generate
from editkit.models.load import LanguageModel, load
from editkit.models.snapshot import Snapshot
from editkit.nethook import get_parameter
from editkit.progress import Bar, Step, Stopped, listening
from editkit.report.html import render
from editkit.settings import TraceSettings
from editkit.testing.tiny import tiny_lm
from editkit.tracing import proposed_block, trace
from editkit.workbench import __main__ as command
from editkit.workbench import leaving, recipe
from editkit.workbench.bench import Bench
from editkit.workbench.desk import Desk
from editkit.workbench.guard import Guard
from editkit.workbench.handlers import answer
from editkit.workbench.page import page_of

TOWER = {"prompt": "The Eiffel Tower is located in the city of", "subject": "The Eiffel Tower"}
TOWER |= {"new": "Rome", "true": "Paris"}
FRANCE = {"prompt": "The capital of France is", "subject": "France", "new": "Madrid", "true": "Paris"}
QUICK = {"method": "ft_l", "settings": {"steps": 2}, "seed": 0}  # no second moments, no contexts


def nothing_or(edit: Edit | None) -> Edit:
    assert edit is not None
    return edit


def go(desk: Desk, request: str, **fields: Any) -> dict[str, Any]:
    """One request; the model is the one that was loaded before and after it."""
    found = answer(desk, {"do": request, **fields}, lambda part: None)
    desk.bench.verify()
    return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Of a tiny model, from the disk, so that the Python of a state can load it."""
    folder, tiny = tmp_path_factory.mktemp("tiny"), tiny_lm("gpt2")
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    lm = load(folder)
    with Snapshot.take(lm.model, [], everything=True):
        yield Bench(lm, tmp_path_factory.mktemp("workbench"))


@pytest.fixture(scope="module")
def atlas_bench(atlas_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Snapshot.take(atlas_lm.model, [], everything=True):
        yield Bench(atlas_lm, tmp_path_factory.mktemp("atlas"))


@pytest.fixture(scope="module")
def edited(bench: Bench) -> Desk:
    """A desk with two edits, the second computed on top of the first. Tests that change its stack undo that."""
    desk = Desk(bench)
    for fact in (TOWER, FRANCE):
        go(desk, "compute", **QUICK, **fact)
        go(desk, "apply")
    return desk


def test_what_the_model_says_in_clear_words(atlas_bench: Bench) -> None:
    desk = Desk(atlas_bench)
    known = go(desk, "ask", **TOWER)
    assert known["verdict"] == "yes" and "“Paris”" in known["sentence"] and known["next"][0][0] == " Paris"
    wrong = go(desk, "ask", **TOWER | {"true": "Athens"})
    assert wrong["verdict"] == "no" and "does not know" in wrong["sentence"] and "Paris" in wrong["sentence"]
    assert go(desk, "ask", **TOWER | {"true": "", "new": ""})["verdict"] == "unsure"
    found = go(desk, "search", text="eiffel city")["found"]
    assert found and all("Eiffel" in row["subject"] and row["others"] for row in found)
    assert go(desk, "search", text="no such words")["found"] == []


def test_a_trace_in_parts_is_the_trace(bench: Bench) -> None:
    desk, parts = Desk(bench), list[dict[str, Any]]()
    answer(desk, {"do": "where", "seed": 3, "samples": 4, **TOWER}, parts.append)
    assert [*parts[0]] == ["lens"] and [len(part["trace"]["values"]) for part in parts[1:]] == [1, 2, 3]
    fact = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
    whole = trace(bench.lm, fact, TraceSettings(kinds=("mlp",), samples=4), seed=3, progress=False)
    last = parts[-1]["trace"]
    assert torch.equal(torch.tensor(last["values"]["mlp"], dtype=torch.float64), whole.probability["mlp"])
    effect = whole.probability["mlp"][whole.subject[1]].tolist()
    assert last["proposed"] == proposed_block(whole) == max(range(len(effect) - 1), key=effect.__getitem__)
    assert "subject_last" in last["lookups"][whole.subject[1]] and "last" in last["lookups"][len(whole.tokens) - 1]


def test_a_draft_is_predicted_and_not_applied(bench: Bench) -> None:
    desk = Desk(bench)
    found = go(desk, "compute", **QUICK, **TOWER, watch="Big Ben is located in the city of → London\nThe Louvre is in")
    assert not desk.stack and desk.draft is not None
    fact = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
    alone = ft_l(bench.lm, fact, FtLSettings(steps=2), progress=False)
    assert alone.digest == found["draft"]["digest"]
    rows = {row["prompt"]: row for row in found["predicted"]}
    watched = rows["Big Ben is located in the city of"]
    wanted = side_effects(bench.lm, alone, [watched["prompt"]], ["London"])
    assert wanted.drop is not None
    assert watched["stays"] and watched["change"] == pytest.approx(-wanted.drop.item(), abs=1e-6)
    assert "The Louvre is in" in rows
    applied = go(desk, "apply", strength=2.0)["compared"]
    assert [row["prompt"] for row in applied["rows"]] == [*rows]
    rewrite = applied["rows"][0]
    assert rewrite["after"]["p_new"] > rewrite["before"]["p_new"] and rewrite["happened"] > 0
    again = go(desk, "compute", **QUICK, **TOWER)
    assert again["draft"]["digest"] != alone.digest  # it is computed on the model as it is now


def test_the_stack_is_the_sum_of_what_is_in_force(edited: Desk) -> None:
    lm = edited.lm
    first, second = (place.step for place in edited.stack)
    assert second.made.on_top == ((first.digest, 1.0),) and second.edit.base.digest != edited.bench.base.digest
    weight = get_parameter(lm.model, first.edit.parameters[0])
    start = weight.detach().clone()
    go(edited, "strength", number=0, value=0.5)
    total = edited.total()
    assert total is not None
    with total.applied(lm):
        change = (weight.detach() - start).double()
    wanted = 0.5 * first.edit.deltas[0].matrix().double() + second.edit.deltas[0].matrix().double()
    assert torch.allclose(change, wanted, atol=1e-6) and change.abs().max() > 1e-4 and torch.equal(weight, start)
    go(edited, "strength", number=0, value=0.7)
    go(edited, "undo")  # both changes of the slider
    assert [place.strength for place in edited.stack] == [1.0, 1.0]
    # Off, moved, taken off: each undone.
    before = edited.total()
    off = go(edited, "switch", number=1)
    assert off["stack"]["total"] == first.digest  # one edit of the base, at strength 1, is itself
    go(edited, "undo")
    go(edited, "move", number=0, to=1)
    assert [place.step for place in edited.stack] == [second, first]
    go(edited, "undo")
    assert go(edited, "remove", number=0)["stack"]["steps"][0]["digest"] == second.digest
    go(edited, "undo")
    go(edited, "redo")
    assert len(edited.stack) == 1
    after = go(edited, "undo")
    assert before is not None and after["stack"]["total"] == before.digest


def test_before_is_without_the_step_that_is_looked_at(edited: Desk) -> None:
    found = go(edited, "select", number=0)["compared"]
    assert found["fact"]["subject"] == "The Eiffel Tower" and found["step"] == 0
    health = go(edited, "health")
    assert health["seen"]["perplexity"] > 0 and set(health["seen"]["passed"]) <= set(health["limits"])
    said = go(edited, "say", prompt=TOWER["prompt"], tokens=3)
    with nothing_or(edited.total()).applied(edited.lm):
        assert generate(edited.lm, [TOWER["prompt"]], 3) == [said["after"]]
    assert generate(edited.lm, [TOWER["prompt"]], 3) == [said["before"]]


def test_the_texts_make_the_very_same_edit(edited: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python, as it stands, in another folder; the state, on another desk; the file; each has the digest."""
    go(edited, "strength", number=1, value=0.75)
    texts, total = go(edited, "texts"), edited.total()
    assert total is not None
    monkeypatch.chdir(tmp_path)
    exec(texts["python"], {})
    assert Edit.load(tmp_path / "edit.safetensors").digest == total.digest
    assert texts["command"].endswith(f"--rebuild {texts['state']} --into edit.safetensors")
    other = Desk(Bench(edited.lm, tmp_path))  # with no files: computed again
    assert leaving.rebuild(other, texts["state"], lambda part: None) == []
    assert other.total() is not None and other.total().digest == total.digest  # type: ignore[union-attr]
    monkeypatch.setattr(Bench, "compute", None)  # from files alone
    third = Desk(edited.bench)
    assert go(third, "restore", state=texts["state"])["stack"]["total"] == total.digest
    written = go(edited, "file", what="edit")
    path, name = edited.bench.offered(written["word"]) or (Path(), "")
    assert name == "edit.safetensors" and Edit.load(path).digest == total.digest
    weights = third.view(whole=True)["edited"]
    with Edit.load(path).applied(edited.lm):
        assert edited.lm.digest == weights
    edited.leave()
    assert edited.bench.offered(written["word"]) is None and not path.exists()
    go(edited, "undo")


def test_the_command_makes_the_very_same_edit(
    edited: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, total = go(edited, "texts"), nothing_or(edited.total())
    monkeypatch.chdir(tmp_path)
    program = shlex.split(texts["command"])
    assert program[:3] == ["python", "-m", "editkit.workbench"]
    assert command.main(program[3:]) == 0
    assert Edit.load("edit.safetensors").digest == total.digest and total.digest in capsys.readouterr().out
    assert command.main([*program[3:5], "--rebuild", "x"]) == 1
    assert "The link is damaged" in capsys.readouterr().err


def test_it_listens_to_this_machine_alone_unless_it_is_asked() -> None:
    options = command._parser().parse_args([])
    assert Guard.of(options.host) == Guard("127.0.0.1", "")
    with command._listen(options.host, 0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
        socket.create_connection(listening.getsockname(), timeout=5).close()  # nothing serves yet, and none is refused


def test_the_page_is_escaped_and_whole(edited: Desk) -> None:
    evil = Desk(edited.bench)
    go(evil, "compute", **QUICK, prompt="<script>alert(1)</script> is in the city of",
       subject="<script>alert(1)</script>", new="Rome", true="")  # fmt: skip
    go(evil, "apply")
    html = render(page_of(evil, go(evil, "texts")))
    assert "<script" not in html and "&lt;script&gt;" in html and evil.stack[0].step.digest in html


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"do": "nonsense"}, "does not know the request"),
        ({"do": "ask", "prompt": 3, "subject": "x"}, "'prompt' is no text"),
        ({"do": "ask", "prompt": "x" * 3000, "subject": "x"}, "3,000 characters"),
        ({"do": "ask", "prompt": "Paris is", "subject": "Rome"}, "occurs 0 times"),
        ({"do": "ask", "prompt": "", "subject": ""}, "Write a prompt"),
        ({"do": "compute", **QUICK, **TOWER, "new": ""}, "target_new is empty"),
        ({"do": "compute", **TOWER, "method": "rmoe", "seed": 0}, "did you mean 'rome'"),
        ({"do": "compute", **QUICK, **TOWER, "settings": {"stesp": 3}}, "did you mean 'steps'"),
        ({"do": "compute", **QUICK, **TOWER, "settings": {"steps": "many"}}, "a whole number"),
        ({"do": "compute", **QUICK, **TOWER, "settings": {"layer": 99}}, "3 blocks"),
        ({"do": "compute", **QUICK, **TOWER, "seed": 1.5}, "must be a whole number"),
        ({"do": "apply"}, "no edit to apply"),
        ({"do": "switch", "number": 0}, "The stack is empty"),
        ({"do": "undo"}, "nothing to undo"),
        ({"do": "audit"}, "Nothing is in force"),
        ({"do": "file", "what": "../../etc/passwd"}, "There is no file"),
        ({"do": "restore", "state": "%%%"}, "The link is damaged"),
        ({"do": "restore", "state": recipe.packed({"version": 1})}, "The link is damaged"),
        ({"do": "restore", "state": recipe.packed({"version": 9})}, "version 9"),
        ({"do": "say", "prompt": "", "tokens": 3}, "Write a prompt"),
        ({"do": "say", "prompt": "x", "tokens": 10**9}, "from 1 to 200"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_bad_message_is_one_clear_error(bench: Bench, message: dict[str, Any], says: str) -> None:
    with pytest.raises(EditkitError, match=says):
        answer(Desk(bench), message, lambda part: None)
    bench.verify()


def test_a_state_of_another_model_is_refused(edited: Desk) -> None:
    found = recipe.unpacked(go(edited, "texts")["state"])
    for name, value, says in (("base", "0" * 64, "Start it with that model"), ("steps", [], "must be from 0")):
        with pytest.raises(EditkitError, match=says):
            go(Desk(edited.bench), "restore", state=recipe.packed(found | {name: value}))
    twice = found | {"stack": [found["stack"][0], found["stack"][0]]}
    with pytest.raises(EditkitError, match="names an edit twice"):
        go(Desk(edited.bench), "restore", state=recipe.packed(twice))


def test_a_file_of_another_place_is_not_offered(bench: Bench, edited: Desk, tmp_path: Path) -> None:
    step = edited.stack[0].step
    assert bench.kept(step.made, step.digest) is not None
    lying = replace(step.made, fact=replace(step.made.fact, target_new="Oslo"))
    assert bench.kept(lying, step.digest) is None  # a link that names another edit's digest
    assert bench.kept(recipe.Made(Fact("{} is", "x", "y"), "ft_l", {}), "../../" + "a" * 58) is None
    with pytest.raises(EditkitError, match="not in the workbench's folder"):
        bench.offer(tmp_path / "secret", "secret")


def test_an_edit_without_weights_has_no_strength(bench: Bench) -> None:
    desk = Desk(bench)
    assert "not predicted" in go(desk, "compute", **TOWER, method="ike", settings={}, seed=0)["why"]
    with pytest.raises(EditkitError, match="no strength but 1"):
        go(desk, "apply", strength=0.5)
    found = go(desk, "apply")
    assert found["stack"]["steps"][0]["fixed"] and found["compared"]["rows"][0]["after"]["p_new"] > 0
    with pytest.raises(EditkitError, match="for changes of weights"):
        stack(desk.lm, [desk.stack[0].step.edit], [2.0])


def test_an_audit_asks_every_fact_with_the_stack(atlas_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = atlas_bench.atlas
    own = whole.by_subject["The Eiffel Tower"]
    facts = list(dict.fromkeys([*own, *(each for fact in own for each in whole.by_relation[fact.relation][::18])]))
    monkeypatch.setattr(atlas_bench, "atlas", Atlas(facts, whole.relations))
    desk = Desk(atlas_bench)
    go(desk, "compute", method="ft", settings={"steps": 10}, seed=0, **TOWER)
    assert len(go(desk, "apply")["compared"]["rows"]) > 5  # with probes of the atlas
    found = go(desk, "audit")
    rows = {(row["relation"], row["subject"]): row for row in found["rows"]}
    edited = rows["landmark_city", "The Eiffel Tower"]
    assert len(rows) == len(facts) and edited["edited"] and edited["after"] == "Rome" and edited["before"] == "Paris"
    assert edited["cosine"] == pytest.approx(1) and edited["pull"] == pytest.approx(1)
    assert found["changed"] == sum(row["changed"] and not row["edited"] for row in rows.values())
    assert "Every fact of the atlas asked again" in render(page_of(desk, go(desk, "texts")))


def test_stacks_that_cannot_be(bench: Bench) -> None:
    for edits, factors in (((), None), ((), [1.0])):
        with pytest.raises(EditkitError, match="one finite factor for each"):
            stack(bench.lm, edits, factors)


# --- progress, which stops what is long ---------------------------------------------------------------------------


def test_a_listener_hears_of_every_step_and_stops_the_work(bench: Bench) -> None:
    heard: list[Step] = []
    fact = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
    with listening(heard.append):
        trace(bench.lm, fact, TraceSettings(kinds=("mlp",)), progress=False)
    assert [step.done for step in heard] == list(range(1, len(heard) + 1)) and heard[-1].total == len(heard) > 3
    assert heard[0].what == "trace of The Eiffel Tower"

    def stop(step: Step) -> None:
        raise Stopped

    with listening(stop), pytest.raises(Stopped):
        go(Desk(bench), "compute", **QUICK, **TOWER)
    bench.verify()
    trace(bench.lm, fact, TraceSettings(kinds=("mlp",)), progress=False)  # nobody listens any more
    assert [*Bar(range(3), disable=True)] == [0, 1, 2]


def test_what_is_sent_is_json(edited: Desk) -> None:
    json.dumps(go(edited, "look"))
    json.dumps(go(edited, "hello"))
    for name in ("rome", "memit", "kn", "grace", "lora"):
        json.dumps(go(edited, "method", name=name))
