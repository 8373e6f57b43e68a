"""ROME against the slow float64 oracle, its determinism, and what it leaves behind: nothing."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from editkit import Edit, Fact, RomeSettings, RRomeSettings, r_rome, rome
from editkit.errors import EditkitError, FactError, ModelError
from editkit.methods.rome import CONSTANTS
from editkit.methods.shared.contexts import context_templates
from editkit.models.load import LanguageModel
from editkit.models.tokens import tokenise
from editkit.moments import second_moments
from editkit.settings import ContextSettings, MomentSettings
from editkit.testing.tiny import tiny_lm
from editkit.testing.untouched import everything
from tests.conftest import Near, inputs_of
from tests.oracles import rome_update

FACT = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
FEW = ContextSettings(lengths=(4, 9), counts=(2, 2))
MOMENTS = MomentSettings(tokens=4000)


def lm_named(name: str, request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue("atlas_lm") if name == "atlas" else tiny_lm(name)


def oracle_of(
    lm: LanguageModel, fact: Fact, settings: RomeSettings, templates: list[str], matrix: Tensor
) -> tuple[Tensor, list[float]]:
    """The oracle's ΔW for the same contexts, tokenised here from the texts."""
    assert settings.layer is not None
    rows, kl_row = inputs_of(lm, fact, templates)
    site = lm.architecture.down(settings.layer)
    names = ("solver", "steps", "lr", "weight_decay", "kl_factor", "clamp", "stop_loss")
    constants = {name: getattr(settings, name) for name in names}
    return rome_update(lm.model, site, rows, kl_row, matrix, mixed=settings.keys == "mixed", **constants)


@pytest.mark.cells
@pytest.mark.parametrize("solver", ["adam", "descent"])
@pytest.mark.parametrize("keys", ["mixed", "mean"])
@pytest.mark.parametrize("name", ["atlas", "gpt2", "llama"])
def test_equal_to_the_oracle(name: str, keys: str, solver: str, request: pytest.FixtureRequest, near: Near) -> None:
    lm = lm_named(name, request)
    layer = 4 if name == "atlas" else 1
    settings = RomeSettings(keys=keys, layer=layer, clamp=4.0, steps=8, contexts=FEW, solver=solver)
    if name != "atlas":
        settings = replace(settings, stop_loss=0.0)
    if solver == "adam":
        # A tiny random model has v0 near nothing: its decay would dwarf the rest, and rounding the update.
        lr, weight_decay = (0.5, 0.5) if name == "atlas" else (0.02, 1e-4)
        settings = replace(settings, lr=lr, weight_decay=weight_decay)
    templates = context_templates(lm, FEW, seed=0)
    moment = second_moments(lm, [layer], MOMENTS, progress=False)[layer]
    edit = rome(lm, FACT, settings, moments={layer: moment}, contexts=templates, progress=False)

    shifted = moment.matrix + MOMENTS.ridge * moment.matrix.diagonal().mean() * torch.eye(len(moment.matrix)).double()
    expected, losses = oracle_of(lm, FACT, settings, templates, shifted)
    delta = edit.deltas[0]
    near("rome" if keys == "mixed" else "r_rome", name, delta.change(), expected, 1e-3)
    steps = [step["loss"] for step in edit.provenance["reports"][0]["steps"]]
    assert steps == pytest.approx(losses, rel=1e-3)


def test_the_clamp_holds(atlas_lm: LanguageModel) -> None:
    settings = RRomeSettings(clamp=0.3, contexts=FEW)
    report = r_rome(atlas_lm, FACT, settings, moments=MOMENTS, progress=False).provenance["reports"][0]
    assert report["clamp_hit"] and report["delta_norm"] <= 0.3 * report["v0_norm"] * (1 + 1e-5)


