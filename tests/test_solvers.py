"""Descent: what its steps promise, for one fact and for a batch. Its oracle is in test_rome.py and test_methods.py."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from editkit.errors import ConfigError
from editkit.methods import all_methods
from editkit.methods.memit import MemitSettings, memit
from editkit.methods.pmet import PmetSettings, pmet
from editkit.methods.r_rome import RRomeSettings
from editkit.methods.rome import RomeSettings, rome, rome_each
from editkit.methods.shared import solvers, value
from editkit.methods.shared.engine import Batch, FactRows, Replayed, rows_of
from editkit.methods.shared.solvers import AIM, Descent
from editkit.models.load import LanguageModel
from editkit.settings import ValueSettings
from editkit.testing.tiny import tiny_lm
from tests.test_engines import CONTEXTS, FACTS, FAMILIES, IN_FLOAT32, NO_MOMENTS, by_both, losses, same

OPTIONS: dict[str, Any] = {"moments": NO_MOMENTS, "contexts": CONTEXTS, "progress": False}
DESCENT = RRomeSettings(layer=1, solver="descent", steps=12, clamp=40.0, stop_loss=0.5)  # tiny models: v0 near nothing


def alone(norm: float, **settings: Any) -> Descent:
    """Descent for one fact whose ‖v0‖ is `norm`."""
    lm = tiny_lm("gpt2")
    chosen = RomeSettings(solver="descent", **{"clamp": 4.0, "stop_loss": 0.5, **settings})
    return Descent(lm, torch.tensor([[norm]]), chosen)


def along(first: float, second: float = 0.0) -> Tensor:
    """A gradient [1, 1, 32] with these two coordinates."""
    gradient = torch.zeros(1, 1, 32)
    gradient[0, 0, 0], gradient[0, 0, 1] = first, second
    return gradient


# --- the step ---------------------------------------------------------------------------------------------------


def test_a_loss_that_is_linear_is_at_the_aim_after_one_step() -> None:
    descent = alone(norm=10.0)
    descent.step(torch.tensor([3.0]), along(0.6, -0.8))
    fallen = (along(0.6, -0.8) * descent.delta).sum().item()
    assert 3.0 + fallen == pytest.approx(AIM * 0.5)


def test_no_step_is_longer_than_the_radius_nor_delta_than_the_clamp() -> None:
    descent = alone(norm=2.0)
    descent.step(torch.tensor([1000.0]), along(1.0))
    assert descent.delta.norm().item() == pytest.approx(2.0)  # ‖v0‖
    for loss in (998.0, 990.0, 980.0, 970.0):
        descent.step(torch.tensor([loss]), along(1.0))
    assert descent.delta.norm().item() == pytest.approx(8.0)  # clamp · ‖v0‖
    found, hit = descent.result(torch.tensor([960.0]))
    assert hit.tolist() == [True] and found.norm().item() == pytest.approx(8.0)


def test_the_radius_grows_where_the_loss_falls_as_promised_and_only_there() -> None:
    as_promised, less = alone(norm=1.0), alone(norm=1.0)
    for descent, second in ((as_promised, 99.0), (less, 99.9)):  # promised: 1
        descent.step(torch.tensor([100.0]), along(1.0))
        descent.step(torch.tensor([second]), along(1.0))
    assert as_promised.delta.norm().item() == pytest.approx(3.0)  # 1, and twice as much
    assert less.delta.norm().item() == pytest.approx(2.0)


@pytest.mark.parametrize("bad", [100.0, 7.0, float("inf"), float("nan")])
def test_a_step_that_does_not_lower_the_loss_is_taken_back_and_a_shorter_one_tried(bad: float) -> None:
    descent = alone(norm=1.0)
    descent.step(torch.tensor([7.0]), along(1.0))
    far = descent.delta.clone()
    descent.step(torch.tensor([bad]), along(0.0, 5.0))
    assert torch.allclose(descent.delta, 0.4 * far)  # along the gradient of the best δ, not of the bad one
    found, _ = descent.result(torch.tensor([bad]))
    assert found.abs().sum() == 0
    found, _ = descent.result(torch.tensor([6.0]))
    assert torch.equal(found, descent.delta)


def test_a_fact_that_no_step_helps_has_ended() -> None:
    descent = alone(norm=1.0)
    descent.step(torch.tensor([7.0]), along(1.0))
    tries = 0
    while not descent.stuck().item():
        descent.step(torch.tensor([8.0]), along(1.0))
        tries += 1
    assert tries == 8  # 0.4^8 < 1e-3


def test_a_model_that_gives_no_number_gives_no_value() -> None:
    descent = alone(norm=1.0)
    descent.step(torch.tensor([float("nan")]), along(float("nan")))
    found, _ = descent.result(torch.tensor([float("nan")]))
    assert found.isnan().all()


def test_ended_facts_stay_where_they_are() -> None:
    lm = tiny_lm("gpt2")
    descent = Descent(lm, torch.ones(3, 1), replace(DESCENT, clamp=4.0))
    gradient = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    descent.step(torch.full((3,), 5.0), gradient)
    held = descent.delta[:, 1].clone()
    descent.alive = torch.tensor([True, False, True])
    descent.step(torch.full((3,), 4.0), gradient)
    assert torch.equal(descent.delta[:, 1], held) and not torch.equal(descent.delta[:, 0], held)
    rest = descent.delta[:, [0, 2]].clone()
    descent.keep([0, 2])
    assert torch.equal(descent.delta, rest) and descent.facts == [0, 2]


# --- the whole optimisation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("error:.*full depth")
def test_replay_equals_full_depth(family: str) -> None:
    if family not in IN_FLOAT32:
        same(*by_both(tiny_lm(family, dtype=torch.float64), DESCENT, FACTS[0]), tolerance=1e-8)
    same(*by_both(tiny_lm(family), DESCENT, FACTS[0]), tolerance=2e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "bloom"])
def test_a_batch_equals_one_by_one(family: str) -> None:
    """Facts of other lengths, targets and ends: some stop sooner, and leave."""
    lm = tiny_lm(family)
    reached = [min(losses(edit)) for edit in rome_each(lm, FACTS, DESCENT, **OPTIONS)]
    settings = replace(DESCENT, stop_loss=sorted(reached)[2])
    together = rome_each(lm, FACTS, settings, **OPTIONS)
    for fact, other in zip(FACTS, together, strict=True):
        same(rome(lm, fact, settings, **OPTIONS), other, tolerance=2e-3)
    assert len({len(losses(edit)) for edit in together}) > 1


@pytest.mark.parametrize("every", [2, 4])
def test_looking_at_the_losses_less_often_changes_nothing(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2")
    wanted = rome_each(lm, FACTS, DESCENT, **OPTIONS)
    monkeypatch.setitem(value.READ_EVERY, "cpu", every)
    for one, other in zip(rome_each(lm, FACTS, DESCENT, **OPTIONS), wanted, strict=True):
        same(one, other, tolerance=1e-4)


def test_what_is_given_back_is_the_best_of_all_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the last evaluation was worse: δ is evaluated once more."""
    lm = tiny_lm("gpt2")
    settings = replace(DESCENT, steps=4, stop_loss=0.0, kl_factor=0.0)
    worse = False
    for radius in (1.0, 40.0, 400.0):  # the last is far too long
        monkeypatch.setattr(solvers, "FIRST_RADIUS", radius)
        found = optimised(lm, replace(settings, clamp=1000.0))
        curve = [step["loss"] for step in found.steps]
        with torch.no_grad():
            engine = Replayed(lm, 1, [lm.architecture.down(1)], Batch([rows(lm)]))
        nll, _, _ = value._answers(engine.logits(found.delta.float()[:, None]), engine.batch)
        assert nll.item() == pytest.approx(min(curve), abs=1e-4)
        worse = worse or curve[-1] > min(curve)
    assert worse


