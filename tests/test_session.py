"""A session: steps can be undone in any order, are saved and gone on with, and nothing is left behind; all on bits."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from editkit import Fact, RRomeSettings, Session
from editkit.edits.edit import Edit
from editkit.errors import EditFileError, EditkitError
from editkit.methods.alphaedit import AlphaEditSettings
from editkit.methods.ft import FtSettings
from editkit.models.load import LanguageModel
from editkit.models.snapshot import bits, same_bits
from editkit.settings import ContextSettings, MomentSettings
from editkit.testing.tiny import tiny_lm
from editkit.testing.untouched import everything

FACTS = [
    Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris"),
    Fact("The capital of {} is", "France", "Madrid", "Paris"),
    Fact("{} was born in the city of", "Ada Lovelace", "Oslo", "London"),
]
FEW = ContextSettings(lengths=(4,), counts=(2,))
MOMENTS = MomentSettings(tokens=4000)
SETTINGS = {
    "r_rome": RRomeSettings(layer=1, steps=4, lr=0.1, contexts=FEW),
    "alphaedit": AlphaEditSettings(layers=[0, 1], steps=3, lr=0.1, fraction=0.5, l2=0.1, contexts=FEW),
    "ft": FtSettings(layer=1, steps=3, lr=1e-3),
}


def open_session(lm: LanguageModel, method: str = "r_rome", **options: Any) -> Session:
    return Session(lm, method, SETTINGS[method], moments=MOMENTS, progress=False, **options)


def weights(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in everything(lm.model).items()}


def assert_bits(lm: LanguageModel, expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(now, expected[name]) for name, now in everything(lm.model).items())


def composed(start: dict[str, Tensor], lm: LanguageModel, steps: Sequence[Edit]) -> Iterator[tuple[Tensor, Tensor]]:
    """W0 + Σ ΔW in float64, in order, cast once: written out here."""
    found: dict[str, Tensor] = {}
    for step in steps:
        for delta in step.deltas:
            left = delta.left.double()
            change = left if delta.right is None else left @ delta.right.double()
            stored = change.T if delta.orientation == "in_out" else change
            found[delta.parameter] = found.get(delta.parameter, torch.zeros(())) + stored
    for name, change in found.items():
        weight = lm.model.get_parameter(name)
        expected = (start[name].double() + change).to(weight.dtype)
        yield weight, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("family", "method"), [("gpt2", "r_rome"), ("llama", "alphaedit"), ("llama", "ft")])
def test_every_state_is_the_composition_of_its_steps(family: str, method: str, dtype: torch.dtype) -> None:
    lm = tiny_lm(family, dtype=dtype)
    before = weights(lm)
    start = {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}
    with open_session(lm, method) as session:
        for fact in FACTS:
            session.edit(fact)
        assert all(same_bits(weight, expected) for weight, expected in composed(start, lm, session.steps))
        assert not same_bits(
            lm.model.get_parameter(session.steps[0].parameters[0]), start[session.steps[0].parameters[0]]
        )
        first, middle, last = session.steps
        undone = session.undo(1)
        assert undone.edit is middle and undone.later == (1,) and session.steps == [first, last]
        assert all(same_bits(weight, expected) for weight, expected in composed(start, lm, [first, last]))
        session.undo(0)
        session.undo(0)
        assert_bits(lm, before)
        session.edit(FACTS[0])
    assert_bits(lm, before)


def test_steps_name_the_steps_before_them() -> None:
    lm = tiny_lm("gpt2")
    with open_session(lm) as session:
        steps = [session.edit(fact) for fact in FACTS]
        assert [step.parents for step in steps] == [(), (steps[0].digest,), (steps[0].digest, steps[1].digest)]


def test_an_undo_says_how_far_it_is_from_never_having_been() -> None:
    lm = tiny_lm("gpt2")
    with open_session(lm) as session:
        for fact in FACTS:
            session.edit(fact)
        without = session.undo(0, rerun=True)
        kept = sum((d.change() for step in session.steps for d in step.deltas), torch.zeros(()))
        now = bits(lm.model.get_parameter(session.steps[0].parameters[0])).clone()
    with open_session(lm) as other:
        for fact in FACTS[1:]:
            other.edit(fact)
        never = sum((d.change() for step in other.steps for d in step.deltas), torch.zeros(()))
        assert not torch.equal(now, bits(lm.model.get_parameter(other.steps[0].parameters[0])))
    assert without.distance == pytest.approx(((kept - never).norm() / never.norm()).item(), rel=1e-4)
    assert without.later == (0, 1) and without.distance is not None and without.distance > 0


@pytest.mark.parametrize("method", ["r_rome", "alphaedit"])
def test_a_saved_session_goes_on_as_if_it_had_not_ended(method: str, tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    before = weights(lm)
    with open_session(lm, method) as session:
        session.edit(FACTS[0])
        session.save(tmp_path)
        here = weights(lm)
        third = session.edit(FACTS[1])
    with Session.load(tmp_path, lm, moments=MOMENTS, progress=False) as again:
        assert_bits(lm, here)
        assert again.edit(FACTS[1]).to_bytes() == third.to_bytes()
    assert_bits(lm, before)
    with pytest.raises(EditkitError, match="began on 'tiny-llama'.*Load the base"):
        Session.load(tmp_path, tiny_lm("llama", seed=1))
    (next(tmp_path.glob("*.safetensors"))).unlink()
    with pytest.raises(EditFileError):
        Session.load(tmp_path, lm)
    assert_bits(lm, before)
    with pytest.raises(EditFileError, match="cannot be read as a session"):
        Session.load(tmp_path / "nowhere", lm)


def test_a_session_knows_its_own_steps(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    before = weights(lm)
    with open_session(lm) as session:
        first, second = session.edit(FACTS[0]), session.edit(FACTS[1])
        session.save(tmp_path)
    one, two = (tmp_path / f"{step.digest[:16]}.safetensors" for step in (first, second))
    one.write_bytes(second.to_bytes())  # a sound edit, but another
    with pytest.raises(
        EditFileError, match=f"'{one}' is not the step that .* names: it holds edit {second.digest[:12]}"
    ):
        Session.load(tmp_path, lm, moments=MOMENTS)
    with open_session(lm) as again:
        again.steps = [first, second]
        again.save(tmp_path)  # a file with other bytes is written again
        assert (one.read_bytes(), two.read_bytes()) == (first.to_bytes(), second.to_bytes())
    path = tmp_path / "session.json"
    sound = path.read_text(encoding="utf-8")
    for damaged in (
        sound.replace('"seed": 0', '"seed": 1'),
        sound.replace('"seed": 0', '"seed": 0, "seed": 0'),
        sound.replace('"seed"', '"sead"'),
        sound[:-20],
        "[" * 100_000,
        "[]",
    ):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(EditFileError, match=f"'{path}' cannot be read as a session: it is damaged"):
            Session.load(tmp_path, lm, moments=MOMENTS)
    header = json.loads(sound)
    del header["sha256"]
    path.write_text(json.dumps(header), encoding="utf-8")
    with (
        pytest.warns(UserWarning, match="session.json' was written without a digest.*write it anew"),
        Session.load(tmp_path, lm, moments=MOMENTS, progress=False) as older,
    ):
        assert [step.digest for step in older.steps] == [first.digest, second.digest]
    assert_bits(lm, before)


def test_alphaedit_holds_the_keys_of_earlier_steps_and_sessions_do_not_see_each_other() -> None:
    one, two = tiny_lm("gpt2"), tiny_lm("gpt2")
    with open_session(one, "alphaedit") as first, open_session(two, "alphaedit") as second:
        first.edit(FACTS[0])
        alone = second.edit(FACTS[1])
        after = first.edit(FACTS[1])
    assert alone.parents == () and after.parents == (first_digest(after),)
    with open_session(two, "alphaedit") as third:
        assert third.edit(FACTS[1]).to_bytes() == alone.to_bytes()
    assert alone.to_bytes() != after.to_bytes()


def first_digest(edit: Edit) -> str:
    return edit.parents[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_fails_leaves_the_session_as_it_was(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("gpt2")
    before = weights(lm)
    with open_session(lm) as session:
        session.edit(FACTS[0])
        here, steps = weights(lm), session.steps

        def fail(*arguments: object, **options: object) -> None:
            raise error

        for place in ("editkit.methods.shared.value.kl_div", "editkit.composition.Composition.sums"):
            with monkeypatch.context() as patch:
                patch.setattr(place, fail)
                with pytest.raises(error):
                    session.edit(FACTS[1])
            assert_bits(lm, here)
            assert session.steps == steps
        with pytest.raises(EditkitError, match="Step 1 was to be undone; the session has 1"):
            session.undo(1)
        session.edit(FACTS[1])
    assert_bits(lm, before)


@pytest.mark.parametrize("transform", ["prune", "rect", "sphere"])
def test_a_transform_is_of_the_total_against_the_base(transform: str) -> None:
    lm = tiny_lm("gpt2")
    site = lm.architecture.down(1)
    start = lm.model.get_parameter(f"{site}.weight").detach().clone()
    with open_session(lm, transform=transform) as session:
        for fact in FACTS[:2]:
            session.edit(fact)
        change = sum((d.change() for step in session.steps for d in step.deltas), torch.zeros(()))
        w = start.T.double()
        if transform == "prune":
            u, s, vt = torch.linalg.svd(change)
            largest = torch.linalg.svdvals(w)[0]
            s = torch.where(s > largest, s.log() - largest.log() + largest, s)
            expected = (u[:, : len(s)] * s) @ vt[: len(s)]
        elif transform == "sphere":
            unit = w / w.square().sum(1, keepdim=True).sqrt()
            values, vectors = torch.linalg.eigh(unit.T @ unit)
            shares = values.flip(0).cumsum(0) / values.sum()
            top = vectors.flip(1)[:, : int((shares < 0.5).sum()) + 1]
            assert 1 < top.shape[1] < len(w)
            expected = change @ (torch.eye(len(values)).double() - 0.5 * top @ top.T)
        else:
            ratio = (change / w).abs()
            kept = ratio.flatten().sort(descending=True).values[round(0.4 * ratio.numel()) - 1]
            expected = torch.where(ratio >= kept, change, 0.0)
        now = lm.model.get_parameter(f"{site}.weight").detach()
        torch.testing.assert_close(now, (start.double() + expected.T).float(), rtol=1e-5, atol=1e-6)
    assert same_bits(lm.model.get_parameter(f"{site}.weight"), start)
