"""Sessions that fold older steps: the same weights, state and later steps, bit for bit, as those that keep them all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit import Edit, Fact, Session, apply_files
from editkit.errors import ConfigError, EditFileError, EditkitError
from editkit.folded import Folded
from editkit.methods import all_methods, register, unregister
from editkit.methods.ft import FtSettings
from editkit.methods.ft_bf import FtBfSettings
from editkit.methods.shared.carried import Carried
from editkit.methods.stableedit import StableEditSettings
from editkit.methods.ultraedit import UltraEditSettings
from editkit.models.load import LanguageModel
from editkit.settings import MomentSettings
from editkit.testing.tiny import tiny_lm
from tests.test_carried import KEEPING, settings_for
from tests.test_session import assert_bits, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:the update of"),
    pytest.mark.filterwarnings("ignore:The second moment at"),
]
MOMENTS = MomentSettings(tokens=2000)
PLACES = ["Rome", "Oslo", "Berlin", "Madrid", "Paris", "Vienna"]
SUBJECTS = ["The Eiffel Tower", "Big Ben", "The Louvre"]
STREAM = [Fact("{} is located in the city of", SUBJECTS[n % 3], place) for n, place in enumerate(PLACES)]
OTHERS: dict[str, Any] = {
    "ft": FtSettings(layer=1, steps=2, lr=1e-3),
    "ft_bf": FtBfSettings(layer=1, steps=2, lr=1e-3, replay=2),
    "ultraedit": UltraEditSettings(layers=(0, 1), lr=1e-3, warm_up=50),
    "stableedit": StableEditSettings(layers=(1,), lr=1e-3, warm_up=50),
}
METHODS = [*KEEPING, *OTHERS]


def opened(lm: LanguageModel, method: str, keep: int | None = None, **more: Any) -> Session:
    settings = OTHERS[method] if method in OTHERS else settings_for(lm, method)
    return Session(lm, method, replace(settings, **more), moments=MOMENTS, progress=False, keep=keep)


def without_parents(step: Edit) -> bytes:
    return replace(step, parents=()).to_bytes()


@pytest.mark.cells
@pytest.mark.parametrize("keep", [1, 2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_the_weights_and_steps_are_those_without_folding(method: str, keep: int) -> None:
    lm = tiny_lm("gpt2")
    with opened(lm, method) as session:
        expected = [(session.edit(fact), weights(lm)) for fact in STREAM]
    with opened(lm, method, keep) as session:
        for number, (fact, (step, then)) in enumerate(zip(STREAM, expected, strict=True)):
            assert without_parents(session.edit(fact)) == without_parents(step)
            assert_bits(lm, then)
            assert len(session.steps) == min(keep, number + 1) and session.count == number + 1
        assert session.relative_norm() > 0 and session.folded.facts == len(STREAM) - keep


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("method", ["memit_seq", "alphaedit", "betaedit", "ultraedit"])
def test_folding_on_other_families(family: str, method: str, tmp_path: Path) -> None:
    lm = tiny_lm(family)
    with opened(lm, method) as session:
        expected = [(session.edit(fact), weights(lm)) for fact in STREAM]
    with opened(lm, method, 2) as session:
        for fact in STREAM[:5]:
            session.edit(fact)
        session.save(tmp_path)
    with Session.load(tmp_path, lm, moments=MOMENTS, progress=False) as again:
        assert_bits(lm, expected[4][1])
        assert without_parents(again.edit(STREAM[5])) == without_parents(expected[5][0])
        assert_bits(lm, expected[5][1])


@pytest.mark.parametrize("method", METHODS)
def test_what_methods_carry_is_saved_and_gone_on_with(method: str, tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    before = weights(lm)
    with opened(lm, method, 2) as session:
        for number, fact in enumerate(STREAM):
            if number == 4:
                session.save(tmp_path / "early")
            session.edit(fact)
        session.save(tmp_path / "whole")
        here = weights(lm)
    with Session.load(tmp_path / "early", lm, moments=MOMENTS, progress=False) as again:
        for fact in STREAM[4:]:
            again.edit(fact)
        assert_bits(lm, here)
        again.save(tmp_path / "early")
    assert_bits(lm, before)
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("early", "whole"))
    assert ours == theirs and len(ours) == 4  # two steps, the folded ones, session.json


def test_an_undo_among_the_latest_steps_is_that_without_folding() -> None:
    lm = tiny_lm("gpt2")
    with opened(lm, "memit_seq") as session:
        for fact in STREAM:
            session.edit(fact)
        session.undo(4)
        expected = weights(lm)
        after = session.edit(STREAM[0])
    with opened(lm, "memit_seq", 3) as session:
        for fact in STREAM:
            session.edit(fact)
        undone = session.undo(1, rerun=True)
        assert undone.later == (1,) and undone.distance is not None and undone.distance > 0
        assert_bits(lm, expected)
        assert without_parents(session.edit(STREAM[0])) == without_parents(after)
        with pytest.raises(EditkitError, match="Step 3 was to be undone; the session has 3 and 3 that are folded"):
            session.undo(3)


def test_parents_are_few_and_files_of_edits_say_where_they_belong(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    with opened(lm, "ft", 2) as session:
        steps = [session.edit(fact) for fact in STREAM]
        chain = Folded()
        for step in steps[:3]:
            chain = chain.plus(step)
        assert steps[5].parents == (f"folded:{chain.chain}", steps[3].digest, steps[4].digest)
        total = session.total()
        here = weights(lm)
    with total.applied(lm):  # float32 of the float64 sum
        for name, now in weights(lm).items():
            torch.testing.assert_close(now, here[name], rtol=1e-5, atol=1e-7)
    steps[5].save(tmp_path / "late.safetensors")
    with (
        pytest.raises(EditkitError, match="folded its older steps.*Session.load"),
        apply_files([tmp_path / "late.safetensors"], lm),
    ):
        pass


@pytest.mark.parametrize("transform", ["prune", "rect", "sphere"])
def test_a_transform_is_of_the_same_total(transform: str) -> None:
    lm = tiny_lm("gpt2")
    with Session(lm, "ft", OTHERS["ft"], transform=transform, progress=False) as session:
        expected = [(session.edit(fact), weights(lm)) for fact in STREAM[:4]]
    with Session(lm, "ft", OTHERS["ft"], transform=transform, progress=False, keep=2) as session:
        for fact, (_, then) in zip(STREAM, expected, strict=False):
            session.edit(fact)
            assert_bits(lm, then)


def test_folded_files_go_only_when_they_are_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill at any write leaves a folder that loads: the session before, or the one after."""
    lm = tiny_lm("gpt2")
    (tmp_path / "mine.safetensors").write_bytes(b"a stranger's file")
    with opened(lm, "ft", 2) as session:
        for fact in STREAM[:4]:
            session.edit(fact)
        session.save(tmp_path)
        before = weights(lm)
        session.edit(STREAM[4])
        after = weights(lm)
        from editkit import sessionfiles

        for stop in ("write_bytes", "write_text"):
            with monkeypatch.context() as patch:
                patch.setattr(sessionfiles, stop, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    session.save(tmp_path)
            with Session.load(tmp_path, tiny_lm("gpt2"), progress=False) as again:
                assert_bits(again.lm, before)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                session.save(tmp_path)
        with Session.load(tmp_path, tiny_lm("gpt2"), progress=False) as again:
            assert_bits(again.lm, after)
        (tmp_path / ".session.json.123.part").write_bytes(b"half")
        session.save(tmp_path)
    named = json.loads((tmp_path / "session.json").read_text(encoding="utf-8"))
    files = {row["file"] for row in (*named["steps"], named["folded"])}
    assert {path.name for path in tmp_path.iterdir()} == {*files, "session.json", "mine.safetensors"}


def test_a_damaged_fold_is_named(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    with opened(lm, "ft", 1) as session:
        for fact in STREAM[:3]:
            session.edit(fact)
        session.save(tmp_path)
    (fold,) = tmp_path.glob("folded-*")
    sound = fold.read_bytes()
    fold.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(EditFileError, match=f"'{fold}' is not the step"):
        Session.load(tmp_path, lm)
    fold.unlink()
    with pytest.raises(EditFileError, match="cannot be read as the folded steps"):
        Session.load(tmp_path, lm)


def test_every_method_may_fold_and_one_that_cannot_says_so() -> None:
    for name, method in all_methods().items():
        assert "earlier" not in method.takes or "carried" in method.takes, name

    def looks(lm: LanguageModel, facts: Any, settings: Any = None, *, earlier: Any = ()) -> Edit:
        raise AssertionError

    register("looks", looks, FtSettings)
    try:
        with pytest.raises(ConfigError, match="method=looks looks at all earlier edits itself.*task.keep=null"):
            Session(tiny_lm("gpt2"), "looks", keep=3)
    finally:
        unregister("looks")
    with pytest.raises(ConfigError, match="keep=0"):
        Session(tiny_lm("gpt2"), "ft", keep=0)


def test_a_state_without_a_form_cannot_be_saved() -> None:
    carried, step = Carried(), Edit((), None)  # type: ignore[arg-type]
    assert carried.state("sum", [step], int, lambda state, _: state + 1) == 1
    with pytest.raises(EditkitError, match="carries a state 'sum' that cannot be saved.*task.keep=null"):
        carried.fold(step).tensors()
    with pytest.raises(EditkitError, match="'late' of the method was not carried"):
        carried.fold(step).state("late", [], int, lambda state, _: state)


@pytest.mark.parametrize("method", ["memit_seq", "alphaedit"])
def test_simie_is_carried_over_folded_steps(method: str, tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    with opened(lm, method, simie=7.0) as session:
        for fact in STREAM:
            session.edit(fact)
        expected = weights(lm)
    with opened(lm, method, 2, simie=7.0) as session:
        for fact in STREAM[:5]:
            session.edit(fact)
        session.save(tmp_path)
    with Session.load(tmp_path, lm, moments=MOMENTS, progress=False) as again:
        again.edit(STREAM[5])
        assert_bits(lm, expected)