def rows(lm: LanguageModel) -> FactRows:
    return rows_of(lm, FACTS[0], "subject_last", CONTEXTS)


def optimised(lm: LanguageModel, settings: ValueSettings) -> value.Optimised:
    """The value of the first fact."""
    site = lm.architecture.down(1)
    (found,) = value.compute_deltas(lm, 1, [site], [rows(lm)], None, settings, name="a fact", progress=False)
    return found


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (memit, MemitSettings(layers=[0, 1], mom2_update_weight=10.0, solver="descent", steps=6, clamp=4.0)),
        (pmet, PmetSettings(layers=[0, 1], mom2_update_weight=10.0, solver="descent", steps=6, clamp=4.0)),
    ],
    ids=["memit", "pmet"],
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "opt", "bloom"])
def test_methods_of_many_facts(family: str, method: Any, settings: Any) -> None:
    same(*by_both(tiny_lm(family), settings, FACTS, method), tolerance=1e-3)


# --- the setting ------------------------------------------------------------------------------------------------


def test_a_learning_rate_asks_for_adam() -> None:
    assert RomeSettings(lr=0.1).resolved("gpt2-xl", 48).solver == "adam"
    assert RRomeSettings(lr=0.1).resolved("atlas", 8).solver == "adam"
    assert RRomeSettings(weight_decay=0.0).resolved("atlas", 8).solver == "adam"


def test_descent_has_neither_learning_rate_nor_weight_decay() -> None:
    chosen = RomeSettings(solver="descent").resolved("gpt2-xl", 48)
    assert (chosen.solver, chosen.lr, chosen.weight_decay, chosen.clamp) == ("descent", None, None, 4.0)
    with pytest.raises(ConfigError, match=r"method\.lr belongs to Adam"):
        RomeSettings(solver="descent", lr=0.1)
    with pytest.raises(ConfigError, match=r"method\.weight_decay belongs to Adam"):
        RomeSettings(solver="descent", weight_decay=0.1)
    with pytest.raises(ConfigError, match=r"method\.solver must be one of adam, descent; found 'sgd'"):
        RomeSettings(solver="sgd")


def test_the_authors_methods_keep_adam_where_they_have_published() -> None:
    for name, method in all_methods().items():
        if issubclass(method.settings, ValueSettings) and name != "r_rome":
            chosen = method.settings().resolved("gpt2-xl", 48)
            assert isinstance(chosen, ValueSettings) and chosen.solver == "adam" and chosen.lr, name