@pytest.mark.parametrize("method", [rome, r_rome])
def test_the_fact_is_rewritten_and_the_model_left_as_it_was(
    atlas_lm: LanguageModel, method: Callable[..., Edit]
) -> None:
    before = everything(atlas_lm.model)
    flags = [p.requires_grad for p in atlas_lm.model.parameters()]
    edit = method(atlas_lm, FACT, moments=MOMENTS, progress=False)
    assert all(torch.equal(b, before[n]) for n, b in everything(atlas_lm.model).items())
    assert [p.requires_grad for p in atlas_lm.model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in atlas_lm.model.modules())
    rows = tokenise(atlas_lm, [FACT.text])

    def answer() -> str:
        with torch.no_grad():
            best = atlas_lm.model(**rows.inputs()).logits[0, -1].argmax()
        return str(atlas_lm.tokenizer.decode(best)).strip()

    assert answer() == "Paris"[: len(answer())]
    with edit.applied(atlas_lm):
        assert answer() == "Rome"[: len(answer())]
    assert edit.rank == 1 and edit.parameters == [
        f"transformer.h.{CONSTANTS.of('atlas', 8)['layer']}.mlp.c_proj.weight"
    ]


def test_a_seed_decides_every_byte(atlas_lm: LanguageModel) -> None:
    def edit(seed: int) -> bytes:
        settings = RRomeSettings(contexts=FEW, steps=5)
        return r_rome(atlas_lm, FACT, settings, seed=seed, moments=MOMENTS, progress=False).to_bytes()

    assert edit(0) == edit(0) != edit(1)


def test_several_facts_in_one_edit(atlas_lm: LanguageModel) -> None:
    facts = [FACT, Fact("The capital of {} is", "France", "Madrid", "Paris")]
    before = everything(atlas_lm.model)
    edit = r_rome(atlas_lm, facts, RRomeSettings(contexts=FEW), moments=MOMENTS, progress=False)
    assert edit.rank == 2
    assert all(torch.equal(b, before[n]) for n, b in everything(atlas_lm.model).items())
    with edit.applied(atlas_lm):
        for fact in facts:
            rows = tokenise(atlas_lm, [fact.text])
            with torch.no_grad():
                best = str(atlas_lm.tokenizer.decode(atlas_lm.model(**rows.inputs()).logits[0, -1].argmax())).strip()
            assert best and fact.target_new.startswith(best)


def test_contexts_are_seeded_and_clean(atlas_lm: LanguageModel) -> None:
    first, again, other = (context_templates(atlas_lm, FEW, seed=s) for s in (0, 0, 1))
    assert first == again != other
    assert first[0] == "{}" and len(first) == 5 and all(t.count("{}") == 1 for t in first)
    state = torch.random.get_rng_state()
    context_templates(atlas_lm, FEW, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())


def test_defaults_follow_the_published_constants() -> None:
    xl = CONSTANTS.of("openai-community/gpt2-xl", 48)
    assert xl == {"layer": 17, "clamp": 4.0, "steps": 20, "lr": 0.5, "weight_decay": 0.5}
    assert CONSTANTS.of("unknown", 3)["layer"] == 1 == CONSTANTS.of("gpt2-xl", 3)["layer"]
    settings = RomeSettings(clamp=2.0).resolved("gpt2-medium", 24)
    assert (settings.layer, settings.clamp) == (8, 2.0)


def test_bad_input(atlas_lm: LanguageModel) -> None:
    with pytest.raises(ModelError, match="Layer 40 was asked for; atlas has 8 blocks"):
        rome(atlas_lm, FACT, RomeSettings(layer=40), progress=False)
    with pytest.raises(EditkitError, match="No fact"):
        rome(atlas_lm, [], progress=False)
    with pytest.raises(FactError, match="nothing to change"):
        rome(atlas_lm, FACT.with_target("Paris"), progress=False)


def test_an_interrupt_during_the_optimisation_leaves_the_model_as_it_was(
    atlas_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(atlas_lm.model)
    calls = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    original = torch.nn.functional.kl_div
    monkeypatch.setattr("editkit.methods.shared.value.kl_div", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rome(atlas_lm, FACT, RomeSettings(contexts=FEW), moments=MOMENTS, progress=False)
    assert all(torch.equal(b, before[n]) for n, b in everything(atlas_lm.model).items())
    assert all(p.requires_grad for p in atlas_lm.model.parameters())
    assert not any(m._forward_hooks for m in atlas_lm.model.modules())
