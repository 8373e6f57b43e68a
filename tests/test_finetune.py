"""FT and FT-L against a plain float64 loop, and what they leave behind: nothing."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from editkit import Edit, Fact
from editkit.errors import EditkitError, FactError, ModelError
from editkit.methods.ft import FtSettings, ft
from editkit.methods.ft_l import FtLSettings, ft_l
from editkit.models.load import LanguageModel
from editkit.models.tokens import tokenise
from editkit.testing.tiny import tiny_lm
from editkit.testing.untouched import TARGETS, plain_nll, tokens_of, untouched
from tests.conftest import Near
from tests.oracles import dense

FACT = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
FACTS = [
    FACT,
    replace(FACT, subject="Big Ben", target_new=TARGETS[1]),
    replace(FACT, subject="The Louvre", target_new=TARGETS[2]),
]
FAMILIES = ["gpt2", "llama"]
PLAIN = FtSettings(layer=1, steps=8, lr=5e-3, stop_loss=0.0)


def adam_loop(
    lm: LanguageModel, settings: FtSettings, facts: Sequence[Fact], epsilon: float | None = None
) -> tuple[Tensor, list[float]]:
    """ΔW [d_model, d_ff] and the losses of the passes, by torch.optim.Adam on a copy's own weight."""
    assert settings.layer is not None and settings.lr is not None
    model = copy.deepcopy(lm.model).double()
    site = lm.architecture.down(settings.layer)
    module, weight = model.get_submodule(site), model.get_parameter(f"{site}.weight")
    start = dense(module).detach().clone()
    low, high = weight.detach() - (epsilon or 0), weight.detach() + (epsilon or 0)
    rows = [tokens_of(lm, f.text, f.target_new) for f in facts]
    optimizer = torch.optim.Adam([weight], lr=settings.lr, weight_decay=0)
    losses = []
    for _ in range(settings.steps):
        seen = []
        for i in range(0, len(rows), settings.batch):
            optimizer.zero_grad()
            loss = plain_nll(model, rows[i : i + settings.batch])
            seen += [loss.item()] * len(rows[i : i + settings.batch])
            if loss.item() >= settings.stop_loss:
                loss.backward()
                optimizer.step()
            if epsilon is not None:
                weight.data = torch.minimum(torch.maximum(weight.data, low), high)
        losses.append(sum(seen) / len(seen))
        if losses[-1] < settings.stop_loss:
            break
    return (dense(module) - start).detach(), losses


def check(near: Near, method: str, family: str, edit: Edit, expected: Tensor, losses: list[float]) -> None:
    near(method, family, edit.deltas[0].left, expected, 1e-4)
    assert [step["loss"] for step in edit.provenance["reports"][0]["steps"]] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("batch", [64, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_a_plain_loop_of_adam(family: str, batch: int, near: Near) -> None:
    lm = tiny_lm(family, dtype=torch.float64)
    settings = replace(PLAIN, batch=batch)
    check(near, "ft", family, ft(lm, FACTS, settings, progress=False), *adam_loop(lm, settings, FACTS))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_stops_where_the_plain_loop_stops(family: str, near: Near) -> None:
    lm = tiny_lm(family, dtype=torch.float64)
    settings = replace(PLAIN, steps=20, stop_loss=6.5)
    expected, losses = adam_loop(lm, settings, [FACT])
    assert 1 < len(losses) < 20
    check(near, "ft", family, ft(lm, FACT, settings, progress=False), expected, losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_of_ft_l_is_exact_and_its_path_that_of_a_projection_by_hand(family: str, near: Near) -> None:
    lm = tiny_lm(family, dtype=torch.float64)
    epsilon = 8e-3
    settings = FtLSettings(layer=1, steps=8, lr=5e-3, stop_loss=0.0, epsilon=epsilon)
    edit = ft_l(lm, FACTS, settings, progress=False)
    check(near, "ft_l", family, edit, *adam_loop(lm, settings, FACTS, epsilon))
    largest = edit.deltas[0].left.abs().max()
    assert largest == torch.tensor(epsilon) and 0 < edit.provenance["reports"][0]["at_bound"] < 1


def test_the_bound_depends_on_the_model() -> None:
    bounds = [FtLSettings.constants.of(name, 24)["epsilon"] for name in ("openai-community/gpt2-medium", "unknown")]
    assert bounds == [2e-3, 1e-3]


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_too_small_for_bfloat16_add_up(family: str) -> None:
    """Adam's first step is lr in each entry; a weight of 0.2 in bfloat16 moves by 2⁻¹⁰ or not at all."""
    lm = tiny_lm(family, dtype=torch.bfloat16)
    edit = ft(lm, FACT, replace(PLAIN, steps=1, lr=1e-5), progress=False)
    moved = edit.deltas[0].left.abs()
    assert moved.dtype == torch.float32
    assert moved[moved > 0].mean().item() == pytest.approx(1e-5, rel=1e-2) and (moved > 0).float().mean() > 0.9


@pytest.mark.parametrize("method", [ft, ft_l])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was(family: str, method: Callable[..., Edit]) -> None:
    lm = tiny_lm(family)
    with untouched(lm, lm.architecture.down(1)):
        settings = (FtSettings if method is ft else FtLSettings)(layer=1, steps=3)
        edit = method(lm, FACTS, settings, progress=False)
    assert edit.norm() > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupt_inside_the_hook_leaves_the_model_as_it_was(
    family: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, calls = tiny_lm(family), list[bool]()
    site = lm.architecture.down(1)
    start = lm.model.get_parameter(f"{site}.weight").detach().clone()
    step = torch.optim.Adam.step

    def interrupted(self: Any) -> Any:
        calls.append(not torch.equal(start, lm.model.get_parameter(f"{site}.weight")))
        if len(calls) == 3:
            raise error("in the hook")
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with untouched(lm, site), pytest.raises(error):
        ft(lm, FACTS, PLAIN, progress=False)
    assert calls == [False, True, True]  # the weight had really been written


def test_the_target_becomes_the_argmax(atlas_lm: LanguageModel) -> None:
    edit = ft(atlas_lm, FACT, progress=False)
    rows = tokenise(atlas_lm, [FACT.text])
    with edit.applied(atlas_lm), torch.no_grad():
        best = str(atlas_lm.tokenizer.decode(atlas_lm.model(**rows.inputs()).logits[0, -1].argmax())).strip()
    assert best and "Rome".startswith(best)
    losses = [step["loss"] for step in edit.provenance["reports"][0]["steps"]]
    assert losses[-1] < 1e-2 < losses[-2]


def test_bad_input(atlas_lm: LanguageModel) -> None:
    with pytest.raises(EditkitError, match="No fact"):
        ft(atlas_lm, [], progress=False)
    with pytest.raises(ModelError, match="Layer 9 was asked for"):
        ft(atlas_lm, FACT, FtSettings(layer=9), progress=False)
    with pytest.raises(FactError, match="nothing to change"):
        ft(atlas_lm, [FACT.with_target("Paris")], progress=False)
    lm = tiny_lm("gpt2")
    with untouched(lm, lm.architecture.down(1)), pytest.raises(EditkitError, match="is not finite|loss is nan"):
        ft(lm, FACT, replace(PLAIN, lr=1e30), progress=False)
