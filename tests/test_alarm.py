"""The alarm: its figures against slow ones, its line, and what a session does at a limit, on bits."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

from editkit import Alarm, CollapseError, Fact, Session
from editkit.errors import ConfigError
from editkit.methods.ft import FtSettings
from editkit.methods.ft_bf import FtBfSettings
from editkit.metrics.running_text import text_blocks
from editkit.models.load import LanguageModel
from editkit.settings import AlarmSettings
from editkit.testing.tiny import tiny_lm
from tests.test_folded import STREAM
from tests.test_session import assert_bits, weights

QUICK = FtSettings(layer=1, steps=2, lr=1e-3)
WILD = replace(QUICK, lr=3.0)
QUIET = AlarmSettings(every=1, tokens=256, growth=None, per_fact=None, perplexity=None, untouched=None)

pytestmark = pytest.mark.filterwarnings("ignore:the update of")


def perplexity(lm: LanguageModel, tokens: int) -> float:
    """exp of the mean −log p of the tokens that come, in float64."""
    found = []
    with torch.no_grad():
        for ids in text_blocks(lm, tokens=tokens):
            log_p = log_softmax(lm.model(input_ids=ids[None]).logits[0].double(), -1)
            found += [-log_p[i, ids[i + 1]].item() for i in range(len(ids) - 1)]
    return math.exp(sum(found) / len(found))


def test_the_figures(atlas_lm: LanguageModel) -> None:
    lm = atlas_lm
    before = {name: parameter.detach().double().clone() for name, parameter in lm.model.named_parameters()}
    known = [Fact("The capital of {} is", "France", "Rome", "Paris"), Fact("{} is in", "Narnia", "Rome", "a wardrobe")]
    alarm = Alarm(lm, QUIET, untouched=known)
    started = perplexity(lm, QUIET.tokens)
    settings = FtSettings(layer=4, steps=10, lr=3e-3)
    with Session(lm, "ft", settings, progress=False, alarm=alarm, keep=1) as session:
        for fact in STREAM[:3]:
            session.edit([fact, replace(fact, subject="Notre-Dame")])
        seen = session.look()
        assert seen is not None and session.look() is seen and (seen.step, seen.facts) == (3, 6)
        changed = {n: p.detach().double() - before[n] for n, p in lm.model.named_parameters()}
        changed = {name: change for name, change in changed.items() if change.any()}
        (size,), began = [change.norm() for change in changed.values()], before[next(iter(changed))].norm()
        assert seen.growth == pytest.approx(float(size / began), rel=1e-4) == pytest.approx(session.relative_norm())
        assert seen.per_fact == pytest.approx(float(size) / 6**0.5, rel=1e-4)
        assert (
            seen.perplexity == pytest.approx(perplexity(lm, QUIET.tokens) / started, rel=1e-4) and seen.perplexity > 1
        )
        ids = lm.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
        said = lm.model(input_ids=ids).logits[0, -1].argmax()
        holds = str(lm.tokenizer.decode([int(said)])).strip() == "Paris"
        assert seen.untouched == float(holds)  # of one fact: the model never knew the other
        assert seen.passed == () and seen.line == "" and json.dumps(seen.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        ("growth", 1e-9, r"‖ΔW‖/‖W‖ is \S+, over alarm.growth=1e-09"),
        ("per_fact", 1e-9, r"‖ΔW‖/√n is \S+, over alarm.per_fact=1e-09"),
        ("perplexity", 10.0, r"perplexity is 12.3 × the unedited model's, over alarm.perplexity=10"),
    ],
)
def test_one_line_names_the_step_and_the_limit(
    limit: str, value: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("gpt2")
    measured = iter([2.0, *[24.6] * 9])
    monkeypatch.setattr("editkit.alarm.perplexity", lambda *_: next(measured))
    limits: Any = {limit: value}
    alarm = Alarm(lm, replace(QUIET, every=2, **limits))
    with Session(lm, "ft", WILD, progress=False, alarm=alarm) as session:
        session.edit(STREAM[0])
        with pytest.warns(UserWarning, match=rf"^alarm after step 2 \(2 facts edited\): {said}$") as caught:
            session.edit(STREAM[1])
        assert "\n" not in str(caught[-1].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for fact in STREAM[2:4]:  # the same limit is not said again
                session.edit(fact)
        assert session.count == 4 and session.good == 0


def test_a_model_that_says_nothing_sensible_has_collapsed(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2")
    alarm = Alarm(lm, replace(QUIET, perplexity=1e9))
    monkeypatch.setattr("editkit.alarm.perplexity", lambda *_: math.nan)
    with pytest.warns(UserWarning, match="perplexity is nan"):
        seen = alarm.look(1, 1, {})
    assert seen.passed == ("perplexity",) and seen.to_json()["perplexity"] is None


@pytest.mark.parametrize("keep", [None, 1, 3])
def test_a_rollback_is_the_last_good_step_bit_for_bit(keep: int | None, tmp_path: Path) -> None:
    """The good step may be folded already when the limit is passed."""
    lm = tiny_lm("gpt2")
    before = weights(lm)
    alarm = Alarm(lm, replace(QUIET, every=2, per_fact=1.0), on_collapse="rollback")
    tame = FtBfSettings(layer=1, steps=2, lr=1e-3, replay=2)
    with Session(lm, "ft_bf", tame, progress=False, alarm=alarm, keep=keep) as session:
        for fact in STREAM[:2]:
            session.edit(fact)
        good, digest = weights(lm), lm.digest
        session.save(tmp_path / "good")
        session.edit(STREAM[2])
        kept, session.settings = session.settings, replace(tame, lr=30.0, stop_loss=1e-9)
        with (
            pytest.raises(
                CollapseError, match=r"It is back at step 2, the last good one; dropped: 'The Louvre'"
            ) as caught,
            pytest.warns(UserWarning, match=r"alarm after step 4 .*‖ΔW‖/√n is \S+, over alarm.per_fact=1"),
        ):
            session.edit(STREAM[3])
        assert caught.value.dropped == (STREAM[2], STREAM[3]) and caught.value.kept == 2
        assert lm.digest == digest and session.count == session.good == 2
        assert_bits(lm, good)
        session.settings = kept
        session.save(tmp_path / "back")
        after = session.edit(STREAM[4])
    assert_bits(lm, before)
    folders = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("good", "back"))
    ours, theirs = ({n: b for n, b in found.items() if n != "session.json"} for found in folders)
    assert ours == theirs
    with Session.load(tmp_path / "good", lm, progress=False) as again:
        assert again.edit(STREAM[4]).to_bytes() == after.to_bytes()


def test_a_stop_keeps_the_step() -> None:
    lm = tiny_lm("gpt2")
    alarm = Alarm(lm, replace(QUIET, per_fact=1e-9), on_collapse="stop", say=lambda line: None)
    with Session(lm, "ft", QUICK, progress=False, alarm=alarm) as session:
        with pytest.raises(CollapseError, match="alarm after step 1 .* The session stops there.$"):
            session.edit(STREAM[0])
        assert session.count == 1 and session.relative_norm() > 0


def test_what_an_alarm_cannot_be() -> None:
    lm = tiny_lm("gpt2")
    with pytest.raises(ConfigError, match="on_collapse must be one of continue, stop, rollback; found 'panic'"):
        Alarm(lm, on_collapse="panic")
    for wrong in ({"every": 0}, {"growth": 0.0}, {"perplexity": 1.0}, {"untouched": 2.0}):
        found: dict[str, Any] = wrong
        with pytest.raises(ConfigError, match=f"alarm.{next(iter(wrong))} must be"):
            AlarmSettings(**found)
